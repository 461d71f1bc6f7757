"""Backups and test VMs of a simulated Hyper-V host whose disks are real, down to a database that starts from what was stored."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from integration.hyperv_disks import (
    DATA_DIRECTORY,
    DISK_BYTES,
    FORMATS,
    ROWS,
    DiskGuest,
    DiskWorld,
    contents,
    database_folder,
    run,
    sql,
    start,
    stop,
)
from tests.workflow.invocations import backup, destroy, provision, reconciling, simply
from vmsnap.disks.export import QemuExport
from vmsnap.disks.filesystems import OfflineInspector
from vmsnap.errors import NotCleanError
from vmsnap.model.capture import DiskImage
from vmsnap.model.ids import new_run_id
from vmsnap.model.manifest import Snapshot
from vmsnap.ports.disks import FileRequest
from vmsnap.testing.hyperv.world import EXPORTS

MINUTE = timedelta(minutes=1)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path)


def _in_order(lab: DiskWorld) -> None:
    assert lab.machine.harm() == []
    kept = {environment.run for environment in lab.state.environments.all()}
    assert [item for owner in lab.owners for item in owner.owned() if item.run not in kept] == []
    if not kept:
        assert lab.machine.leftovers() == []


def _stored(lab: DiskWorld) -> tuple[Snapshot, list[Path]]:
    (snapshot,) = lab.real_store.snapshots("db")
    return snapshot, [Path(image.path) for image in lab.real_store.images(snapshot)]


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.mark.parametrize("name", list(FORMATS))
def test_what_is_stored_is_what_the_clone_left(folder: Path, name: str) -> None:
    lab = DiskWorld(folder, disk_format=FORMATS[name])
    outcome = simply(lab, backup())
    assert outcome.error is None, (outcome.error, getattr(outcome.error, "details", ""))
    snapshot, images = _stored(lab)
    assert [image.stat().st_size for image in images] == [DISK_BYTES, DISK_BYTES]
    assert [_sum(image) for image in images] == [_sum(contents() / "clean.raw"), _sum(contents() / "second.raw")]
    assert [state.kind for state in snapshot.manifest.clean.file_systems] == ["ext4", "ext4"]
    assert snapshot.manifest.capture.ram_bytes > 0
    _in_order(lab)


def test_a_database_starts_from_it_without_recovery(folder: Path) -> None:
    lab = DiskWorld(folder, disk_format=FORMATS["dynamic VHDX"])
    assert simply(lab, backup()).error is None
    _, images = _stored(lab)
    with database_folder() as place:
        data = place / "main"
        run("debugfs", "-R", f'rdump "/{DATA_DIRECTORY}" "{place}"', images[0])
        run("chown", "-R", "postgres:", data)
        (data / "log").unlink()
        start(data)
        try:
            assert sql(data, "SELECT count(*), max(number) FROM kept") == f"{2 * ROWS}|{2 * ROWS}"
        finally:
            stop(data)
        log = (data / "log").read_text()
    assert "database system was shut down at" in log
    assert "was not properly shut down" not in log
    assert "redo" not in log


@pytest.mark.parametrize("how", ["the server crashes", "the guest crashes"])
def test_disks_that_were_not_left_in_order_are_stored_nowhere(folder: Path, how: str) -> None:
    lab = DiskWorld(folder, disk_format=FORMATS["dynamic VHDX"])
    inside = lab.machine.vm("db").truth.inside
    assert isinstance(inside, DiskGuest)
    if how == "the guest crashes":
        inside.ends_in_order = False
    else:
        # It says that it was stopped, and the disk says otherwise.
        inside.clean = (None, None)
    outcome = simply(lab, backup())
    assert isinstance(outcome.error, NotCleanError), outcome.error
    assert "needs_recovery" in str(outcome.error.details)
    assert "in production" in str(outcome.error.details)
    assert lab.real_store.snapshots() == ()
    _in_order(lab)


def test_a_test_vm_stands_on_a_copy_of_what_is_stored(folder: Path) -> None:
    lab = DiskWorld(folder, disk_format=FORMATS["dynamic VHDX"])
    assert simply(lab, backup()).error is None
    _, images = _stored(lab)
    outcome = simply(lab, provision())
    assert outcome.error is None, (outcome.error, getattr(outcome.error, "details", ""))
    vm = lab.machine.vm("test")
    assert vm.network_adapters[0].switch_name.startswith("vmsnap-")
    for image, drive in zip(images, vm.hard_drives, strict=True):
        (disk,) = lab.machine.get_vhd(path=drive.path)
        assert (disk.vhd_type, disk.size) == ("Differencing", DISK_BYTES)
        assert drive.path.startswith(EXPORTS)
        base = lab.machine.files.local(disk.parent_path)
        run("qemu-img", "compare", "-f", "raw", "-F", "vhdx", image, base)
    _in_order(lab)
    assert simply(lab, destroy()).error is None
    assert simply(lab, reconciling).error is None
    _in_order(lab)


def test_a_windows_disk_is_judged_by_its_journal(folder: Path) -> None:
    """NTFS in VHDX, as a guest of Hyper-V has it: what ntfs-3g left is clean, and its files are read through QEMU."""
    raw, vhdx, mounted = folder / "windows.raw", folder / "windows.vhdx", folder / "mounted"
    raw.touch()
    with raw.open("r+b") as file:
        file.truncate(DISK_BYTES)
    run("mkntfs", "--quick", "--quiet", "--force", raw)
    mounted.mkdir()
    run("ntfs-3g", raw, mounted)
    (mounted / "PostgreSQL").mkdir()
    (mounted / "PostgreSQL" / "pg_control").write_bytes(b"control" * 1000)
    run("umount", mounted)
    FORMATS["dynamic VHDX"].convert(raw, vhdx)
    export, identity = QemuExport(runtime_dir=folder / "runtime"), new_run_id()
    views = export.open(
        identity,
        images=(DiskImage(target="scsi-0-0", path=str(vhdx), image_format="vhdx", size_bytes=DISK_BYTES),),
    )
    try:
        (state,) = OfflineInspector().file_systems(views, timeout=MINUTE)
        assert (state.kind, state.clean) == ("ntfs", True)
        request = FileRequest(file_system_uuid=state.uuid, path="/postgresql/PG_CONTROL")
        (found,) = OfflineInspector().read_files(views, requests=(request,), timeout=MINUTE)
        assert found.content == b"control" * 1000
    finally:
        export.release(export.resource(identity, guest="db"), deadline=MINUTE)
