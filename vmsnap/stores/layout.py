"""Where things lie in a store of images, and how they get onto the disk for good. ``docs/formats.md`` is the description.

STORE/GUEST/SNAPSHOT/manifest.json    the snapshot exists if and only if this does
STORE/GUEST/SNAPSHOT/DISK.raw         and DISK.digests, DISK.written, marks.json, holds/RUN, small files
STORE/GUEST/.staging-RUN/             a snapshot in the making
STORE/GUEST/.lock
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from vmsnap.errors import DriverError, NoSpaceError, VmsnapError
from vmsnap.model.ids import RunId, SnapshotId, folder_name, is_run_id

MANIFEST = "manifest.json"
REMOVED = "manifest.removed"
MARKS = "marks.json"
HOLDS = "holds"
LOCK = ".lock"
STAGING_PREFIX = ".staging-"
DISK_SUFFIXES = (".raw", ".digests", ".written")

_OUT_OF_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Paths in one store."""

    root: Path

    def guest(self, guest: str) -> Path:
        """Return a guest's folder."""
        return self.root / folder_name(guest)

    def snapshot(self, guest: str, *, snapshot: SnapshotId) -> Path:
        """Return a snapshot's folder."""
        return self.guest(guest) / snapshot

    def staging(self, guest: str, *, run: RunId) -> Path:
        """Return the folder of a snapshot in the making."""
        return self.guest(guest) / f"{STAGING_PREFIX}{run}"

    def guest_folders(self) -> list[Path]:
        """Return the folders of all guests, by name. Raises DriverError."""
        try:
            return sorted(entry for entry in self.root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise disk_failure(error, doing=f"read the store {self.root}") from error

    def snapshot_folders(self, guest: str | None = None) -> list[Path]:
        """Return the folders that are named as snapshots are, of one guest or of all, with a manifest or without.

        Raises DriverError.
        """
        folders = self.guest_folders() if guest is None else [self.guest(guest)]
        return [entry for entry in self._below(folders) if is_run_id(entry.name)]

    def snapshot_states(self, guest: str, *, known: Container[str] = ()) -> list[tuple[str, os.stat_result]]:
        """Return a guest's folders that are named as snapshots are, and what the file system says of them.

        ``known``: names of which that need not be looked at. Raises DriverError.
        """
        found = []
        try:
            with os.scandir(self.guest(guest)) as entries:
                for entry in entries:
                    if entry.name in known or (is_run_id(entry.name) and entry.is_dir()):
                        with contextlib.suppress(FileNotFoundError):  # removed just now
                            found.append((entry.name, entry.stat()))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise disk_failure(error, doing=f"read the store {self.root}") from error
        return found

    def staging_folders(self) -> list[Path]:
        """Return all folders of snapshots in the making. Raises DriverError."""
        return [
            entry
            for entry in self._below(self.guest_folders())
            if entry.name.startswith(STAGING_PREFIX) and is_run_id(entry.name.removeprefix(STAGING_PREFIX))
        ]

    def _below(self, folders: Sequence[Path]) -> list[Path]:
        try:
            return [entry for folder in folders for entry in _folders_in(folder)]
        except OSError as error:
            raise disk_failure(error, doing=f"read the store {self.root}") from error


def _folders_in(folder: Path) -> list[Path]:
    """Return the folders in a folder, by name; none where it is not there. Raises OSError."""
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.is_dir())
    except FileNotFoundError:
        return []


def guest_of(folder: Path) -> str:
    """Return the guest's name that a guest's folder stands for; the cut form where the name was too long."""
    return unquote(folder.name, errors="surrogateescape")


def image_name(target: str) -> str:
    """Return the file name of a disk's image."""
    return f"{folder_name(target)}.raw"


def digests_name(target: str) -> str:
    """Return the file name of a disk's digests."""
    return f"{folder_name(target)}.digests"


def written_name(target: str) -> str:
    """Return the name of the file that lists where a disk's clone wrote."""
    return f"{folder_name(target)}.written"


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on the disk. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and put it on the disk. Content where it is there. Raises OSError.

    Root alone can list it; QEMU's account can pass through to an image that it was given.
    """
    try:
        folder.mkdir(mode=0o711)
    except FileExistsError:
        return
    sync_folder(folder.parent)


def write_new_file(path: Path, *, data: bytes, mode: int) -> None:
    """Write a file that must not exist yet, and put its bytes on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(descriptor)


def replace_file(path: Path, *, data: bytes, mode: int) -> None:
    """Replace a file, so that a crash leaves the old or the new one whole. Raises OSError."""
    draft = path.with_name(f".{path.name}.draft")
    draft.unlink(missing_ok=True)
    write_new_file(draft, data=data, mode=mode)
    draft.replace(path)
    sync_folder(path.parent)


def disk_failure(error: OSError, *, doing: str, folder: Path | None = None) -> VmsnapError:
    """Translate an operating system's error: NoSpaceError with numbers for a full disk, else DriverError."""
    if error.errno in _OUT_OF_SPACE:
        room = f", {free_bytes(folder):,} bytes are free on {folder}" if folder is not None else ""
        return NoSpaceError(
            f"no space left to {doing}{room}",
            remedy="prune snapshots ('vmsnap prune'), or make the store's file system larger",
        )
    return DriverError(
        f"cannot {doing}: {error.strerror or error}", remedy="look at the store's file system and the kernel's log"
    )


def free_bytes(folder: Path) -> int:
    """Return the bytes that are free for root on a folder's file system. Raises OSError."""
    values = os.statvfs(folder)
    return values.f_frsize * values.f_bfree
