"""Snapshots go into a repository and come out as they were."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmsnap.model.ids import SnapshotId
from vmsnap.stores.blocks import BLOCK_BYTES
from vmsnap.stores.objects.directory import DirectoryObjects
from vmsnap.stores.packs.maps import LEAF_BLOCKS
from vmsnap.stores.packs.names import INTENTS, MAPS, PACKS
from vmsnap.stores.packs.reading import PackedDisk
from vmsnap.stores.packs.repository import open_repository
from vmsnap.testing.memory_objects import FaultyObjects, MemoryBucket, MemoryObjects
from vmsnap.testing.packs_samples import KEY, Local, block, disks_of, fresh, send


def disk(*seeds: int, tail: int = 0) -> bytes:
    return b"".join(map(block, seeds)) + block(99)[:tail]


@pytest.mark.parametrize("key", [None, KEY], ids=["open", "keyed"])
def test_disks_and_files_come_out_as_they_went_in(tmp_path: Path, key: bytes | None) -> None:
    store = MemoryObjects(MemoryBucket())
    repository = fresh(store, key=key)
    disks = {"vda": disk(1, 0, 2, 1, 3, tail=5000), "vdb": bytes(3 * BLOCK_BYTES), "vdc": disk(4, tail=1)}
    copy = Local(folder=tmp_path).snapshot(disks=disks, nvram=b"variables" * 9000)
    done = send(repository, copy=copy, index=tmp_path / "index")
    assert done.stored_bytes > 0
    assert len(list(store.list(PACKS))) == 1
    assert list(store.list(INTENTS)) == []
    again = open_repository(store, key=key)
    assert disks_of(again) == disks
    found = again.snapshot("db", snapshot=SnapshotId(f"{1:010x}")).body
    assert found.manifest == copy.snapshot.manifest
    nvram = PackedDisk(again, root=bytes.fromhex(found.files[0].root), size_bytes=found.files[0].size_bytes)
    assert nvram.read(0, 1 << 20) == b"variables" * 9000


def test_what_is_there_is_not_uploaded_again(tmp_path: Path) -> None:
    store = MemoryObjects(MemoryBucket())
    repository, local = fresh(store), Local(folder=tmp_path)
    send(repository, copy=local.snapshot(1, disks={"vda": disk(1, 2, 3)}), index=tmp_path / "index")
    # Another guest, another host whose cache is empty.
    other = send(
        repository, copy=local.snapshot(2, guest="ab/c", disks={"sda": disk(3, 3, 1)}), index=tmp_path / "other"
    )
    assert other.stored_bytes < BLOCK_BYTES // 4
    changed = send(repository, copy=local.snapshot(3, disks={"vda": disk(1, 5, 3)}), index=tmp_path / "index")
    assert changed.stored_bytes < BLOCK_BYTES
    assert len(list(store.list(PACKS))) == 2
    assert disks_of(repository, number=3) == {"vda": disk(1, 5, 3)}
    assert disks_of(repository, guest="ab/c", number=2) == {"sda": disk(3, 3, 1)}


def test_an_unchanged_stretch_shares_its_map(tmp_path: Path) -> None:
    store = MemoryObjects(MemoryBucket())
    repository, local = fresh(store), Local(folder=tmp_path)
    first = disk(1) + bytes((LEAF_BLOCKS - 1) * BLOCK_BYTES) + disk(2)
    second = disk(1) + bytes((LEAF_BLOCKS - 1) * BLOCK_BYTES) + disk(3)
    send(repository, copy=local.snapshot(1, disks={"vda": first}), index=tmp_path / "index")
    assert len(list(store.list(MAPS))) == 3
    send(repository, copy=local.snapshot(2, disks={"vda": second}), index=tmp_path / "other host")
    assert len(list(store.list(MAPS))) == 5
    assert PackedDisk(
        repository,
        root=bytes.fromhex(repository.snapshot("db", snapshot=SnapshotId(f"{2:010x}")).body.disks[0].root),
        size_bytes=len(second),
    ).read(LEAF_BLOCKS * BLOCK_BYTES - 10, 100) == (bytes(10) + disk(3)[:90])


def test_uploading_twice_changes_nothing(tmp_path: Path) -> None:
    store = FaultyObjects(MemoryObjects(MemoryBucket()))
    repository = fresh(store)
    copy = Local(folder=tmp_path).snapshot(disks={"vda": disk(1, 2)})
    send(repository, copy=copy, index=tmp_path / "index")
    before = [info.version for info in store.list("")]
    assert send(repository, copy=copy, index=tmp_path / "index").there
    assert [info.version for info in store.list("")] == before


def test_zstd_itself_decodes_a_pack(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    repository = fresh(DirectoryObjects(place))
    send(repository, copy=Local(folder=tmp_path).snapshot(disks={"vda": disk(1, 2, 0, 3)}), index=tmp_path / "index")
    (pack,) = (place / info.name for info in repository.store.list(PACKS))
    decoded = subprocess.run(["zstd", "-d", "-c", "--no-progress", pack], check=True, capture_output=True, timeout=30)
    assert decoded.stdout == disk(1, 2, 3)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    generations=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=12), min_size=1, max_size=4),
    tail=st.integers(0, 3),
    keyed=st.booleans(),
)
def test_every_snapshot_of_a_series_can_be_read(
    tmp_path_factory: pytest.TempPathFactory, generations: list[list[int]], tail: int, *, keyed: bool
) -> None:
    folder = tmp_path_factory.mktemp("series")
    repository, local = fresh(MemoryObjects(MemoryBucket()), key=KEY if keyed else None), Local(folder=folder)
    for number, seeds in enumerate(generations, start=1):
        copy = local.snapshot(number, disks={"vda": disk(*seeds, tail=tail * 777)})
        send(repository, copy=copy, index=folder / f"index{number % 2}")
    for number, seeds in enumerate(generations, start=1):
        assert disks_of(repository, number=number) == {"vda": disk(*seeds, tail=tail * 777)}
