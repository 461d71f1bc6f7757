"""Storing by hints, byte for byte: what is read, what is looked at besides, and when everything is read after all.

Copies stand in for reflinks, which the file system of the unit tests may lack.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmsnap.model import hints as model_hints
from vmsnap.model.hints import BlockSet, DiskHint
from vmsnap.model.ids import new_run_id
from vmsnap.model.manifest import ReadRecord, Snapshot
from vmsnap.stores import hinted, images, writer
from vmsnap.stores.blocks import BLOCK_BYTES, file_extents
from vmsnap.stores.images import ImagesStore
from vmsnap.testing.cancels import NeverCancelled
from vmsnap.testing.fake_disks import FakeDiskView
from vmsnap.testing.store_contract import GUEST, NOON, SECOND, blocks, no_progress, sample_clean, sample_manifest

MANY = 200
SIZE = MANY * BLOCK_BYTES


def _copy(*, source: int, target: int) -> None:
    size_bytes = os.fstat(source).st_size
    os.ftruncate(target, size_bytes)
    for extent in file_extents(source, size_bytes=size_bytes):
        if extent.data:
            os.pwrite(target, os.pread(source, extent.length, extent.offset), extent.offset)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImagesStore:
    monkeypatch.setattr(images, "can_reflink", lambda _folder: True)
    monkeypatch.setattr(writer, "clone", _copy)
    (tmp_path / "store").mkdir()
    return ImagesStore(tmp_path / "store")


def save(
    store: ImagesStore, content: dict[int, bytes], *, own: tuple[int, ...] = (), hint: DiskHint | None = None
) -> tuple[Snapshot, ReadRecord]:
    number = len(store.snapshots())
    path = store._layout.root.parent / f"disk-{number}"
    stretches = tuple((block * BLOCK_BYTES, BLOCK_BYTES) for block in own)
    view = FakeDiskView.make(path, content=content, size_bytes=SIZE, own=stretches)
    run = new_run_id()
    staging = store.stage(run, guest=GUEST)
    record = store.write_disk(staging, view=view, progress=no_progress, cancel=NeverCancelled(), hint=hint)
    manifest = sample_manifest(run, disks=(record,), captured=NOON + number * SECOND)
    snapshot = store.publish(staging, manifest=manifest, clean=sample_clean(run))
    assert record.read is not None
    assert Path(store.images(snapshot)[0].path).read_bytes() == path.read_bytes()
    assert store.verify(snapshot, progress=no_progress, cancel=NeverCancelled()) == (MANY, ())
    return snapshot, record.read


def hint_of(since: Snapshot, *written: int) -> DiskHint:
    found = BlockSet.of(((block * BLOCK_BYTES, 1) for block in written), size_bytes=SIZE)
    return DiskHint(target="vda", since=since.id, written=found)


def test_only_what_can_have_changed_and_a_sample_are_read(store: ImagesStore) -> None:
    content = blocks(*range(150))
    first, read = save(store, content, own=(1, 2))
    assert (read.read_bytes, read.since) == (150 * BLOCK_BYTES, None)
    changed = {**content, **blocks(2, 50, 180, seed=1)}
    _, read = save(store, changed, own=(180,), hint=hint_of(first, 50))
    # Blocks 1, 2, 50 and 180 can have changed, and 64 others were looked at.
    assert read == ReadRecord(read_bytes=(4 + 64) * BLOCK_BYTES, since=first.id, sampled_blocks=64, hinted_in_a_row=1)


def test_where_the_clone_before_wrote_is_read_although_nobody_wrote_there_since(store: ImagesStore) -> None:
    """The guest's own block comes back there. This is what is forgotten most easily."""
    content = blocks(*range(150))
    first, _ = save(store, {**content, **blocks(7, seed=1)}, own=(7,))
    _, read = save(store, content, hint=hint_of(first))
    assert (read.since, read.mismatch) == (first.id, None)


@pytest.mark.parametrize("damage", ["missing", "cut", "another"])
def test_without_a_sound_list_of_what_the_clone_before_wrote_all_is_read(store: ImagesStore, damage: str) -> None:
    content = blocks(*range(150))
    first, _ = save(store, {**content, **blocks(7, seed=1)}, own=(7,))
    path = Path(store.images(first)[0].path).with_suffix(".written")
    assert path.read_bytes() == b"7 1\n"
    path.unlink()
    if damage != "missing":
        path.write_bytes({"cut": b"", "another": b"8 1\n"}[damage])
    _, read = save(store, content, hint=hint_of(first))
    assert read.since is None
    assert "is missing or damaged" in str(read.full_because)
    assert read.read_bytes == 150 * BLOCK_BYTES


def test_a_hole_that_a_hint_missed_is_always_found(store: ImagesStore) -> None:
    """A disk that was made smaller and larger again, for example: QEMU's bitmap knows nothing of it."""
    first, _ = save(store, blocks(*range(150)))
    _, read = save(store, blocks(*range(149)), hint=hint_of(first))
    assert "data became a hole" in str(read.mismatch)
    assert read.read_bytes == 149 * BLOCK_BYTES


def test_one_block_that_a_hint_missed_is_found_where_it_is_in_the_sample(
    store: ImagesStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = blocks(*range(150))
    first, _ = save(store, content)
    monkeypatch.setattr(hinted, "_LEAST_SAMPLE", 150)
    _, read = save(store, {**content, **blocks(123, seed=1)}, hint=hint_of(first, 7))
    assert read.mismatch == f"block 123 changed since {first.id}"
    assert read.full_because == f"the hint since {first.id} is wrong: block 123 changed"
    assert read.sampled_blocks == 149


def test_a_sample_is_some_blocks_of_the_set_by_chance() -> None:
    large = BlockSet.of([(0, 30_000 * BLOCK_BYTES), (50_000 * BLOCK_BYTES, 2)], size_bytes=60_000 * BLOCK_BYTES)
    one, other = hinted.pick(large), hinted.pick(large)
    assert len(one) == len(set(one)) == large.count // 256
    assert one == sorted(one)
    assert one != other
    assert all(block in large for block in one)
    few = BlockSet.of([(3 * BLOCK_BYTES, 1), (9 * BLOCK_BYTES, 2 * BLOCK_BYTES)], size_bytes=20 * BLOCK_BYTES)
    assert hinted.pick(few) == [3, 9, 10]
    assert hinted.pick(BlockSet.of([], size_bytes=BLOCK_BYTES)) == []


def test_now_and_then_all_is_read_whatever_the_hints_say(store: ImagesStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_hints, "MOST_HINTED_IN_A_ROW", 2)
    content = blocks(1)
    newest, _ = save(store, content)
    reads = []
    for _ in range(4):
        newest, read = save(store, content, hint=hint_of(newest))
        reads.append(read)
    assert [read.since is None for read in reads] == [False, False, True, False]
    assert "now and then" in str(reads[2].full_because)
