"""Reaching environments, over fakes: where they are looked for, what is said when they are not there, names."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path

import pytest

from tests.workflow.invocations import Outcome, Trial, backup, destroy, invoke, order, recovers, simply, succeed
from vmsnap.dhcp.pool import DEFAULT_POOL
from vmsnap.errors import (
    CancelledError,
    CleanupError,
    DriverError,
    EnvironmentNotFoundError,
    GuestUnreachableError,
    HeldError,
    PreconditionError,
)
from vmsnap.model.guest import GuestState
from vmsnap.model.isolation import Rung
from vmsnap.model.policy import DnsPolicy, EnvironmentPolicy, IsolationPolicy, Policy
from vmsnap.model.report import (
    BackupReport,
    ForwardOptions,
    ForwardReport,
    ProvisionOptions,
    ProvisionReport,
    ServeOptions,
    ServeReport,
)
from vmsnap.ports.clock import Cancel
from vmsnap.testing.faults import DEATHS, Fault, FaultCancel, Mode
from vmsnap.testing.world import FakeWorld, QuietProgress
from vmsnap.workflow.naming import register
from vmsnap.workflow.provision import Provision, status_of
from vmsnap.workflow.serve import forward, serve
from vmsnap.workflow.world import World

OLD = IPv4Interface("10.9.8.77/24")
DNS = DnsPolicy(
    zone="test.example", server=IPv4Address("192.0.2.53"), key_name="vmsnap", key_file="/etc/vmsnap/dns.key"
)
POLICY = Policy(guest="db", isolation=IsolationPolicy(old_address=OLD), environment=EnvironmentPolicy(dns=DNS))
NAME = "test.test.example"


def provisioning(*, network: str | None = None, policy: EnvironmentPolicy = POLICY.environment, wait: bool = False) -> (
    Callable[[World, Cancel], ProvisionReport]
):  # fmt: skip
    def work(world: World, cancel: Cancel) -> ProvisionReport:
        options = ProvisionOptions(name="test", network=network, wait=wait)
        making = Provision(world, options=options, policy=policy, progress=QuietProgress(), cancel=cancel)
        return making.run("db@latest")

    return work


def prepared(folder: Path, *, network: str | None = None) -> FakeWorld:
    lab = FakeWorld(folder)
    succeed(lab, backup())
    succeed(lab, provisioning(network=network, policy=EnvironmentPolicy()))
    return lab


@pytest.fixture
def lab(tmp_path: Path) -> FakeWorld:
    return prepared(tmp_path)


@contextmanager
def answering(lab: FakeWorld, *places: tuple[str, int]) -> Iterator[None]:
    """Let something in the fences listen at these addresses and ports."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        for place in places:
            lab.network.servers[place] = server.getsockname()
        yield


def closed_port() -> tuple[str, int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        found: tuple[str, int] = server.getsockname()
    return found


def forwarding(port: int = 5432, *, policy: Policy | None = POLICY, wait: timedelta | None = None) -> (
    Callable[[World, FaultCancel], ForwardReport]
):  # fmt: skip
    def work(world: World, cancel: FaultCancel) -> ForwardReport:
        told: list[ForwardReport] = []

        def ready(report: ForwardReport) -> None:
            told.append(report)
            cancel.asked = True

        options = ForwardOptions(port=port, wait=wait)
        forward(world, name="test", options=options, policy=policy, ready=ready, waiting=(QuietProgress(), cancel))
        return told[0]

    return work


def serving(policy: Policy | None = POLICY, *ports: int) -> Callable[[World, FaultCancel], ServeReport]:
    def work(world: World, cancel: FaultCancel) -> ServeReport:
        told: list[ServeReport] = []

        def ready(report: ServeReport) -> None:
            told.append(report)
            cancel.asked = True

        options = ServeOptions(ports=ports)
        serve(world, name="test", options=options, policy=policy, ready=ready, waiting=(QuietProgress(), cancel))
        return told[0]

    return work


def done(outcome: Outcome) -> ForwardReport:
    if outcome.error is not None:
        raise outcome.error
    assert isinstance(outcome.result, ForwardReport)
    return outcome.result


def run(lab: FakeWorld, work: Callable[[World, FaultCancel], object]) -> Outcome:
    return invoke(lab, work)  # type: ignore[arg-type]


# Where it is looked for


def test_the_address_that_the_agent_tells_is_used(lab: FakeWorld) -> None:
    lab.host.machines["test"].addresses = (
        IPv4Interface("127.0.0.1/8"), IPv4Interface("169.254.9.9/16"), IPv4Interface("10.1.1.5/16"),
    )  # fmt: skip
    with answering(lab, ("10.1.1.5", 5432)):
        report = done(run(lab, forwarding()))
    assert (report.address, report.port, report.listen_address) == ("10.1.1.5", 5432, "127.0.0.1")
    (place,) = lab.residences.opened[-1]
    assert place.mac == lab.host.machines["test"].macs[0]
    assert place.old.interface == IPv4Interface("10.1.1.5/16")
    assert all(residence.closed for residence in lab.residences.residences)
    assert all(relay.closed for relay in lab.services.relays)


def test_without_an_agent_the_policys_address_is_asked_for_on_every_nic(lab: FakeWorld) -> None:
    lab.residences.living[OLD.ip] = lab.host.machines["test"].macs[0]
    with answering(lab, (str(OLD.ip), 5432)):
        assert done(run(lab, forwarding())).address == str(OLD.ip)
    assert lab.host.machines["test"].links == {}, "no cable of one with a fixed address is pulled"


def test_one_that_asks_by_dhcp_is_lent_an_address_that_nobody_knew(lab: FakeWorld) -> None:
    """The same address for each call, because the environment keeps it."""
    lent = set()
    for _ in range(2):
        outcome = run(lab, forwarding(policy=None, wait=timedelta(seconds=1)))
        assert isinstance(outcome.error, GuestUnreachableError)
        (place,) = lab.residences.opened[-1]
        assert place.old.interface.ip in DEFAULT_POOL
        assert place.old.gateway in place.old.interface.network
        lent.add(place.old.interface)
    (interface,) = lent
    with answering(lab, (str(interface.ip), 5432)):
        assert done(run(lab, forwarding(policy=None))).address == str(interface.ip)
    lab.host.machines["test"].addresses = (interface,)
    with answering(lab, (str(interface.ip), 5432)):
        done(run(lab, forwarding(policy=None)))
    (place,) = lab.residences.opened[-1]
    assert place.old.interface == interface


def test_a_cable_is_pulled_where_no_address_is_known(lab: FakeWorld) -> None:
    pulled: list[tuple[str, bool]] = []
    world = lab.process()
    machine = lab.host.machines["test"]

    class Cables(dict[str, bool]):
        def __setitem__(self, mac: str, up: bool) -> None:
            pulled.append((mac, up))
            super().__setitem__(mac, up)

    machine.links = Cables()
    with pytest.raises(GuestUnreachableError, match="5432"):
        forwarding(wait=timedelta(minutes=1))(world, FaultCancel())
    assert 2 <= len(pulled) <= 10
    assert pulled[:2] == [(machine.macs[0], False), (machine.macs[0], True)]
    assert machine.links[machine.macs[0]]


def test_the_clones_old_address_is_remembered_by_the_snapshot(lab: FakeWorld) -> None:
    environment = lab.state.environments.get("test")
    found = lab.store.find(environment.snapshot)
    isolation = found.manifest.isolation.model_copy(update={"rung": Rung.OLD_ADDRESS, "address": "10.9.8.99"})
    manifest = found.manifest.model_copy(update={"isolation": isolation})

    class Remembering:
        def __init__(self, store: object) -> None:
            self._store = store

        def find(self, reference: str) -> object:
            return found.model_copy(update={"manifest": manifest})

        def __getattr__(self, name: str) -> object:
            return getattr(self._store, name)

    world = replace(lab.process(), store=Remembering(lab.store))  # type: ignore[arg-type]
    with answering(lab, ("10.9.8.99", 22)):
        assert forwarding(22, policy=None)(world, FaultCancel()).address == "10.9.8.99"


def test_on_a_network_the_host_connects_as_its_routing_says(tmp_path: Path) -> None:
    lab = prepared(tmp_path, network="default")
    lab.host.machines["test"].addresses = (IPv4Interface("192.0.2.9/24"),)
    with socket.create_server(("127.0.0.1", 0)) as server:
        lab.production_door = server.getsockname()[1]
        assert done(run(lab, forwarding())).address == "192.0.2.9"
    assert lab.residences.opened == []


# What is said when it is not there


def test_an_unknown_one_is_named_with_those_that_exist(lab: FakeWorld) -> None:
    options = ForwardOptions(port=1)
    with pytest.raises(EnvironmentNotFoundError) as unknown:
        forward(
            lab.process(),
            name="tset",
            options=options,
            policy=None,
            ready=print,
            waiting=(QuietProgress(), FaultCancel()),
        )
    assert "'test'" in (unknown.value.remedy or "")


def test_one_that_does_not_run_is_told(lab: FakeWorld) -> None:
    lab.host.machines["test"].state = GuestState.SHUT_OFF
    for work in (forwarding(), serving()):
        error = run(lab, work).error
        assert isinstance(error, PreconditionError)
        assert "shut off" in error.brief


def test_what_to_do_about_one_that_is_off_depends_on_where_it_is(lab: FakeWorld) -> None:
    """A fence that nothing proves anew must not be started into; a network of the hypervisor has nothing to prove."""
    lab.host.machines["test"].state = GuestState.SHUT_OFF
    remedy = _remedy(lab)
    assert "virsh start" not in remedy
    assert "vmsnap env destroy test" in remedy
    assert f"vmsnap provision {lab.state.environments.get('test').snapshot} --name test" in remedy
    lab.host.machines["test"].state = GuestState.PAUSED
    assert "virsh resume test" in _remedy(lab)
    environment = lab.state.environments.get("test")
    lab.state.environments.replace(replace(environment, network="default"))
    lab.host.machines["test"].state = GuestState.SHUT_OFF
    assert "virsh start test" in _remedy(lab)


def _remedy(lab: FakeWorld) -> str:
    error = run(lab, forwarding()).error
    assert isinstance(error, PreconditionError)
    return error.remedy or ""


def test_a_closed_port_is_told_soon(lab: FakeWorld) -> None:
    lab.residences.living[OLD.ip] = lab.host.machines["test"].macs[0]
    lab.network.servers[str(OLD.ip), 5432] = closed_port()
    before = lab.clock.monotonic()
    error = run(lab, forwarding()).error
    assert isinstance(error, PreconditionError)
    assert "nothing listens on port 5432" in error.brief
    assert lab.clock.monotonic() - before < 15
    assert all(residence.closed for residence in lab.residences.residences)


def test_one_that_ends_ends_the_forward(lab: FakeWorld) -> None:
    lab.residences.living[OLD.ip] = lab.host.machines["test"].macs[0]

    def ready(_: ForwardReport) -> None:
        lab.host.machines["test"].state = GuestState.SHUT_OFF

    with answering(lab, (str(OLD.ip), 5432)), pytest.raises(PreconditionError, match="does not run"):
        forward(
            lab.process(),
            name="test",
            options=ForwardOptions(port=5432),
            policy=POLICY,
            ready=ready,
            waiting=(QuietProgress(), FaultCancel()),
        )
    assert all(relay.closed for relay in lab.services.relays)


def test_stopped_before_it_answers(lab: FakeWorld) -> None:
    cancel = FaultCancel()
    cancel.asked = True
    with pytest.raises(CancelledError):
        forwarding()(lab.process(), cancel)


# Served


@pytest.fixture
def served(lab: FakeWorld) -> Iterator[FakeWorld]:
    lab.residences.living[OLD.ip] = lab.host.machines["test"].macs[0]
    with answering(lab, (str(OLD.ip), 22), (str(OLD.ip), 5432)):
        yield lab


def test_a_service_address_is_the_same_every_time_and_goes_with_the_environment(served: FakeWorld) -> None:
    reports = []
    for _ in range(2):
        outcome = run(served, serving())
        assert isinstance(outcome.result, ServeReport), outcome.error
        reports.append(outcome.result)
        assert order(served) == []
    first, second = reports
    assert first == second
    assert first.ports == (22, 5432)
    assert IPv4Address(first.service_address) in IPv4Network("198.18.0.0/15")
    assert (first.dns_name, first.warnings) == (NAME, ())
    assert {relay.address for relay in served.services.relays} == {
        (first.service_address, port) for port in first.ports
    }
    assert served.dns.records[NAME][0] == IPv4Address(first.service_address)
    environment = served.state.environments.get("test")
    status = status_of(served.process(), environment)
    assert (status.service_address, status.dns_name) == (first.service_address, NAME)
    succeed(served, destroy())
    assert served.services.made == {}
    assert served.dns.records == {}


def test_serving_without_names_or_a_policy(served: FakeWorld) -> None:
    outcome = run(served, serving(POLICY.model_copy(update={"environment": EnvironmentPolicy()}), 22))
    assert isinstance(outcome.result, ServeReport)
    assert (outcome.result.ports, outcome.result.dns_name, outcome.result.warnings) == ((22,), None, ())
    outcome = run(served, serving(None))
    assert isinstance(outcome.error, PreconditionError)
    assert "--port" in (outcome.error.remedy or "")


def test_one_on_a_network_is_not_served(tmp_path: Path) -> None:
    outcome = run(prepared(tmp_path, network="default"), serving())
    assert isinstance(outcome.error, PreconditionError)
    assert "default" in outcome.error.brief


@pytest.mark.parametrize("mode", sorted(DEATHS))
def test_serving_that_dies_anywhere_leaves_an_environment_that_can_be_served_and_destroyed(
    tmp_path: Path, mode: Mode
) -> None:
    def prepare(folder: Path) -> FakeWorld:
        lab = prepared(folder)
        lab.residences.living[OLD.ip] = lab.host.machines["test"].macs[0]
        lab.network.servers[str(OLD.ip), 22] = lab.network.servers[str(OLD.ip), 5432] = address
        return lab

    with socket.create_server(("127.0.0.1", 0), backlog=512) as server:
        address = server.getsockname()
        calls = run(prepare(tmp_path / "good"), serving()).calls
        # Not after a connection was opened: nobody is left who could close that socket here.
        numbers = [call.number for call in calls if mode is Mode.DIE_BEFORE or "connector()" not in call.name]
        assert len(numbers) >= 15
        for number in numbers:
            lab = prepare(tmp_path / f"{number}")
            outcome = invoke(lab, serving(), Fault(call=number, mode=mode))  # type: ignore[arg-type]
            where = outcome.hit[0].name
            for relay in lab.services.relays:
                relay.close()  # the kernel does, when a process dies
            assert recovers(lab) == [], where
            again = run(lab, serving())
            assert isinstance(again.result, ServeReport), (where, again.error)
            assert simply(lab, destroy()).error is None, where
            assert (lab.services.made, lab.dns.records) == ({}, {}), where
            assert order(lab) == [], where


# Names


def test_provisioning_registers_one_on_a_network_that_was_waited_for(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    succeed(lab, backup())
    lab.host.environment_addresses = (IPv4Interface("192.0.2.9/24"),)
    report = succeed(lab, provisioning(network="default", wait=True)).result
    assert isinstance(report, ProvisionReport)
    assert (report.address, report.dns_name, report.warnings) == ("192.0.2.9", NAME, ())
    assert report.reach == "vmsnap env forward test PORT"
    assert lab.dns.records[NAME][0] == IPv4Address("192.0.2.9")
    succeed(lab, destroy())
    assert lab.dns.records == {}


@pytest.mark.parametrize(
    ("network", "said"),
    [(None, "vmsnap env serve"), ("default", "vmsnap env register")],
    ids=["fenced", "not waited for"],
)
def test_without_an_address_nothing_is_registered_and_the_report_says_how(
    tmp_path: Path, network: str | None, said: str
) -> None:
    lab = FakeWorld(tmp_path)
    succeed(lab, backup())
    report = succeed(lab, provisioning(network=network)).result
    assert isinstance(report, ProvisionReport)
    assert report.dns_name is None
    (warning,) = report.warnings
    assert said in warning
    assert lab.dns.records == {}


@pytest.mark.parametrize("trouble", ["down", "key", "zone", "taken", "unanswered"])
def test_trouble_with_the_dns_is_a_warning(tmp_path: Path, trouble: str) -> None:
    lab = FakeWorld(tmp_path)
    succeed(lab, backup())
    lab.host.environment_addresses = (IPv4Interface("192.0.2.9/24"),)
    match trouble:
        case "down":
            lab.dns.up = False
        case "key":
            lab.dns.keys = frozenset()
        case "zone":
            lab.dns.zones = frozenset()
        case "taken":
            lab.dns.records[NAME] = (IPv4Address("192.0.2.1"), "somebody")
        case _:
            lab.dns.forgets_to_answer = True
    report = succeed(lab, provisioning(network="default", wait=True)).result
    assert isinstance(report, ProvisionReport)
    assert (report.state, report.dns_name, len(report.warnings)) == (GuestState.RUNNING, None, 1)
    environment = lab.state.environments.get("test")
    kept = status_of(lab.process(), environment).dns_name
    assert kept == (NAME if trouble == "unanswered" else None), "what may be registered is remembered"
    with pytest.raises((HeldError, PreconditionError, DriverError)):
        register(lab.process(), environment, policy=POLICY.environment)
    lab.end()
    lab.dns.forgets_to_answer = False
    succeed(lab, destroy())
    assert lab.dns.records == ({NAME: (IPv4Address("192.0.2.1"), "somebody")} if trouble == "taken" else {})


def test_a_server_that_is_gone_keeps_the_name_and_not_the_environment(served: FakeWorld) -> None:
    run(served, serving())
    served.dns.up = False
    error = simply(served, destroy()).error
    assert isinstance(error, CleanupError)
    assert "DNS" in error.brief
    assert served.state.environments.all() == ()
    assert "test" not in served.host.machines
    served.dns.up = True
    assert recovers(served) == []
    assert served.dns.records == {}


@pytest.mark.parametrize("mode", list(Mode))
def test_any_fault_while_provisioning_with_a_name(tmp_path: Path, mode: Mode) -> None:
    def prepare(folder: Path) -> FakeWorld:
        lab = FakeWorld(folder)
        succeed(lab, backup())
        lab.host.environment_addresses = (IPv4Interface("192.0.2.9/24"),)
        return lab

    def afterwards(lab: FakeWorld, outcome: Outcome) -> list[str]:
        wrong = recovers(lab)
        if lab.state.environments.all():
            error = simply(lab, destroy()).error
            wrong += [] if error is None else [f"destroy: {error!r}"]
        return wrong + [f"still registered: {name}" for name in lab.dns.records] + order(lab)

    trial = Trial(prepare=prepare, work=provisioning(network="default", wait=True))
    trial.every(tmp_path, mode, after=afterwards)
    assert trial.count > 25


# Clones


CLONE_AT = "198.18.7.10"  # where the fake ladder moves clones
LOOKED_ON = Policy(guest="db", isolation=IsolationPolicy(address="always", clone_ports=(5432, 22)))


def test_a_clone_is_served_while_it_drains(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    seen: list[tuple[str, int]] = []

    def look(_domain: str, _command: object) -> None:
        for relay in lab.services.relays:
            if not relay.closed and relay.address not in seen:
                relay.connect().close()
                seen.append(relay.address)

    lab.host.before_command = look
    with answering(lab, (CLONE_AT, 22), (CLONE_AT, 5432)):
        report = succeed(lab, backup(LOOKED_ON)).result
    assert isinstance(report, BackupReport)
    assert report.warnings == ()
    assert [port for _, port in seen] == [5432, 22]
    assert all(relay.closed for relay in lab.services.relays)
    assert lab.services.made == {}


@pytest.mark.parametrize("trouble", ["no address", "no room"])
def test_a_clone_that_cannot_be_served_is_backed_up_with_a_warning(tmp_path: Path, trouble: str) -> None:
    lab = FakeWorld(tmp_path)
    policy = LOOKED_ON
    if trouble == "no address":
        policy = Policy(guest="db", isolation=IsolationPolicy(clone_ports=(22,)))
    else:
        policy = Policy(guest="db", isolation=IsolationPolicy(address="always", clone_ports=(22, 22)))
    report = succeed(lab, backup(policy)).result
    assert isinstance(report, BackupReport)
    (warning,) = report.warnings
    assert "served" in warning
    assert all(relay.closed for relay in lab.services.relays)


@pytest.mark.parametrize("mode", list(Mode))
def test_any_fault_while_serving_a_clone(tmp_path: Path, mode: Mode) -> None:
    """Only where services are touched: the rest of a backup has its own trials."""
    good = invoke(FakeWorld(tmp_path / "good"), backup(LOOKED_ON))
    numbers = [call.number for call in good.calls if call.name.startswith("services.") and ".owned" not in call.name]
    assert len(numbers) >= 5
    for number in numbers:
        lab = FakeWorld(tmp_path / f"{number}")
        outcome = invoke(lab, backup(LOOKED_ON), Fault(call=number, mode=mode))
        name = outcome.hit[0].name
        if mode not in DEATHS and mode is not Mode.CANCEL and ".release" not in name:
            assert isinstance(outcome.result, BackupReport), (name, outcome.error)
            assert outcome.result.warnings or name.endswith(".close"), name
        assert recovers(lab) == [], name
        assert lab.services.made == {}, name
