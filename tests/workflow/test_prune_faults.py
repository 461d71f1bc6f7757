"""Pruning, with every fault at every call: what is kept stays, and the next prune finishes the job."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from tests.workflow.invocations import Outcome, Trial, backup, invoke, provision, pruning, recovers, simply, succeed
from vmsnap.errors import ConfigError, PreconditionError
from vmsnap.model.ids import RunId, SnapshotId
from vmsnap.model.manifest import Marks, Pin, Snapshot, Verification
from vmsnap.model.policy import Policy
from vmsnap.model.report import BackupReport
from vmsnap.model.retention_policy import Counting, RetentionPolicy
from vmsnap.testing.faults import Fault, Mode
from vmsnap.testing.memory_store import MemoryStore
from vmsnap.testing.world import START, FakeWorld
from vmsnap.workflow.prune import foresee, prune

KEEP_ONE = Policy(guest="db", retention=RetentionPolicy(keep_last=1))


def _with_four_snapshots(folder: Path) -> FakeWorld:
    """Return a world whose second snapshot is in use."""
    lab = FakeWorld(folder)
    for number in range(4):
        succeed(lab, backup())
        if number == 1:
            succeed(lab, provision())
    return lab


def _with_one_snapshot(folder: Path) -> FakeWorld:
    lab = FakeWorld(folder)
    succeed(lab, backup())
    return lab


@pytest.mark.parametrize("mode", list(Mode))
def test_any_fault_while_pruning(tmp_path: Path, mode: Mode) -> None:
    trial = Trial(prepare=_with_four_snapshots, work=pruning(KEEP_ONE))

    def afterwards(lab: FakeWorld, outcome: Outcome) -> list[str]:
        wrong = recovers(lab)
        simply(lab, pruning(KEEP_ONE))
        (environment,) = lab.state.environments.all()
        ids = [snapshot.id for snapshot in lab.store.snapshots("db")]
        if len(ids) != 2 or ids[0] != environment.snapshot:
            wrong.append(f"after the next prune there are {ids}, in use is {environment.snapshot}")
        return wrong

    trial.every(tmp_path, mode, after=afterwards)
    assert trial.count > 8


REPLACE = Policy(guest="db", retention=RetentionPolicy(replace_on_next=True))
RICH = Policy(
    guest="db",
    time_zone="Europe/Berlin",
    retention=RetentionPolicy(keep_last=1, keep_daily=1, keep_weekly=2, max_age=timedelta(days=30)),
)


def _with_marks(folder: Path) -> FakeWorld:
    """Return a world whose snapshots are: pinned, with nothing, verified, damaged, with nothing, newest and damaged."""
    lab = FakeWorld(folder)
    bad = Verification(at=START, blocks=9, bad_blocks=1)
    for marks in (
        Marks(pin=Pin(owner="ann", reason="audit", since=START)),
        Marks(),
        Marks(verification=Verification(at=START, blocks=9, bad_blocks=0)),
        Marks(verification=bad),
        Marks(),
        Marks(verification=bad),
    ):
        succeed(lab, backup(Policy(guest="db", retention=RetentionPolicy(keep_last=9))))
        newest = lab.store.snapshots("db")[-1]
        lab.store.mark(newest, marks=marks)
    return lab


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("policy", [REPLACE, RICH], ids=["replace", "rich"])
def test_what_is_protected_outlives_any_fault(tmp_path: Path, mode: Mode, policy: Policy) -> None:
    trial = Trial(prepare=_with_marks, work=pruning(policy))
    before: dict[FakeWorld, list[SnapshotId]] = {}

    def prepared(folder: Path) -> FakeWorld:
        lab = _with_marks(folder)
        before[lab] = [snapshot.id for snapshot in lab.store.snapshots("db")]
        return lab

    trial.prepare = prepared

    def afterwards(lab: FakeWorld, outcome: Outcome) -> list[str]:
        pinned, _, verified, _, sound, newest = before[lab]
        protected = {pinned, verified, sound, newest}
        wrong = recovers(lab)
        left = {snapshot.id for snapshot in lab.store.snapshots("db")}
        wrong += [f"{gone} is gone" for gone in protected - left]
        simply(lab, pruning(policy))
        left = {snapshot.id for snapshot in lab.store.snapshots("db")}
        if left != protected:
            wrong.append(f"after the next prune there are {left}, protected are {protected}")
        return wrong

    trial.every(tmp_path, mode, after=afterwards)
    assert trial.count > 8


@pytest.mark.parametrize(("zone", "stay"), [("Europe/Berlin", 2), ("UTC", 1)])
def test_days_are_those_of_the_policys_time_zone(tmp_path: Path, zone: str, stay: int) -> None:
    lab = FakeWorld(tmp_path)
    retention = RetentionPolicy(keep_daily=2, counting=Counting.IN_TURN)
    lab.clock.sleep(timedelta(hours=20, minutes=40))  # 22:40 UTC, 23:40 in Berlin
    for _ in range(2):
        succeed(lab, backup(Policy(guest="db", time_zone=zone, retention=retention)))
        lab.clock.sleep(timedelta(minutes=30))
    assert len(lab.store.snapshots("db")) == stay


def test_a_clock_far_ahead_of_the_snapshots_removes_nothing_by_age(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    for _ in range(2):
        succeed(lab, backup())
    first, second = lab.store.snapshots("db")
    aged = Policy(guest="db", retention=RetentionPolicy(keep_last=9, max_age=timedelta(days=4)))
    lab.clock.sleep(timedelta(days=400))
    kept = prune(lab.process(), policy=aged, dry_run=False)
    assert [decision.keep for decision in kept] == [True, True]
    assert "clock-in-doubt" in kept[0].rules
    removed = prune(lab.process(), policy=aged, dry_run=False, trust_clock=True)
    assert [(decision.snapshot.id, decision.keep) for decision in removed] == [(first.id, False), (second.id, True)]


@pytest.mark.parametrize("keep", [RetentionPolicy(keep_last=50), RetentionPolicy(keep_daily=9)])
def test_backups_made_by_a_clock_far_ahead_remove_nothing_by_age(tmp_path: Path, keep: RetentionPolicy) -> None:
    lab = FakeWorld(tmp_path)
    policy = Policy(guest="db", retention=keep.model_copy(update={"max_age": timedelta(days=10)}))
    for _ in range(5):
        succeed(lab, backup(policy))
        lab.clock.sleep(timedelta(days=1))
    good = {snapshot.id for snapshot in lab.store.snapshots("db")}
    lab.clock.sleep(timedelta(days=400))
    for number in range(6):
        report = succeed(lab, backup(policy)).result
        assert isinstance(report, BackupReport)
        assert not good & set(report.pruned)
        assert bool(report.warnings) == (number == 0)
        lab.clock.sleep(timedelta(hours=12))
    assert good <= {snapshot.id for snapshot in lab.store.snapshots("db")}


@pytest.mark.parametrize("wrong", [1, 3])
def test_a_snapshot_made_while_the_clock_was_back_is_not_the_first_to_go(tmp_path: Path, wrong: int) -> None:
    lab = FakeWorld(tmp_path)
    policy = Policy(guest="db", retention=RetentionPolicy(keep_last=4, max_age=timedelta(days=30)))
    for _ in range(4):
        succeed(lab, backup(policy))
        lab.clock.sleep(timedelta(hours=6))
    lab.clock.sleep(timedelta(days=-400))
    for _ in range(wrong):
        succeed(lab, backup(policy))
        lab.clock.sleep(timedelta(hours=6))
    made_then = {one.id for one in lab.store.snapshots("db") if one.manifest.captured < START}
    lab.clock.sleep(timedelta(days=400))
    succeed(lab, pruning(policy))
    left = {one.id for one in lab.store.snapshots("db")}
    assert len(left) == 4
    assert made_then <= left, "they are the newest"


def test_most_of_a_guests_snapshots_do_not_go_at_once_unless_somebody_wants_it(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    generous = Policy(guest="db", retention=RetentionPolicy(keep_last=50))
    for _ in range(9):
        succeed(lab, backup(generous))
    edited = Policy(guest="db", retention=RetentionPolicy(keep_last=2))
    outcome = simply(lab, pruning(edited))
    assert isinstance(outcome.error, PreconditionError)
    assert "7 of the 9 snapshots" in outcome.error.brief
    assert "--many" in str(outcome.error.remedy)
    assert len(lab.store.snapshots("db")) == 9
    assert [decision.keep for decision in prune(lab.process(), policy=edited, dry_run=True)].count(False) == 7
    report = simply(lab, backup(edited)).result
    assert isinstance(report, BackupReport)
    assert "--many" not in report.warnings[0]
    assert "8 of the 10 snapshots" in report.warnings[0], "the backup itself is done"
    prune(lab.process(), policy=edited, dry_run=False, many=True)
    assert len(lab.store.snapshots("db")) == 2
    succeed(lab, pruning(edited))


def test_a_forecast_changes_nothing_and_knows_what_is_in_use(tmp_path: Path) -> None:
    lab = _with_four_snapshots(tmp_path)
    ids = [snapshot.id for snapshot in lab.store.snapshots("db")]
    said = foresee(lab.process(), policy=KEEP_ONE, span=timedelta(days=9), every=timedelta(days=1))
    assert [verdict.candidate.id for verdict in said.kept] == [ids[1], "+000000009"]
    assert [snapshot.id for snapshot in lab.store.snapshots("db")] == ids
    scheduled = foresee(lab.process(), policy=KEEP_ONE, span=timedelta(days=9), every=None)
    assert (len(scheduled.backups), scheduled.every) == (9, None), "every day, the first a day after the newest"
    with pytest.raises(ConfigError, match="more than"):
        foresee(lab.process(), policy=KEEP_ONE, span=timedelta(days=9), every=timedelta(milliseconds=1))


def test_pruning_that_fails_after_a_good_backup_is_a_warning(tmp_path: Path) -> None:
    good = invoke(_with_one_snapshot(tmp_path / "good"), backup(KEEP_ONE))
    discarded = max(call.number for call in good.calls if call.name.endswith(".finish"))
    pruning_calls = [call for call in good.calls[discarded + 1 :] if call.name.startswith("store.")]
    assert len(pruning_calls) > 5
    for call in pruning_calls:
        for mode in (Mode.FAIL_BEFORE, Mode.BUG_BEFORE):
            lab = _with_one_snapshot(tmp_path / f"{call.number} {mode}")
            outcome = invoke(lab, backup(KEEP_ONE), Fault(call=call.number, mode=mode))
            assert isinstance(outcome.result, BackupReport), call.name
            assert f"injected at call {call.number}" in " ".join(outcome.result.warnings)
            assert lab.store.find(outcome.result.snapshot)


def test_a_dry_run_removes_nothing_and_says_the_same(tmp_path: Path) -> None:
    lab = _with_four_snapshots(tmp_path)
    said = prune(lab.process(), policy=KEEP_ONE, dry_run=True)
    assert [decision.keep for decision in said] == [False, True, False, True]
    assert [decision.removed_bytes for decision in said] == [None] * 4
    assert len(lab.store.snapshots("db")) == 4
    done = prune(lab.process(), policy=KEEP_ONE, dry_run=False)
    assert [decision.reasons for decision in done] == [decision.reasons for decision in said]
    assert [decision.removed_bytes is not None for decision in done] == [True, False, True, False]


def test_a_snapshot_that_was_taken_into_use_since_the_decision_stays(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    succeed(lab, backup())
    succeed(lab, backup())
    oldest = lab.store.snapshots("db")[0]
    lab.store = _HeldAtTheLastMoment.over(lab.store)
    (decision, _) = prune(lab.process(), policy=KEEP_ONE, dry_run=False)
    assert decision.keep
    assert "00000000a1" in decision.reasons[0]
    assert lab.store.find(oldest.id)


class _HeldAtTheLastMoment(MemoryStore):
    """Somebody provisions from a snapshot between the decision and its removal."""

    @staticmethod
    def over(store: MemoryStore) -> _HeldAtTheLastMoment:
        held = _HeldAtTheLastMoment(Path("/nowhere"))
        vars(held).update(vars(store))
        return held

    def remove(self, snapshot: Snapshot) -> int:
        self.hold(self.hold_resource(RunId("00000000a1"), snapshot=snapshot))
        return super().remove(snapshot)
