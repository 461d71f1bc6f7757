"""What a test may leave behind, listed, so that it can be compared before and after."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import libvirt

from integration.lab.commands import run
from integration.lab.lab import Lab
from integration.lab.services import URI

RUN = Path("/run")
# Files that libvirt's and the lab's own services keep and rewrite; those of a domain are told by the domain itself.
SERVICES = ("libvirt", "libvirtd.pid", "virtlogd.pid", "dnsmasq.pid", "lock", "netns", "xtables.lock", "blkid")


@dataclass(frozen=True)
class Belongings:
    """Everything outside a test's own memory that it could have made, as readable lines."""

    things: frozenset[str]

    def new_since(self, before: Belongings) -> list[str]:
        """What is there now and was not before, in order."""
        return sorted(self.things - before.things)

    def gone_since(self, before: Belongings) -> list[str]:
        """What was there before and is not now, in order."""
        return sorted(before.things - self.things)


def look(lab: Lab) -> Belongings:
    """List domains, networks, links, namespaces, nft tables, mounts, loop devices, QEMU processes and files."""
    kinds: dict[str, Callable[[Lab], list[str]]] = {
        "libvirt": _libvirt,
        "link": _links,
        "network namespace": _namespaces,
        "nft table": _tables,
        "mount": _mounts,
        "loop device": _loops,
        "process": _processes,
        "file": _files,
        "open file": _open_files,
    }
    return Belongings(frozenset(f"{kind}: {thing}" for kind, lister in kinds.items() for thing in lister(lab)))


def left_behind(lab: Lab, before: Belongings, *, patience_s: float = 5.0) -> tuple[list[str], list[str]]:
    """What appeared and what vanished since `before`. Waits a little: the kernel removes some things after the call returned."""
    deadline = time.monotonic() + patience_s
    while True:
        now = look(lab)
        new, gone = now.new_since(before), now.gone_since(before)
        if not (new or gone) or time.monotonic() > deadline:
            return new, gone
        time.sleep(0.2)


def _libvirt(_lab: Lab) -> list[str]:
    connection = libvirt.open(URI)
    try:
        found = [
            f"domain {domain.name()!r} {'persistent' if domain.isPersistent() else 'transient'} "
            f"{'active' if domain.isActive() else 'off'}"
            for domain in connection.listAllDomains()
        ]
        found += [f"network {network.name()!r}" for network in connection.listAllNetworks()]
        found += [f"storage pool {pool.name()!r}" for pool in connection.listAllStoragePools()]
        found += [f"network filter {binding.portdev()!r}" for binding in connection.listAllNWFilterBindings()]
        return found
    finally:
        connection.close()


def _links(_lab: Lab) -> list[str]:
    # Without the index: '7: vnet0@if6: ...' -> 'vnet0'.
    names = (line.split(":")[1].strip().split("@")[0] for line in run(["ip", "-o", "link"]).splitlines())
    return [*names, *(f"rule {line.split(':', 1)[1].strip()}" for line in run(["ip", "rule"]).splitlines())]


def _namespaces(_lab: Lab) -> list[str]:
    return [entry.name for entry in (RUN / "netns").iterdir()]


def _tables(_lab: Lab) -> list[str]:
    return run(["nft", "list", "tables"]).splitlines()


def _mounts(lab: Lab) -> list[str]:
    # Mounts elsewhere are the host's, and come and go without the tests.
    mine = (str(lab.scratch), str(RUN), "/var/lib/libvirt")
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    found = [f"{line.split()[4]} ({line.split(' - ', 1)[1].split()[0]})" for line in lines]
    return [mount for mount in found if mount.startswith(mine)]


def _loops(lab: Lab) -> list[str]:
    # The kernel has one list for the whole host: other people's are told apart by their files.
    lines = run(["losetup", "--list", "--noheadings", "--output", "NAME,BACK-FILE"]).splitlines()
    return [line for line in lines if line.split()[1].startswith((str(lab.scratch), str(RUN)))]


def _processes(_lab: Lab) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue  # it ended meanwhile
            if b"qemu-system" in words[0]:
                named = re.search(rb"guest=((?:[^,]|,,)*)", b" ".join(words))
                found.append(f"QEMU of {named.group(1).decode() if named else words!r}")
    return found


def _files(lab: Lab) -> list[str]:
    found = [str(path) for path in RUN.iterdir() if path.name not in SERVICES]
    for top in (*(Path(name) for name in found if Path(name).is_dir()), lab.guests, lab.reflink):
        found += [str(Path(folder) / name) for folder, folders, files in os.walk(top) for name in (*folders, *files)]
    kept = Path("/var/lib/libvirt")
    parts = (*(f"qemu/{part}" for part in ("nvram", "save", "snapshot", "ram")), "swtpm")
    found += [str(path) for part in parts for path in (kept / part).glob("*")]
    return found


def _open_files(lab: Lab) -> list[str]:
    # This process's own: what it opened below the lab's folders and never closed.
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the handle on the folder itself
            found.append(str(entry.readlink()))
    return [path for path in found if path.startswith((str(lab.scratch), f"{RUN}/", "/dev/loop", "/dev/net/"))]
