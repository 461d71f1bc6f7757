"""``verify --due`` over a fake host: in which order it reads, what it passes over, and what a replica that is away costs."""

from __future__ import annotations

from collections.abc import Collection
from datetime import timedelta
from pathlib import Path

import pytest

from tests.workflow.invocations import Work, backup, invoke, order, pruning, simply, succeed
from tests.workflow.test_replica import Site, connected
from vmsnap.errors import StoreUnreachableError
from vmsnap.model.history import Action
from vmsnap.model.ids import SnapshotId
from vmsnap.model.policy import Policy, VerifyPolicy
from vmsnap.model.retention_policy import RetentionPolicy
from vmsnap.model.verification import VerifyEntry
from vmsnap.ports.clock import Cancel
from vmsnap.stores.packs.names import PACKS
from vmsnap.testing.faults import DEATHS, Fault, Mode
from vmsnap.testing.memory_objects import FaultyObjects, MemoryObjects, ObjectCall
from vmsnap.testing.world import FakeWorld, QuietProgress
from vmsnap.workflow.replicate import replicate
from vmsnap.workflow.verify import verify_due
from vmsnap.workflow.world import World

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
GUESTS = ("db", "second", "third")
DAILY = [
    Policy.model_validate(
        {"guest": guest, "replica": {"enabled": True}, "verify": {"every": "never", "share_per_day": 1.0}}
    )
    for guest in GUESTS
]


def round_of(*policies: Policy, leave_out: Collection[SnapshotId] = ()) -> Work:
    def work(world: World, cancel: Cancel) -> list[VerifyEntry]:
        found = verify_due(world, policies=policies, progress=QuietProgress(), cancel=cancel, leave_out=leave_out)
        return list(found)

    return work


def due(lab: FakeWorld, *policies: Policy, leave_out: Collection[SnapshotId] = ()) -> list[VerifyEntry]:
    outcome = simply(lab, round_of(*policies, leave_out=leave_out))
    assert isinstance(outcome.result, list), outcome.error
    return outcome.result


def read(entries: list[VerifyEntry]) -> list[tuple[str, SnapshotId | None]]:
    return [(entry.guest, entry.snapshot) for entry in entries]


def ids(lab: FakeWorld, guest: str = "db") -> list[SnapshotId]:
    return [snapshot.id for snapshot in lab.store.snapshots(guest)]


def back_up(lab: FakeWorld, *guests: str) -> None:
    for guest in guests:
        succeed(lab, backup(Policy(guest=guest)))


@pytest.fixture
def lab(tmp_path: Path) -> FakeWorld:
    lab = FakeWorld(tmp_path)
    for guest in GUESTS[1:]:
        lab.add_guest(guest)
    return lab


def test_by_default_something_of_a_guest_is_read_each_week_though_retention_removes_the_rest(lab: FakeWorld) -> None:
    policy = Policy(guest="db", retention=RetentionPolicy(keep_last=2))
    days = []
    for day in range(15):
        back_up(lab, "db")
        succeed(lab, pruning(policy))
        entries = due(lab, policy)
        assert read(entries) in ([], [("db", ids(lab)[-1])])
        days += [day] * len(entries)
        succeed(lab, pruning(policy))
        assert due(lab, policy) == []
        lab.clock.sleep(DAY)
    assert days == [0, 7, 14]


def test_guests_of_which_nothing_was_read_lately_come_before_old_snapshots(lab: FakeWorld) -> None:
    policies = [Policy(guest=guest) for guest in GUESTS]
    back_up(lab, "db")
    due(lab, *policies)
    lab.clock.sleep(6 * DAY)
    back_up(lab, "db", "third")
    due(lab, *policies)
    lab.clock.sleep(DAY)
    back_up(lab, "second", "db")
    (first, second, third), (other,) = ids(lab), ids(lab, "second")
    assert read(due(lab, *policies)) == [("db", third), ("second", other)]
    assert read(due(lab, *policies)) == [("db", first)], "it waited for the newest, and is still there"
    assert read(due(lab, *policies, leave_out=ids(lab))) == []
    lab.clock.sleep(7 * DAY)
    assert second in {snapshot for _, snapshot in read(due(lab, *policies))}


def test_the_newest_verified_one_is_read_at_once_where_the_newest_is_damaged(lab: FakeWorld) -> None:
    policy = Policy(guest="db")
    back_up(lab, "db")
    due(lab, policy)
    lab.clock.sleep(7 * DAY)
    back_up(lab, "db")
    lab.store.damage(lab.store.snapshots("db")[-1], target="vda")
    entries = due(lab, policy)
    assert read(entries) == [("db", one) for one in reversed(ids(lab))]
    assert [entry.error is None for entry in entries] == [False, True]
    assert due(lab, policy) == []
    back_up(lab, "db")
    assert read(due(lab, policy)) == [("db", ids(lab)[-1])], "what comes after a damaged one is read"


def test_where_the_newest_could_not_be_read_the_one_before_is(lab: FakeWorld) -> None:
    back_up(lab, "db")
    back_up(lab, "db")
    before, newest = ids(lab)
    assert read(due(lab, Policy(guest="db"), leave_out={newest})) == [("db", before)]


def test_a_sample_is_told_as_one_and_marks_nothing_unless_it_is_the_whole(lab: FakeWorld) -> None:
    back_up(lab, "db")
    lab.clock.sleep(DAY)
    half = Policy(guest="db", verify=VerifyPolicy(every=None, share_per_day=0.5))
    (entry,) = due(lab, half)
    assert entry.report is not None
    assert lab.store.snapshots("db")[0].marks.verification is None
    (audited,) = (one for one in lab.state.history.audited if one.action is Action.VERIFY)
    assert audited.detail == f"part {entry.report.sample}, {entry.report.blocks} blocks read, 0 defects"
    lab.clock.sleep(DAY)
    due(lab, Policy(guest="db", verify=VerifyPolicy(every=None, share_per_day=1.0)))
    assert lab.store.snapshots("db")[0].marks.verification is not None


class Line:
    """The line to a replica that has a copy of each guest's snapshot. It is down for names that begin with ``down``."""

    def __init__(self, folder: Path) -> None:
        self.site = Site(folder)
        self.lab = self.site.host("here")
        self.down: str | None = None
        self.refused = 0
        for guest in GUESTS[1:]:
            self.lab.add_guest(guest, disks=2)
        back_up(self.lab, *GUESTS)
        objects = FaultyObjects(MemoryObjects(self.site.bucket), on_call=self._pass)
        connected(self.lab, objects, state=folder / "here" / "state")
        for guest in GUESTS:
            succeed(self.lab, sending(guest))
        self.lab.clock.sleep(DAY)

    def _pass(self, call: ObjectCall) -> None:
        if self.down is not None and call.name.startswith(self.down):
            self.refused += 1
            raise StoreUnreachableError("the line is gone", remedy="mend it")

    def round(self) -> tuple[list[str], list[str], list[str]]:
        """Return the guests that were read here, those that were read there, and those that failed."""
        entries = due(self.lab, *DAILY)
        reports = [entry.report for entry in entries if entry.report is not None]
        return (
            [report.guest for report in reports if not report.replica],
            [report.guest for report in reports if report.replica],
            [entry.guest for entry in entries if entry.error is not None],
        )


def sending(guest: str) -> Work:
    def work(world: World, cancel: Cancel) -> object:
        return replicate(world, reference=f"{guest}@latest", progress=QuietProgress(), cancel=cancel)

    return work


def test_a_replica_that_is_away_is_asked_once_a_round_and_again_in_the_next(tmp_path: Path) -> None:
    line = Line(tmp_path)
    line.down = ""
    assert line.round() == (list(GUESTS), [], ["db"])
    assert line.refused == 1
    assert line.round() == ([], [], ["db"])
    line.down = None
    assert line.round() == ([], list(GUESTS), [])
    assert line.round() == ([], [], []), "once a day"


def test_a_guest_whose_copies_cannot_be_read_keeps_no_other_from_its_turn(tmp_path: Path) -> None:
    line = Line(tmp_path)
    line.down = PACKS
    failed = [line.round()[2] for _ in GUESTS]
    assert failed == [["db"], ["second"], ["third"]]
    assert line.round() == ([], [], []), "a reading that failed is not begun again all day"
    line.down = None
    line.lab.clock.sleep(DAY)
    assert line.round() == (list(GUESTS), list(GUESTS), [])


@pytest.mark.parametrize("mode", [Mode.DIE_BEFORE, Mode.DIE_AFTER, Mode.FAIL_BEFORE, Mode.FAIL_AFTER])
def test_whatever_dies_or_fails_the_next_rounds_read_what_is_left(tmp_path: Path, mode: Mode) -> None:
    def prepared(number: object) -> FakeWorld:
        lab = FakeWorld(tmp_path / f"{number}")
        back_up(lab, "db")
        back_up(lab, "db")
        return lab

    policy = Policy(guest="db", verify=VerifyPolicy(share_per_day=0.5))
    calls = [call for call in invoke(prepared("count"), round_of(policy)).calls if not call.inside or mode in DEATHS]
    assert len(calls) > 5
    for call in calls:
        lab = prepared(call.number)
        invoke(lab, round_of(policy), Fault(call=call.number, mode=mode))
        due(lab, policy)
        newest = lab.store.snapshots("db")[-1]
        assert newest.marks.verification is not None, f"{mode} at {call.name}"
        assert newest.marks.verification.bad_blocks == 0
        assert order(lab) == []
