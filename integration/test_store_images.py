"""The store of images on XFS with reflinks: the contract, crashes, sharing, damage, a full disk."""

from __future__ import annotations

import logging
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from integration.lab.commands import LabError
from integration.lab.lab import Lab
from vmsnap.errors import NoSpaceError
from vmsnap.linux.reflink import exclusive_bytes
from vmsnap.model.ids import new_run_id
from vmsnap.model.manifest import Marks, Snapshot, Verification
from vmsnap.stores.images import ImagesStore
from vmsnap.testing.cancels import NeverCancelled
from vmsnap.testing.fake_disks import FakeDiskView
from vmsnap.testing.store_contract import (
    BLOCK,
    GUEST,
    NOON,
    SECOND,
    StoreContract,
    blocks,
    no_progress,
    sample_clean,
    sample_manifest,
)
from vmsnap.testing.store_crashes import StoreCrashes


def run(*argv: str | Path) -> None:
    subprocess.run([str(word) for word in argv], check=True, capture_output=True, timeout=60)


@pytest.fixture
def small_xfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 MiB of its own."""
    image, folder = tmp_path / "small.img", tmp_path / "small"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(300 << 20)
    run("mkfs.xfs", "-q", "-m", "reflink=1", image)
    run("mount", "-o", "loop", image, folder)
    yield folder
    run("umount", folder)


@pytest.fixture
def reflink_folder(request: pytest.FixtureRequest) -> Path:
    """The lab's XFS, or a small one of the test's own where the session does not run in the lab."""
    try:
        Lab.current()
    except LabError:
        folder = request.getfixturevalue("small_xfs")
    else:
        folder = request.getfixturevalue("store_dir")
    assert isinstance(folder, Path)
    return folder


@pytest.fixture
def store(reflink_folder: Path) -> ImagesStore:
    return ImagesStore(reflink_folder)


class TestContract(StoreContract):
    @pytest.fixture
    def shares_blocks(self) -> bool:
        return True

    @pytest.fixture
    def damage(self, store: ImagesStore) -> Callable[[Snapshot], None]:
        def change(snapshot: Snapshot) -> None:
            overwrite(Path(store.images(snapshot)[0].path), offset=BLOCK + 100)

        return change


class TestCrashes(StoreCrashes):
    @pytest.fixture
    def root(self, reflink_folder: Path) -> Path:
        return reflink_folder

    @pytest.fixture
    def allow_copies(self) -> bool:
        return False


def overwrite(path: Path, *, offset: int) -> None:
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"damage")


def save(store: ImagesStore, view: FakeDiskView, *, number: int = 0) -> Snapshot:
    identity = new_run_id()
    staging = store.stage(identity, guest=GUEST)
    record = store.write_disk(staging, view=view, progress=no_progress, cancel=NeverCancelled())
    manifest = sample_manifest(identity, disks=(record,), captured=NOON + number * SECOND)
    return store.publish(staging, manifest=manifest, clean=sample_clean(identity))


def defects(store: ImagesStore, snapshot: Snapshot) -> tuple[str, ...]:
    return store.verify(snapshot, progress=no_progress, cancel=NeverCancelled())[1]


def test_unchanged_blocks_and_digests_are_shared_on_the_disk(store: ImagesStore, tmp_path: Path) -> None:
    content = blocks(*range(512))
    view = FakeDiskView.make(tmp_path / "one", content=content, size_bytes=2048 * BLOCK)
    first = save(store, view)
    changed = FakeDiskView.make(tmp_path / "two", content={**content, **blocks(400, seed=1)}, size_bytes=2048 * BLOCK)
    second = save(store, changed, number=1)
    images = [Path(store.images(one)[0].path) for one in (first, second)]
    assert [exclusive_bytes(path) for path in images] == [BLOCK, BLOCK]
    digests = images[1].with_suffix(".digests")
    assert exclusive_bytes(digests) == 4096
    assert digests.stat().st_size == 2048 * 32
    # Holes of the disk are holes of both files. (Over shared blocks XFS may reserve more for a while.)
    assert [(one.offset, one.length) for one in FakeDiskView(images[0]).extents() if one.data] == [(0, 512 * BLOCK)]
    with images[0].with_suffix(".digests").open("rb") as file:
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == 512 * 32


def test_only_pages_that_differ_are_written(store: ImagesStore, tmp_path: Path) -> None:
    content = blocks(*range(64))
    save(store, FakeDiskView.make(tmp_path / "one", content=content, size_bytes=128 * BLOCK))
    pages = {place * BLOCK + 8192 * (1 + place % 7): random.Random(place).randbytes(8192) for place in range(0, 64, 4)}
    view = FakeDiskView.make(tmp_path / "two", content={**content, **pages, 100 * BLOCK: b"x"}, size_bytes=128 * BLOCK)
    second = save(store, view, number=1)
    assert second.manifest.disks[0].new_bytes == 16 * 8192 + 4096
    image = Path(store.images(second)[0].path)
    assert image.read_bytes() == view.path.read_bytes()
    assert exclusive_bytes(image) == 16 * 8192 + 4096
    assert defects(store, second) == ()


def test_stored_files_are_for_reading_and_folders_for_passing_through(store: ImagesStore, tmp_path: Path) -> None:
    snapshot = save(store, FakeDiskView.make(tmp_path / "one", content=blocks(1), size_bytes=4 * BLOCK))
    folder = Path(store.images(snapshot)[0].path).parent
    assert folder.stat().st_mode & 0o777 == 0o711
    assert folder.parent.stat().st_mode & 0o777 == 0o711
    assert {entry.name: entry.stat().st_mode & 0o777 for entry in folder.iterdir()} == {
        "manifest.json": 0o400,
        "vda.raw": 0o400,
        "vda.digests": 0o400,
        "vda.written": 0o400,
    }


@pytest.mark.parametrize("broken", ["digests", "image"])
def test_a_disk_is_written_whole_where_the_one_before_cannot_be_trusted(
    store: ImagesStore, tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    view = FakeDiskView.make(tmp_path / "one", content=blocks(*range(8)), size_bytes=16 * BLOCK)
    first = save(store, view)
    image = Path(store.images(first)[0].path)
    if broken == "digests":
        overwrite(image.with_suffix(".digests"), offset=40)
    else:
        image.unlink()
    with caplog.at_level(logging.WARNING):
        second = save(store, view, number=1)
    assert f"vmsnap verify {first.id}" in caplog.text
    assert second.manifest.disks[0].new_bytes == 8 * BLOCK
    assert defects(store, second) == ()


def test_a_manifest_damaged_after_staging_leads_to_a_whole_disk(store: ImagesStore, tmp_path: Path) -> None:
    view = FakeDiskView.make(tmp_path / "one", content=blocks(*range(8)), size_bytes=16 * BLOCK)
    first = save(store, view)
    folder = Path(store.images(first)[0].path).parent
    identity = new_run_id()
    staging = store.stage(identity, guest=GUEST)
    assert staging.previous == first.id
    overwrite(folder / "manifest.json", offset=0)
    record = store.write_disk(staging, view=view, progress=no_progress, cancel=NeverCancelled())
    assert record.new_bytes == 8 * BLOCK


def test_a_snapshot_with_bad_blocks_is_not_built_upon(store: ImagesStore, tmp_path: Path) -> None:
    view = FakeDiskView.make(tmp_path / "one", content=blocks(*range(8)), size_bytes=16 * BLOCK)
    good = save(store, view)
    bad = save(store, view, number=1)
    overwrite(Path(store.images(bad)[0].path), offset=3 * BLOCK)
    assert defects(store, bad) == ("vda.raw: block 3 (byte 196608) differs from its digest",)
    assert defects(store, good) == ()
    store.mark(bad, marks=Marks(verification=Verification(at=NOON, blocks=16, bad_blocks=1)))
    assert store.stage(new_run_id(), guest=GUEST).previous == good.id
    third = save(store, view, number=2)
    assert defects(store, third) == ()
    assert third.manifest.disks[0].new_bytes == 0


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    histories=st.lists(
        st.tuples(st.integers(1, 40 * BLOCK), st.dictionaries(st.integers(0, 39), st.integers(0, 3), max_size=20)),
        min_size=2,
        max_size=5,
    )
)
def test_any_history_of_a_disk_reads_back(
    store: ImagesStore, tmp_path: Path, histories: list[tuple[int, dict[int, int]]]
) -> None:
    kept = []
    for number, (size_bytes, changes) in enumerate(histories):
        content = {
            place * BLOCK: bytes(BLOCK) if seed == 0 else blocks(place, seed=seed)[place * BLOCK]
            for place, seed in changes.items()
        }
        view = FakeDiskView.make(tmp_path / f"view{number}", content=content, size_bytes=size_bytes)
        kept.append((save(store, view, number=number), view.path.read_bytes()))
    random.Random(0).shuffle(kept)
    while kept:
        for snapshot, data in kept:
            assert Path(store.images(snapshot)[0].path).read_bytes() == data
            assert defects(store, snapshot) == ()
        store.remove(kept.pop()[0])


def test_a_full_disk_is_told_with_numbers_and_released(small_xfs: Path, tmp_path: Path) -> None:
    store = ImagesStore(small_xfs)
    assert [finding.severity for finding in store.findings(needed_bytes=1 << 30)][1] == "refusal"
    kept = save(store, FakeDiskView.make(tmp_path / "tiny", content=blocks(1), size_bytes=BLOCK * 4))
    big = tmp_path / "big"
    with big.open("wb") as file:
        for seed in range(300):
            file.write(random.Random(seed).randbytes(1 << 20))
    identity = new_run_id()
    staging = store.stage(identity, guest=GUEST)
    before = os.statvfs(small_xfs).f_bfree
    with pytest.raises(NoSpaceError, match=r"[\d,]+ bytes are free") as caught:
        store.write_disk(staging, view=FakeDiskView(big), progress=no_progress, cancel=NeverCancelled())
    assert caught.value.remedy
    store.release(store.staging_resource(identity, guest=GUEST), deadline=timedelta(seconds=10))
    run("sync", "-f", small_xfs)
    assert os.statvfs(small_xfs).f_bfree >= before - 16
    assert defects(store, kept) == ()
    assert store.owned() == ()


def test_a_snapshot_can_be_copied_with_cp(store: ImagesStore, tmp_path: Path) -> None:
    view = FakeDiskView.make(tmp_path / "one", content=blocks(1, 9), size_bytes=16 * BLOCK)
    snapshot = save(store, view)
    shutil.copyfile(store.images(snapshot)[0].path, tmp_path / "restored")
    assert (tmp_path / "restored").read_bytes() == view.path.read_bytes()
