"""What provisioning does, and refuses to do; and the end of an environment."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from tests.workflow.invocations import backup, destroy, invoke, order, provision, simply, succeed
from vmsnap.errors import (
    CancelledError,
    CleanupError,
    EnvironmentNotFoundError,
    GuestUnreachableError,
    PreconditionError,
    SnapshotNotFoundError,
)
from vmsnap.model.environment import Environment
from vmsnap.model.guest import GuestState
from vmsnap.model.journal import ResourceKind
from vmsnap.model.policy import EnvironmentPolicy
from vmsnap.model.report import ProvisionOptions, ProvisionReport
from vmsnap.ports.clock import Cancel
from vmsnap.testing.faults import Call, Fault, FaultCancel, Mode
from vmsnap.testing.memory_state import MemoryEnvironmentBook, MemoryState
from vmsnap.testing.world import FakeWorld, QuietProgress
from vmsnap.workflow.provision import Provision, destroy_environment, status_of
from vmsnap.workflow.verify import verify
from vmsnap.workflow.world import World


@pytest.fixture
def lab(tmp_path: Path) -> FakeWorld:
    lab = FakeWorld(tmp_path, disks=2)
    succeed(lab, backup())
    return lab


def _provision(lab: FakeWorld, *, options: ProvisionOptions, policy: EnvironmentPolicy) -> ProvisionReport:
    def work(world: World, cancel: Cancel) -> ProvisionReport:
        making = Provision(world, options=options, policy=policy, progress=QuietProgress(), cancel=cancel)
        return making.run("db@latest")

    outcome = succeed(lab, work)
    assert isinstance(outcome.result, ProvisionReport)
    return outcome.result


def test_an_environment_runs_fenced_with_names_of_its_own(lab: FakeWorld) -> None:
    report = _provision(lab, options=ProvisionOptions(), policy=EnvironmentPolicy())
    (environment,) = lab.state.environments.all()
    assert report.environment == environment.name
    assert environment.name.startswith("db-test-")
    assert report.state is GuestState.RUNNING
    assert report.defined_ms <= report.running_ms
    assert report.expires == environment.created + timedelta(days=1)
    assert report.answered_ms is None
    machine, source = lab.host.machines[environment.name], lab.host.machines["db"]
    assert machine.uuid != source.uuid
    assert not set(machine.macs) & set(source.macs)
    assert machine.fence == environment.run
    assert set(machine.live) == {"vda", "vdb"}
    status = status_of(lab.process(), environment)
    assert (status.state, status.overlay_bytes > 0) == (GuestState.RUNNING, True)


def test_two_environments_of_one_snapshot_share_nothing(lab: FakeWorld) -> None:
    for name in ("one", "two"):
        _provision(lab, options=ProvisionOptions(name=name), policy=EnvironmentPolicy())
    one, two = lab.host.machines["one"], lab.host.machines["two"]
    assert one.uuid != two.uuid
    assert not set(one.macs) & set(two.macs)
    assert not set(one.live.values()) & set(two.live.values())
    succeed(lab, destroy("one"))
    assert lab.host.machines["two"].state is GuestState.RUNNING


def test_a_network_instead_of_a_fence_and_no_end(lab: FakeWorld) -> None:
    policy = EnvironmentPolicy(network="default", ttl=None)
    report = _provision(lab, options=ProvisionOptions(name="open"), policy=policy)
    assert report.expires is None
    assert lab.network.fences == {}
    assert lab.state.environments.get("open").network == "default"


def test_options_win_over_the_policy(lab: FakeWorld) -> None:
    options = ProvisionOptions(name="short", ttl=timedelta(hours=1))
    report = _provision(lab, options=options, policy=EnvironmentPolicy(ttl=None))
    assert report.expires == lab.state.environments.get("short").created + timedelta(hours=1)


def test_waiting_for_its_agent(lab: FakeWorld) -> None:
    report = _provision(lab, options=ProvisionOptions(wait=True), policy=EnvironmentPolicy())
    assert report.answered_ms is not None
    assert report.answered_ms >= report.running_ms


def test_one_that_does_not_answer_stays_for_a_look(lab: FakeWorld) -> None:
    lab.host.environments_answer = False
    outcome = simply(lab, provision(wait=True))
    assert isinstance(outcome.error, GuestUnreachableError)
    assert order(lab) == []
    assert [environment.name for environment in lab.state.environments.all()] == ["test"]


@pytest.mark.parametrize("name", ["a/b", "..", ".", "x" * 65, "new\nline", "\x00"])
def test_a_name_that_cannot_be_one_is_refused(lab: FakeWorld, name: str) -> None:
    outcome = simply(lab, provision(name=name))
    assert isinstance(outcome.error, PreconditionError)
    assert outcome.error.remedy
    assert order(lab) == []


def test_a_name_that_is_taken_is_refused(lab: FakeWorld) -> None:
    succeed(lab, provision())
    again = simply(lab, provision())
    assert isinstance(again.error, PreconditionError)
    assert "vmsnap env destroy test" in (again.error.remedy or "")
    of_a_guest = simply(lab, provision(name="db"))
    assert isinstance(of_a_guest.error, PreconditionError)
    assert order(lab) == []
    assert lab.host.machines["db"].state is GuestState.RUNNING


def test_an_unknown_network_is_refused_and_undone(lab: FakeWorld) -> None:
    outcome = simply(lab, provision(network="no-such-network"))
    assert isinstance(outcome.error, PreconditionError)
    assert order(lab) == []


def test_an_unknown_snapshot_is_refused(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path / "empty")
    assert isinstance(simply(lab, provision()).error, SnapshotNotFoundError)
    assert lab.state.runs == {}


def test_a_signal_before_the_start_undoes_it(lab: FakeWorld) -> None:
    def work(world: World, _cancel: Cancel) -> ProvisionReport:
        cancel = FaultCancel()
        cancel.asked = True
        options, policy = ProvisionOptions(name="test"), EnvironmentPolicy()
        making = Provision(world, options=options, policy=policy, progress=QuietProgress(), cancel=cancel)
        return making.run("db@latest")

    assert isinstance(simply(lab, work).error, CancelledError)
    assert order(lab) == []
    assert lab.state.environments.all() == ()


def test_an_unknown_environment_cannot_be_destroyed(lab: FakeWorld) -> None:
    succeed(lab, provision())
    outcome = simply(lab, destroy("tset"))
    assert isinstance(outcome.error, EnvironmentNotFoundError)
    assert "'test'" in (outcome.error.remedy or "")


def test_an_environment_whose_vm_is_gone_can_be_destroyed(lab: FakeWorld) -> None:
    succeed(lab, provision())
    environment = lab.state.environments.get("test")
    del lab.host.machines["test"]
    assert status_of(lab.process(), environment).state is None
    succeed(lab, destroy())
    assert lab.store.holders(lab.store.snapshots("db")[0]) == ()


def test_an_environment_without_a_journal_says_what_to_do(lab: FakeWorld) -> None:
    succeed(lab, provision())
    del lab.state.runs[lab.state.environments.get("test").run]
    outcome = simply(lab, destroy())
    assert isinstance(outcome.error, PreconditionError)
    assert outcome.error.remedy


def test_what_an_environment_uses_stays_while_it_could_not_be_ended(lab: FakeWorld) -> None:
    succeed(lab, provision())
    (snapshot,) = lab.store.snapshots("db")
    calls = [call.name for call in _calls_of_destroy(lab)]
    ending = calls.index("hypervisor.release environment")
    outcome = invoke(lab, destroy(), Fault(call=ending, mode=Mode.FAIL_BEFORE))
    assert isinstance(outcome.error, CleanupError)
    assert {item.kind for item in lab.leftovers()} == {
        ResourceKind.ENVIRONMENT,
        ResourceKind.ENVIRONMENT_DISKS,
        ResourceKind.FENCE,
        ResourceKind.HOLD,
    }
    assert lab.store.holders(snapshot) != ()
    lab.host.live_on()
    assert lab.host.violations == []
    succeed(lab, destroy())


def _calls_of_destroy(lab: FakeWorld) -> tuple[Call, ...]:
    outcome = invoke(lab, destroy())
    succeed(lab, provision())
    return outcome.calls


def test_a_name_given_again_meanwhile_is_not_taken_from_its_new_owner(lab: FakeWorld) -> None:
    """Two operators destroy one environment; between them the name is used again."""
    succeed(lab, provision())
    seen = lab.state.environments.get("test")
    succeed(lab, destroy())
    succeed(lab, provision())

    def late(world: World, _cancel: Cancel) -> None:
        destroy_environment(replace(world, book=_SeenEarlier(lab.state, seen=seen)), name="test")

    assert simply(lab, late).error is None
    assert [environment.name for environment in lab.state.environments.all()] == ["test"]
    assert order(lab) == []


class _SeenEarlier(MemoryEnvironmentBook):
    """A book that was looked into before somebody else changed it."""

    def __init__(self, state: MemoryState, *, seen: Environment) -> None:
        super().__init__(state)
        self._seen = seen

    def get(self, name: str) -> Environment:
        return self._seen if name == self._seen.name else super().get(name)


def test_verifying_finds_damage_and_marks_it(lab: FakeWorld) -> None:
    (snapshot,) = lab.store.snapshots("db")
    world = lab.process()
    sound = verify(world, reference="db@latest", progress=QuietProgress(), cancel=FaultCancel())
    assert (sound.defects, sound.blocks > 0) == ((), True)
    lab.store.damage(snapshot, target="vda")
    found = verify(world, reference=snapshot.id, progress=QuietProgress(), cancel=FaultCancel())
    assert len(found.defects) == 1
    marks = lab.store.find(snapshot.id).marks
    assert marks.verification is not None
    assert marks.verification.bad_blocks == 1
