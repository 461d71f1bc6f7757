"""What a backup does, and refuses to do."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from typing import Literal

import pytest

from tests.workflow.invocations import POLICY, Outcome, backup, invoke, order, provision, simply, succeed
from vmsnap.engines.pg_control import ClusterState
from vmsnap.errors import (
    BusyError,
    CancelledError,
    CleanupError,
    DeadlineError,
    ExitCode,
    GuestCommandError,
    GuestNotFoundError,
    GuestUnreachableError,
    IsolationError,
    NoSpaceError,
    NotCleanError,
    PreconditionError,
    SafetyError,
    VmsnapError,
)
from vmsnap.model.admission import HostMemory, Place
from vmsnap.model.command import Command, CommandResult
from vmsnap.model.drain import CleanShutdown, FileSystemState, InstanceEvidence
from vmsnap.model.guest import Finding, GuestState, Severity
from vmsnap.model.ids import RunId
from vmsnap.model.isolation import DEFAULT_LADDER, Addressed, Exchange, Rung
from vmsnap.model.policy import (
    ControlPolicy,
    DatabasePolicy,
    IsolationPolicy,
    Policy,
    SshPolicy,
)
from vmsnap.model.report import BackupReport
from vmsnap.model.retention_policy import RetentionPolicy
from vmsnap.ports.clock import Cancel
from vmsnap.ports.network import AddressRequest, LinkControl
from vmsnap.testing.fake_disks import FakeDiskInspector
from vmsnap.testing.fake_host import RAM_BYTES, ImageFile
from vmsnap.testing.fake_network import FakeAddressing, RungOutcome
from vmsnap.testing.fake_postgresql import FakeCluster
from vmsnap.testing.faults import Fault, Mode
from vmsnap.testing.world import START, FakeWorld, QuietProgress
from vmsnap.workflow.backup import Backup
from vmsnap.workflow.guard import ISOLATION_ALARM
from vmsnap.workflow.whereabouts import ADDRESS_QUESTION
from vmsnap.workflow.world import World

CLONE_ADDRESS = "198.18.7.10"
BY_SSH = Policy(guest="db", control=ControlPolicy(ssh=SshPolicy(key_file="/etc/vmsnap/key")))


def report_of(outcome: Outcome) -> BackupReport:
    assert isinstance(outcome.result, BackupReport)
    return outcome.result


def refused(lab: FakeWorld, policy: Policy = POLICY) -> VmsnapError:
    """Run a backup that must be refused before anything is touched, with a remedy; return the refusal."""
    outcome = invoke(lab, backup(policy))
    assert isinstance(outcome.error, VmsnapError)
    touched = [call.name for call in outcome.calls if ".prepare" in call.name or call.name == "journals.begin"]
    assert touched == []
    assert lab.leftovers() == ()
    assert lab.state.runs == {}
    return outcome.error


def failed(lab: FakeWorld, policy: Policy = POLICY) -> VmsnapError:
    """Run a backup that must fail, leave everything in order and store nothing; return the error."""
    before = lab.store.snapshots()
    outcome = simply(lab, backup(policy))
    assert isinstance(outcome.error, VmsnapError)
    assert outcome.error.also == []
    assert order(lab) == []
    assert lab.store.snapshots() == before
    return outcome.error


# Good runs


def test_a_good_run_tells_everything(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path, disks=2)
    report = report_of(succeed(lab, backup()))
    (snapshot,) = lab.store.snapshots("db")
    assert (report.snapshot, report.guest) == (snapshot.id, "db")
    (drain,) = report.drain
    assert (drain.in_flight_at_start, drain.finished, drain.rolled_back) == (3, 2, 1)
    assert report.capture.pause_ms == 25
    assert report.capture.captured.tzinfo is not None
    assert (report.isolation.rung, report.isolation.address) == (Rung.NONE, None)
    assert report.isolation.proof
    assert {item.method for item in report.clean.instances} == {"disk", "in-guest"}
    assert [state.disk for state in report.clean.file_systems] == ["vda", "vdb"]
    assert [disk.target for disk in snapshot.manifest.disks] == ["vda", "vdb"]
    assert report.store.logical_bytes == sum(disk.size_bytes for disk in snapshot.manifest.disks)
    assert report.warnings == ()
    names = [step.name for step in report.steps]
    assert names[-2:] == ["discard", "prune"]
    assert names.index("capture") < names.index("prove fence") < names.index("resume clone") < names.index("store")
    assert snapshot.manifest.parent is None
    again = report_of(succeed(lab, backup()))
    assert lab.store.find(again.snapshot).manifest.parent == snapshot.id


def test_only_pings_reach_the_source(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    asked: list[str] = []
    lab.host.before_command = lambda domain, _command: asked.append(domain)
    succeed(lab, backup())
    assert asked
    assert all(domain.startswith("vmsnap-clone-") for domain in asked)
    assert lab.host.machines["db"].guest.commands == []
    assert lab.host.machines["db"].guest.clusters[0].log == []


def test_a_guest_frozen_by_another_tool_is_thawed_in_the_clone_alone(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    lab.host.machines["db"].guest.frozen = True
    report_of(succeed(lab, backup()))
    assert lab.host.machines["db"].guest.frozen


def test_all_clusters_of_a_guest_are_drained_and_proven(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    second = FakeCluster(data_directory="/srv/pg/two", port=5433, pid=2000, will_finish=4)
    lab.host.machines["db"].guest.clusters.append(second)
    report = report_of(succeed(lab, backup()))
    assert [drain.in_flight_at_start for drain in report.drain] == [3, 4]
    assert len({item.instance for item in report.clean.instances}) == 2


def test_a_preflight_warning_is_in_the_report(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    lab.host.findings.append(Finding(check="memory", severity=Severity.WARNING, message="huge pages"))
    assert report_of(succeed(lab, backup())).warnings == ("memory: huge pages",)


def test_firmware_variables_are_kept_and_given_to_environments(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    variables = tmp_path / "db_VARS.fd"
    variables.write_bytes(b"boot order")
    lab.host.machines["db"].nvram = str(variables)
    report = report_of(succeed(lab, backup()))
    snapshot = lab.store.find(report.snapshot)
    assert snapshot.manifest.machine.nvram == "nvram.fd"
    assert lab.store.file(snapshot, name="nvram.fd").read_bytes() == b"boot order"
    succeed(lab, provision())


def test_by_ssh_where_there_is_no_agent(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    lab.host.machines["db"].has_agent_channel = False
    lab.addressing = FakeAddressing({Rung.OLD_ADDRESS: RungOutcome(CLONE_ADDRESS)})
    with lab.ssh_servers(clone_address=CLONE_ADDRESS):
        report = report_of(succeed(lab, backup(BY_SSH)))
    assert (report.isolation.rung, report.isolation.address) == (Rung.OLD_ADDRESS, CLONE_ADDRESS)
    assert [attempt.rung for attempt in report.isolation.attempts] == list(DEFAULT_LADDER)
    assert report.clean.guest_shut_down_by == "ACPI"
    (request,) = lab.addressing.requests
    assert request.old_addresses[0].interface == IPv4Interface("10.0.0.1/24")
    assert request.probe_port == 22


def test_the_rung_that_worked_is_tried_first_next_time_and_the_journal_tells_each(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    lab.host.machines["db"].has_agent_channel = False
    lab.addressing = FakeAddressing({Rung.OLD_ADDRESS: RungOutcome(CLONE_ADDRESS)})
    with lab.ssh_servers(clone_address=CLONE_ADDRESS):
        for _ in range(2):
            report = report_of(succeed(lab, backup(BY_SSH)))
        lab.addressing.outcomes = {Rung.LINK_FLAP: RungOutcome(CLONE_ADDRESS)}
        third = report_of(succeed(lab, backup(BY_SSH)))
    assert [attempt.rung for attempt in report.isolation.attempts] == [Rung.OLD_ADDRESS]
    assert [attempt.rung for attempt in third.isolation.attempts] == [Rung.OLD_ADDRESS, Rung.FORCERENEW, Rung.LINK_FLAP]
    assert lab.state.rungs.recall("db") is Rung.LINK_FLAP
    journals = [run.notes for run in lab.state.runs.values()]
    assert [len(notes) for notes in journals] == [6, 2, 6]
    assert journals[1] == ["rung old-address began", "rung old-address ended"]


def test_a_rung_that_the_policy_no_longer_allows_is_forgotten(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    lab.state.rungs.remember("db", rung=Rung.HOT_PLUG)
    report_of(succeed(lab, backup(Policy(guest="db", isolation=IsolationPolicy(address="always")))))
    (request,) = lab.addressing.requests
    assert request.ladder == DEFAULT_LADDER


def test_the_ladder_is_told_what_was_seen_in_production(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    mac = lab.host.machines["db"].macs[0]
    seen = Exchange(
        mac=mac.upper(), address=IPv4Address("10.0.0.1"), server=IPv4Address("10.0.0.254"), xid=7,
        seen=datetime(2026, 11, 20, tzinfo=UTC), nonce=bytes(16),
    )  # fmt: skip
    lab.state.exchanges.put(seen)
    always = IsolationPolicy(
        address="always", ladder=(Rung.AGENT, Rung.LINK_FLAP), deadlines={Rung.AGENT: timedelta(7)}
    )
    succeed(lab, backup(Policy(guest="db", isolation=always)))
    succeed(lab, backup(Policy(guest="db", isolation=always.model_copy(update={"exchanges": "none"}))))
    first, second = lab.addressing.requests
    assert (first.exchanges, second.exchanges) == ((seen,), ())
    assert first.deadlines == {Rung.AGENT: timedelta(7)}
    assert first.agent is not None


@pytest.mark.parametrize(
    ("static", "dynamic", "exchanged", "expected"),
    [
        ("auto", None, False, False),
        ("auto", False, False, True),
        ("auto", True, False, False),
        ("auto", False, True, False),
        (True, True, True, True),
        (False, False, False, False),
    ],
)
def test_static_addresses_are_known_from_the_policy_or_the_agent(
    *, static: Literal["auto"] | bool, dynamic: bool | None, exchanged: bool, expected: bool, tmp_path: Path
) -> None:
    lab = FakeWorld(tmp_path)
    machine = lab.host.machines["db"]
    (mac,) = machine.macs
    address = {"scope": "global", "local": "10.0.0.1"} | ({"dynamic": True} if dynamic else {})
    if dynamic is not None:
        told = json.dumps([{"ifname": "eth0", "address": mac.upper(), "addr_info": [address]}]).encode()
        machine.guest.extra[ADDRESS_QUESTION.argv] = CommandResult(exit_status=0, stdout=told)
    if exchanged:
        lab.state.exchanges.put(
            Exchange(mac=mac, address=IPv4Address("10.0.0.1"), server=IPv4Address("10.0.0.254"), xid=7, seen=START)
        )
    succeed(lab, backup(Policy(guest="db", isolation=IsolationPolicy(address="always", static=static))))
    (request,) = lab.addressing.requests
    assert request.static_macs == (frozenset({mac}) if expected else frozenset())


HOT_PLUG = Policy(guest="db", isolation=IsolationPolicy(address="always", ladder=(Rung.HOT_PLUG, Rung.LINK_FLAP)))


def test_a_clone_whose_fence_cannot_be_proven_after_its_card_was_plugged_anew_is_ended(tmp_path: Path) -> None:
    class Holed(FakeAddressing):
        def move(self, request: AddressRequest, *, links: LinkControl, cancel: Cancel) -> Addressed:
            lab.network.fences[request.fence.run].intact = False
            return super().move(request, links=links, cancel=cancel)

    lab = FakeWorld(tmp_path)
    lab.addressing = Holed({Rung.HOT_PLUG: RungOutcome(CLONE_ADDRESS)})
    error = failed(lab, HOT_PLUG)
    assert isinstance(error, IsolationError)
    assert error.exit_code is ExitCode.SAFETY
    assert lab.host.machines["db"].state is GuestState.RUNNING


def test_a_guest_that_keeps_its_card_is_tried_by_the_next_rung(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    lab.addressing = FakeAddressing(
        {Rung.HOT_PLUG: RungOutcome(CLONE_ADDRESS), Rung.LINK_FLAP: RungOutcome(CLONE_ADDRESS)}
    )
    lab.host.keeps_nics = True
    report = report_of(succeed(lab, backup(HOT_PLUG)))
    first, second = report.isolation.attempts
    assert (first.rung, second.rung) == (Rung.HOT_PLUG, Rung.LINK_FLAP)
    assert "did not let go" in (first.failure or "")


def test_production_is_asked_nothing_where_no_address_is_needed(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    succeed(lab, backup())
    assert lab.host.machines["db"].guest.commands == []


def test_an_address_is_given_beside_the_agent_where_the_policy_wants_one(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    policy = Policy(guest="db", isolation=IsolationPolicy(address="always"))
    report = report_of(succeed(lab, backup(policy)))
    assert (report.isolation.rung, report.isolation.address) == (Rung.LINK_FLAP, CLONE_ADDRESS)
    assert report.clean.guest_shut_down_by == "guest agent"


# Side by side


def test_a_second_backup_of_the_guest_is_busy_and_another_guest_goes_on(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    lab.add_guest("mail")
    beside: list[object] = []

    def in_the_middle(_domain: str, _command: Command) -> None:
        lab.host.before_command = lambda _domain, _command: None
        for policy in (POLICY, Policy(guest="mail")):
            other = Backup(lab.process(), policy=policy, progress=QuietProgress(), cancel=_Never())
            try:
                beside.append(other.run())
            except BusyError as error:
                beside.append(error)

    lab.host.before_command = in_the_middle
    mine = report_of(succeed(lab, backup()))
    busy, other = beside
    assert isinstance(busy, BusyError)
    assert busy.exit_code is ExitCode.BUSY
    assert isinstance(other, BackupReport)
    assert [snapshot.manifest.guest for snapshot in lab.store.snapshots()] == ["db", "mail"]
    assert (mine.guest, other.guest) == ("db", "mail")


def test_without_room_for_its_clone_a_guest_is_not_touched(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    lab.host.memory_bytes = RAM_BYTES - 1
    assert isinstance(refused(lab), BusyError)
    lab.host.memory_bytes = RAM_BYTES
    other = Place(run=RunId("00000000ff"), guest="other", memory_bytes=RAM_BYTES)
    with lab.state.admissions.admitted(other, look=lambda: HostMemory(available_bytes=RAM_BYTES)):
        assert "promised to others" in refused(lab).brief
    assert lab.state.runs == {}
    succeed(lab, backup())
    assert lab.state.places == {}


def test_a_reconcile_beside_it_touches_nothing_of_a_living_run(tmp_path: Path) -> None:
    from vmsnap.workflow.reconcile import reconcile  # noqa: PLC0415 - named as what runs beside

    lab = FakeWorld(tmp_path)
    undone: list[object] = []
    lab.host.before_command = lambda _domain, _command: undone.extend(reconcile(lab.process()).undone)
    succeed(lab, backup())
    assert undone == []


def test_what_a_dead_run_of_the_guest_left_is_undone_first_even_where_another_reconciles(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    good = invoke(FakeWorld(tmp_path / "good"), backup())
    number = next(call.number for call in good.calls if call.name == "fence.prove")
    invoke(lab, backup(), Fault(call=number, mode=Mode.DIE_BEFORE))

    def beside_a_reconcile(world: World, cancel: Cancel) -> object:
        with world.locks.reconcile():
            return backup()(world, cancel)

    outcome = simply(lab, beside_a_reconcile)
    assert isinstance(outcome.error, BusyError)
    assert lab.store.snapshots("db") == ()
    assert simply(lab, backup()).error is None


def test_a_reconcile_that_is_going_on_does_not_stop_a_backup(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)

    def work(world: World, cancel: Cancel) -> BackupReport:
        with world.locks.reconcile():
            return Backup(world, policy=POLICY, progress=QuietProgress(), cancel=cancel).run()

    succeed(lab, work)


# Retention


def test_it_keeps_what_the_policy_says(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    policy = Policy(guest="db", retention=RetentionPolicy(keep_last=2))
    reports = [report_of(succeed(lab, backup(policy))) for _ in range(4)]
    assert [len(report.pruned) for report in reports] == [0, 0, 1, 1]
    assert [snapshot.id for snapshot in lab.store.snapshots("db")] == [report.snapshot for report in reports[2:]]


def test_an_environment_holds_its_snapshot(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    policy = Policy(guest="db", retention=RetentionPolicy(keep_last=1))
    first = report_of(succeed(lab, backup(policy)))
    succeed(lab, provision())
    for _ in range(2):
        last = report_of(succeed(lab, backup(policy)))
    assert [snapshot.id for snapshot in lab.store.snapshots("db")] == [first.snapshot, last.snapshot]


# Refused before anything is touched


def _no_agent(lab: FakeWorld) -> None:
    lab.host.machines["db"].has_agent_channel = False


def _silent_agent(lab: FakeWorld) -> None:
    lab.host.machines["db"].guest.answers = False


def _stopped(lab: FakeWorld) -> None:
    lab.host.machines["db"].state = GuestState.SHUT_OFF


def _full_store(lab: FakeWorld) -> None:
    lab.store.capacity_bytes = 1


def _full_overlays(lab: FakeWorld) -> None:
    lab.host.free_bytes = 1


def _no_address(lab: FakeWorld) -> None:
    _no_agent(lab)
    lab.host.machines["db"].addresses = ()


AGENT_ONLY = Policy(guest="db", control=ControlPolicy(via="agent"))


@pytest.mark.parametrize(
    ("spoil", "policy", "words"),
    [
        (_no_agent, POLICY, "no way to run commands in 'db'"),
        (_silent_agent, POLICY, "no way to run commands in 'db'"),
        (_silent_agent, AGENT_ONLY, "the guest agent of 'db' does not answer"),
        (_no_address, BY_SSH, "the address of 'db' is not known"),
        (_stopped, POLICY, "shut off"),
        (_full_store, POLICY, "the store cannot take a snapshot"),
        (_full_overlays, POLICY, "too little room"),
    ],
)
def test_it_refuses_before_it_touches_anything(
    tmp_path: Path, spoil: Callable[[FakeWorld], None], policy: Policy, words: str
) -> None:
    lab = FakeWorld(tmp_path)
    spoil(lab)
    error = refused(lab, policy)
    assert isinstance(error, PreconditionError)
    assert error.exit_code is ExitCode.PRECONDITION
    assert words in error.brief
    assert error.remedy


def test_an_unknown_guest_is_refused(tmp_path: Path) -> None:
    error = refused(FakeWorld(tmp_path), Policy(guest="no such/guest"))
    assert isinstance(error, GuestNotFoundError)
    assert "no such/guest" in error.brief


def test_an_ssh_server_that_does_not_answer_is_refused(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    _no_agent(lab)
    error = refused(lab, BY_SSH)
    assert isinstance(error, PreconditionError)
    assert "does not answer" in error.brief


# Failed: undone, and nothing stored


def test_a_database_that_was_stopped_immediately_is_not_stored(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    lab.host.machines["db"].guest.clusters[0].stops_as = ClusterState.IN_PRODUCTION
    error = failed(lab)
    assert isinstance(error, NotCleanError)
    assert error.exit_code is ExitCode.SAFETY
    assert "in production" in (error.details or "")


def test_a_database_that_comes_back_is_not_stored(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    lab.host.machines["db"].guest.clusters[0].comes_back = True
    assert isinstance(failed(lab), NotCleanError)


def test_a_database_that_comes_up_while_the_others_are_drained_is_not_stored(tmp_path: Path) -> None:
    """Nobody found it, drained it, or would look at its files; the power-off would end it, and all else would be clean."""
    lab = FakeWorld(tmp_path)
    late = FakeCluster(data_directory="/srv/pg/late", port=5433, pid=2000, status="", comes_up_late=True)
    lab.host.machines["db"].guest.clusters.append(late)
    error = failed(lab)
    assert isinstance(error, NotCleanError)
    assert "process id 2000" in error.brief


def test_a_database_of_the_snapshot_before_that_does_not_run_is_told(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    second = FakeCluster(data_directory="/srv/pg/two", port=5433, pid=2000)
    lab.host.machines["db"].guest.clusters.append(second)
    assert report_of(succeed(lab, backup())).warnings == ()
    second.status = ""
    (warning,) = report_of(succeed(lab, backup())).warnings
    assert "/srv/pg/two" in warning


def test_a_dirty_file_system_is_not_stored(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    lab.inspector = _DirtyInspector()
    error = failed(lab)
    assert isinstance(error, NotCleanError)
    assert "needs_recovery" in (error.details or "")


def test_a_disk_without_any_file_system_is_not_stored(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    lab.inspector = _BlankInspector()
    assert isinstance(failed(lab), PreconditionError | NotCleanError)


@pytest.mark.parametrize(("how", "kind"), [("destroyed", NotCleanError), ("hangs", DeadlineError)])
def test_a_clone_that_does_not_shut_down_in_order_is_not_stored(
    tmp_path: Path, how: str, kind: type[VmsnapError]
) -> None:
    lab = FakeWorld(tmp_path)
    lab.host.shutdown = how
    assert isinstance(failed(lab), kind)


def test_a_clone_killed_at_any_command_is_reported_and_harms_nobody(tmp_path: Path) -> None:
    commands: list[str] = []
    lab = FakeWorld(tmp_path / "good")
    lab.host.before_command = lambda domain, _command: commands.append(domain)
    succeed(lab, backup())
    for number in range(len(commands)):
        lab = FakeWorld(tmp_path / f"{number}")
        lab.host.before_command = _killer(lab, after=number)
        assert isinstance(failed(lab), GuestUnreachableError), number


def backed_up_while(lab: FakeWorld, happens: Callable[[str], None]) -> Outcome:
    """Back up; ``happens`` is called in between what the hypervisor does."""

    def work(world: World, cancel: Cancel) -> BackupReport:
        lab.host.between = happens
        return Backup(world, policy=POLICY, progress=QuietProgress(), cancel=cancel).run()

    return invoke(lab, work)


def clones_of(lab: FakeWorld) -> set[str]:
    # A copy: guards end clones beside this.
    return {machine for machine in tuple(lab.host.machines) if machine.startswith("vmsnap-clone-")}


def tear_fences(lab: FakeWorld) -> None:
    for fence in lab.network.fences.values():
        fence.intact = False


def test_a_fence_that_cannot_be_proven_never_runs_a_clone(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)

    def tear(name: str) -> None:
        if name == "the clone is there":
            tear_fences(lab)

    outcome = backed_up_while(lab, tear)
    assert isinstance(outcome.error, IsolationError)
    assert "hypervisor.resume_clone" not in [call.name for call in outcome.calls]
    assert order(lab) == []


def test_a_clone_ended_before_it_ran_is_no_breach_of_its_fence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its taps went with it, so its fence cannot be proven: that is said of the space, and nobody is alarmed."""
    lab = FakeWorld(tmp_path)

    def fill(name: str) -> None:
        if name == "the clone is there":
            lab.host.free_bytes = 100 << 20
            deadline = time.monotonic() + 20
            while clones_of(lab):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            tear_fences(lab)

    outcome = backed_up_while(lab, fill)
    assert isinstance(outcome.error, NoSpaceError), outcome.error
    assert "fence.prove" in [call.name for call in outcome.calls]
    assert ISOLATION_ALARM not in caplog.text
    assert order(lab) == []


def test_a_clone_that_the_kernel_ended_before_it_ran_is_no_breach_of_its_fence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lab = FakeWorld(tmp_path)

    def end(name: str) -> None:
        if name == "the clone is there":
            for machine in clones_of(lab):
                del lab.host.machines[machine]
            tear_fences(lab)

    outcome = backed_up_while(lab, end)
    assert isinstance(outcome.error, NotCleanError), outcome.error
    assert "OOM killer" in str(outcome.error.remedy)
    assert ISOLATION_ALARM not in caplog.text
    assert order(lab) == []


def test_overlay_space_that_runs_out_ends_the_clone_and_the_run(tmp_path: Path) -> None:
    """The drain would take long; the guard ends it within its interval."""
    lab = FakeWorld(tmp_path)
    waited: list[float] = []

    def fill(domain: str, command: Command) -> None:
        if any(word.startswith("VMSNAP_PGDATA") for word in command.argv):
            lab.host.free_bytes = 100 << 20
            began = time.monotonic()
            while domain in lab.host.machines and time.monotonic() < began + 30:
                time.sleep(0.01)
            waited.append(time.monotonic() - began)

    lab.host.before_command = fill
    error = failed(lab)
    assert isinstance(error, NoSpaceError)
    assert "100 MiB" in error.brief
    assert waited[0] < 20


def test_the_wrong_ssh_server_in_the_fence_is_refused(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    _no_agent(lab)
    policy = Policy(
        guest="db",
        control=ControlPolicy(ssh=SshPolicy(key_file="/etc/vmsnap/key", host_key="ssh-ed25519 AAAAanother")),
    )
    with lab.ssh_servers(clone_address=CLONE_ADDRESS):
        assert "host key" in failed(lab, policy).brief


def test_a_rung_that_never_works_is_a_deadline(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    _no_agent(lab)
    lab.addressing = FakeAddressing({})
    with lab.ssh_servers(clone_address=CLONE_ADDRESS):
        assert isinstance(failed(lab, BY_SSH), DeadlineError)


def test_a_failing_command_of_the_policy_ends_the_run(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    policy = Policy(guest="db", database=DatabasePolicy(before_drain=(("true",), ("false",))))
    error = failed(lab, policy)
    assert isinstance(error, GuestCommandError)
    assert "false ended with status 1" in error.brief


def test_a_guest_without_a_database_is_refused_and_undone(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    lab.host.machines["db"].guest.clusters.clear()
    assert "no PostgreSQL server runs" in failed(lab).brief


def test_a_guest_that_talks_rubbish_is_an_error_not_a_crash(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    lab.host.machines["db"].guest.clusters[0].drain_seconds = -1
    error = failed(lab)
    assert isinstance(error, GuestCommandError)
    assert "makes no sense" in error.brief


def test_a_store_that_fills_up_in_the_middle_is_undone(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    succeed(lab, backup())

    def fill(_domain: str, _command: Command) -> None:
        lab.store.capacity_bytes = 10

    lab.host.before_command = fill
    assert isinstance(failed(lab), NoSpaceError)


@pytest.mark.parametrize("step", ["capture", "restore clone", "drain", "stop databases", "shut down clone", "store"])
def test_a_signal_in_any_step_is_obeyed(tmp_path: Path, step: str) -> None:
    lab = FakeWorld(tmp_path)
    asking = _AskedIn(step)

    def work(world: World, _cancel: Cancel) -> BackupReport:
        return Backup(world, policy=POLICY, progress=asking, cancel=asking).run()

    outcome = simply(lab, work)
    assert isinstance(outcome.error, CancelledError)
    assert outcome.error.exit_code is ExitCode.DEADLINE
    assert order(lab) == []
    assert lab.store.snapshots() == ()
    assert set(asking.steps[asking.steps.index(step) + 1 :]) <= {"restore clone", "prove fence", "discard"}


# Meanwhile, in production


def test_a_snapshot_that_somebody_else_took_meanwhile_loses_nothing(tmp_path: Path) -> None:
    """The guest is on a foreign overlay over ours: ours stays, and the run says what is left."""
    lab = FakeWorld(tmp_path)
    source = lab.host.machines["db"]

    def take(_domain: str, _command: Command) -> None:
        lab.host.before_command = lambda _domain, _command: None
        lab.host.files["/images/foreign.qcow2"] = ImageFile(path="/images/foreign.qcow2", backing=source.live["vda"])
        source.live["vda"] = source.persistent["vda"] = "/images/foreign.qcow2"

    lab.host.before_command = take
    outcome = simply(lab, backup())
    assert isinstance(outcome.error, CleanupError)
    assert "foreign.qcow2" in (outcome.error.details or "")
    assert {item.kind for item in lab.leftovers()} == {"source-overlays"}
    assert lab.host.violations == []
    assert source.promised <= lab.host.content(source.live["vda"])
    assert lab.unfinished() != ()


def test_a_guest_that_is_not_on_its_own_disks_at_the_end_is_reported(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)

    def edit(_domain: str, _command: Command) -> None:
        lab.host.machines["db"].persistent["vda"] = "/images/moved.qcow2"

    lab.host.before_command = edit
    outcome = simply(lab, backup())
    assert isinstance(outcome.error, CleanupError)
    assert "'db' is not on its own disks" in (outcome.error.details or "")
    assert len(lab.store.snapshots("db")) == 1


@pytest.mark.parametrize("stops_at", ["tee", "pg_ctl"])
def test_a_guest_that_stops_meanwhile_keeps_what_it_wrote(tmp_path: Path, stops_at: str) -> None:
    lab = FakeWorld(tmp_path)

    def stop(_domain: str, command: Command) -> None:
        if any(word.endswith(stops_at) for word in command.argv):
            lab.host.machines["db"].state = GuestState.SHUT_OFF

    lab.host.before_command = stop
    outcome = simply(lab, backup())
    # Nobody can say any more that the clone did it no harm.
    assert isinstance(outcome.error, IsolationError) is (stops_at == "tee")
    assert order(lab) == ["db is shut off"]


def test_publishing_refuses_evidence_of_another_run(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    first = lab.store.find(report_of(succeed(lab, backup())).snapshot)
    mine = RunId("00000000a1")
    staging = lab.store.stage(mine, guest="db")
    evidence = CleanShutdown(
        run=first.manifest.run,
        made=datetime(2026, 11, 21, tzinfo=UTC),
        guest_shut_down_by="guest agent",
        instances=(
            InstanceEvidence(
                engine="postgresql", instance="main", data_directory="/d", method="disk", clean=True, observed=()
            ),
        ),
        file_systems=(FileSystemState(disk="vda", kind="ext4", uuid="u", clean=True, observed="clean"),),
    )
    with pytest.raises(SafetyError):
        lab.store.publish(staging, manifest=first.manifest, clean=evidence)
    assert [snapshot.id for snapshot in lab.store.snapshots()] == [first.id]


class _Never:
    def is_set(self) -> bool:
        return False

    def check(self) -> None:
        return


class _AskedIn(QuietProgress):
    """A progress and a cancel in one: somebody presses Ctrl-C as soon as a step begins."""

    def __init__(self, step: str) -> None:
        super().__init__()
        self._step = step

    def is_set(self) -> bool:
        return self._step in self.steps

    def check(self) -> None:
        if self.is_set():
            raise CancelledError("stopped by SIGINT")


class _DirtyInspector(FakeDiskInspector):
    """Every file system was left dirty, whatever the clone did."""

    def file_systems(self, views: object, *, timeout: timedelta) -> tuple[FileSystemState, ...]:
        (state,) = super().file_systems(views, timeout=timeout)  # type: ignore[arg-type]
        return (
            FileSystemState(
                disk=state.disk, kind=state.kind, uuid=state.uuid, clean=False, observed="state clean, needs_recovery"
            ),
        )


class _BlankInspector(FakeDiskInspector):
    """Nothing is found on any disk."""

    def file_systems(self, views: object, *, timeout: timedelta) -> tuple[FileSystemState, ...]:
        return ()


def _killer(lab: FakeWorld, *, after: int) -> Callable[[str, Command], None]:
    seen: list[str] = []

    def kill(domain: str, _command: Command) -> None:
        seen.append(domain)
        if len(seen) == after + 1:
            lab.host.kill(domain)

    return kill
