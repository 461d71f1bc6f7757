"""A small network world for tests of the fence: a namespace of its own for the test, stand-ins for clone and production.

The test's main thread moves into a fresh network namespace, so nothing of the machine's network is touched, inside the
lab or outside. Links are made with iproute2, not with the code under test.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from vmsnap.errors import CancelledError
from vmsnap.model.guest import Guest, GuestState, Nic
from vmsnap.model.ids import new_run_id
from vmsnap.model.isolation import FencePlan

_CLONE_NEWNET = 0x40000000
# IPv6 addresses that can be used at once, instead of after a second or two.
_NO_DUPLICATE_DETECTION = ("net.ipv6.conf.all.accept_dad=0", "net.ipv6.conf.default.accept_dad=0")
_libc = ctypes.CDLL(None, use_errno=True)


def sh(*command: str, timeout_seconds: float = 20, check: bool = True) -> str:
    """Run a program and return what it said."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_seconds, check=False)
    if check and done.returncode != 0:
        raise AssertionError(f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


@contextmanager
def fresh_network() -> Iterator[None]:
    """Move the calling thread into a network namespace of its own, and back. Threads and programs it starts follow."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    assert _libc.unshare(_CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
    try:
        sh("ip", "link", "set", "lo", "up")
        sh("sysctl", "-w", *_NO_DUPLICATE_DETECTION)
        yield
    finally:
        assert _libc.setns(home, _CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        os.close(home)


def plan_for(*, macs: tuple[str, ...] = ("52:54:00:aa:00:01",), mtu: int | None = None) -> FencePlan:
    """Return a plan for a guest with these NICs."""
    nics = tuple(Nic(index=i, mac=mac, attached_to="prod", mtu=mtu) for i, mac in enumerate(macs))
    guest = Guest(
        name="shop db", uuid="0", state=GuestState.RUNNING, memory_bytes=1, vcpus=1, disks=(), nics=nics,
        has_agent_channel=False,
    )  # fmt: skip
    return FencePlan.for_guest(new_run_id(), guest=guest)


def snapshot_of_network() -> dict[str, Any]:
    """Return everything of the network that a test could leave behind."""
    return {
        "links": sorted(link["ifname"] for link in json.loads(sh("ip", "-j", "link"))),
        "namespaces": sorted(path.name for path in Path("/run/netns").glob("*")),
        "tables": sh("nft", "list", "tables"),
        "mounts": sorted(line for line in Path("/proc/self/mounts").read_text().splitlines() if "/netns/" in line),
    }


class StandIn:
    """A machine with one link per (interface, link at our side): a clone behind its taps, or a neighbour."""

    def __init__(self, name: str | None = None) -> None:
        self.namespace = name or f"vt-{secrets.token_hex(4)}"
        sh("ip", "netns", "add", self.namespace)
        self.run("ip", "link", "set", "lo", "up")
        self.run("sysctl", "-w", *_NO_DUPLICATE_DETECTION)
        self.plugged: list[str] = []

    def plug(self, ours: str, *, mac: str | None = None, bridge: str | None = None, interface: str = "eth0") -> None:
        """Connect ``interface`` of this machine to a link named ``ours``, which joins ``bridge``."""
        sh("ip", "link", "add", ours, "type", "veth", "peer", "name", interface, "netns", self.namespace)
        if mac is not None:
            self.run("ip", "link", "set", interface, "address", mac)
        if bridge is not None:
            sh("ip", "link", "set", ours, "master", bridge)
        sh("ip", "link", "set", ours, "up")
        self.run("ip", "link", "set", interface, "up")
        self.plugged.append(ours)

    def run(self, *command: str, timeout_seconds: float = 20, check: bool = True) -> str:
        return sh("nsenter", f"--net=/run/netns/{self.namespace}", *command,
                  timeout_seconds=timeout_seconds, check=check)  # fmt: skip

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """Start a program that goes on until it is stopped."""
        return subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{self.namespace}", *command],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def addresses(self, interface: str = "eth0") -> list[str]:
        found = json.loads(self.run("ip", "-j", "-4", "addr", "show", "dev", interface))
        return [item["local"] for entry in found for item in entry.get("addr_info", [])]

    def close(self) -> None:
        """Remove the namespace and, with it, its links."""
        links = json.loads(self.run("ip", "-j", "link", check=False) or "[]")
        for link in links:
            if link["ifname"] != "lo":
                self.run("ip", "link", "del", link["ifname"], check=False)
        sh("ip", "netns", "del", self.namespace, check=False)


def attach_clone(plan: FencePlan) -> StandIn:
    """Put a stand-in for the clone behind the taps of a built fence."""
    clone = StandIn()
    for port in plan.ports:
        clone.plug(port.tap, mac=port.mac, bridge=port.bridge, interface=f"eth{port.index}")
    return clone


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a program that a test started."""
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(5)


class TapCables:
    """Pulls cables at our side, as a hypervisor does."""

    def __init__(self, plan: FencePlan) -> None:
        self._taps = {port.mac: port.tap for port in plan.ports}
        self.events: list[tuple[float, str, bool]] = []

    def set_link(self, *, mac: str, up: bool) -> None:
        self.events.append((time.monotonic(), mac, up))
        sh("ip", "link", "set", self._taps[mac], "up" if up else "down")

    def replug(self, *, mac: str, deadline: timedelta) -> None:
        raise AssertionError("a stand-in has no slots")


class SwitchCancel:
    """A cancel that a test switches."""

    def __init__(self) -> None:
        self.on = False

    def is_set(self) -> bool:
        return self.on

    def check(self) -> None:
        if self.on:
            raise CancelledError("the run was cancelled")
