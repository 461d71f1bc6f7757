"""Retention where a guest's snapshots are here and at a replica: the last copy goes only where both places' rules say so."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.workflow.invocations import backup, succeed
from vmsnap.errors import HeldError, PreconditionError, SnapshotNotFoundError, VmsnapError
from vmsnap.model.copies import Held, Rules, decide_copies, locked_until
from vmsnap.model.ids import RunId, SnapshotId
from vmsnap.model.manifest import DiskRecord, Marks, Pin, Snapshot, Verification
from vmsnap.model.policy import Policy, ReplicaPolicy
from vmsnap.model.report import Place, PruneDecision
from vmsnap.model.retention_policy import RetentionPolicy
from vmsnap.ports.objects import ObjectStore
from vmsnap.ports.replica import Replica
from vmsnap.ports.upkeep import CollectWishes
from vmsnap.stores.packs import holds
from vmsnap.stores.packs.manifests import Body, PackedSnapshot, encode_snapshot
from vmsnap.stores.packs.names import snapshot_name
from vmsnap.stores.packs.repository import initialise, open_repository
from vmsnap.stores.packs.upkeep import PackedUpkeep
from vmsnap.testing.cancels import NeverCancelled
from vmsnap.testing.memory_objects import FaultyObjects, MemoryBucket, MemoryObjects, ObjectFault
from vmsnap.testing.memory_state import ProcessDied
from vmsnap.testing.store_contract import sample_manifest
from vmsnap.testing.world import START, FakeWorld, QuietProgress
from vmsnap.workflow.collect import collect, copies_of
from vmsnap.workflow.prune import prune
from vmsnap.workflow.world import World

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
ONE, TWO, FOUR = (RetentionPolicy(keep_last=count) for count in (1, 2, 4))
DAMAGED = Marks(verification=Verification(at=NOW, blocks=9, bad_blocks=2))


def taken(hours_ago: int, *, marks: Marks | None = None) -> Snapshot:
    """Return a snapshot of so many hours before NOW."""
    disk = DiskRecord(
        target="vda",
        image="vda.raw",
        digests="vda.digests",
        digests_sha256="0" * 64,
        size_bytes=1 << 20,
        data_bytes=0,
        new_bytes=0,
    )
    manifest = sample_manifest(
        RunId(f"{1000 - hours_ago:010x}"), guest="db", disks=(disk,), captured=NOW - timedelta(hours=hours_ago)
    )
    return Snapshot(manifest=manifest, marks=marks or Marks())


def rules(*, here: RetentionPolicy, away: RetentionPolicy) -> Rules:
    return Rules(here=here, away=away, now=NOW, zone=UTC)


def told(decisions: tuple[PruneDecision, ...]) -> dict[tuple[str, int], bool]:
    """Return what was decided, by place and hours ago."""
    return {(one.place.value, 1000 - int(one.snapshot.id, 16)): one.keep for one in decisions}


def test_each_place_has_rules_of_its_own() -> None:
    snapshots = [taken(hours) for hours in (4, 3, 2, 1)]
    decided = decide_copies(snapshots, snapshots, rules=rules(here=ONE, away=TWO), held=Held())
    assert told(decided) == {
        **{("local", hours): hours == 1 for hours in (4, 3, 2, 1)},
        **{("replica", hours): hours <= 2 for hours in (4, 3, 2, 1)},
    }
    gone = next(one for one in decided if not one.keep and one.snapshot.id == snapshots[2].id)
    assert gone.reasons[-1] == "a copy stays at the replica"


def test_what_the_replica_wants_stays_here_until_it_is_there() -> None:
    snapshots = [taken(hours) for hours in (3, 2, 1)]
    decided = decide_copies(snapshots, snapshots[:1], rules=rules(here=ONE, away=TWO), held=Held())
    assert told(decided) == {("local", 3): False, ("local", 2): True, ("local", 1): True, ("replica", 3): True}
    (kept,) = (one for one in decided if one.rules == ("last-copy",))
    assert "not at the replica, whose rules want it (keep_last 2 of 2)" in kept.reasons[0]


def test_a_last_copy_at_the_replica_stays_where_the_local_rules_want_it() -> None:
    away = [taken(hours) for hours in (5, 4, 3, 2, 1)]
    decided = decide_copies([], away, rules=rules(here=FOUR, away=TWO), held=Held())
    assert told(decided) == {("replica", hours): hours <= 4 for hours in (5, 4, 3, 2, 1)}


def test_a_damaged_copy_is_none() -> None:
    here = [taken(2, marks=DAMAGED), taken(1)]
    away = [taken(2), taken(1)]
    decided = decide_copies(here, away, rules=rules(here=TWO, away=ONE), held=Held())
    assert told(decided)["replica", 2]
    decided = decide_copies(away, here, rules=rules(here=ONE, away=TWO), held=Held())
    assert told(decided)["local", 2]


def test_pins_and_holds_count_in_both_places() -> None:
    pin = Marks(pin=Pin(owner="ann", reason="audit", since=NOW))
    here, away = [taken(3, marks=pin), taken(1)], [taken(3), taken(2), taken(1)]
    held = Held(away=frozenset({away[1].id}))
    decided = decide_copies(here, away, rules=rules(here=ONE, away=ONE), held=held)
    assert all(one.keep for one in decided)


def test_what_was_restored_is_held_until_its_pin_ends() -> None:
    away = [taken(hours) for hours in (3, 2, 1)]
    for until, kept in ((NOW + timedelta(hours=1), True), (NOW - timedelta(minutes=1), False)):
        pin = Pin(owner="ann", reason="restored", since=NOW - timedelta(minutes=30), until=until)
        here = [taken(3, marks=Marks(pin=pin)), taken(1)]
        decided = decide_copies(here, away, rules=rules(here=ONE, away=FOUR), held=Held())
        (restored,) = (one for one in decided if one.snapshot.id == here[0].id and one.place is Place.LOCAL)
        assert restored.keep is kept
        assert restored.rules == (("pinned",) if kept else ("beyond", "pin-ended", "copy-stays"))


def test_nothing_goes_here_while_the_replica_is_not_known() -> None:
    decided = decide_copies([taken(2), taken(1)], None, rules=rules(here=ONE, away=ONE), held=Held())
    assert [one.rules for one in decided] == [("replica-unknown",), ("newest", "keep_last")]


policies = st.builds(
    RetentionPolicy, keep_last=st.integers(1, 3), keep_daily=st.integers(0, 3), keep_weekly=st.integers(0, 2)
)
places = st.lists(st.integers(0, 400), unique=True, max_size=8)


@given(places, places, policies, policies)
def test_the_last_copy_goes_only_where_both_agree(
    here: list[int], away: list[int], near: RetentionPolicy, far: RetentionPolicy
) -> None:
    both = rules(here=near, away=far)
    decided = decide_copies([taken(one) for one in here], [taken(one) for one in away], rules=both, held=Held())
    kept = {hours for (_, hours), keep in told(decided).items() if keep}
    known = {one.snapshot.id: one.snapshot for one in decided}
    gone = {taken(hours).id for hours in {*here, *away} - kept}
    if known:
        assert min((*here, *away)) in kept, "the newest of all stays"
    for policy in (near, far):
        every = decide_copies(list(known.values()), [], rules=rules(here=policy, away=policy), held=Held())
        wanted = {one.snapshot.id for one in every if one.keep}
        assert not gone & wanted


def test_a_copy_is_locked_for_as_long_as_it_stays_in_any_case() -> None:
    policy = RetentionPolicy(keep_daily=7, min_age=timedelta(days=2))
    days = [taken(24 * day) for day in range(5)]
    until = locked_until(days, policy=policy, now=NOW, zone=UTC, at_least=timedelta(days=1))
    # The newest of today may yet give way to a newer one; the fourth of seven stays until three newer days have begun.
    assert until[days[0].id] == NOW + timedelta(days=2)
    assert until[days[3].id] == NOW + 3 * timedelta(hours=23)


class Off:
    """Two places: a world with its store, and a bucket."""

    def __init__(self, folder: Path, *, locks: bool = False) -> None:
        self.lab = FakeWorld(folder)
        self.bucket = MemoryBucket(locks=True, now=self.lab.clock.now)
        self.locks = locks
        initialise(MemoryObjects(self.bucket), key=None, now=START)
        for _ in range(4):
            succeed(self.lab, backup(Policy(guest="db", retention=RetentionPolicy(keep_last=9))))
        self.ids = [one.id for one in self.lab.store.snapshots("db")]

    def copy(self, *numbers: int) -> None:
        for number in numbers:
            manifest = self.lab.store.snapshots("db")[number].manifest
            seal = open_repository(MemoryObjects(self.bucket), key=None)
            data = encode_snapshot(
                Body(manifest=manifest, disks=()), repository=seal.id, upload="0" * 32, at=START, seal=seal.seal
            )
            MemoryObjects(self.bucket).put(snapshot_name("db", snapshot=manifest.id), data=data)

    def world(self, store: ObjectStore | None = None) -> World:
        upkeep = PackedUpkeep(
            lambda: open_repository(store or MemoryObjects(self.bucket), key=None),
            clock=self.lab.clock,
            locks=self.locks,
        )
        return replace(self.lab.process(), upkeep=upkeep)

    @property
    def here(self) -> list[SnapshotId]:
        return [one.id for one in self.lab.store.snapshots("db")]

    @property
    def away(self) -> list[SnapshotId]:
        entries = open_repository(MemoryObjects(self.bucket), key=None).entries("db")
        found = [one for _, one in entries if isinstance(one, PackedSnapshot)]
        return [one.id for one in sorted(found, key=lambda one: one.body.manifest.ranked)]


POLICY = Policy(guest="db", retention=ONE, replica=ReplicaPolicy(enabled=True, retention=TWO))


def test_prune_decides_of_both_places_and_writes_it_down(tmp_path: Path) -> None:
    off = Off(tmp_path)
    off.copy(0, 1, 2, 3)
    dry = prune(off.world(), policy=POLICY, dry_run=True)
    assert (off.here, off.away) == (off.ids, off.ids)
    decided = prune(off.world(), policy=POLICY, dry_run=False)
    assert [(one.place, one.keep) for one in decided] == [(one.place, one.keep) for one in dry]
    assert (off.here, off.away) == (off.ids[3:], off.ids[2:])
    audited = [entry.detail for entry in off.world().history.trail(guest="db", limit=None) if entry.action == "prune"]
    assert sum(detail.startswith("at the replica, of ") for detail in audited) == 2


def test_a_guest_without_copies_is_pruned_as_ever(tmp_path: Path) -> None:
    off = Off(tmp_path)
    prune(off.world(), policy=Policy(guest="db", retention=ONE), dry_run=False)
    assert off.here == off.ids[3:]


def test_nothing_goes_here_while_the_replica_cannot_be_reached(tmp_path: Path) -> None:
    off = Off(tmp_path)
    off.copy(0, 1, 2, 3)
    for fault in range(3):
        store = FaultyObjects(MemoryObjects(off.bucket), faults={fault: ObjectFault.FAIL_BEFORE})
        prune(off.world(store), policy=POLICY, dry_run=False)
        assert off.here == off.ids
    empty = replace(
        off.world(),
        upkeep=PackedUpkeep(
            lambda: open_repository(MemoryObjects(MemoryBucket()), key=None), clock=off.lab.clock, locks=False
        ),
    )
    assert {one.rules for one in prune(empty, policy=POLICY, dry_run=False) if len(one.rules) == 1} == {
        ("replica-unknown",)
    }
    assert off.here == off.ids


@pytest.mark.parametrize("fault", list(ObjectFault))
def test_any_fault_of_the_replica_while_pruning(tmp_path: Path, fault: ObjectFault) -> None:
    """Whatever fails: each snapshot that a place's rules want is somewhere, and the next prune finishes the job."""
    number = 0
    while True:
        off = Off(tmp_path / str(number))
        off.copy(0, 1, 2)
        store = FaultyObjects(MemoryObjects(off.bucket), faults={number: fault})
        try:
            prune(off.world(store), policy=POLICY, dry_run=False)
        except (VmsnapError, ProcessDied):
            off.lab.end()
        assert off.ids[3] in off.here
        assert off.ids[2] in {*off.here, *off.away}
        prune(off.world(), policy=POLICY, dry_run=False)
        assert (off.here, off.away) == (off.ids[3:], off.ids[1:3])
        if number >= len(store.calls):
            break
        number += 1
    assert number > 6


def test_a_copy_in_use_or_locked_stays(tmp_path: Path) -> None:
    off = Off(tmp_path, locks=True)
    off.copy(0, 1, 2, 3)
    store = MemoryObjects(off.bucket)
    hold = holds.HoldRecord(
        snapshot=off.ids[0], run=RunId("00000000aa"), host="far", since=START, until=START + timedelta(days=3)
    )
    holds.take(store, hold=hold, exists=lambda: True)
    store.retain(snapshot_name("db", snapshot=off.ids[1]), until=START + timedelta(days=9))
    decided = prune(off.world(), policy=POLICY, dry_run=False)
    assert off.away == off.ids
    assert {one.keep for one in decided if one.place is Place.REPLICA} == {True}


def test_collecting_locks_what_is_kept_for_longer(tmp_path: Path) -> None:
    off = Off(tmp_path, locks=True)
    off.copy(2, 3)
    world = off.world()
    report = collect(
        world, policies=[POLICY], wishes=CollectWishes(), progress=QuietProgress(), cancel=NeverCancelled()
    )
    assert report.renewed == 2
    store = MemoryObjects(off.bucket)
    locked = store.info(snapshot_name("db", snapshot=off.ids[3])).retained_until
    assert locked is not None
    assert locked > off.lab.clock.now() + timedelta(days=6)
    with pytest.raises(HeldError, match="is locked in the replica until"):
        world.upkeep.remove(off.lab.store.find(off.ids[3])) if world.upkeep else None
    again = collect(world, policies=[POLICY], wishes=CollectWishes(), progress=QuietProgress(), cancel=NeverCancelled())
    assert again.renewed == 0


def test_without_a_replica_there_is_nothing_to_collect(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    with pytest.raises(PreconditionError, match="there is no replica"):
        collect(lab.process(), policies=[], wishes=CollectWishes(), progress=QuietProgress(), cancel=NeverCancelled())


class Mute:
    """A replica that does not answer until it is let."""

    def __init__(self) -> None:
        self.answer = Event()

    def snapshots(self, guest: str | None = None) -> tuple[Snapshot, ...]:
        self.answer.wait(60)
        if guest is None:
            raise SnapshotNotFoundError("no guest")
        return (taken(1),)


def test_nobody_waits_for_a_replica_that_does_not_answer() -> None:
    mute = cast("Replica", Mute())
    silent = copies_of(mute, guest="db", patience=timedelta(milliseconds=50))
    assert silent.replica
    assert str(silent.problem) == "the replica has not answered within 0 s"
    cast("Mute", mute).answer.set()
    assert copies_of(mute, guest="db").ids == {taken(1).id}
    assert str(copies_of(mute, guest=None).problem) == "no guest"
