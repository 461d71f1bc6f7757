"""Fenced VMs reached from the host: service addresses, relays, residences. Stand-ins for the VMs, real kernel.

Needs root. Runs in network namespaces of its own, in the lab or outside.
"""

from __future__ import annotations

import hashlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path

import pytest

from integration.dhcp_clients import Udhcpc
from integration.networld import (
    StandIn,
    SwitchCancel,
    TapCables,
    attach_clone,
    fresh_network,
    plan_for,
    sh,
    snapshot_of_network,
    stop,
)
from integration.waiting import wait_until
from tests.workflow.invocations import backup, provision, succeed
from vmsnap.errors import GuestUnreachableError, PreconditionError
from vmsnap.model.guest import OldAddress
from vmsnap.model.ids import new_run_id
from vmsnap.model.isolation import FencePlan, Rung
from vmsnap.model.policy import IsolationPolicy, Policy
from vmsnap.model.report import ForwardOptions, ForwardReport, ServeOptions, ServeReport
from vmsnap.network import netns
from vmsnap.network.fence import NetworkFence
from vmsnap.network.ladder import NetworkAddressing
from vmsnap.network.residence import FenceResidences
from vmsnap.network.service import HostServices
from vmsnap.ports.network import AddressRequest
from vmsnap.ports.service import Opener, Place, Services
from vmsnap.state.clock import SystemClock
from vmsnap.testing.faults import FaultCancel
from vmsnap.testing.service_contract import ServiceContract
from vmsnap.testing.world import FakeWorld, QuietProgress
from vmsnap.workflow.serve import forward, serve

DEADLINE = timedelta(seconds=10)
PATIENCE_SECONDS = 10.0
PORT = 5432
MAC = "52:54:00:aa:00:01"
OLD = OldAddress(interface=IPv4Interface("10.9.8.77/24"), gateway=IPv4Address("10.9.8.1"))
DIGEST = """
import hashlib, socket, threading
def serve(c):
    told, size = hashlib.sha256(), 0
    while data := c.recv(1 << 18):
        told.update(data); size += len(data)
    c.sendall(f"{name} {told.hexdigest()} {size}".encode()); c.close()
name = %r
s = socket.create_server(("0.0.0.0", %d), backlog=256)
while True:
    threading.Thread(target=serve, args=(s.accept()[0],)).start()
"""
SINK = """
import socket
s = socket.create_server(("0.0.0.0", %d))
while True:
    c, _ = s.accept(); size = 0
    while data := c.recv(1 << 20): size += len(data)
    c.sendall(str(size).encode()); c.close()
"""


@pytest.fixture(autouse=True)
def network() -> Iterator[None]:
    """Give each test a network of its own, and hold that it leaves it as it was."""
    with fresh_network():
        before = snapshot_of_network()
        yield
        assert snapshot_of_network() == before


class TestHostServices(ServiceContract):
    @pytest.fixture
    def services(self) -> Services:
        return HostServices()


class Vms:
    """Fenced stand-ins, and what serves them."""

    def __init__(self) -> None:
        self.fence = NetworkFence()
        self.services = HostServices()
        self.residences = FenceResidences()
        self.undo = ExitStack()

    def fenced(self, *, serving: str | None = None, address: OldAddress | None = OLD) -> tuple[FencePlan, StandIn]:
        """Return a fence with a VM that lives at an address, or has none, and runs a Python server."""
        plan = plan_for(macs=(MAC,))
        vm = self.fence_around(plan)
        if address is not None:
            vm.run("ip", "addr", "add", str(address.interface), "dev", "eth0")
            vm.run("ip", "route", "add", "default", "via", str(address.gateway))
        if serving is not None:
            self.start(vm, serving)
        return plan, vm

    def fence_around(self, plan: FencePlan) -> StandIn:
        """Build a fence, and put a VM into it that has no address."""
        self.undo.callback(lambda: self.fence.release(self.fence.resource(plan), deadline=DEADLINE))
        self.fence.build(plan)
        vm = attach_clone(plan)
        self.undo.callback(vm.close)
        self.fence.prove(plan)
        return vm

    def start(self, vm: StandIn, program: str) -> None:
        process = vm.start(sys.executable, "-c", program)
        self.undo.callback(lambda: stop(process))
        wait_until(lambda: bool(vm.run("ss", "-Hltn", f"sport = :{PORT}")), seconds=10, what="a TCP server")

    def settle(self, plan: FencePlan, *, old: OldAddress = OLD) -> None:
        residence = self.residences.open(plan, places=(Place(mac=MAC, old=old),))
        self.undo.callback(residence.close)

    def climb(self, plan: FencePlan) -> None:
        """Let the ladder's last rung reach the VM, as a backup does."""
        addressing = NetworkAddressing(clock=SystemClock())
        self.undo.callback(addressing.close)
        request = AddressRequest(
            fence=plan,
            ladder=(Rung.OLD_ADDRESS,),
            old_addresses=(OLD,),
            probe_port=PORT,
            rung_deadline=timedelta(seconds=20),
        )
        moved = addressing.move(request, links=TapCables(plan), cancel=SwitchCancel())
        assert moved.address == str(OLD.interface.ip)

    def opener(self, plan: FencePlan, *, old: OldAddress = OLD) -> Opener:
        connect = self.fence.connector(plan)
        return lambda: connect(str(old.interface.ip), PORT, timedelta(seconds=5))

    def serve(self, plan: FencePlan) -> tuple[str, int]:
        """Put the VM's port at a service address."""
        resource = self.services.resource(plan.run, guest=plan.guest)
        self.undo.callback(lambda: self.services.release(resource, deadline=DEADLINE))
        self.services.make(resource)
        relay = self.services.listen(resource, port=PORT, opener=self.opener(plan))
        self.undo.callback(relay.close)
        return relay.address


@pytest.fixture
def vms(network: None) -> Iterator[Vms]:
    made = Vms()
    with made.undo:
        yield made
    assert made.services.owned() == ()


def ask(address: tuple[str, int], said: bytes) -> str:
    """Say everything, end that direction, and return the answer."""
    with socket.create_connection(address, timeout=PATIENCE_SECONDS) as connection:
        connection.sendall(said)
        with suppress(OSError):  # where it was reset meanwhile, receiving says so
            connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(1 << 16), b"")).decode()


def told(name: str, said: bytes) -> str:
    return f"{name} {hashlib.sha256(said).hexdigest()} {len(said)}"


@pytest.mark.parametrize("way", ["by the ladder, as clones", "by residences, as environments"])
def test_two_clones_of_one_guest_are_reached_at_once(vms: Vms, way: str) -> None:
    addresses = []
    for name in ("one", "two"):
        plan, _ = vms.fenced(serving=DIGEST % (name, PORT))
        began = time.monotonic()
        if "ladder" in way:
            vms.climb(plan)
        else:
            vms.settle(plan)
        addresses.append(vms.serve(plan))
        print(f"set up and listening after {(time.monotonic() - began) * 1000:.0f} ms")
    one, two = addresses
    assert one != two
    assert {IPv4Address(host) in IPv4Network("198.18.0.0/15") for host, _ in addresses} == {True}
    with socket.create_connection(one) as first, socket.create_connection(two) as second:
        for connection in (first, second):
            connection.settimeout(PATIENCE_SECONDS)
            connection.sendall(b"both at once")
        for name, connection in (("two", second), ("one", first)):
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(200).decode() == told(name, b"both at once")


def test_a_server_of_the_host_on_all_addresses_is_not_taken_for_the_vm(vms: Vms) -> None:
    with socket.create_server(("0.0.0.0", PORT)):  # noqa: S104 - as SSH servers of hosts do
        plan, _ = vms.fenced(serving=DIGEST % ("vm", PORT))
        vms.settle(plan)
        assert ask(vms.serve(plan), b"who are you") == told("vm", b"who are you")


def test_a_host_that_begins_to_route_serves_nobody_until_it_has_stopped(vms: Vms) -> None:
    plan, _ = vms.fenced(serving=DIGEST % ("vm", PORT))
    vms.settle(plan)
    address = vms.serve(plan)
    setting = f"net.ipv4.conf.vs{plan.run}s0.forwarding"
    sh("sysctl", "-w", f"{setting}=1")
    with pytest.raises(ConnectionResetError):
        ask(address, b"a neighbour, perhaps")
    assert sh("sysctl", "-n", setting).strip() == "0"
    assert ask(address, b"who are you") == told("vm", b"who are you")


def test_many_connections_through_one_address(vms: Vms) -> None:
    plan, _ = vms.fenced(serving=DIGEST % ("vm", PORT))
    vms.settle(plan)
    address = vms.serve(plan)
    with ExitStack() as stack:
        connections = [stack.enter_context(socket.create_connection(address, timeout=20)) for _ in range(60)]
        for number, connection in reversed(list(enumerate(connections))):
            connection.sendall(b"%d" % number)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(200).decode() == told("vm", b"%d" % number)


def test_a_refused_port_and_a_silent_vm_are_told_apart(vms: Vms) -> None:
    plan, _ = vms.fenced()
    vms.settle(plan)
    with pytest.raises(GuestUnreachableError, match="refused") as refused:
        vms.opener(plan)()
    assert isinstance(refused.value.__cause__, ConnectionRefusedError)
    silent, _ = vms.fenced(address=None)
    vms.settle(silent)
    with pytest.raises(GuestUnreachableError) as unreached:
        vms.opener(silent)()
    assert not isinstance(unreached.value.__cause__, ConnectionRefusedError)
    address = vms.serve(plan)
    with socket.create_connection(address, timeout=PATIENCE_SECONDS) as connection, pytest.raises(ConnectionResetError):
        connection.recv(1)


def test_nothing_that_the_vm_begins_comes_out(vms: Vms) -> None:
    """Neither over the service address, nor to the host, nor to another VM: whatever it knows of them."""
    heard: list[str] = []
    with ExitStack() as stack:
        sh("ip", "link", "add", "prod0", "type", "veth", "peer", "name", "prod1")
        stack.callback(sh, "ip", "link", "del", "prod0")
        sh("ip", "addr", "add", "192.0.2.1/24", "dev", "prod0")
        sh("ip", "link", "set", "prod0", "up")
        for setting in ("ip_forward=1", "conf.all.rp_filter=0", "conf.default.rp_filter=0"):
            sh("sysctl", "-w", f"net.ipv4.{setting}")
        plan, vm = vms.fenced(serving=DIGEST % ("vm", PORT))
        other, _ = vms.fenced(serving=DIGEST % ("other", PORT))
        for each in (plan, other):
            vms.settle(each)
        service, elsewhere = vms.serve(plan), vms.serve(other)
        host_end = str(IPv4Address(service[0]) - 1)
        gateway = str(OLD.gateway)
        listener = stack.enter_context(socket.create_server(("0.0.0.0", 8080), backlog=64))  # noqa: S104
        stack.enter_context(_noting(listener, heard))
        vm.run("ip", "route", "add", "198.18.0.0/15", "via", gateway)
        for target, port in (
            (host_end, 8080), ("192.0.2.1", 8080), (gateway, 8080), ("127.0.0.1", 8080), service, elsewhere,
            (str(IPv4Address(elsewhere[0]) - 1), 8080),
        ):  # fmt: skip
            attempt = f"import socket; socket.create_connection(({target!r}, {port}), timeout=0.7)"
            assert vm.run(sys.executable, "-c", f"try:\n {attempt}\n print('open')\nexcept OSError: print('shut')") == (
                "shut\n"
            ), (target, port)
        assert heard == []
        assert ask(service, b"the way in is open") == told("vm", b"the way in is open")
        with socket.create_connection(("127.0.0.1", 8080)):
            wait_until(lambda: heard == ["127.0.0.1"], seconds=5, what="the positive control")


@contextmanager
def _noting(listener: socket.socket, heard: list[str]) -> Iterator[None]:
    """Note who connects."""

    def accept() -> None:
        while True:
            try:
                connection, (address, _) = listener.accept()
            except OSError:
                return
            heard.append(address)
            connection.close()

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(PATIENCE_SECONDS)


def test_the_fence_is_as_proven_while_its_vm_is_served(vms: Vms) -> None:
    plan, _ = vms.fenced(serving=DIGEST % ("vm", PORT))
    before = vms.fence.prove(plan)
    vms.serve(plan)
    assert [point.name for point in vms.fence.prove(plan).points] == [point.name for point in before.points]


def test_a_vm_that_asks_by_dhcp_is_given_its_place_by_two_processes_alike(vms: Vms, tmp_path: Path) -> None:
    plan, vm = vms.fenced(address=None)
    vms.settle(plan)
    vms.settle(plan)
    client = Udhcpc(vm, tmp_path).start()
    vms.undo.callback(lambda: stop(client))
    wait_until(lambda: vm.addresses() == [str(OLD.interface.ip)], seconds=20, what="a lease")
    vms.start(vm, DIGEST % ("vm", PORT))
    assert ask(vms.serve(plan), b"hello") == told("vm", b"hello")


def test_a_fixed_address_is_found_on_the_nic_where_it_lives(vms: Vms) -> None:
    plan, _ = vms.fenced()
    assert vms.residences.find(plan, old=OLD) == MAC
    other = OldAddress(interface=IPv4Interface("10.9.8.78/24"), gateway=OLD.gateway)
    assert vms.residences.find(plan, old=other) is None


def test_a_network_that_the_host_uses_is_not_served_from() -> None:
    sh("ip", "link", "add", "lan0", "type", "veth", "peer", "name", "lan1")
    try:
        sh("ip", "addr", "add", "198.18.0.9/15", "dev", "lan0")
        sh("ip", "link", "set", "lan0", "up")
        with pytest.raises(PreconditionError, match=r"198\.18\.0\.0/15") as refused:
            HostServices().resource(new_run_id(), guest="db")
        assert "service_network" in (refused.value.remedy or "")
        elsewhere = HostServices(network=IPv4Network("100.64.0.0/30"))
        first = elsewhere.resource(new_run_id(), guest="db")
        elsewhere.make(first)
        second = elsewhere.resource(new_run_id(), guest="db")
        elsewhere.make(second)
        assert {first.detail, second.detail} == {"100.64.0.1", "100.64.0.3"}, "a taken pair is passed over"
        with pytest.raises(PreconditionError):
            elsewhere.resource(new_run_id(), guest="db")
        for resource in (first, second):
            elsewhere.release(resource, deadline=DEADLINE)
    finally:
        sh("ip", "link", "del", "lan0")


@pytest.mark.parametrize("made", ["namespace", "links"])
def test_one_that_was_made_by_half_is_found_finished_and_removed(made: str) -> None:
    services = HostServices()
    resource = services.resource(new_run_id(), guest="db")
    if made == "namespace":
        netns.create(resource.name)
    else:
        sh("ip", "link", "add", f"vs{resource.run}s0", "type", "veth", "peer", "name", "half")
    assert [item.run for item in services.owned()] == [resource.run]
    services.make(resource)
    services.listen(resource, port=PORT, opener=socket.socket).close()
    services.release(services.owned()[0], deadline=DEADLINE)
    assert services.owned() == ()


def test_the_relay_is_fast_enough_for_a_database(vms: Vms) -> None:
    plan, _ = vms.fenced(serving=SINK % PORT)
    vms.settle(plan)
    address = vms.serve(plan)
    block, count = bytes(1 << 20), 100
    began = time.monotonic()
    with socket.create_connection(address, timeout=30) as connection:
        for _ in range(count):
            connection.sendall(block)
        connection.shutdown(socket.SHUT_WR)
        assert int(connection.recv(32)) == len(block) * count
    rate = count / (time.monotonic() - began)
    print(f"{rate:.0f} MiB/s")
    assert rate > 10


def test_a_killed_relay_leaves_an_address_where_nobody_listens(vms: Vms) -> None:
    resource = vms.services.resource(new_run_id(), guest="db")
    vms.undo.callback(lambda: vms.services.release(resource, deadline=DEADLINE))
    vms.services.make(resource)
    program = (
        "import socket, sys, time\nfrom vmsnap.network.service import HostServices\n"
        "from vmsnap.model.journal import Resource, ResourceKind\n"
        f"resource = Resource(kind=ResourceKind.SERVICE, run={resource.run!r}, guest='db', name={resource.name!r}, "
        f"detail={resource.detail!r})\n"
        f"relay = HostServices().listen(resource, port={PORT}, opener=socket.socket)\nprint('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.kill()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((resource.detail, PORT), timeout=PATIENCE_SECONDS)
    vms.services.listen(resource, port=PORT, opener=socket.socket).close()


@pytest.mark.parametrize("configured", ["static", "dhcp"])
def test_an_environment_without_an_agent_is_forwarded_and_served(vms: Vms, tmp_path: Path, configured: str) -> None:
    """The whole way, but for the hypervisor: it only tells the MAC, and no address."""
    lab = FakeWorld(tmp_path / "world")
    succeed(lab, backup())
    succeed(lab, provision())
    (mac,) = lab.host.machines["test"].macs
    environment = lab.state.environments.get("test")
    plan = FencePlan.for_macs(environment.run, guest="db", macs=(mac,))
    vm = vms.fence_around(plan)
    policy = None
    if configured == "static":
        vm.run("ip", "addr", "add", str(OLD.interface), "dev", "eth0")
        policy = Policy(guest="db", isolation=IsolationPolicy(old_address=OLD.interface))
    else:
        client = Udhcpc(vm, tmp_path).start()
        vms.undo.callback(lambda: stop(client))
    vms.start(vm, DIGEST % ("vm", PORT))
    world = replace(
        lab.process(), fence=vms.fence, services=vms.services, residences=vms.residences, clock=SystemClock()
    )
    vms.undo.callback(
        lambda: vms.services.release(vms.services.resource(environment.run, guest="db"), deadline=DEADLINE)
    )
    asked: list[str] = []
    for _ in range(2):  # the second time it has its address, and the fence its gateway
        forwarding, serving = FaultCancel(), FaultCancel()

        def forwarded(report: ForwardReport, *, cancel: FaultCancel = forwarding) -> None:
            asked.append(ask((report.listen_address, report.listen_port), b"by forward"))
            cancel.asked = True

        def served(report: ServeReport, *, cancel: FaultCancel = serving) -> None:
            asked.append(ask((report.service_address, PORT), b"by serve"))
            cancel.asked = True

        options = ForwardOptions(port=PORT)
        waiting = (QuietProgress(), forwarding)
        forward(world, name="test", options=options, policy=policy, ready=forwarded, waiting=waiting)
        ports = ServeOptions(ports=(PORT,))
        serve(world, name="test", options=ports, policy=policy, ready=served, waiting=(QuietProgress(), serving))
    assert asked == [told("vm", b"by forward"), told("vm", b"by serve")] * 2
    assert [item.run for item in vms.services.owned()] == [environment.run], "its address stays with it"
