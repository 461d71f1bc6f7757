"""The ladder against real DHCP clients and static machines, each in a namespace that plays the clone.

``client`` boots on a production network with its own DHCP server, is then moved behind the fence's tap with its lease,
its memory and its ARP cache, as a clone is, and has to be reached.
"""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path

import pytest

from integration.dhcp_clients import CLIENTS, Dhcpcd
from integration.networld import (
    StandIn,
    SwitchCancel,
    TapCables,
    fresh_network,
    plan_for,
    sh,
    stop,
)
from integration.waiting import wait_until
from vmsnap.dhcp.pool import DEFAULT_POOL
from vmsnap.errors import CancelledError, DeadlineError, GuestUnreachableError
from vmsnap.model.command import Command, CommandResult
from vmsnap.model.guest import OldAddress
from vmsnap.model.isolation import Addressed, Exchange, FencePlan, FencePort, Rung
from vmsnap.network import ladder
from vmsnap.network.fence import NetworkFence
from vmsnap.network.frames import vlan_tag
from vmsnap.network.ladder import NetworkAddressing
from vmsnap.network.leasing import FenceDhcp
from vmsnap.network.linkflap import FLAPS, Flap
from vmsnap.network.vlans import VlanLink
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


def leased(kind: str, worlds: Worlds, folder: Path, *, lease: str = "12h") -> tuple[StandIn, subprocess.Popen[bytes]]:
    """Return a machine with a lease of production's server, and its DHCP client."""
    folder.chmod(0o755)
    worlds.keep(start_production(folder, lease=lease))
    machine = worlds.machine()
    machine.plug("guest0", mac=MAC, bridge="prod")
    client = CLIENTS[kind](machine, folder).start()
    worlds.keep(client)
    wait_until(lambda: machine.addresses() == ["10.9.8.77"], seconds=30, what="a production lease")
    return machine, client


def told(moved: Addressed) -> list[tuple[str, float, str | None]]:
    return [(item.rung.value, round(item.seconds, 2), item.failure) for item in moved.attempts]


@pytest.mark.parametrize(
    ("kind", "rung"),
    [
        ("dhcpcd", Rung.LINK_FLAP),
        ("networkd", Rung.LINK_FLAP),
        ("NetworkManager", Rung.LINK_FLAP),
        ("dhclient", Rung.OLD_ADDRESS),
        ("udhcpc", Rung.OLD_ADDRESS),
    ],
)
def test_real_clients_are_reached(kind: str, rung: Rung, worlds: Worlds, tmp_path: Path) -> None:
    machine, _ = leased(kind, worlds, tmp_path)
    world = worlds.around(machine)  # same client, same memory, another bridge
    flaps = FLAPS if rung is Rung.LINK_FLAP else QUICK  # the others stay silent however long the flap
    with NetworkAddressing(clock=SystemClock(), flaps=flaps) as addressing:
        moved = addressing.move(
            request_for(world.plan, Rung.LINK_FLAP, Rung.OLD_ADDRESS), links=world.cables, cancel=SwitchCancel()
        )
        print(f"{kind}: {told(moved)}")
        assert moved.rung is rung
        assert moved.address is not None
        assert greeting(world.plan, moved.address) == "clone"
        assert moved.address in machine.addresses()
        in_pool = IPv4Address(moved.address) in DEFAULT_POOL
        assert in_pool if rung is Rung.LINK_FLAP else moved.address == "10.9.8.77"
        if kind == "networkd":
            assert moved.seconds < 15


@pytest.mark.parametrize("kind", ["dhcpcd", "networkd", "NetworkManager"])
def test_clients_that_could_be_moved_are_reached_where_they_lived_too(
    kind: str, worlds: Worlds, addressing: NetworkAddressing, tmp_path: Path
) -> None:
    machine, _ = leased(kind, worlds, tmp_path)
    world = worlds.around(machine)
    moved = addressing.move(request_for(world.plan, Rung.OLD_ADDRESS), links=world.cables, cancel=SwitchCancel())
    print(f"{kind}: {told(moved)}")
    assert moved.seconds < 2
    assert greeting(world.plan, "10.9.8.77") == "clone"


class NamespaceAgent:
    """A GuestControl of a machine whose DHCP client is this process."""

    method = "agent"

    def __init__(self, client: subprocess.Popen[bytes]) -> None:
        self._client = client

    def ping(self, *, timeout: timedelta) -> None:
        return

    def close(self) -> None:
        return

    def run(self, command: Command, *, timeout: timedelta) -> CommandResult:
        done = subprocess.run(
            ["nsenter", "-t", str(self._client.pid), "--mount", "--net", *command.argv],
            capture_output=True, timeout=timeout.total_seconds(), check=False,
        )  # fmt: skip
        return CommandResult(exit_status=done.returncode, stdout=done.stdout, stderr=done.stderr)


@pytest.mark.parametrize("kind", ["dhcpcd", "dhclient", "udhcpc", "NetworkManager"])
def test_real_clients_obey_the_agent(kind: str, worlds: Worlds, addressing: NetworkAddressing, tmp_path: Path) -> None:
    machine, client = leased(kind, worlds, tmp_path)
    world = worlds.around(machine)
    agent = NamespaceAgent(client)
    request = replace(request_for(world.plan, Rung.AGENT), agent=agent)
    moved = addressing.move(request, links=world.cables, cancel=SwitchCancel())
    print(f"{kind}: {told(moved)}")
    assert moved.rung is Rung.AGENT
    assert IPv4Address(str(moved.address)) in DEFAULT_POOL
    assert greeting(world.plan, str(moved.address)) == "clone"
    assert world.cables.events == []
    if kind == "dhclient":  # the one that the agent started is nobody's child
        agent.run(Command(argv=("dhclient", "-4", "-x", "eth0")), timeout=timedelta(seconds=10))


def test_a_client_that_renews_by_itself_is_noticed(
    worlds: Worlds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, client = leased("udhcpc", worlds, tmp_path)
    world = worlds.around(machine)
    seen = Exchange(mac=MAC, address=OLD.interface.ip, server=GATEWAY, xid=1, seen=datetime.now(UTC))

    class Renewed(FenceDhcp):
        def start(self, ports: Sequence[FencePort] | None = None) -> None:
            super().start(ports)
            client.send_signal(signal.SIGUSR1)  # udhcpc: renew now, at the old server

    monkeypatch.setattr(ladder, "_FIRST_LOOK_SECONDS", 4)  # a client on a busy machine takes its time
    with NetworkAddressing(clock=SystemClock(), dhcp_for=Renewed) as addressing:
        moved = addressing.move(
            replace(request_for(world.plan, Rung.LINK_FLAP), exchanges=(seen,)),
            links=world.cables, cancel=SwitchCancel(),
        )  # fmt: skip
        print(f"udhcpc: {told(moved)}")
        assert moved.rung is Rung.BY_ITSELF
        assert greeting(world.plan, str(moved.address)) == "clone"
        assert world.cables.events == []


SECOND = "52:54:00:aa:00:02"


def in_pool(machine: StandIn, interface: str) -> bool:
    found = machine.addresses(interface)
    return bool(found) and all(IPv4Address(address) in DEFAULT_POOL for address in found)


def test_every_nic_that_asks_is_leased_an_address(
    worlds: Worlds, addressing: NetworkAddressing, tmp_path: Path
) -> None:
    world = worlds.empty(macs=(MAC, SECOND))
    tmp_path.chmod(0o755)
    client = Dhcpcd(world.clone, tmp_path)
    client.interfaces = ("eth0", "eth1")
    worlds.keep(client.start())
    moved = addressing.move(request_for(world.plan, Rung.LINK_FLAP), links=world.cables, cancel=SwitchCancel())
    assert greeting(world.plan, str(moved.address)) == "clone"
    for interface in ("eth0", "eth1"):
        wait_until(lambda: in_pool(world.clone, interface), seconds=20, what=f"a lease of ours on {interface}")  # noqa: B023
    networks = {IPv4Network(f"{world.clone.addresses(nic)[0]}/24", strict=False) for nic in ("eth0", "eth1")}
    assert len(networks) == 2


def test_a_static_nic_does_not_keep_the_other_from_moving(
    worlds: Worlds, addressing: NetworkAddressing, tmp_path: Path
) -> None:
    world = worlds.empty(macs=(MAC, SECOND))
    be_static(world.clone)
    tmp_path.chmod(0o755)
    client = Dhcpcd(world.clone, tmp_path)
    client.interfaces = ("eth1",)
    worlds.keep(client.start())
    moved = addressing.move(
        replace(request_for(world.plan, Rung.LINK_FLAP, Rung.OLD_ADDRESS), static_macs=frozenset({MAC})),
        links=world.cables, cancel=SwitchCancel(),
    )  # fmt: skip
    assert moved.address in world.clone.addresses("eth1")
    assert greeting(world.plan, str(moved.address)) == "clone"
    assert world.clone.addresses("eth0") == ["10.9.8.77"]


def test_beside_the_old_address_the_other_nic_is_leased_one_of_ours(
    worlds: Worlds, addressing: NetworkAddressing, tmp_path: Path
) -> None:
    world = worlds.empty(macs=(MAC, SECOND))
    be_static(world.clone)
    moved = addressing.move(request_for(world.plan, Rung.OLD_ADDRESS), links=world.cables, cancel=SwitchCancel())
    assert moved.address == "10.9.8.77"
    tmp_path.chmod(0o755)
    client = Dhcpcd(world.clone, tmp_path)
    client.interfaces = ("eth1",)
    worlds.keep(client.start())
    wait_until(lambda: in_pool(world.clone, "eth1"), seconds=20, what="a lease of ours on eth1")
    assert greeting(world.plan, "10.9.8.77") == "clone"


def test_two_old_addresses_on_two_nics_are_both_reached(worlds: Worlds, addressing: NetworkAddressing) -> None:
    """Linux answers ARP for any of its addresses on any of its NICs; the MAC says where each belongs."""
    world = worlds.empty(macs=(MAC, SECOND))
    be_static(world.clone, interface="eth1")
    world.clone.run("ip", "addr", "add", "10.7.6.5/24", "dev", "eth0")
    world.clone.run("sysctl", "-w", "net.ipv4.conf.eth0.rp_filter=1", "net.ipv4.conf.eth1.rp_filter=1")
    here = replace(OLD, mac=SECOND)
    there = OldAddress(interface=IPv4Interface("10.7.6.5/24"), mac=MAC)
    moved = addressing.move(
        request_for(world.plan, Rung.OLD_ADDRESS, old=(here, there)), links=world.cables, cancel=SwitchCancel()
    )
    assert moved.seconds < 2
    for address in ("10.9.8.77", "10.7.6.5"):
        assert greeting(world.plan, address) == "clone"


def test_an_ipv6_only_second_nic_is_left_alone(worlds: Worlds, addressing: NetworkAddressing, tmp_path: Path) -> None:
    world = worlds.empty(macs=(MAC, SECOND))
    world.clone.run("ip", "addr", "add", "2001:db8::7/64", "dev", "eth1", "nodad")
    tmp_path.chmod(0o755)
    worlds.keep(Dhcpcd(world.clone, tmp_path).start())
    moved = addressing.move(request_for(world.plan, Rung.LINK_FLAP), links=world.cables, cancel=SwitchCancel())
    assert moved.address in world.clone.addresses()
    assert greeting(world.plan, str(moved.address)) == "clone"
    assert "2001:db8::7/64" in world.clone.run("ip", "-6", "addr", "show", "dev", "eth1")
    assert world.clone.addresses("eth1") == []


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
    machine, client = leased("udhcpc", worlds, tmp_path, lease="120")
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


def test_a_tagged_static_guest_is_reached_inside_its_vlan(worlds: Worlds, addressing: NetworkAddressing) -> None:
    world = worlds.empty()
    inside = FencePort(index=0, mac=MAC, bridge="", tap="", veth_host="", veth_inside="eth0")
    link = VlanLink(world.clone.namespace, port=inside, tags=(vlan_tag(42),))  # for want of VLAN devices
    link.open()
    try:
        be_static(world.clone, interface=link.name)
        blind = request_for(world.plan, Rung.OLD_ADDRESS, seconds=2)
        for old in (OLD, replace(OLD, vlan=43)):
            with pytest.raises(DeadlineError, match="could not be reached"):
                addressing.move(replace(blind, old_addresses=(old,)), links=world.cables, cancel=SwitchCancel())
            worlds.fence.prove(world.plan)
        moved = addressing.move(
            request_for(world.plan, Rung.OLD_ADDRESS, old=(replace(OLD, vlan=42),)),
            links=world.cables, cancel=SwitchCancel(),
        )  # fmt: skip
        assert moved.seconds < 2
        assert greeting(world.plan, "10.9.8.77") == "clone"
    finally:
        link.close()
