"""What a reader of one kind of file system finds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from vmsnap.errors import PreconditionError

LARGEST_FILE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a file system was left in order, and what was seen."""

    clean: bool
    observed: str


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One name in a folder. ``kind``: ``folder``, ``file`` or ``other``."""

    name: bytes
    inode: int
    kind: str


def path_parts(path: str) -> tuple[bytes, ...]:
    """Return the names in a path from a file system's root, as the bytes on the disk.

    Raises PreconditionError for a path that is not absolute, climbs with ``..``, or holds a line break or a NUL,
    which the tools' listings cannot tell apart from the end of a name.
    """
    if not path.startswith("/"):
        raise PreconditionError(
            f"{path!r} is not a path from the root of a file system", remedy="give a path that begins with a slash"
        )
    parts = PurePosixPath(path).parts[1:]
    if ".." in parts or any(character in path for character in "\n\r\0"):
        raise PreconditionError(
            f"{path!r} cannot be read from a disk", remedy="give a path without '..', line breaks and NUL characters"
        )
    return tuple(part.encode("utf-8", "surrogateescape") for part in parts)


def find_inode(path: str, *, root: int, folder: Callable[[int], Iterable[Entry]]) -> int | None:
    """Walk from the inode of the root to a file's; ``folder`` lists one. None where a name on the way is missing.

    Raises PreconditionError for a path that cannot be read, or that leads to something else than a file.
    """
    inode = root
    parts = path_parts(path)
    for depth, name in enumerate(parts, 1):
        entry = next((item for item in folder(inode) if item.name == name), None)
        if entry is None:
            return None
        if entry.kind != ("file" if depth == len(parts) else "folder"):
            raise not_a_file(path)
        inode = entry.inode
    if not parts:
        raise not_a_file(path)
    return inode


def too_large(path: str, *, size_bytes: int) -> PreconditionError:
    """Return the error for a file larger than ``LARGEST_FILE_BYTES``."""
    return PreconditionError(
        f"the file {path} has {size_bytes} bytes; at most {LARGEST_FILE_BYTES} are read",
        remedy="only small files are read as evidence",
    )


def not_a_file(path: str) -> PreconditionError:
    """Return the error for something on the way to a file, or the file itself, that is of another kind."""
    return PreconditionError(
        f"{path} is not a plain file in plain folders on its file system",
        remedy="give the path without symbolic links (in the guest: realpath)",
    )
