from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.cli_samples import sample
from vmsnap.model.ids import SnapshotId
from vmsnap.model.manifest import Marks, Pin, Snapshot, Verification
from vmsnap.model.policy import RetentionPolicy
from vmsnap.model.report import PruneDecision
from vmsnap.model.retention import decide

NOW = datetime(2026, 11, 21, tzinfo=UTC)
moments = st.datetimes(
    min_value=datetime(2026, 1, 1),  # noqa: DTZ001 - the strategy adds the zone
    max_value=datetime(2027, 12, 31),  # noqa: DTZ001
    timezones=st.just(UTC),
)
pins = st.none() | st.builds(
    Pin, owner=st.just("me"), reason=st.just("because"), since=st.just(NOW), until=st.none() | moments
)
verifications = st.none() | st.builds(Verification, at=moments, blocks=st.just(9), bad_blocks=st.integers(0, 2))


@st.composite
def snapshot_sets(draw: st.DrawFn) -> tuple[Snapshot, ...]:
    ids = draw(st.lists(st.integers(0, 99), unique=True, max_size=9))
    return tuple(
        sample(
            f"{number:010x}",
            captured=draw(moments | st.just(NOW)),
            marks=Marks(pin=draw(pins), verification=draw(verifications)),
        )
        for number in ids
    )


def held_from(snapshots: tuple[Snapshot, ...], bits: int) -> frozenset[SnapshotId]:
    return frozenset(snapshot.id for position, snapshot in enumerate(snapshots) if bits >> position & 1)


def kept(decisions: tuple[PruneDecision, ...]) -> set[SnapshotId]:
    return {decision.snapshot.id for decision in decisions if decision.keep}


@settings(max_examples=40)
@given(snapshots=snapshot_sets(), count=st.integers(1, 10), bits=st.integers(0, 4095))
def test_what_always_holds(snapshots: tuple[Snapshot, ...], count: int, bits: int) -> None:
    held = held_from(snapshots, bits)
    decisions = decide(snapshots, policy=RetentionPolicy(keep_last=count), held=held, now=NOW)
    # A partition: each snapshot once, with a reason, and nothing removed by deciding.
    assert sorted(item.snapshot.id for item in decisions) == sorted(item.id for item in snapshots)
    assert all(item.reasons and item.removed_bytes is None for item in decisions)
    stay = kept(decisions)
    assert held <= stay
    for snapshot in snapshots:
        pin = snapshot.marks.pin
        if pin is not None and (pin.until is None or pin.until > NOW):
            assert snapshot.id in stay
    assert len(stay) >= min(count, len(snapshots))
    if snapshots:
        newest = max(snapshots, key=lambda item: (item.manifest.captured, item.id))
        assert newest.id in stay
    sound = [item for item in snapshots if not (item.marks.verification and item.marks.verification.bad_blocks)]
    if sound:
        assert max(sound, key=lambda item: (item.manifest.captured, item.id)).id in stay
    times = [item.snapshot.manifest.captured for item in decisions]
    assert times == sorted(times)


@settings(max_examples=40)
@given(snapshots=snapshot_sets(), count=st.integers(1, 10), bits=st.integers(0, 4095))
def test_a_larger_keep_last_never_removes_more(snapshots: tuple[Snapshot, ...], count: int, bits: int) -> None:
    held = held_from(snapshots, bits)
    fewer, more = (
        kept(decide(snapshots, policy=RetentionPolicy(keep_last=number), held=held, now=NOW))
        for number in (count, count + 1)
    )
    assert fewer <= more


@settings(max_examples=40)
@given(data=st.data(), snapshots=snapshot_sets(), count=st.integers(1, 10))
def test_the_order_of_the_snapshots_does_not_matter(
    data: st.DataObject, snapshots: tuple[Snapshot, ...], count: int
) -> None:
    shuffled = tuple(data.draw(st.permutations(snapshots)))
    policy = RetentionPolicy(keep_last=count)
    assert decide(shuffled, policy=policy, held=frozenset(), now=NOW) == decide(
        snapshots, policy=policy, held=frozenset(), now=NOW
    )


@settings(max_examples=40)
@given(snapshots=snapshot_sets(), count=st.integers(1, 10))
def test_removing_what_goes_and_deciding_again_removes_nothing(snapshots: tuple[Snapshot, ...], count: int) -> None:
    policy = RetentionPolicy(keep_last=count)
    stay = kept(decide(snapshots, policy=policy, held=frozenset(), now=NOW))
    rest = tuple(snapshot for snapshot in snapshots if snapshot.id in stay)
    assert all(item.keep for item in decide(rest, policy=policy, held=frozenset(), now=NOW))


def test_the_reasons_say_what_decided() -> None:
    pinned = Marks(pin=Pin(owner="ann", reason="audit", since=NOW, until=NOW + timedelta(days=2)))
    ended = Marks(pin=Pin(owner="ann", reason="audit", since=NOW, until=NOW))
    snapshots = [
        sample("0000000001", captured=NOW - timedelta(days=5)),
        sample("0000000002", captured=NOW - timedelta(days=4), marks=ended),
        sample("0000000003", captured=NOW - timedelta(days=3), marks=pinned),
        sample("0000000004", captured=NOW - timedelta(days=2)),
        sample("0000000005", captured=NOW - timedelta(days=1)),
    ]
    decisions = decide(
        snapshots, policy=RetentionPolicy(keep_last=1), held=frozenset({SnapshotId("0000000004")}), now=NOW
    )
    assert [(item.keep, item.reasons) for item in decisions] == [
        (False, ("not among the newest 1 (keep_last)",)),
        (False, ("not among the newest 1 (keep_last)", "its pin ended 2026-11-21 00:00Z")),
        (True, ("pinned by ann until 2026-11-23 00:00Z: audit",)),
        (True, ("in use by an environment",)),
        (True, ("the newest", "among the newest 1 (keep_last)")),
    ]


def test_the_newest_sound_snapshot_stays_where_the_newest_is_damaged() -> None:
    bad = Marks(verification=Verification(at=NOW, blocks=9, bad_blocks=1))
    snapshots = [
        sample("0000000001", captured=NOW - timedelta(days=3)),
        sample("0000000002", captured=NOW - timedelta(days=2)),
        sample("0000000003", captured=NOW - timedelta(days=1), marks=bad),
    ]
    decisions = decide(snapshots, policy=RetentionPolicy(keep_last=1), held=frozenset(), now=NOW)
    assert [item.keep for item in decisions] == [False, True, True]
    assert decisions[1].reasons == ("the newest without known damage",)


def test_snapshots_of_two_guests_are_refused() -> None:
    with pytest.raises(ValueError, match="one guest"):
        decide(
            [sample("0000000001"), sample("0000000002", guest="other")],
            policy=RetentionPolicy(),
            held=frozenset(),
            now=NOW,
        )


def test_nothing_is_decided_about_nothing() -> None:
    assert decide([], policy=RetentionPolicy(), held=frozenset(), now=NOW) == ()
