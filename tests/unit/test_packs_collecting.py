"""Single things that a collector does: tombstones, grace, the lease, dead uploads, rewriting, locks, and faults at any call."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from vmsnap.errors import BusyError, DriverError, VerificationError, VmsnapError
from vmsnap.model.collection import CollectReport
from vmsnap.model.ids import RunId, SnapshotId
from vmsnap.stores.packs import holds, intents, lease, tombstones
from vmsnap.stores.packs.collecting import Collecting, collect, estimate
from vmsnap.stores.packs.intents import IntentRecord, new_token
from vmsnap.stores.packs.lease import LASTS, Clocks
from vmsnap.stores.packs.names import COLLECTOR_LOCK, INTENTS, MAPS, MOVES, PACKS, TOMBSTONES
from vmsnap.stores.packs.removing import remove
from vmsnap.stores.packs.repository import open_repository
from vmsnap.stores.packs.retaining import retain
from vmsnap.testing.memory_objects import FaultyObjects, MemoryBucket, MemoryObjects, ObjectFault
from vmsnap.testing.memory_state import ProcessDied
from vmsnap.testing.packs_samples import KEY, NOW, Local, block, disks_of, fresh, send

DAY = timedelta(days=1)


def disk(*seeds: int) -> dict[str, bytes]:
    return {"vda": b"".join(map(block, seeds))}


def snapshot(number: int) -> SnapshotId:
    return SnapshotId(f"{number:010x}")


class Lab:
    """A repository, a folder of local snapshots, and a clock."""

    def __init__(self, folder: Path, *, key: bytes | None = None) -> None:
        self.bucket = MemoryBucket(now=lambda: self.now)
        self.store = MemoryObjects(self.bucket)
        self.key = key
        self.repository = fresh(self.store, key=key)
        self.local = Local(folder=folder)
        self.now = NOW
        self.seconds = 0.0
        self.how = Collecting(
            holder="a test", clocks=Clocks(now=lambda: self.now, seconds=self._boot, sleep=self._sleep)
        )
        self.at_once = replace(self.how, grace=timedelta(0))

    def _boot(self) -> float:
        return self.seconds

    def _sleep(self, span: timedelta) -> None:
        self.seconds += span.total_seconds()

    def send(self, number: int, *seeds: int, guest: str = "db") -> None:
        copy = self.local.snapshot(number, guest=guest, disks=disk(*seeds))
        send(self.repository, copy=copy, index=self.local.folder / "index")

    def remove(self, number: int) -> None:
        assert remove(self.repository, guest="db", snapshot=snapshot(number), now=self.now)

    def collect(self, how: Collecting | None = None) -> CollectReport:
        return collect(self.repository, how=how or self.how)

    def names(self, prefix: str) -> list[str]:
        return [info.name for info in self.store.list(prefix)]


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def test_garbage_goes_a_day_after_it_was_found(lab: Lab) -> None:
    lab.send(1, 1, 2)
    lab.send(2, 1, 2, 3)
    assert lab.collect().found.objects == 0
    lab.remove(2)
    looked = estimate(lab.repository, how=lab.how)
    assert (looked.found.objects, looked.dry_run) == (3, True)
    assert lab.names(TOMBSTONES) == []
    found = lab.collect()
    assert (found.found, found.removed.objects) == (looked.found, 0)
    waiting = lab.collect()
    assert (waiting.found.objects, waiting.waiting) == (0, found.found)
    assert waiting.reasons == ("what is found stays for 1d first",)
    lab.now += DAY
    freed = lab.collect()
    assert freed.removed == found.found
    assert (lab.names(TOMBSTONES), len(lab.names(PACKS)), len(lab.names(MAPS))) == ([], 1, 2)
    assert disks_of(lab.repository) == disk(1, 2)


def test_what_is_in_use_after_all_loses_its_tombstone(lab: Lab) -> None:
    lab.send(1, 1, 2)
    (pack,) = lab.names(PACKS)
    tombstones.put(lab.store, record=tombstones.TombstoneRecord(generation=1, made=NOW - DAY, objects=(pack,)))
    assert lab.collect().removed.objects == 0
    assert (lab.names(TOMBSTONES), lab.names(PACKS)) == ([], [pack])


def test_no_later_upload_relies_upon_what_has_a_tombstone(lab: Lab) -> None:
    lab.send(1, 1, 2)
    lab.send(2, 1, 2)
    (pack,) = lab.names(PACKS)
    leaves = set(lab.names(MAPS))
    tombstones.put(lab.store, record=tombstones.TombstoneRecord(generation=1, made=NOW, objects=(pack,)))
    # The snapshot before needs the pack, and shares its whole map; it may be removed while this one is uploaded.
    lab.send(3, 1, 2)
    (other,) = set(lab.names(PACKS)) - {pack}
    assert len(set(lab.names(MAPS)) - leaves) == 2
    for number in (1, 2):
        lab.remove(number)
    lab.now += DAY
    lab.collect()
    assert lab.names(PACKS) == [other]
    assert disks_of(lab.repository, number=3) == disk(1, 2)


def test_an_environment_that_reads_a_removed_snapshot_keeps_everything(lab: Lab) -> None:
    lab.send(1, 1)
    lab.send(2, 2)
    hold = holds.HoldRecord(snapshot=snapshot(2), run=RunId("00000000aa"), host="far", since=NOW, until=NOW + 3 * DAY)
    lab.remove(2)
    lab.store.put(holds.name_of(hold.snapshot, run=hold.run), data=hold.model_dump_json().encode())
    held = lab.collect(lab.at_once)
    assert (held.removed.objects, held.reasons) == (
        0,
        ("environments still read from removed snapshots: 0000000002",),
    )
    lab.now += 4 * DAY
    assert lab.collect(lab.at_once).removed.objects == 3


# Uploads


def _begin_upload(lab: Lab, *, number: int = 2) -> IntentRecord:
    record = IntentRecord(
        upload=new_token(), guest="db", snapshot=snapshot(number), host="far", since=lab.now, renewed=lab.now
    )
    intents.begin(lab.store, record=record)
    return record


def test_garbage_waits_for_uploads_that_may_need_it(lab: Lab) -> None:
    lab.send(1, 1)
    lab.remove(1)
    record = _begin_upload(lab)
    assert lab.collect(lab.at_once).found.objects == 3
    later = _begin_upload(lab, number=3)
    waiting = lab.collect(lab.at_once)
    assert waiting.reasons == (f"uploads are on that began before: {record.upload}",)
    intents.end(lab.store, upload=record.upload)
    assert lab.collect(lab.at_once).removed.objects == 3
    assert intents.exists(lab.store, upload=later.upload)


def test_an_upload_that_is_not_renewed_is_called_over_and_cannot_publish(lab: Lab, tmp_path: Path) -> None:
    killed = FaultyObjects(lab.store, faults={})
    copy = lab.local.snapshot(2, disks=disk(5, 6))
    token = new_token()
    send(open_repository(killed, key=None), copy=copy, index=tmp_path / "other", token=token)
    before_manifest = next(
        call.number for call in killed.calls if call.name.startswith("snapshots/") and call.method == "put_new"
    )
    lab.bucket.objects.clear()
    lab.repository = fresh(lab.store)
    dying = FaultyObjects(lab.store, faults={before_manifest: ObjectFault.DIE_BEFORE})
    with pytest.raises(ProcessDied):
        send(open_repository(dying, key=None), copy=copy, index=tmp_path / "again", token=token)
    packs = lab.names(PACKS)
    for _ in range(3):
        assert lab.collect(lab.at_once).ended == ()  # the days between two looks count, not those of the upload's clock
    assert lab.names(PACKS) == packs
    lab.now += 4 * DAY
    (ended,) = lab.collect(lab.at_once).ended
    assert (ended.upload, ended.reason) == (token, "not renewed for 4d")
    assert lab.names(INTENTS) == []
    with pytest.raises(DriverError, match="was taken for dead"):
        send(lab.repository, copy=copy, index=tmp_path / "again", token=token)
    lab.collect(lab.at_once)
    assert lab.names(PACKS) == []
    send(lab.repository, copy=copy, index=tmp_path / "again")
    assert disks_of(lab.repository, number=2) == disk(5, 6)


def test_a_renewed_upload_is_left_alone_whatever_the_clocks_say(lab: Lab) -> None:
    intent = intents.begin(lab.store, record=_begin_upload(lab))
    for _ in range(4):
        lab.now += 30 * DAY
        assert intents.renew(lab.store, intent=intent, now=NOW - 99 * DAY)
        assert lab.collect().ended == ()
    lab.now -= 300 * DAY
    assert lab.collect().ended == ()


def test_the_intent_of_a_published_upload_goes_at_once(lab: Lab) -> None:
    lab.send(1, 1)
    (name,) = [name for _, _, name in lab.repository.snapshot_names()]
    entry = lab.repository.entry(name)
    assert entry is not None
    record = _begin_upload(lab, number=1).model_copy(update={"upload": entry.upload})
    intents.begin(lab.store, record=record)
    assert [one.reason for one in lab.collect().ended] == ["its snapshot is published"]
    assert disks_of(lab.repository) == disk(1)


# The lease


def test_one_collects_at_a_time_and_a_dead_one_is_taken_over_from(lab: Lab) -> None:
    dead = lease.take(lab.store, holder="dead", clocks=lab.how.clocks, waits=False)
    with pytest.raises(BusyError, match="dead collects the replica's garbage"):
        lab.collect()
    lab.send(1, 1)
    lab.remove(1)
    assert lab.collect(replace(lab.at_once, takes_over=True)).removed.objects == 3
    assert lab.seconds >= LASTS.total_seconds()
    with pytest.raises(BusyError, match="took this one for dead"):
        dead.hold()
    assert lease.take(lab.store, holder="next", clocks=lab.how.clocks, waits=False).generation == 3


def test_a_lease_that_is_renewed_is_not_taken_over(lab: Lab) -> None:
    living = lease.take(lab.store, holder="living", clocks=lab.how.clocks, waits=False)

    def sleep(span: timedelta) -> None:
        lab.seconds += span.total_seconds()
        lab.now -= DAY  # whatever the clock says
        living.hold()

    with pytest.raises(BusyError):
        lease.take(lab.store, holder="other", clocks=replace(lab.how.clocks, sleep=sleep), waits=True)
    living.release(sightings=())


def test_a_write_whose_answer_was_lost_counts(lab: Lab) -> None:
    """The store retries such a write, and finds its own."""

    class Twice(MemoryObjects):
        def replace(self, name: str, *, data: bytes, version: str):  # type: ignore[no-untyped-def]
            super().replace(name, data=data, version=version)
            return super().replace(name, data=data, version=version)

    lab.repository = open_repository(Twice(lab.bucket), key=None)
    lab.seconds = 60
    lab.collect()
    lab.collect()


# Rewriting


@pytest.mark.parametrize("key", [None, KEY], ids=["open", "keyed"])
def test_a_pack_that_is_mostly_garbage_is_written_anew(tmp_path: Path, key: bytes | None) -> None:
    lab = Lab(tmp_path, key=key)
    lab.send(1, *range(1, 41))
    lab.send(2, *range(1, 5), *range(101, 137))  # shares 4 of 40
    old, *_ = lab.names(PACKS)
    lab.remove(1)
    how = replace(lab.at_once, rewrite_bytes=1 << 30)
    done = lab.collect(how)
    assert done.rewritten.objects == 1
    assert len(lab.names(MOVES)) == 1
    lab.collect(how)
    assert done.rewritten.size_bytes > 1 << 20
    gone = lab.names(MOVES)[0].rpartition("/")[2]
    assert f"{PACKS}{gone[:2]}/{gone}" not in lab.names(PACKS)
    assert disks_of(lab.repository, number=2) == disk(*range(1, 5), *range(101, 137))
    # The next map does not speak of the old pack; without the snapshot whose map does, the move is garbage too.
    lab.send(3, *range(1, 5), *range(101, 137))
    lab.send(4, *range(1, 6), *range(101, 136))
    for number in (2, 3):
        lab.remove(number)
    lab.collect(how)
    lab.collect(how)
    assert lab.names(MOVES) == []
    assert disks_of(lab.repository, number=4) == disk(*range(1, 6), *range(101, 136))
    assert old


def test_a_rewritten_pack_stays_where_an_upload_relied_upon_more_of_it(lab: Lab, tmp_path: Path) -> None:
    lab.send(1, *range(1, 41))
    lab.send(2, 1, 2)
    (old,) = lab.names(PACKS)
    lab.remove(1)
    # This upload has looked at the packs, and stands still before its manifest.
    copy = lab.local.snapshot(3, disks=disk(30, 31))
    gate = FaultyObjects(lab.store, on_call=lambda call: stop(call.method, call.name))
    how = replace(lab.at_once, rewrite_bytes=1 << 30)

    def stop(method: str, name: str) -> None:
        if method == "put_new" and name.startswith("snapshots/"):
            assert lab.collect(how).rewritten.objects == 1
            assert lab.collect(how).removed.objects == 0

    send(open_repository(gate, key=None), copy=copy, index=tmp_path / "other")
    lab.collect(how)
    assert old in lab.names(PACKS)
    assert lab.names(TOMBSTONES) == []
    assert disks_of(lab.repository, number=3) == disk(30, 31)
    assert disks_of(lab.repository, number=2) == disk(1, 2)


# Locks


def test_what_is_locked_waits_and_is_no_failure(lab: Lab) -> None:
    lab.send(1, 1)
    lab.send(2, 1, 2)
    entries = [entry for _, entry in lab.repository.entries() if not isinstance(entry, VerificationError)]
    until = {entry.id: NOW + (10 if entry.id == snapshot(1) else 5) * DAY for entry in entries}

    def lock() -> int:
        return retain(lab.repository, snapshots=entries, until=until, connections=1, check=lambda: None)

    assert lock() == len([name for name in lab.bucket.objects if "/" in name])
    assert lock() == 0
    # What both need is locked for as long as either needs it.
    shared = {info.retained_until for info in map(lab.store.info, lab.names(PACKS))}
    assert shared == {NOW + 10 * DAY, NOW + 5 * DAY}
    with pytest.raises(VmsnapError, match="is locked"):
        remove(lab.repository, guest="db", snapshot=snapshot(2), now=NOW)
    lab.bucket.lose("snapshots/db/0000000002.json")
    for _ in range(2):
        report = lab.collect(lab.at_once)
    assert report.reasons == ("some objects are locked (Object Lock)",)
    assert (report.removed.objects, report.waiting.objects) == (0, 3)
    lab.now += 6 * DAY
    assert lab.collect(lab.at_once).removed.objects == 3
    assert disks_of(lab.repository) == disk(1)


# Faults


def test_a_map_that_is_missing_ends_the_pass_and_nothing_goes(lab: Lab) -> None:
    lab.send(1, 1)
    lab.send(2, 2)
    lab.remove(1)
    lab.collect()
    lab.now += DAY
    for name in lab.names(MAPS):
        entry = lab.bucket.objects[name].data
        lab.bucket.damage(name, data=entry[:-1] + b"?")
    with pytest.raises(VerificationError):
        lab.collect()
    assert len(lab.names(PACKS)) == 2
    # The lease was let go.
    assert b'"held": false' in lab.store.get(COLLECTOR_LOCK).data


def _copy(lab: Lab) -> MemoryBucket:
    kept = {name: replace(one) for name, one in lab.bucket.objects.items()}
    return MemoryBucket(now=lab.bucket.now, objects=kept, versions=lab.bucket.versions)


@pytest.mark.parametrize("fault", list(ObjectFault))
def test_any_fault_at_any_call(lab: Lab, fault: ObjectFault) -> None:
    lab.send(1, *range(1, 9))
    lab.send(2, 1, 2, 20)
    lab.remove(1)
    lab.collect(lab.at_once)
    lab.send(3, 1, 2, 21)
    lab.remove(2)
    how = replace(lab.at_once, rewrite_bytes=1 << 30, takes_over=True, patience=timedelta(0))
    before = _copy(lab)
    number = 0
    while True:
        lab.bucket = before
        store = MemoryObjects(_copy(lab))
        repository = open_repository(store, key=None)
        faulty = FaultyObjects(store, faults={number: fault})
        with suppress(VmsnapError, ProcessDied):
            collect(open_repository(faulty, key=None), how=how)
        assert disks_of(repository, number=3) == disk(1, 2, 21)
        for _ in range(3):
            collect(repository, how=how)
        assert disks_of(repository, number=3) == disk(1, 2, 21)
        left = estimate(repository, how=how)
        assert (left.found.objects, left.waiting.objects) == (0, 0)
        assert list(store.list(TOMBSTONES)) == []
        if number >= len(faulty.calls):
            break
        number += 1
    assert number > 20
