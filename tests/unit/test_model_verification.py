"""Which snapshots are read again: something of each guest always is, whatever retention removes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.cli_samples import sample
from vmsnap.config.policies import PolicyBook
from vmsnap.model.ids import SnapshotId
from vmsnap.model.manifest import Marks, Snapshot, Verification
from vmsnap.model.policy import Policy, VerifyPolicy
from vmsnap.model.retention import decide
from vmsnap.model.retention_policy import RetentionPolicy
from vmsnap.model.verification import last_read, turns_of

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
WEEK = 7 * DAY
EXAMPLES = Path(__file__).parents[2] / "policies"


@dataclass(frozen=True, kw_only=True)
class Known:
    """A snapshot of the table: how many days ago it was made and read; a negative number is ahead of the clock."""

    made: float
    read: float | None = None
    bad: int = 0


def made(number: int, *, at: datetime, verification: Verification | None = None) -> Snapshot:
    # The samples' manifests are written 90 s after the capture.
    captured = at - timedelta(seconds=90)
    return sample(f"{number:010x}", guest="db", captured=captured, marks=Marks(verification=verification))


def store_of(*all_known: Known) -> list[Snapshot]:
    return [
        made(
            number,
            at=NOW - known.made * DAY,
            verification=None
            if known.read is None
            else Verification(at=NOW - known.read * DAY, blocks=9, bad_blocks=known.bad),
        )
        for number, known in enumerate(all_known)
    ]


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        pytest.param([], [], id="nothing there"),
        pytest.param([Known(made=0)], [(0, None)], id="the first one, at once"),
        pytest.param(
            [Known(made=day) for day in (6, 5, 4, 3, 2, 1, 0)], [(6, None)], id="none of a week was ever read"
        ),
        pytest.param([Known(made=3, read=3), Known(made=2), Known(made=0)], [], id="one of this week was"),
        pytest.param([Known(made=7, read=7), Known(made=0)], [(1, None), (0, 1)], id="the one that was is too old"),
        pytest.param([Known(made=8, read=1), Known(made=0)], [(1, None)], id="an old one was read lately"),
        pytest.param(
            [Known(made=90, read=8), Known(made=30, read=9), Known(made=7, read=7), Known(made=1), Known(made=0)],
            [(4, None), (1, None), (0, None), (2, 4)],
            id="old ones are read in their time, after the newest",
        ),
        pytest.param(
            [Known(made=9), Known(made=8), Known(made=7)], [(2, None), (0, None), (1, None)], id="all are due"
        ),
        pytest.param([Known(made=100, read=6)], [], id="backups stopped, read lately"),
        pytest.param([Known(made=100, read=7)], [(0, None)], id="backups stopped, due again"),
        pytest.param([Known(made=1), Known(made=0, read=0, bad=1)], [], id="the newest was just found damaged"),
        pytest.param([Known(made=1, read=1, bad=1), Known(made=0)], [(1, None)], id="one after a damaged one"),
        pytest.param([Known(made=8), Known(made=7, read=7, bad=1)], [(1, None), (0, None)], id="damaged a week ago"),
        pytest.param([Known(made=0), Known(made=-30)], [(0, None), (1, None)], id="one from the future takes no place"),
        pytest.param([Known(made=0), Known(made=-30, read=0)], [(0, None)], id="read or not"),
        pytest.param([Known(made=-30)], [(0, None)], id="one from the future alone"),
        pytest.param([Known(made=3, read=-30)], [(0, None)], id="read by a clock that was wrong"),
        pytest.param([Known(made=-0.1)], [(0, None)], id="a clock that went back a little"),
    ],
)
def test_what_is_due(there: list[Known], expected: list[tuple[int, int | None]]) -> None:
    turns = turns_of(store_of(*there), every=WEEK, now=NOW)
    found = [(int(turn.snapshot.id, 16), None if turn.unless is None else int(turn.unless, 16)) for turn in turns]
    assert found == expected


def test_never_means_never() -> None:
    assert turns_of(store_of(Known(made=100), Known(made=0)), every=None, now=NOW) == ()


def test_guests_of_which_nothing_was_read_lately_come_first() -> None:
    never = turns_of(store_of(Known(made=2), Known(made=0)), every=WEEK, now=NOW)
    long_ago = turns_of(store_of(Known(made=50, read=20), Known(made=0)), every=WEEK, now=NOW)
    lately = turns_of(store_of(Known(made=90, read=60), Known(made=0, read=0)), every=WEEK, now=NOW)
    ranks = sorted(turn.rank for turn in (*lately, *never, *long_ago))
    assert [(not own, since) for own, since, _ in ranks] == [
        (True, NOW - 20 * DAY),
        (True, NOW - 2 * DAY),
        (False, NOW - 60 * DAY),
        (False, NOW - 20 * DAY),
    ]


days = st.one_of(st.integers(-2, 20), st.integers(-400, 400), st.floats(-2, 20))
stores = st.lists(st.builds(Known, made=days, read=st.none() | days, bad=st.sampled_from([0, 0, 1])), max_size=8).map(
    lambda all_known: store_of(*all_known)
)
spans = st.integers(1, 40).map(lambda number: number * DAY)


def identities(snapshots: Sequence[Snapshot], *, every: timedelta | None) -> set[SnapshotId]:
    return {turn.snapshot.id for turn in turns_of(snapshots, every=every, now=NOW)}


def after_a_round(snapshots: Sequence[Snapshot], *, every: timedelta | None, now: datetime) -> list[Snapshot]:
    """Return the snapshots after all that are due were read and found whole."""
    read: set[SnapshotId] = set()
    for turn in turns_of(snapshots, every=every, now=now):
        if turn.unless not in read:
            read.add(turn.snapshot.id)
    mark = Marks(verification=Verification(at=now, blocks=9, bad_blocks=0))
    return [one.model_copy(update={"marks": mark}) if one.id in read else one for one in snapshots]


@settings(max_examples=200)
@given(snapshots=stores, every=spans, longer=spans)
def test_what_always_holds(snapshots: list[Snapshot], every: timedelta, longer: timedelta) -> None:
    turns = turns_of(snapshots, every=every, now=NOW)
    due = [turn.snapshot.id for turn in turns]
    assert len(set(due)) == len(due)
    assert [turn.rank for turn in turns] == sorted(turn.rank for turn in turns)
    assert sum(turn.for_guest for turn in turns) <= 1
    assert {one.id for one in snapshots if NOW - last_read(one) >= every} <= set(due), "each is read in its time"
    read = {one.id for one in snapshots if one.marks.verification and timedelta(0) <= NOW - last_read(one) < every}
    assert not read & set(due), "nothing is read again before its time"
    assert turns_of(snapshots[::-1], every=every, now=NOW) == turns
    assert identities(snapshots, every=max(every, longer)) <= identities(snapshots, every=min(every, longer))
    # What could wait is read in the second round, and then there is nothing left to do.
    twice = after_a_round(after_a_round(snapshots, every=every, now=NOW), every=every, now=NOW)
    assert turns_of(twice, every=every, now=NOW) == ()


retentions = st.one_of(
    st.integers(1, 9).map(lambda number: RetentionPolicy(keep_last=number)),
    st.builds(
        RetentionPolicy, keep_daily=st.integers(1, 7), keep_weekly=st.integers(0, 4), keep_monthly=st.integers(0, 3)
    ),
    st.just(RetentionPolicy(replace_on_next=True)),
)


@settings(max_examples=40)
@given(
    retention=retentions,
    every=st.integers(1, 15).map(lambda number: number * DAY),
    steps=st.lists(st.tuples(st.integers(1, 60), st.booleans()), min_size=1, max_size=40),
)
def test_something_that_is_there_was_always_read_lately(
    retention: RetentionPolicy, every: timedelta, steps: list[tuple[int, bool]]
) -> None:
    now, snapshots = NOW, [made(0, at=NOW)]
    for number, (hours, backed_up) in enumerate(steps, 1):
        now += hours * HOUR
        if backed_up:
            snapshots.append(made(number, at=now))
        decisions = decide(snapshots, policy=retention, held=frozenset(), now=now)
        snapshots = [decision.snapshot for decision in decisions if decision.keep]
        snapshots = after_a_round(snapshots, every=every, now=now)
        whole = [one for one in snapshots if one.marks.verification is not None]
        assert any(now - last_read(one) < every for one in whole)
        assert snapshots[-1] in whole or any(now - one.manifest.created < every for one in whole)


def readings(policy: Policy, *, weeks: int) -> list[timedelta]:
    """Return the ages of what is read in so many weeks of one backup, one pruning and one look a day."""
    snapshots: list[Snapshot] = []
    ages = []
    for day in range(7 * weeks):
        now = NOW + day * DAY
        snapshots.append(made(day, at=now))
        decisions = decide(snapshots, policy=policy.retention, held=frozenset(), now=now)
        snapshots = [decision.snapshot for decision in decisions if decision.keep]
        now += 9 * HOUR
        before = {one.id: one.marks for one in snapshots}
        snapshots = after_a_round(snapshots, every=policy.verify.every, now=now)
        ages += [now - one.manifest.created for one in snapshots if one.marks != before[one.id]]
    return ages


def test_without_a_word_one_snapshot_of_a_guest_is_read_a_week() -> None:
    assert readings(Policy(guest="db"), weeks=12) == [9 * HOUR] * 12


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.stem)
def test_each_example_has_something_read_each_week(path: Path) -> None:
    policy = PolicyBook(EXAMPLES).get(path.stem)
    assert policy.verify == VerifyPolicy()
    assert len(readings(policy, weeks=12)) >= 12
