"""Removing snapshots by hand: what is held stays, what would be lost takes the guest's name, whatever fails."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from tests.workflow.invocations import Outcome, Trial, Work, backup, provision, pruning, recovers, simply, succeed
from tests.workflow.test_copies import Off, taken
from vmsnap.errors import ConfigError, HeldError, PreconditionError, SnapshotNotFoundError, VmsnapError
from vmsnap.model.forgetting import ForgetReport, ForgetWishes
from vmsnap.model.guest import Severity
from vmsnap.model.history import Action, AuditEntry
from vmsnap.model.ids import RunId, SnapshotId
from vmsnap.model.manifest import Marks, Pin, Snapshot, Verification
from vmsnap.model.policy import Policy
from vmsnap.model.report import BackupReport, Place
from vmsnap.model.retention_policy import RetentionPolicy
from vmsnap.ports.objects import ObjectStore
from vmsnap.stores.images import ImagesStore
from vmsnap.stores.layout import MANIFEST, REMOVED
from vmsnap.stores.packs import holds
from vmsnap.stores.packs.names import snapshot_name
from vmsnap.stores.packs.replica import PacksReplica
from vmsnap.stores.packs.repository import initialise, open_repository
from vmsnap.stores.packs.upkeep import PackedUpkeep
from vmsnap.testing.fake_disks import FakeDiskView
from vmsnap.testing.faults import Mode
from vmsnap.testing.memory_objects import FaultyObjects, MemoryBucket, MemoryObjects, ObjectFault
from vmsnap.testing.memory_state import ProcessDied
from vmsnap.testing.memory_store import MemoryStore
from vmsnap.testing.store_contract import GUEST, StoreContract, blocks
from vmsnap.testing.world import START, FakeWorld
from vmsnap.workflow.forget import forget
from vmsnap.workflow.hinting import hint_findings
from vmsnap.workflow.world import World

KEEP = Policy(guest="db", retention=RetentionPolicy(keep_last=9))
SOUND = Verification(at=START, blocks=9, bad_blocks=0)
DAMAGED = Verification(at=START, blocks=9, bad_blocks=1)


def wishes(
    *references: str,
    guest: str | None = None,
    replica: bool = False,
    dry_run: bool = False,
    confirmed: str | None = None,
) -> ForgetWishes:
    return ForgetWishes(
        reason="request 4711",
        references=references,
        guest=guest,
        replica=replica,
        dry_run=dry_run,
        confirmed=confirmed,
    )


def backed_up(folder: Path, *, times: int = 3) -> FakeWorld:
    lab = FakeWorld(folder)
    for _ in range(times):
        succeed(lab, backup(KEEP))
    return lab


def ids(lab: FakeWorld) -> list[SnapshotId]:
    return [one.id for one in lab.store.snapshots("db")]


def trail(lab: FakeWorld) -> list[AuditEntry]:
    return [one for one in lab.state.history.trail(guest=None, limit=None) if one.action is Action.FORGET]


def world_of(off: Off, objects: ObjectStore | None = None) -> World:
    """Return a process that sees both places."""
    store = objects or MemoryObjects(off.bucket)
    replica = PacksReplica(lambda: store, key=lambda: None, state=Path("/nowhere"), connections=1, clock=off.lab.clock)
    return replace(off.world(store), replica=replica)


def both(folder: Path, *numbers: int) -> Off:
    """Return two places: four snapshots here, and copies of some at the replica."""
    off = Off(folder, locks=True)
    off.copy(*numbers)
    return off


def test_a_copy_here_goes_and_the_one_at_the_replica_stays(tmp_path: Path) -> None:
    off = both(tmp_path, 0, 1, 2, 3)
    report = forget(world_of(off), wishes=wishes(off.ids[1], off.ids[0]))
    assert (off.here, off.away) == (off.ids[2:], off.ids)
    assert [(one.place, one.copy_stays) for one in report.entries] == [(Place.LOCAL, True)] * 2
    assert [(one.guest, one.failure) for one in trail(off.lab)] == [("db", None)] * 2
    assert {one.subject for one in trail(off.lab)} == set(off.ids[:2])
    assert all(one.detail.startswith("of 2026-") and one.detail.endswith(": request 4711") for one in trail(off.lab))


@pytest.mark.parametrize("confirmed", [None, "db2"])
def test_the_last_copy_goes_only_with_the_guests_name(tmp_path: Path, confirmed: str | None) -> None:
    lab = backed_up(tmp_path)
    before = ids(lab)
    with pytest.raises(VmsnapError, match="nothing was removed") as caught:
        forget(lab.process(), wishes=wishes(before[0], confirmed=confirmed))
    if confirmed is None:
        assert isinstance(caught.value, PreconditionError)
        assert caught.value.details == f"no copy is left anywhere of {before[0]}"
        assert "--yes db" in str(caught.value.remedy)
    else:
        assert isinstance(caught.value, ConfigError)
    assert (ids(lab), trail(lab)) == (before, [])
    forget(lab.process(), wishes=wishes(before[0], confirmed="db"))
    assert ids(lab) == before[1:]


def test_the_best_and_the_last_here_take_the_guests_name_though_copies_stay(tmp_path: Path) -> None:
    off = both(tmp_path, 0, 1, 2, 3)
    for number, verification in enumerate((SOUND, SOUND, DAMAGED)):
        off.lab.store.mark(off.lab.store.find(off.ids[number]), marks=Marks(verification=verification))
    for named, said in (
        (off.ids[1:2], f"{off.ids[1]} is the newest verified one in the local store"),
        (off.ids, "no snapshot of 'db' is left in the local store"),
    ):
        with pytest.raises(PreconditionError) as caught:
            forget(world_of(off), wishes=wishes(*named))
        assert said in str(caught.value.details)
    assert off.here == off.ids
    forget(world_of(off), wishes=wishes(off.ids[0], off.ids[2], off.ids[3]))
    assert (off.here, off.away) == ([off.ids[1]], off.ids)


def test_where_none_is_verified_the_newest_sound_one_takes_the_guests_name(tmp_path: Path) -> None:
    off = both(tmp_path, 0, 1, 2, 3)
    off.lab.store.mark(off.lab.store.find(off.ids[3]), marks=Marks(verification=DAMAGED))
    forget(world_of(off), wishes=wishes(off.ids[3]))
    with pytest.raises(PreconditionError) as caught:
        forget(world_of(off), wishes=wishes(off.ids[2]))
    assert "the newest one without known damage (none is verified)" in str(caught.value.details)


def test_what_is_held_is_refused_and_everything_that_holds_it_is_named(tmp_path: Path) -> None:
    lab = backed_up(tmp_path)
    succeed(lab, provision())
    first, _, newest = lab.store.snapshots("db")
    lab.store.mark(first, marks=Marks(pin=Pin(owner="ann", reason="audit", since=START)))
    before = ids(lab)
    for dry_run in (True, False):
        with pytest.raises(HeldError, match="2 things hold snapshots of 'db': nothing was removed") as caught:
            forget(lab.process(), wishes=wishes(guest="db", dry_run=dry_run, confirmed="db"))
        assert f"snapshot {first.id} of 2026-11-21 " in str(caught.value.details)
        assert "is pinned by ann: audit" in str(caught.value.details)
        assert f"snapshot {newest.id}" in str(caught.value.details)
        assert "is in use by environment 'test'" in str(caught.value.details)
        lab.end()
    assert (ids(lab), trail(lab)) == (before, [])
    with pytest.raises(HeldError, match=f"snapshot {first.id} of .* is pinned by ann: audit: nothing was removed"):
        forget(lab.process(), wishes=wishes(first.id, confirmed="db"))


def test_a_pin_that_has_ended_holds_nothing(tmp_path: Path) -> None:
    lab = backed_up(tmp_path)
    first = lab.store.snapshots("db")[0]
    ended = Pin(owner="ann", reason="audit", since=START, until=START + timedelta(hours=1))
    lab.store.mark(first, marks=Marks(pin=ended))
    lab.clock.sleep(timedelta(hours=2))
    forget(lab.process(), wishes=wishes(first.id, confirmed="db"))
    assert first.id not in ids(lab)


def test_a_run_that_holds_a_snapshot_is_named(tmp_path: Path) -> None:
    lab = backed_up(tmp_path)
    first = lab.store.snapshots("db")[0]
    lab.store.hold(lab.store.hold_resource(RunId("00000000a1"), snapshot=first))
    with pytest.raises(HeldError, match="is in use by run 00000000a1"):
        forget(lab.process(), wishes=wishes(first.id, confirmed="db"))


def test_what_is_held_or_locked_at_the_replica_is_refused_there_and_may_go_here(tmp_path: Path) -> None:
    off = both(tmp_path, 0, 1, 2, 3)
    store = MemoryObjects(off.bucket)
    hold = holds.HoldRecord(
        snapshot=off.ids[0], run=RunId("00000000aa"), host="far", since=START, until=START + timedelta(days=3)
    )
    holds.take(store, hold=hold, exists=lambda: True)
    store.retain(snapshot_name("db", snapshot=off.ids[1]), until=START + timedelta(days=9))
    for dry_run in (True, False):
        with pytest.raises(HeldError) as caught:
            forget(world_of(off), wishes=wishes(guest="db", replica=True, dry_run=dry_run, confirmed="db"))
        assert f"snapshot {off.ids[0]} is in use in the replica, by an environment of far" in str(caught.value.details)
        assert f"snapshot {off.ids[1]} is locked in the replica until 2026-11-30" in str(caught.value.details)
    assert (off.here, off.away) == (off.ids, off.ids)
    forget(world_of(off), wishes=wishes(off.ids[0], off.ids[1]))
    assert (off.here, off.away) == (off.ids[2:], off.ids)


def test_a_dry_run_says_the_same_and_changes_nothing(tmp_path: Path) -> None:
    lab = backed_up(tmp_path)
    before = ids(lab)
    said = forget(lab.process(), wishes=wishes(*before[:2], dry_run=True))
    assert said.confirm == (f"no copy is left anywhere of {before[0]}, {before[1]}",)
    assert (ids(lab), trail(lab)) == (before, [])
    done = forget(lab.process(), wishes=wishes(*before[:2], confirmed="db"))
    assert (done.entries, done.freed_bytes, done.confirm) == (said.entries, said.freed_bytes, said.confirm)
    assert (said.dry_run, done.dry_run) == (True, False)
    assert ids(lab) == before[2:]


def test_with_the_replica_both_copies_go_and_those_that_are_only_there(tmp_path: Path) -> None:
    off = both(tmp_path, 0, 1, 2, 3)
    forget(world_of(off), wishes=wishes(off.ids[0]))
    with pytest.raises(SnapshotNotFoundError) as caught:
        forget(world_of(off), wishes=wishes(off.ids[0]))
    assert "--replica" in str(caught.value.remedy)
    with pytest.raises(PreconditionError, match="takes --yes db"):
        forget(world_of(off), wishes=wishes(off.ids[0], replica=True))
    report = forget(world_of(off), wishes=wishes(off.ids[0], off.ids[1], replica=True, confirmed="db"))
    assert [(one.snapshot.id, one.place.value) for one in report.entries] == [
        (off.ids[1], "local"),
        (off.ids[0], "replica"),
        (off.ids[1], "replica"),
    ]
    assert (off.here, off.away) == (off.ids[2:], off.ids[2:])
    assert sum(one.detail.startswith("at the replica, of ") for one in trail(off.lab)) == 2
    assert all(one.detail.endswith(": request 4711") for one in trail(off.lab))


def test_all_of_a_retired_guest_goes(tmp_path: Path) -> None:
    off = both(tmp_path, 0, 1)
    said = forget(world_of(off), wishes=wishes(guest="db", replica=True, dry_run=True))
    assert said.confirm[-2:] == (
        "no snapshot of 'db' is left in the local store",
        "no snapshot of 'db' is left at the replica",
    )
    forget(world_of(off), wishes=wishes(guest="db", replica=True, confirmed="db"))
    assert (off.here, off.away) == ([], [])
    with pytest.raises(SnapshotNotFoundError, match="no such snapshots of guest 'db'"):
        forget(world_of(off), wishes=wishes(guest="db", replica=True, confirmed="db"))


def test_what_is_not_named_unmistakably_is_refused(tmp_path: Path) -> None:
    lab = backed_up(tmp_path, times=1)
    lab.add_guest("db2")
    succeed(lab, backup(Policy(guest="db2")))
    (other,) = lab.store.snapshots("db2")
    for named, said in (
        (("db@latest",), "named by its id"),
        ((ids(lab)[0], other.id), "several guests: 'db', 'db2'"),
    ):
        with pytest.raises(ConfigError, match=said):
            forget(lab.process(), wishes=wishes(*named, confirmed="db"))
    with pytest.raises(SnapshotNotFoundError, match="there is no snapshot 'ffffff'"):
        forget(lab.process(), wishes=wishes(ids(lab)[0], "ffffff", confirmed="db"))
    with pytest.raises(SnapshotNotFoundError, match="is the beginning of 2 snapshots"):
        forget(lab.process(), wishes=wishes("00000", confirmed="db"))
    with pytest.raises(SnapshotNotFoundError, match="no such snapshots of guest 'nobody'"):
        forget(lab.process(), wishes=wishes(guest="nobody", confirmed="nobody"))
    with pytest.raises(ConfigError, match="names no replica"):
        forget(lab.process(), wishes=wishes(guest="db", replica=True, confirmed="db"))
    assert len(lab.store.snapshots()) == 2


def test_while_the_replica_cannot_be_asked_it_takes_the_guests_name(tmp_path: Path) -> None:
    off = both(tmp_path, 0, 1, 2, 3)

    def away() -> World:
        return world_of(off, FaultyObjects(MemoryObjects(off.bucket), faults={0: ObjectFault.FAIL_BEFORE}))

    with pytest.raises(PreconditionError) as caught:
        forget(away(), wishes=wishes(off.ids[0]))
    assert "whether copies are at the replica is not known" in str(caught.value.details)
    with pytest.raises(VmsnapError):
        forget(away(), wishes=wishes(off.ids[0], replica=True, confirmed="db"))
    assert off.here == off.ids
    report = forget(away(), wishes=wishes(off.ids[0], confirmed="db"))
    assert ([one.copy_stays for one in report.entries], report.problem is None) == ([None], False)
    assert off.here == off.ids[1:]


def test_a_copy_that_has_just_gone_is_none(tmp_path: Path) -> None:
    off = both(tmp_path, 0, 1, 2, 3)
    bucket = MemoryBucket()
    initialise(MemoryObjects(bucket), key=None, now=START)
    upkeep = PackedUpkeep(lambda: open_repository(MemoryObjects(bucket), key=None), clock=off.lab.clock, locks=False)
    with pytest.raises(PreconditionError, match="has just gone, so the last one stays here"):
        forget(replace(world_of(off), upkeep=upkeep), wishes=wishes(off.ids[0]))
    assert off.here == off.ids


class _Meanwhile(MemoryStore):
    """Somebody pins the first snapshot just before the lock is taken, or holds what is being removed."""

    pins = False

    @staticmethod
    def over(store: MemoryStore, *, pins: bool) -> _Meanwhile:
        meanwhile = _Meanwhile(Path("/nowhere"))
        vars(meanwhile).update(vars(store), pins=pins)
        return meanwhile

    def finish_removals(self, guest: str) -> tuple[SnapshotId, ...]:
        if self.pins:
            pin = Pin(owner="ann", reason="audit", since=START)
            self.mark(self.snapshots(guest)[0], marks=Marks(pin=pin))
        return super().finish_removals(guest)

    def remove(self, snapshot: Snapshot) -> int:
        if snapshot == self.snapshots("db")[-2]:
            self.hold(self.hold_resource(RunId("00000000a1"), snapshot=snapshot))
        return super().remove(snapshot)


def test_what_is_pinned_meanwhile_stays(tmp_path: Path) -> None:
    lab = backed_up(tmp_path)
    before = ids(lab)
    lab.store = _Meanwhile.over(lab.store, pins=True)
    with pytest.raises(HeldError, match="pinned by ann"):
        forget(lab.process(), wishes=wishes(*before[:2], confirmed="db"))
    assert ids(lab) == before


def test_what_is_taken_into_use_meanwhile_stays_and_what_went_before_is_told(tmp_path: Path) -> None:
    lab = backed_up(tmp_path)
    before = ids(lab)
    lab.store = _Meanwhile.over(lab.store, pins=False)
    with pytest.raises(HeldError, match="00000000a1") as caught:
        forget(lab.process(), wishes=wishes(*before[:2], confirmed="db"))
    assert caught.value.details == f"removed before that: {before[0]}"
    assert ids(lab) == before[1:]
    assert [(one.subject, one.failure is None) for one in trail(lab)] == [(before[1], False), (before[0], True)]


def forgetting(wanted: ForgetWishes) -> Work:
    def work(world: World, _cancel: object) -> ForgetReport:
        return forget(world, wishes=wanted)

    return work


@pytest.mark.parametrize("mode", list(Mode))
def test_any_fault_while_forgetting(tmp_path: Path, mode: Mode) -> None:
    """Whatever fails, what was not named stays; and what is left of what was named goes with the next command."""
    known = ids(backed_up(tmp_path / "model"))
    named, stays = known[:2], known[2]
    trial = Trial(prepare=backed_up, work=forgetting(wishes(*named, confirmed="db")))

    def afterwards(lab: FakeWorld, outcome: Outcome) -> list[str]:
        wrong = recovers(lab)
        left = [one for one in named if one in ids(lab)]
        if left:
            again = simply(lab, forgetting(wishes(*left, confirmed="db")))
            wrong += [f"the next fails: {again.error!r}"] if again.error is not None else []
        simply(lab, pruning(KEEP))
        return wrong if ids(lab) == [stays] else [*wrong, f"left are {ids(lab)}"]

    trial.every(tmp_path, mode, after=afterwards)
    assert trial.count > 8


class _Light(Off):
    """Two places with three snapshots that nobody made."""

    def __init__(self, folder: Path) -> None:
        self.lab = FakeWorld(folder)
        self.bucket = MemoryBucket(locks=True, now=self.lab.clock.now)
        self.locks = True
        initialise(MemoryObjects(self.bucket), key=None, now=START)
        for hours in (22, 21, 20):
            self.lab.store.put(taken(hours))
        self.ids = self.here


@pytest.mark.parametrize("fault", list(ObjectFault))
def test_any_fault_of_the_replica_while_forgetting(tmp_path: Path, fault: ObjectFault) -> None:
    number = 0
    while True:
        off = _Light(tmp_path / str(number))
        off.copy(0, 1, 2)
        store = FaultyObjects(MemoryObjects(off.bucket), faults={number: fault})
        try:
            forget(world_of(off, store), wishes=wishes(*off.ids[:2], replica=True, confirmed="db"))
        except (VmsnapError, ProcessDied):
            off.lab.end()
        assert off.ids[2] in off.away, "it was not named"
        assert set(off.away) <= set(off.here), "what is gone here is gone there"
        for named in off.here[:-1]:
            forget(world_of(off), wishes=wishes(named, replica=True, confirmed="db"))
        assert (off.here, off.away) == (off.ids[2:], off.ids[2:])
        if number >= len(store.calls):
            break
        number += 1
    assert number > 6


def test_a_removal_that_was_cut_is_finished_by_the_same_command_without_a_policy(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    store = ImagesStore(tmp_path / "images", allow_copies=True)
    world = replace(FakeWorld(tmp_path).process(), store=store)
    view = FakeDiskView.make(tmp_path / "disk", content=blocks(1), size_bytes=1 << 20)
    for wanted in (wishes(guest=GUEST, confirmed=GUEST), None):
        snapshot = StoreContract().save(store, view)
        folder = Path(store.images(snapshot)[0].path).parent
        (folder / MANIFEST).rename(folder / REMOVED)
        (finding,) = (one for one in store.findings(needed_bytes=0) if "was cut" in one.message)
        assert f"vmsnap forget {snapshot.id}" in str(finding.remedy)
        report = forget(world, wishes=wanted or wishes(snapshot.id, confirmed=GUEST))
        assert (report.entries, folder.exists(), store.owned()) == ((), False, ())


# What later snapshots need of one that was removed.


def test_an_older_one_is_not_missed_by_the_next_backup(tmp_path: Path) -> None:
    lab = backed_up(tmp_path)
    first, _, newest = ids(lab)
    forget(lab.process(), wishes=wishes(first, confirmed="db"))
    lab.end()
    report = succeed(lab, backup(KEEP)).result
    assert isinstance(report, BackupReport)
    assert report.reads["vda"].since == newest


def test_without_the_newest_the_next_backup_reads_everything(tmp_path: Path) -> None:
    lab = backed_up(tmp_path)
    forget(lab.process(), wishes=wishes(ids(lab)[-1], confirmed="db"))
    lab.end()
    for number in range(2):
        # Each disk that is stored is compared with what the guest wrote.
        report = succeed(lab, backup(KEEP)).result
        assert isinstance(report, BackupReport)
        assert (report.reads["vda"].since is None) == (number == 0)


def test_hints_that_were_wrong_are_not_believed_again_without_the_snapshot_that_said_so(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    lab.export.own = ()
    lab.host.machines["db"].notes_miss_writes = True
    for _ in range(2):
        succeed(lab, backup(KEEP))
    old, new = lab.store.snapshots("db")
    assert (old.hints_distrusted, new.hints_distrusted is None) == (None, False)
    forget(lab.process(), wishes=wishes(new.id, confirmed="db"))
    lab.end()
    assert lab.store.snapshots("db")[-1].hints_distrusted == new.hints_distrusted
    world = lab.process()
    (finding,) = hint_findings(world, policy=KEEP, guest=world.hypervisor.inspect("db"))
    assert finding.severity is Severity.WARNING
    lab.end()
    for _ in range(2):
        report = succeed(lab, backup(KEEP)).result
        assert isinstance(report, BackupReport)
        assert "hints are not believed" in str(report.reads["vda"].full_because)
    assert lab.store.snapshots("db")[-1].manifest.hints_distrusted == new.hints_distrusted
    said = forget(lab.process(), wishes=wishes(guest="db", dry_run=True))
    assert 'set capture.hints = "off"' in said.confirm[-1]
