"""Folders and files of the state directory: private to their owner, and on disk when a call returns."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vmsnap.errors import DriverError, NoSpaceError, PreconditionError, VmsnapError

FOLDER_MODE = 0o700
FILE_MODE = 0o600
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_DENIED = frozenset({errno.EACCES, errno.EPERM})


def translate(error: OSError, *, doing: str, path: Path) -> VmsnapError:
    """Return the error to show an operator for a failed system call on the state directory."""
    brief = f"cannot {doing} '{path}': {error.strerror or error}"
    if error.errno in _FULL:
        return NoSpaceError(
            brief, remedy=f"free space on the file system of '{path.parent}', or move [state] path elsewhere"
        )
    if error.errno == errno.EROFS:
        return PreconditionError(
            brief, remedy=f"the file system of '{path.parent}' is read-only: remount it, or move [state] path elsewhere"
        )
    if error.errno in _DENIED:
        return PreconditionError(
            brief, remedy="run vmsnap as root, or set [state] path to a folder that belongs to you"
        )
    return DriverError(brief, remedy=f"look at '{path.parent}' and at the kernel's log for errors of its disk")


@contextmanager
def translated(*, doing: str, path: Path) -> Iterator[None]:
    """Turn an OSError in the body into an error with a remedy."""
    try:
        yield
    except OSError as error:
        raise translate(error, doing=doing, path=path) from error


def make_state_folder(state: Path) -> None:
    """Make the state directory, of mode 0700. May be repeated.

    Raises PreconditionError where it is there but others may write to it: they could plant a journal that makes
    reconcile remove things.
    """
    with translated(doing="make the folder", path=state):
        state.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        mode = state.stat().st_mode
    if mode & 0o022:
        raise PreconditionError(
            f"others than its owner may write to '{state}'", remedy=f"run: chmod go-w '{state}' (and see who did)"
        )


def make_private_folder(folder: Path) -> None:
    """Make a folder of mode 0700 in the state directory, and that too, as ``make_state_folder`` does."""
    for part in (folder.parent, folder):
        make_state_folder(part)


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on disk. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_if_there(path: Path) -> bytes | None:
    """Return what a file holds; None where there is none. Raises PreconditionError, DriverError."""
    with translated(doing="read", path=path):
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None


def remove_if_there(path: Path) -> None:
    """Remove a file, for good when this returns; content where there is none. Raises PreconditionError, DriverError."""
    with translated(doing="remove", path=path):
        try:
            path.unlink()
        except FileNotFoundError:
            return
        sync_folder(path.parent)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of ``data``. Raises OSError; part of it may be written then."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def write_new(path: Path, *, data: bytes) -> None:
    """Make a file with its whole content at once, on disk. Raises FileExistsError where the name is taken."""
    _write(path, data=data, replace=False)


def write_replace(path: Path, *, data: bytes) -> None:
    """Replace a file's content at once, on disk. A reader sees the old or the new content, never a mixture."""
    _write(path, data=data, replace=True)


def _write(path: Path, *, data: bytes, replace: bool) -> None:
    draft = path.parent / draft_name()
    with translated(doing="write", path=path):
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
    try:
        try:
            write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if replace:
            draft.replace(path)
        else:
            path.hardlink_to(draft)
        sync_folder(path.parent)
    except FileExistsError:
        raise
    except OSError as error:
        raise translate(error, doing="write", path=path) from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def draft_name() -> str:
    """Return a name for a file in the making. Readers skip names that begin with a dot."""
    return f".draft-{secrets.token_hex(8)}"
