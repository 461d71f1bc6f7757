"""What is asked of a file system: sharing blocks, punching holes, telling which blocks are shared.

Sources: ioctl_ficlonerange(2), fallocate(2), and ``struct fiemap`` in linux/fiemap.h.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Sequence
from pathlib import Path

_FICLONE = 0x40049409
_FIEMAP = 0xC020660B
_KEEP_SIZE_AND_PUNCH_HOLE = 0x01 | 0x02

_FIEMAP_HEADER = struct.Struct("=QQIIII")
_FIEMAP_EXTENT = struct.Struct("=QQQ16xI12x")
_EXTENTS_A_CALL = 512
_LAST = 0x0001
_SHARED = 0x2000
_WHOLE_FILE = (1 << 64) - 1

_END, _STAYS = 0x1, 0x2
_KINDS = _END | _STAYS

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.fallocate.restype = ctypes.c_int


def clone(*, source: int, target: int) -> None:
    """Make the file ``target`` share all blocks of ``source`` (descriptors). Raises OSError."""
    fcntl.ioctl(target, _FICLONE, source)


def can_reflink(folder: Path) -> bool:
    """Try whether files in a folder can share blocks. It leaves nothing, even if the process dies.

    Raises OSError where the folder cannot be written.
    """
    flags = os.O_TMPFILE | os.O_RDWR
    source = os.open(folder, flags, 0o600)
    try:
        target = os.open(folder, flags, 0o600)
        try:
            os.write(source, bytes(65536))
            clone(source=source, target=target)
        except OSError as error:
            if error.errno in {errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOSYS, errno.EXDEV}:
                return False
            raise
        finally:
            os.close(target)
    finally:
        os.close(source)
    return True


def punch_hole(descriptor: int, *, offset: int, length: int) -> None:
    """Give back the blocks of a stretch of a file; it reads as zeroes then. Raises OSError."""
    if _libc.fallocate(descriptor, _KEEP_SIZE_AND_PUNCH_HOLE, offset, length) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def exclusive_bytes(path: Path) -> int | None:
    """Return the bytes on the disk that this file shares with no other; None where the file system cannot tell."""
    extents = _extents(path)
    return None if extents is None else sum(length for _, length, shared in extents if not shared)


def freed_bytes(going: Sequence[Path], *, staying: Sequence[Path]) -> int | None:
    """Return the bytes on the disk that are free once the files ``going`` are gone; None where the file system cannot tell.

    ``staying``: files that may share blocks with them. A block that only one of ``going`` has, and that is shared all the same,
    is shared with a file that is in neither: it is not counted. Raises OSError.
    """
    total = 0
    edges: list[int] = []
    for kind, paths in ((0, going), (_STAYS, staying)):
        for path in paths:
            extents = _extents(path)
            if extents is None:
                return None
            for start, length, shared in extents:
                if shared:
                    # Places on a disk are multiples of 512: there is room for what each edge means.
                    edges += [start | kind, start + length | kind | _END]
                elif kind != _STAYS:
                    total += length
    edges.sort()
    go, stay, before = 0, 0, 0
    for edge in edges:
        place = edge & ~_KINDS
        if go > 1 and not stay:
            total += place - before
        step = -1 if edge & _END else 1
        if edge & _STAYS:
            stay += step
        else:
            go += step
        before = place
    return total


def _extents(path: Path) -> list[tuple[int, int, bool]] | None:
    """Return the extents of a file: place on the disk, length, whether shared; None where the file system cannot tell."""
    found: list[tuple[int, int, bool]] = []
    position = 0
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while True:
            buffer = bytearray(_FIEMAP_HEADER.size + _EXTENTS_A_CALL * _FIEMAP_EXTENT.size)
            _FIEMAP_HEADER.pack_into(buffer, 0, position, _WHOLE_FILE - position, 0, 0, _EXTENTS_A_CALL, 0)
            try:
                fcntl.ioctl(descriptor, _FIEMAP, buffer)
            except OSError as error:
                if error.errno in {errno.EOPNOTSUPP, errno.ENOTTY}:
                    return None
                raise
            count = _FIEMAP_HEADER.unpack_from(buffer)[3]
            if count == 0:
                return found
            for index in range(count):
                logical, physical, length, flags = _FIEMAP_EXTENT.unpack_from(
                    buffer, _FIEMAP_HEADER.size + index * _FIEMAP_EXTENT.size
                )
                found.append((physical, length, bool(flags & _SHARED)))
                position = logical + length
                if flags & _LAST:
                    return found
    finally:
        os.close(descriptor)
