"""Uploads that fail or die at every single object call, and go on."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path

import pytest

from vmsnap.errors import DriverError, StoreUnreachableError, VerificationError, VmsnapError
from vmsnap.model.ids import SnapshotId
from vmsnap.ports.objects import ObjectStore
from vmsnap.stores.packs import intents, packfile
from vmsnap.stores.packs.manifests import Absence, encode_absence
from vmsnap.stores.packs.names import INTENTS, PACKS, SNAPSHOTS, snapshot_name
from vmsnap.stores.packs.repository import Repository, open_repository
from vmsnap.stores.packs.uploading import load_index
from vmsnap.testing.memory_objects import FaultyObjects, MemoryBucket, MemoryObjects, ObjectFault
from vmsnap.testing.memory_state import ProcessDied
from vmsnap.testing.packs_samples import NOW, Local, block, disks_of, fresh, send

TOKEN = "0123456789abcdef" * 2
FIRST = {"vda": b"".join(map(block, (1, 2, 3)))}
SECOND = {"vda": b"".join(map(block, (1, 4, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13)))}


@pytest.fixture(autouse=True)
def _small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Close a pack after each frame, so that there are several."""
    monkeypatch.setattr(packfile, "PACK_BYTES", 1)


def over(store: ObjectStore) -> Repository:
    return open_repository(store, key=None)


def seen_by_others(bucket: MemoryBucket) -> None:
    """Every manifest that exists can be read whole, at any time."""
    store = MemoryObjects(bucket)
    repository = over(store)
    wanted = {1: FIRST, 2: SECOND}
    for _, identity, _ in list(repository.snapshot_names()):
        assert disks_of(repository, number=int(identity, 16)) == wanted[int(identity, 16)]


def prepared(tmp_path: Path) -> tuple[MemoryBucket, Local]:
    bucket, local = MemoryBucket(), Local(folder=tmp_path)
    repository = fresh(MemoryObjects(bucket))
    send(repository, copy=local.snapshot(1, disks=FIRST), index=tmp_path / "index")
    return bucket, local


def calls_of_an_upload(tmp_path: Path) -> int:
    bucket, local = prepared(tmp_path)
    faulty = FaultyObjects(MemoryObjects(bucket))
    send(over(faulty), copy=local.snapshot(2, disks=SECOND), index=tmp_path / "other", token=TOKEN)
    return len(faulty.calls)


def test_an_upload_that_dies_at_any_call_goes_on_and_repeats_no_pack(tmp_path_factory: pytest.TempPathFactory) -> None:
    total = calls_of_an_upload(tmp_path_factory.mktemp("count"))
    assert total > 15
    others = (ObjectFault.DIE_BEFORE, ObjectFault.FAIL_AFTER, ObjectFault.FAIL_BEFORE)
    for number in range(total):
        for fault in (ObjectFault.DIE_AFTER, others[number % 3]):
            folder = tmp_path_factory.mktemp("run")
            bucket, local = prepared(folder)
            copy = local.snapshot(2, disks=SECOND)
            faulty = FaultyObjects(MemoryObjects(bucket), faults={number: fault})
            with contextlib.suppress(ProcessDied, StoreUnreachableError):
                send(over(faulty), copy=copy, index=folder / "second", token=TOKEN)
            seen_by_others(bucket)
            before = {info.name for info in MemoryObjects(bucket).list(PACKS)}
            again = FaultyObjects(MemoryObjects(bucket))
            # The cache of a host may be lost as well.
            index = folder / ("second" if number % 2 else "third")
            send(over(again), copy=copy, index=index, token=TOKEN)
            seen_by_others(bucket)
            store = MemoryObjects(bucket)
            assert list(store.list(INTENTS)) == []
            assert len(list(store.list(SNAPSHOTS))) == 2
            put = {call.name for call in again.calls if call.method == "put" and call.name.startswith(PACKS)}
            assert not put & before
            held = Counter(_blocks(over(store)))
            twice = [identity for identity, times in held.items() if times > 1]
            assert not twice, f"{fault} at call {number}: {len(twice)} blocks are stored twice"


def _blocks(repository: Repository) -> list[bytes]:
    found = []
    for info in repository.store.list(PACKS):
        digest = bytes.fromhex(info.name.rpartition("/")[2])
        index = load_index(repository, pack=digest, size_bytes=info.size_bytes)
        found += [identity for identity, _ in index.places(digest)]
    return found


def test_what_a_collector_took_for_dead_publishes_nothing(tmp_path: Path) -> None:
    bucket, local = prepared(tmp_path)
    copy = local.snapshot(2, disks=SECOND)
    store = MemoryObjects(bucket)
    name = snapshot_name("db", snapshot=SnapshotId(f"{2:010x}"))
    mark = Absence(reason="revoked", upload=TOKEN, at=NOW)

    def revoke() -> None:
        store.put_new(name, data=encode_absence(mark, repository=over(store).id))

    # Just before the manifest is written: whatever was checked before, its condition fails.
    slow = FaultyObjects(
        store, on_call=lambda call: revoke() if (call.method, call.name) == ("put_new", name) else None
    )
    with pytest.raises(DriverError, match="taken for dead"):
        send(over(slow), copy=copy, index=tmp_path / "index", token=TOKEN)
    assert isinstance(over(store).entry(name), Absence)
    # The same token never comes back; another does.
    with pytest.raises(VmsnapError):
        send(over(store), copy=copy, index=tmp_path / "index", token=TOKEN)
    intents.end(store, upload=TOKEN)
    send(over(store), copy=copy, index=tmp_path / "index")
    assert disks_of(over(store), number=2) == SECOND


def test_an_intent_that_went_away_ends_the_upload(tmp_path: Path) -> None:
    bucket, local = prepared(tmp_path)
    store = MemoryObjects(bucket)
    ended = FaultyObjects(
        store, on_call=lambda call: intents.end(store, upload=TOKEN) if call.name.startswith("maps/") else None
    )
    with pytest.raises(DriverError, match="taken for dead"):
        send(over(ended), copy=local.snapshot(2, disks=SECOND), index=tmp_path / "index", token=TOKEN)
    assert len(list(store.list(SNAPSHOTS))) == 1


def test_a_condemned_pack_is_not_relied_upon(tmp_path: Path) -> None:
    bucket, local = prepared(tmp_path)
    store = MemoryObjects(bucket)
    packs = [info.name for info in store.list(PACKS)]
    text = intents.TombstoneRecord(objects=tuple(packs)).model_dump_json()
    store.put("tombstones/round.json", data=text.encode())
    send(over(store), copy=local.snapshot(2, disks=FIRST), index=tmp_path / "index")
    for name in packs:
        store.delete(name)
    assert disks_of(over(store), number=2) == FIRST


def test_what_goes_away_meanwhile_is_noticed_before_the_manifest(tmp_path: Path) -> None:
    bucket, local = prepared(tmp_path)
    store = MemoryObjects(bucket)
    packs = [info.name for info in store.list(PACKS)]
    seen = []

    def lose(call: object) -> None:
        seen.append(call)
        if len(seen) == 12 and packs[0] in bucket.objects:
            bucket.lose(packs[0])

    with pytest.raises(DriverError, match="went away during the upload"):
        send(
            over(FaultyObjects(store, on_call=lose)),
            copy=local.snapshot(2, disks=SECOND),
            index=tmp_path / "index",
        )
    assert len(list(store.list(SNAPSHOTS))) == 1


def test_a_damaged_local_block_is_not_uploaded(tmp_path: Path) -> None:
    bucket, local = prepared(tmp_path)
    copy = local.snapshot(2, disks=SECOND)
    image = copy.disks[0].image
    data = bytearray(image.read_bytes())
    data[4 * 65536 + 5] ^= 1
    image.write_bytes(data)
    with pytest.raises(VerificationError, match=r"block 4 \(byte 262144\) differs from its digest"):
        send(over(MemoryObjects(bucket)), copy=copy, index=tmp_path / "index")
    copy.disks[0].digests.write_bytes(bytes(len(copy.disks[0].digests.read_bytes())))
    with pytest.raises(VerificationError, match="nothing is uploaded"):
        send(over(MemoryObjects(bucket)), copy=copy, index=tmp_path / "index")
