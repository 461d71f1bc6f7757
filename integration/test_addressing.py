"""The ladder against real DHCP clients and static machines, each in a namespace that plays the clone.

``client`` boots on a production network with its own DHCP server, is then moved behind the fence's tap with its lease,
its memory and its ARP cache, as a clone is, and has to be reached.
"""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path

import pytest

from integration.conftest import MakeGuest
from integration.lab.domain import GuestSpec
from integration.lab.guest import LabGuest
from integration.lab.lab import Lab
from integration.networld import (
    StandIn,
    SwitchCancel,
    TapCables,
    fresh_network,
    plan_for,
    sh,
    stop,
)
from vmsnap.dhcp.pool import DEFAULT_POOL
from vmsnap.errors import CancelledError, DeadlineError, GuestUnreachableError
from vmsnap.model.guest import OldAddress
from vmsnap.model.isolation import FencePlan, Rung
from vmsnap.network.fence import NetworkFence
from vmsnap.network.ladder import NetworkAddressing
from vmsnap.network.linkflap import FLAPS, Flap
from vmsnap.ports.network import AddressRequest
from vmsnap.state.clock import SystemClock

PORT = 2222
MAC = "52:54:00:aa:00:01"
GATEWAY = IPv4Address("10.9.8.1")
OLD = OldAddress(interface=IPv4Interface("10.9.8.77/24"), gateway=GATEWAY)
SERVE = (
    "import socket\n"
    "s = socket.create_server(('0.0.0.0', {port}))\n"
    "while True:\n"
    "    c, _ = s.accept(); c.sendall(b'{name}'); c.close()\n"
)
QUICK = (Flap(pull=0.5, silence=1.5),)


@dataclass
class Fenced:
    """One built fence with a clone in it."""

    plan: FencePlan
    clone: StandIn
    cables: TapCables


@pytest.fixture
def network() -> Iterator[None]:
    with fresh_network():
        yield


@pytest.fixture
def addressing() -> Iterator[NetworkAddressing]:
    with NetworkAddressing(clock=SystemClock()) as ready:
        yield ready


class Worlds:
    """Makes fences with clones in them, and takes everything down."""

    def __init__(self) -> None:
        self.fence = NetworkFence()
        self._made: list[Fenced] = []
        self._machines: list[StandIn] = []
        self._processes: list[subprocess.Popen[bytes]] = []

    def machine(self) -> StandIn:
        """Return a machine on no network."""
        self._machines.append(StandIn())
        return self._machines[-1]

    def keep(self, process: subprocess.Popen[bytes]) -> None:
        """End this program when the world ends."""
        self._processes.append(process)

    def empty(self, *, name: str = "clone", macs: tuple[str, ...] = (MAC,)) -> Fenced:
        """Return a fence with a clone that has no address."""
        return self.around(self.machine(), macs=macs, name=name)

    def around(self, clone: StandIn, *, macs: tuple[str, ...] = (MAC,), name: str = "clone") -> Fenced:
        """Build a fence and put a machine into it. Its link ``guest0``, where it has one, becomes the tap."""
        plan = plan_for(macs=macs)
        self.fence.build(plan)
        self._made.append(Fenced(plan=plan, clone=clone, cables=TapCables(plan)))
        for port in plan.ports:
            if port.index == 0 and "guest0" in clone.plugged:
                sh("ip", "link", "set", "guest0", "name", port.tap)
                sh("ip", "link", "set", port.tap, "master", port.bridge)
            else:
                clone.plug(port.tap, mac=port.mac, bridge=port.bridge, interface=f"eth{port.index}")
        self.fence.prove(plan)
        self._processes.append(clone.start("python3", "-c", SERVE.format(port=PORT, name=name)))
        wait_until(lambda: bool(clone.run("ss", "-Hltn", f"sport = :{PORT}")), seconds=10, what="a TCP server")
        return self._made[-1]

    def close(self) -> None:
        for process in self._processes:
            stop(process)
        for machine in self._machines:
            machine.close()
        for item in self._made:
            self.fence.release(self.fence.resource(item.plan), deadline=timedelta(seconds=10))
        assert self.fence.owned() == ()


@pytest.fixture
def worlds(network: None) -> Iterator[Worlds]:
    made = Worlds()
    yield made
    made.close()


def request_for(
    plan: FencePlan, *ladder: Rung, seconds: float = 45, old: tuple[OldAddress, ...] = (OLD,)
) -> AddressRequest:
    return AddressRequest(
        fence=plan, ladder=ladder, old_addresses=old, probe_port=PORT, rung_deadline=timedelta(seconds=seconds)
    )


def greeting(plan: FencePlan, address: str) -> str:
    connection = NetworkFence().connector(plan)(address, PORT, timedelta(seconds=3))
    with connection:
        connection.settimeout(3)
        return connection.recv(64).decode()


class Client:
    """A real DHCP client in the clone's namespace."""

    def __init__(self, clone: StandIn, folder: Path) -> None:
        self.clone = clone
        self.folder = folder

    def start(self) -> subprocess.Popen[bytes]:
        raise NotImplementedError


class Dhcpcd(Client):
    def start(self) -> subprocess.Popen[bytes]:
        config = self.folder / "dhcpcd.conf"
        config.write_text("noarp\nnoipv6\nnohook resolv.conf, hostname, timesyncd\n")
        # Its lease and pid files stand at fixed places: each run gets private ones.
        script = (
            "mount -t tmpfs none /run && mount -t tmpfs none /var/lib && mkdir /run/dhcpcd /var/lib/dhcpcd && "
            f"exec /usr/sbin/dhcpcd -4 -B -f {config} eth0"
        )
        return self.clone.start("unshare", "--mount", "sh", "-c", script)


class Dhclient(Client):
    def start(self) -> subprocess.Popen[bytes]:
        leases, pid = self.folder / "leases", self.folder / "pid"
        script = self.folder / "script"
        script.write_text(
            "#!/bin/sh\ncase $reason in BOUND|RENEW|REBIND|REBOOT)\n"
            "ip addr flush dev $interface; ip addr add $new_ip_address/$new_subnet_mask dev $interface;;\n"
            "EXPIRE|FAIL) ip addr flush dev $interface;; esac\n"
        )
        script.chmod(0o755)
        return self.clone.start(
            "/usr/sbin/dhclient", "-4", "-d", "-lf", str(leases), "-pf", str(pid), "-sf", str(script), "eth0"
        )


class Udhcpc(Client):
    def start(self) -> subprocess.Popen[bytes]:
        script = self.folder / "script"
        script.write_text(
            "#!/bin/sh\ncase $1 in bound|renew) ip addr flush dev $interface\n"
            f"ip addr add $ip/$mask dev $interface; [ $1 = renew ] && touch {self.folder}/renewed;;\n"
            "deconfig) ip addr flush dev $interface;; esac\n"
        )
        script.chmod(0o755)
        return self.clone.start("udhcpc", "-f", "-i", "eth0", "-s", str(script))


class Networkd(Client):
    def start(self) -> subprocess.Popen[bytes]:
        (self.folder / "eth0.network").write_text(
            "[Match]\nName=eth0\n[Network]\nDHCP=ipv4\nIPv6AcceptRA=no\nLinkLocalAddressing=no\n"
        )
        # Private /run and /etc, no bus. A read-only /sys tells networkd that no udev will name its links.
        script = (
            "mount -t tmpfs none /run && mkdir -p /run/systemd/netif/links /run/systemd/netif/leases && "
            "mkdir -p /run/systemd/netif/lldp && chown -R systemd-network /run/systemd/netif && "
            "mount -t sysfs -o ro none /sys && mount --bind "
            f"{self.folder} /etc/systemd/network && exec /lib/systemd/systemd-networkd"
        )
        return self.clone.start("unshare", "--mount", "--uts", "sh", "-c", script)


CLIENTS = {"dhcpcd": Dhcpcd, "networkd": Networkd, "dhclient": Dhclient, "udhcpc": Udhcpc}


def start_production(folder: Path, *, lease: str = "12h") -> subprocess.Popen[bytes]:
    """Start a production network, with a DHCP server that knows one guest."""
    sh("ip", "link", "add", "prod", "type", "bridge")
    sh("ip", "addr", "add", f"{GATEWAY}/24", "dev", "prod")
    sh("ip", "link", "set", "prod", "up")
    return subprocess.Popen(
        ["dnsmasq", "-k", "--conf-file=/dev/null", "--port=0", "--interface=prod", "--bind-interfaces",
         f"--dhcp-range=10.9.8.77,10.9.8.77,{lease}", f"--dhcp-option=3,{GATEWAY}", f"--dhcp-leasefile={folder}/dnsmasq",
         "--dhcp-authoritative", f"--pid-file={folder}/dnsmasq.pid", "--user=root"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def be_static(clone: StandIn, *, interface: str = "eth0") -> None:
    """Give a machine the old address by hand, and the old gateway."""
    clone.run("ip", "addr", "add", str(OLD.interface), "dev", interface)
    clone.run("ip", "route", "add", "default", "via", str(GATEWAY), "dev", interface)


def wait_until(condition: Callable[[], bool], *, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("kind", "rung"),
    [
        ("dhcpcd", Rung.LINK_FLAP),
        ("networkd", Rung.LINK_FLAP),
        ("dhclient", Rung.OLD_ADDRESS),
        ("udhcpc", Rung.OLD_ADDRESS),
    ],
)
def test_real_clients_are_reached(kind: str, rung: Rung, worlds: Worlds, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    worlds.keep(start_production(tmp_path))
    machine = worlds.machine()
    machine.plug("guest0", mac=MAC, bridge="prod")
    worlds.keep(CLIENTS[kind](machine, tmp_path).start())
    wait_until(lambda: machine.addresses() == ["10.9.8.77"], seconds=30, what="a production lease")
    world = worlds.around(machine)  # same client, same memory, another bridge
    flaps = FLAPS if rung is Rung.LINK_FLAP else QUICK  # the others stay silent however long the flap
    with NetworkAddressing(clock=SystemClock(), flaps=flaps) as addressing:
        moved = addressing.move(
            request_for(world.plan, Rung.LINK_FLAP, Rung.OLD_ADDRESS), links=world.cables, cancel=SwitchCancel()
        )
        print(f"{kind}: {[(item.rung.value, round(item.seconds, 2), item.failure) for item in moved.attempts]}")
        assert moved.rung is rung
        assert moved.address is not None
        assert greeting(world.plan, moved.address) == "clone"
        assert moved.address in machine.addresses()
        in_pool = IPv4Address(moved.address) in DEFAULT_POOL
        assert in_pool if rung is Rung.LINK_FLAP else moved.address == "10.9.8.77"


def test_a_static_guest_and_its_twin_are_reached_at_once(worlds: Worlds, addressing: NetworkAddressing) -> None:
    twins = [worlds.empty(name=name) for name in ("first", "second")]
    for twin in twins:
        be_static(twin.clone)
    for twin, name in zip(twins, ("first", "second"), strict=True):
        moved = addressing.move(request_for(twin.plan, Rung.OLD_ADDRESS), links=twin.cables, cancel=SwitchCancel())
        assert (moved.rung, moved.address) == (Rung.OLD_ADDRESS, "10.9.8.77")
        assert moved.seconds < 2
        assert greeting(twin.plan, "10.9.8.77") == name
    assert [greeting(twin.plan, "10.9.8.77") for twin in twins] == ["first", "second"]


def test_a_stale_arp_entry_of_the_gateway_does_not_hide_the_clone(
    worlds: Worlds, addressing: NetworkAddressing
) -> None:
    world = worlds.empty()
    be_static(world.clone)
    world.clone.run(
        "ip", "neigh", "replace", str(GATEWAY), "lladdr", "52:54:00:99:99:99", "dev", "eth0", "nud", "reachable"
    )
    moved = addressing.move(request_for(world.plan, Rung.OLD_ADDRESS), links=world.cables, cancel=SwitchCancel())
    assert greeting(world.plan, str(moved.address)) == "clone"


@pytest.mark.parametrize("prefix", ["24", "32"])
def test_an_unknown_gateway_is_no_obstacle(prefix: str, worlds: Worlds, addressing: NetworkAddressing) -> None:
    world = worlds.empty()
    world.clone.run("ip", "addr", "add", f"10.9.8.77/{prefix}", "dev", "eth0")
    world.clone.run("ip", "route", "add", "default", "via", str(GATEWAY), "dev", "eth0", "onlink")
    old = OldAddress(interface=IPv4Interface(f"10.9.8.77/{prefix}"))
    moved = addressing.move(
        request_for(world.plan, Rung.OLD_ADDRESS, old=(old,)), links=world.cables, cancel=SwitchCancel()
    )
    assert greeting(world.plan, str(moved.address)) == "clone"


def test_the_second_nic_is_found(worlds: Worlds, addressing: NetworkAddressing) -> None:
    world = worlds.empty(macs=(MAC, "52:54:00:aa:00:02"))
    be_static(world.clone, interface="eth1")
    moved = addressing.move(request_for(world.plan, Rung.OLD_ADDRESS), links=world.cables, cancel=SwitchCancel())
    assert greeting(world.plan, str(moved.address)) == "clone"


def test_a_refused_connection_is_an_answer(worlds: Worlds, addressing: NetworkAddressing) -> None:
    world = worlds.empty()
    be_static(world.clone)
    request = AddressRequest(
        fence=world.plan, ladder=(Rung.OLD_ADDRESS,), old_addresses=(OLD,), probe_port=1,
        rung_deadline=timedelta(seconds=10),
    )  # fmt: skip
    assert addressing.move(request, links=world.cables, cancel=SwitchCancel()).address == "10.9.8.77"


def test_rungs_that_fail_leave_nothing_and_say_why(worlds: Worlds) -> None:
    world = worlds.empty()
    with NetworkAddressing(clock=SystemClock(), flaps=QUICK) as addressing:
        request = request_for(world.plan, Rung.FORCERENEW, Rung.LINK_FLAP, Rung.OLD_ADDRESS, seconds=4)
        with pytest.raises(DeadlineError) as raised:
            addressing.move(request, links=world.cables, cancel=SwitchCancel())
    details = raised.value.details or ""
    assert "forcerenew: the clone's DHCP client did not obey FORCERENEW" in details
    assert "link-flap: the clone sent no DHCP message" in details
    assert "old-address: nothing in the fence answers for 10.9.8.77" in details
    assert [up for _, _, up in world.cables.events] == [False, True]
    worlds.fence.prove(world.plan)  # still exactly as built: no address, no route
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("vmsnap")]


def test_a_cancelled_run_plugs_the_cable_in_again(worlds: Worlds, addressing: NetworkAddressing) -> None:
    world = worlds.empty()
    cancel = SwitchCancel()
    timer = threading.Timer(0.7, lambda: setattr(cancel, "on", True))
    timer.start()
    with pytest.raises(CancelledError):
        addressing.move(request_for(world.plan, Rung.LINK_FLAP), links=world.cables, cancel=cancel)
    assert [up for _, _, up in world.cables.events] == [False, True]
    worlds.fence.prove(world.plan)


def test_the_responder_ends_with_its_fence(worlds: Worlds, addressing: NetworkAddressing) -> None:
    world = worlds.empty()
    be_static(world.clone)
    addressing.move(request_for(world.plan, Rung.OLD_ADDRESS), links=world.cables, cancel=SwitchCancel())
    assert any(thread.name.startswith("vmsnap-dhcp") for thread in threading.enumerate())
    worlds.fence.release(worlds.fence.resource(world.plan), deadline=timedelta(seconds=10))
    wait_until(
        lambda: not any(thread.name.startswith("vmsnap-dhcp") for thread in threading.enumerate()),
        seconds=5,
        what="the responder's end",
    )


def test_no_address_is_needed_on_rung_none(worlds: Worlds, addressing: NetworkAddressing) -> None:
    world = worlds.empty()
    moved = addressing.move(request_for(world.plan, Rung.NONE), links=world.cables, cancel=SwitchCancel())
    assert (moved.rung, moved.address) == (Rung.NONE, None)


def test_the_old_lease_is_renewed_as_before(worlds: Worlds, addressing: NetworkAddressing, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    worlds.keep(start_production(tmp_path, lease="120"))
    machine = worlds.machine()
    machine.plug("guest0", mac=MAC, bridge="prod")
    client = Udhcpc(machine, tmp_path).start()
    worlds.keep(client)
    wait_until(lambda: machine.addresses() == ["10.9.8.77"], seconds=30, what="a production lease")
    world = worlds.around(machine)
    addressing.move(request_for(world.plan, Rung.OLD_ADDRESS), links=world.cables, cancel=SwitchCancel())
    log = tmp_path / "renewed"
    client.send_signal(signal.SIGUSR1)  # udhcpc: renew now
    wait_until(log.exists, seconds=10, what="a renewal")
    assert machine.addresses() == ["10.9.8.77"]


def test_the_connector_says_what_is_wrong(worlds: Worlds) -> None:
    world = worlds.empty()
    connect = worlds.fence.connector(world.plan)
    with pytest.raises(GuestUnreachableError, match=r"10\.9\.8\.77 port 2222"):
        connect("10.9.8.77", PORT, timedelta(seconds=0.5))
    with pytest.raises(GuestUnreachableError, match="shop-db"):
        connect("shop-db.example.org", PORT, timedelta(seconds=0.5))
    worlds.fence.release(worlds.fence.resource(world.plan), deadline=timedelta(seconds=10))
    with pytest.raises(GuestUnreachableError, match="cannot enter"):
        connect("10.9.8.77", PORT, timedelta(seconds=0.5))


# --- real guests: their kernels, their virtio cards with unfinished checksums, libvirt's way to pull a cable


class VirshCables:
    def __init__(self, domain: str) -> None:
        self._domain = domain

    def set_link(self, *, mac: str, up: bool) -> None:
        sh("virsh", "domif-setlink", self._domain, mac, "up" if up else "down")

    def replug(self, *, mac: str, deadline: timedelta) -> None:
        raise AssertionError


def move_into_fence(guest: LabGuest, plan: FencePlan) -> None:
    """Turn a running guest's tap into the fence's, as if libvirt had restored a clone there."""
    tap = sh("virsh", "domiflist", guest.name).split()[-5]
    sh("ip", "link", "set", tap, "name", plan.ports[0].tap)
    sh("ip", "link", "set", plan.ports[0].tap, "master", plan.ports[0].bridge)


@pytest.mark.parametrize("static", [None, "10.77.0.55/24"], ids=["networkd", "static"])
def test_real_guests_are_reached(static: str | None, make_guest: MakeGuest, lab: Lab) -> None:
    guest = make_guest(GuestSpec(static_address=static))
    old = OldAddress(interface=IPv4Interface(f"{guest.address()}/24"), gateway=IPv4Address("10.77.0.1"))
    rung = Rung.LINK_FLAP if static is None else Rung.OLD_ADDRESS
    plan = plan_for(macs=guest.spec.macs)
    fence = NetworkFence()
    fence.build(plan)
    try:
        move_into_fence(guest, plan)
        fence.prove(plan)
        request = AddressRequest(
            fence=plan, ladder=(rung,), old_addresses=(old,), probe_port=22,
            rung_deadline=timedelta(seconds=20 * lab.time_factor),
        )  # fmt: skip
        with NetworkAddressing(clock=SystemClock()) as addressing:
            moved = addressing.move(request, links=VirshCables(guest.name), cancel=SwitchCancel())
            print(f"real guest, {rung}: {moved.seconds:.2f} s, {moved.address}")
            assert moved.address is not None
            assert (moved.address == str(old.interface.ip)) is (rung is Rung.OLD_ADDRESS)
            connection = fence.connector(plan)(moved.address, 22, timedelta(seconds=5 * lab.time_factor))
            with connection:
                connection.settimeout(5 * lab.time_factor)
                assert connection.recv(64).startswith(b"SSH-2.0")
            counts = fence.counts(plan)
            assert all(
                counts[f"elsewhere to {link}"].packets == 0 for link in (plan.ports[0].tap, plan.ports[0].veth_host)
            )
    finally:
        fence.release(fence.resource(plan), deadline=timedelta(seconds=10))
