from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from tests.workflow.invocations import backup, destroy, invoke, provision, pruning, reconciling, simply, succeed
from vmsnap.errors import DriverError, PreconditionError
from vmsnap.model.history import Action, RunEntry, RunOutcome
from vmsnap.model.journal import RunKind
from vmsnap.model.policy import Policy
from vmsnap.model.report import BackupReport, ProvisionReport
from vmsnap.model.retention_policy import RetentionPolicy
from vmsnap.testing.faults import Fault, FaultCancel, Mode
from vmsnap.testing.memory_history import MemoryHistory
from vmsnap.testing.world import STARTER, FakeWorld, QuietProgress
from vmsnap.workflow.backup import Backup
from vmsnap.workflow.chronicle import known_runs
from vmsnap.workflow.verify import verify


@pytest.fixture
def lab(tmp_path: Path) -> FakeWorld:
    return FakeWorld(tmp_path)


def only(lab: FakeWorld) -> RunEntry:
    (entry,) = lab.state.history.runs()
    return entry


def test_a_backup_is_in_the_history_with_its_steps_and_figures(lab: FakeWorld) -> None:
    report = succeed(lab, backup()).result
    assert isinstance(report, BackupReport)
    entry = only(lab)
    assert (entry.kind, entry.guest, entry.starter) == (RunKind.BACKUP, "db", STARTER)
    assert entry.result is not None
    assert (entry.outcome, entry.result.exit_code, entry.result.error) == (RunOutcome.DONE, 0, None)
    assert entry.result.snapshot == report.snapshot
    assert entry.result.pause_ms == pytest.approx(report.capture.pause_ms, abs=0.001)
    assert entry.result.new_bytes == report.store.new_bytes
    assert entry.result.logical_bytes == report.store.logical_bytes
    assert [step.name for step in entry.steps] == ["preflight", *(step.name for step in report.steps)]
    assert all(step.seconds is not None and step.seconds > 0 for step in entry.steps)
    assert entry.seconds is not None
    assert sum(step.seconds or 0 for step in entry.steps) <= entry.seconds


def test_a_backup_that_is_refused_is_in_the_history_too(lab: FakeWorld) -> None:
    outcome = simply(lab, backup(Policy(guest="nobody")))
    assert isinstance(outcome.error, PreconditionError)
    result = only(lab).result
    assert result is not None
    assert (result.outcome, result.exit_code, result.error) == (RunOutcome.FAILED, 3, outcome.error.brief)
    assert result.remedy == outcome.error.remedy


def test_one_that_failed_after_its_capture_tells_its_pause(lab: FakeWorld, tmp_path: Path) -> None:
    good = invoke(FakeWorld(tmp_path / "good"), backup())
    proving = next(call.number for call in good.calls if call.name == "fence.prove")
    outcome = invoke(lab, backup(), Fault(call=proving, mode=Mode.FAIL_BEFORE))
    assert isinstance(outcome.error, DriverError)
    result = lab.state.history.runs()[0].result
    assert result is not None
    assert result.outcome is RunOutcome.FAILED
    assert result.pause_ms is not None
    assert result.snapshot is None


def test_a_stopped_backup_is_stopped_and_not_failed(lab: FakeWorld) -> None:
    good = invoke(lab, backup())
    capture = next(call.number for call in good.calls if call.name == "hypervisor.capture" or "capture" in call.name)
    invoke(lab, backup(), Fault(call=capture, mode=Mode.CANCEL))
    assert lab.state.history.runs()[0].outcome is RunOutcome.STOPPED


@pytest.mark.parametrize("moment", ["hypervisor.inspect", "fence.build", "store.publish"])
def test_a_run_cut_by_kill_9_is_shown_as_died_and_reconcile_closes_it(lab: FakeWorld, moment: str) -> None:
    good = invoke(lab, backup())
    number = next(call.number for call in good.calls if call.name == moment or call.name.startswith(f"{moment} "))
    invoke(lab, backup(), Fault(call=number, mode=Mode.DIE_BEFORE))
    cut = lab.state.history.runs()[0]
    assert cut.result is None
    shown = known_runs(lab.process(), guest="db", failures_only=True, limit=None)
    assert [(entry.run, entry.outcome) for entry in shown] == [(cut.run, RunOutcome.DIED)]
    assert shown[0].result is not None
    assert f"in step '{cut.steps[-1].name}'" in (shown[0].result.error or "")
    succeed(lab, reconciling)
    closed = lab.state.history.runs()[0]
    assert closed.outcome is RunOutcome.DIED
    assert closed.ended is not None
    assert lab.state.history.dead() == ()


def test_the_next_backup_closes_a_run_whose_end_could_not_be_recorded(
    lab: FakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = lab.process()
    with monkeypatch.context() as broken:
        broken.setattr(MemoryHistory, "end", _broken)
        Backup(world, policy=Policy(guest="db"), progress=QuietProgress(), cancel=FaultCancel()).run()
    assert only(lab).outcome is RunOutcome.RUNNING
    Backup(world, policy=Policy(guest="db"), progress=QuietProgress(), cancel=FaultCancel()).run()
    assert [entry.outcome for entry in lab.state.history.runs()] == [RunOutcome.DONE, RunOutcome.DIED]


def _broken(*_: object, **__: object) -> None:
    raise OSError("the disk is gone")


def test_a_history_that_cannot_be_written_stops_nothing_and_is_asked_little(
    lab: FakeWorld, caplog: pytest.LogCaptureFixture
) -> None:
    class Gone(MemoryHistory):
        calls = 0

        def begin(self, *_: object, **__: object) -> None:
            Gone.calls += 1
            raise DriverError("the disk is gone", remedy="put it back")

        step = end = audit = begin

        def dead(self) -> tuple[RunEntry, ...]:
            raise RuntimeError("and its driver has a bug")

    caplog.set_level(logging.WARNING, logger="vmsnap")
    world = replace(lab.process(), history=Gone(lab.state))
    report = Backup(world, policy=Policy(guest="db"), progress=QuietProgress(), cancel=FaultCancel()).run()
    assert len(lab.store.snapshots("db")) == 1
    assert report.snapshot
    assert Gone.calls == 2, "one at the beginning, one at the end; each may have to wait"
    assert "the disk is gone" in caplog.text
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_provisioning_and_destroying_are_told_and_audited(lab: FakeWorld) -> None:
    succeed(lab, backup())
    report = succeed(lab, provision(name="test")).result
    assert isinstance(report, ProvisionReport)
    (entry,) = lab.state.history.runs(kind=RunKind.PROVISION)
    assert entry.result is not None
    assert (entry.result.environment, entry.result.snapshot) == ("test", report.snapshot)
    assert [step.name for step in entry.steps] == ["define", "attach", "start"]
    succeed(lab, destroy("test"))
    destroyed, provisioned = lab.state.history.trail(limit=2)
    assert (destroyed.action, destroyed.subject, destroyed.guest) == (Action.DESTROY, "test", "db")
    assert (provisioned.action, provisioned.subject) == (Action.PROVISION, "test")
    assert provisioned.starter == STARTER
    assert report.snapshot in provisioned.detail


def test_a_provision_that_fails_is_audited_with_the_reason(lab: FakeWorld) -> None:
    succeed(lab, backup())
    succeed(lab, provision(name="test"))
    outcome = simply(lab, provision(name="test"))
    assert isinstance(outcome.error, PreconditionError)
    newest = lab.state.history.trail()[0]
    assert (newest.action, newest.failure) == (Action.PROVISION, outcome.error.brief)
    assert lab.state.history.runs()[0].outcome is RunOutcome.FAILED


def test_what_is_pruned_is_audited_with_its_reasons(lab: FakeWorld) -> None:
    for _ in range(3):
        succeed(lab, backup(Policy(guest="db", retention=RetentionPolicy(keep_last=9))))
    oldest = lab.store.snapshots("db")[0]
    succeed(lab, pruning(Policy(guest="db", retention=RetentionPolicy(keep_last=2))))
    pruned = lab.state.history.trail()[0]
    assert (pruned.action, pruned.subject, pruned.failure) == (Action.PRUNE, oldest.id, None)
    assert "beyond keep_last 2" in pruned.detail


def test_verifying_is_audited(lab: FakeWorld) -> None:
    succeed(lab, backup())
    verify(lab.process(), reference="db@latest", progress=QuietProgress(), cancel=FaultCancel())
    verified = lab.state.history.trail()[0]
    assert verified.action is Action.VERIFY
    assert verified.detail.endswith("0 defects")


def test_what_reconcile_undoes_is_audited(lab: FakeWorld) -> None:
    good = invoke(lab, backup())
    number = next(call.number for call in good.calls if call.name == "fence.prove")
    invoke(lab, backup(), Fault(call=number, mode=Mode.DIE_BEFORE))
    succeed(lab, reconciling)
    (entry,) = [entry for entry in lab.state.history.trail() if entry.action is Action.RECONCILE]
    assert entry.subject == lab.state.history.runs()[0].run
    assert entry.failure is None
