"""Copies of stored images on a Hyper-V host: one of each, for as long as a test VM stands on it."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from vmsnap.errors import DriverError, ToolError
from vmsnap.hypervisors.hyperv import bases
from vmsnap.hypervisors.hyperv.bases import Bases
from vmsnap.hypervisors.hyperv.tags import Part, RunFolders
from vmsnap.model.capture import DiskImage
from vmsnap.model.ids import RunId, new_run_id
from vmsnap.state.clock import SystemClock
from vmsnap.testing.world import FakeClock


class Shelf:
    """A folder of exports, mounted, and an image of the store."""

    def __init__(self, folder: Path) -> None:
        self.mounted = folder / "mounted"
        self.mounted.mkdir()
        self.folders = RunFolders(root="D:\\vmsnap", mounted=str(self.mounted))
        path = folder / "disk.raw"
        path.write_bytes(b"data" * 1024)
        self.image = DiskImage(target="scsi-0-0", path=str(path), image_format="raw", size_bytes=4096)

    def bases(self) -> Bases:
        return Bases(self.folders, clock=FakeClock())

    def run(self) -> RunId:
        """Return a run that has the folder of a test VM."""
        run = new_run_id()
        Path(self.folders.here(self.folders.of(run, Part.ENVIRONMENT))).mkdir(parents=True)
        return run

    def remove(self, run: RunId) -> None:
        folder = Path(self.folders.here(self.folders.of(run, Part.ENVIRONMENT)))
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        folder.parent.rmdir()

    def there(self) -> list[str]:
        folder = self.mounted / "vmsnap-bases"
        return sorted(path.suffix for path in folder.iterdir()) if folder.is_dir() else []


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


def test_test_vms_of_one_snapshot_stand_on_one_copy(shelf: Shelf) -> None:
    first, second = shelf.run(), shelf.run()
    path = shelf.bases().use(shelf.image, run=first)
    assert path.startswith("D:\\vmsnap\\vmsnap-bases\\")
    before = Path(shelf.folders.here(path)).stat()
    assert shelf.bases().use(shelf.image, run=second) == path
    assert Path(shelf.folders.here(path)).stat() == before
    shelf.remove(first)
    shelf.bases().collect()
    assert shelf.there() == [".vhdx"]
    shelf.remove(second)
    shelf.bases().collect()
    assert list(shelf.mounted.iterdir()) == []


def test_another_image_is_another_copy(shelf: Shelf, tmp_path: Path) -> None:
    run = shelf.run()
    other = tmp_path / "other.raw"
    other.write_bytes(b"other" * 1024)
    first = shelf.bases().use(shelf.image, run=run)
    assert shelf.bases().use(replace(shelf.image, path=str(other)), run=run) != first
    assert shelf.there() == [".vhdx", ".vhdx"]


def test_two_that_come_at_once_make_one_copy(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    begun, go_on = threading.Event(), threading.Event()
    convert = bases._convert

    def slowly(image: DiskImage, *, to: Path) -> None:
        made.append(to)
        begun.set()
        assert go_on.wait(10)
        convert(image, to=to)

    monkeypatch.setattr(bases, "_convert", slowly)
    runs = [shelf.run(), shelf.run()]
    found = []

    def use(run: RunId) -> None:
        found.append(Bases(shelf.folders, clock=SystemClock()).use(shelf.image, run=run))

    threads = [threading.Thread(target=use, args=(run,)) for run in runs]
    threads[0].start()
    assert begun.wait(10)
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert len(made) == 1
    assert len(set(found)) == 1
    assert shelf.there() == [".vhdx"]


def test_what_a_dead_process_left_is_made_anew_and_removed(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(image: DiskImage, *, to: Path) -> None:
        to.write_bytes(b"half")
        raise KeyboardInterrupt

    dead = shelf.run()
    with monkeypatch.context() as patch:
        patch.setattr(bases, "_convert", die)
        patch.setattr(Path, "unlink", lambda *_args, **_kwargs: None)
        with pytest.raises(KeyboardInterrupt):
            shelf.bases().use(shelf.image, run=dead)
    assert shelf.there() == [".claim", ".draft"]
    shelf.remove(dead)
    run = shelf.run()
    shelf.bases().use(shelf.image, run=run)
    shelf.bases().collect()
    assert shelf.there() == [".vhdx"]


def test_a_copy_that_was_being_removed_is_found_back(shelf: Shelf) -> None:
    run = shelf.run()
    path = Path(shelf.folders.here(shelf.bases().use(shelf.image, run=run)))
    path.rename(path.with_suffix(".gone"))
    shelf.bases().collect()
    assert path.exists()
    path.with_suffix(".gone").write_bytes(b"of another time")
    shelf.bases().collect()
    assert shelf.there() == [".vhdx"]


def test_an_image_that_cannot_be_copied_leaves_no_claim(shelf: Shelf) -> None:
    broken = replace(shelf.image, image_format="qcow2")
    with pytest.raises(ToolError, match="qemu-img"):
        shelf.bases().use(broken, run=shelf.run())
    assert ".claim" not in shelf.there()


def test_a_mount_that_is_gone_is_told(shelf: Shelf) -> None:
    with pytest.raises(DriverError, match="cannot be put into"):
        shelf.bases().use(shelf.image, run=new_run_id())


def test_files_of_others_stay(shelf: Shelf) -> None:
    folder = shelf.mounted / "vmsnap-bases"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    shelf.bases().collect()
    assert (folder / "notes.txt").exists()
