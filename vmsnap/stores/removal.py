"""Removing folders so that a crash at any point leaves either a snapshot or something that is known as a left-over."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from vmsnap.errors import HeldError, SnapshotNotFoundError
from vmsnap.linux.reflink import exclusive_bytes, freed_bytes
from vmsnap.model.ids import RunId, SnapshotId, is_run_id
from vmsnap.model.manifest import Manifest, Snapshot
from vmsnap.stores.catalogue import is_half_removed
from vmsnap.stores.layout import HOLDS, MANIFEST, REMOVED, disk_failure, sync_folder, write_new_file

_log = logging.getLogger(__name__)


def holders(folder: Path) -> tuple[RunId, ...]:
    """Return the runs that hold the snapshot in a folder. Raises OSError."""
    try:
        return tuple(sorted(RunId(entry.name) for entry in (folder / HOLDS).iterdir() if is_run_id(entry.name)))
    except FileNotFoundError:
        return ()


def hold(folder: Path, *, run: RunId) -> None:
    """Hold the snapshot in a folder. May be repeated. Raises SnapshotNotFoundError where it is gone, OSError.

    Holding writes the hold and then looks for the manifest; removing takes the manifest away and then looks for holds.
    Whichever comes second sees the other.
    """
    holds = folder / HOLDS
    try:
        holds.mkdir(mode=0o700, exist_ok=True)
        write_new_file(holds / run, data=b"", mode=0o600)
    except FileExistsError:
        pass
    except FileNotFoundError as error:
        raise _gone(SnapshotId(folder.name)) from error
    if not (folder / MANIFEST).exists():
        let_go(folder, run=run)
        raise _gone(SnapshotId(folder.name))
    sync_folder(holds)
    sync_folder(folder)


def let_go(folder: Path, *, run: RunId) -> None:
    """Take a hold off. Content where there is none. Raises OSError."""
    (folder / HOLDS / run).unlink(missing_ok=True)


def remove_snapshot(snapshot: Snapshot, *, folder: Path) -> int:
    """Remove a snapshot and return the bytes that were its own. Raises HeldError, SnapshotNotFoundError, DriverError."""
    try:
        _refuse_if_held(folder)
        own_bytes = _own_bytes(snapshot, folder=folder)
        (folder / MANIFEST).rename(folder / REMOVED)
        sync_folder(folder)
        try:
            _refuse_if_held(folder)
        except HeldError:
            (folder / REMOVED).rename(folder / MANIFEST)
            sync_folder(folder)
            raise
        finish_removal(folder)
    except FileNotFoundError as error:
        raise _gone(snapshot.id) from error
    except OSError as error:
        raise disk_failure(error, doing=f"remove snapshot {snapshot.id} in {folder}") from error
    return own_bytes


def freed_by(snapshots: Sequence[Snapshot], *, folder: Path) -> int:
    """Return how many bytes are free once all these snapshots below a guest's folder are removed. Raises OSError.

    Where the file system cannot tell, it is what was written for them.
    """
    going = {snapshot.id for snapshot in snapshots}
    total = 0
    for image in {disk.image for snapshot in snapshots for disk in snapshot.manifest.disks}:
        files = [entry / image for entry in folder.iterdir() if (entry / image).is_file()]
        mine = [path for path in files if path.parent.name in going]
        # What one file alone has is known without a look at the others.
        others = [path for path in files if path not in mine] if len(mine) > 1 else []
        freed = freed_bytes(mine, staying=others)
        if freed is None:
            records = (disk for snapshot in snapshots for disk in snapshot.manifest.disks if disk.image == image)
            freed = sum(disk.new_bytes for disk in records)
        total += freed
    return total


def finish_removal(folder: Path) -> bool:
    """Remove a folder whose removal began; tell whether it did. Content where it is gone. Leaves one that is not.

    One that is held comes back: its removal had looked for holds once, and died before it looked again. Call it where nobody
    else removes: under the guest's lock. Raises OSError.
    """
    if not is_half_removed(folder):
        return False
    if holders(folder):
        _take_back(folder)
        return False
    for entry in folder.iterdir() if folder.exists() else ():
        if entry.name == REMOVED:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)
    # Last: without it the folder could not be told from a damaged snapshot.
    (folder / REMOVED).unlink(missing_ok=True)
    _remove_empty(folder)
    return True


def _take_back(folder: Path) -> None:
    """Make a snapshot of a folder again whose removal has not taken anything away yet. Others wait for their holds to end."""
    try:
        manifest = Manifest.model_validate_json((folder / REMOVED).read_bytes())
    except (FileNotFoundError, ValidationError):
        return
    if all((folder / name).exists() for disk in manifest.disks for name in (disk.image, disk.digests)):
        (folder / REMOVED).rename(folder / MANIFEST)
        sync_folder(folder)
        _log.warning("%s: its removal was cut while an environment took it into use: it is a snapshot again", folder)


def remove_staging(folder: Path) -> None:
    """Remove a folder of a snapshot in the making. Content where it is gone. Raises OSError."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    sync_folder(folder.parent)


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except FileNotFoundError:
        return
    sync_folder(folder.parent)


def _refuse_if_held(folder: Path) -> None:
    if runs := holders(folder):
        raise HeldError(
            f"snapshot {folder.name} is used by an environment (run {', '.join(runs)})",
            remedy="destroy the environment first: 'vmsnap env list', 'vmsnap env destroy NAME'",
        )


def _own_bytes(snapshot: Snapshot, *, folder: Path) -> int:
    total = 0
    for disk in snapshot.manifest.disks:
        try:
            own = exclusive_bytes(folder / disk.image)
        except FileNotFoundError:
            _log.warning("%s: %s is missing", folder, disk.image)
            continue
        total += disk.new_bytes if own is None else own
    return total


def _gone(snapshot: SnapshotId) -> SnapshotNotFoundError:
    return SnapshotNotFoundError(f"snapshot {snapshot} is gone", remedy="'vmsnap list' shows what is there")
