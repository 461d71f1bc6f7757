"""What was fetched of a disk: a sparse raw file, and a file beside it that says which blocks of it count.

A block counts in memory once its data, checked before, is written; on disk only after the data of every block that the record
names has been synced. So a record never names what is not there, whatever dies and whenever, and the worst that a crash costs is
to fetch some blocks again. A full disk, or one that fails, makes the cache keep less, never anything wrong.
"""

from __future__ import annotations

import hashlib
import logging
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from vmsnap.errors import DriverError

BLOCK_BYTES = 64 << 10
_LOG = logging.getLogger(__name__)
_MAGIC = b"vmsnapC1"
_HEAD = struct.Struct("<8s32sQI32s")
"""Magic, SHA-256 of everything after it, size of the disk, size of a block, identity of the disk; then the bitmap."""
_PAUSE_SECONDS = 30.0
_LOOK_SECONDS = 1.0
_FLOOR_SHARE = 0.05
_FLOOR_MOST = 4 << 30


class Stretch(NamedTuple):
    """Blocks in a row."""

    first: int
    blocks: int


def floor_bytes(folder: Path) -> int:
    """Return how much room the cache leaves on its file system to what guests write: a twentieth, at most 4 GiB."""
    found = os.statvfs(folder)
    return min(_FLOOR_MOST, int(found.f_blocks * found.f_frsize * _FLOOR_SHARE))


def _encode(bitmap: bytes, *, size_bytes: int, identity: bytes) -> bytes:
    rest = struct.pack("<QI32s", size_bytes, BLOCK_BYTES, identity) + bitmap
    return _MAGIC + hashlib.sha256(rest).digest() + rest


def is_whole(path: Path, *, size_bytes: int, identity: bytes) -> bool:
    """Tell whether all of a disk is in its cache, on disk too. Changes nothing, whoever uses the cache meanwhile."""
    count = -(-size_bytes // BLOCK_BYTES)
    bitmap = bytearray(b"\xff" * (count // 8))
    if count % 8:
        bitmap.append((1 << (count % 8)) - 1)
    try:
        record = path.with_suffix(".have").read_bytes()
        return path.stat().st_size == size_bytes and record == _encode(
            bytes(bitmap), size_bytes=size_bytes, identity=identity
        )
    except FileNotFoundError:
        return False
    except OSError as error:
        raise DriverError(f"the cache {path} cannot be read: {error.strerror}") from error


class BlockCache:
    """The cache of one disk. Safe to use from several threads, by one process at a time (the caller sees to that)."""

    def __init__(
        self,
        path: Path,
        *,
        size_bytes: int,
        identity: bytes,
        most_bytes: int | None = None,
        floor: int | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._record = path.with_suffix(".have")
        self._size_bytes = size_bytes
        self._identity = identity
        self._most_bytes = most_bytes
        self._floor = floor_bytes(path.parent) if floor is None else floor
        self._monotonic = monotonic
        self.count = -(-size_bytes // BLOCK_BYTES)
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._dirty = False
        self._refused_until = 0.0
        self._looked = -_LOOK_SECONDS
        self._kept_bytes = 0
        self._have = bytearray(-(-self.count // 8))
        self._synced = bytes(self._have)
        try:
            self._file = self._open()
        except OSError as error:
            raise DriverError(
                f"the cache {path} cannot be opened: {error.strerror}",
                remedy=f"look at {path.parent} and its file system",
            ) from error

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            file = os.open(self._path, flags)
        except FileNotFoundError:
            # The record first: it must never speak of another file than it was written for.
            self._record.unlink(missing_ok=True)
            file = os.open(self._path, flags | os.O_CREAT | os.O_EXCL, 0o600)
        if os.fstat(file).st_size == self._size_bytes:
            self._load()
        else:
            self._record.unlink(missing_ok=True)
            os.ftruncate(file, 0)
            os.ftruncate(file, self._size_bytes)
        self._kept_bytes = os.fstat(file).st_blocks * 512
        return file

    def _load(self) -> None:
        try:
            data = self._record.read_bytes()
        except FileNotFoundError:
            return
        bitmap = data[_HEAD.size :]
        if len(bitmap) != len(self._have) or data != self._encoded(bitmap):
            _LOG.warning("the record of the cache %s is damaged or of another disk; it begins anew", self._path)
            self._record.unlink()
            return
        self._have[:] = bitmap
        self._synced = bitmap

    def _encoded(self, bitmap: bytes) -> bytes:
        return _encode(bitmap, size_bytes=self._size_bytes, identity=self._identity)

    @property
    def kept_bytes(self) -> int:
        """Return about how many bytes it occupies."""
        return self._kept_bytes

    @property
    def keeping(self) -> bool:
        """Tell whether it keeps what it is given now, as far as it knows."""
        return self._has_room()

    @property
    def whole(self) -> bool:
        """Tell whether every block is there."""
        return self.next_missing(0) is None

    def has(self, block: int) -> bool:
        """Tell whether a block is there."""
        return bool(self._have[block >> 3] & (1 << (block & 7)))

    def missing(self, first: int, count: int) -> Iterator[Stretch]:
        """Yield what is missing of blocks in a row."""
        start: int | None = None
        for block in range(first, first + count):
            if self.has(block):
                if start is not None:
                    yield Stretch(start, block - start)
                start = None
            elif start is None:
                start = block
        if start is not None:
            yield Stretch(start, first + count - start)

    def next_missing(self, first: int) -> int | None:
        """Return the next block from ``first`` on that is missing."""
        block = first
        while block < self.count:
            if not block & 7 and self._have[block >> 3] == 0xFF:
                # Far, in steps, over what is there: a disk of 2 TiB has 32 million blocks.
                index = block >> 3
                while self._have[index : index + 4096] == b"\xff" * 4096:
                    index += 4096
                while index < len(self._have) and self._have[index] == 0xFF:
                    index += 1
                block = index << 3
            elif self.has(block):
                block += 1
            else:
                return block
        return None

    def read(self, offset: int, length: int) -> bytes | None:
        """Return bytes of blocks that are there. None where they cannot be read after all; they then count as missing."""
        try:
            data = os.pread(self._file, length, offset)
        except OSError as error:
            _LOG.warning(
                "the cache %s cannot be read at %d: %s; fetching that again", self._path, offset, error.strerror
            )
            data = b""
        if len(data) == length:
            return data
        first = offset // BLOCK_BYTES
        self._set(first, (offset + length - 1) // BLOCK_BYTES - first + 1, there=False)
        return None

    def put(self, first: int, data: bytes) -> bool:
        """Keep blocks in a row, which were checked. Tell whether they are kept."""
        if not self._has_room():
            return False
        try:
            written = os.pwrite(self._file, data, first * BLOCK_BYTES)
        except OSError as error:
            self._refuse(error.strerror or str(error))
            return False
        if written != len(data):
            self._refuse(f"{written} of {len(data)} bytes were written")
            return False
        self._kept_bytes += len(data)
        self._set(first, -(-len(data) // BLOCK_BYTES), there=True)
        return True

    def put_holes(self, first: int, count: int) -> None:
        """Count blocks as there that are holes: the file has nothing in their place, and reads as zeroes."""
        self._set(first, count, there=True)

    def _set(self, first: int, count: int, *, there: bool) -> None:
        with self._lock:
            for block in range(first, first + count):
                if there:
                    self._have[block >> 3] |= 1 << (block & 7)
                else:
                    self._have[block >> 3] &= ~(1 << (block & 7)) & 0xFF
            self._dirty = True

    def _has_room(self) -> bool:
        if self._most_bytes is not None and self._kept_bytes >= self._most_bytes:
            return False
        now = self._monotonic()
        if now < self._refused_until:
            return False
        if now - self._looked >= _LOOK_SECONDS:
            self._looked = now
            found = os.statvfs(self._path.parent)
            if found.f_bavail * found.f_frsize < self._floor:
                self._refuse("its file system is nearly full")
                return False
        return True

    def _refuse(self, why: str) -> None:
        self._refused_until = self._monotonic() + _PAUSE_SECONDS
        _LOG.warning("the cache %s keeps nothing new for %.0f s: %s", self._path, _PAUSE_SECONDS, why)

    def flush(self) -> bool:
        """Make what is there survive a power cut. Tell whether that worked; where not, nothing was promised."""
        with self._flushing:
            with self._lock:
                if not self._dirty:
                    return True
                bitmap = bytes(self._have)
                self._dirty = False
            draft = self._record.with_suffix(".draft")
            try:
                self._sync(bitmap)
                with draft.open("wb") as file:
                    file.write(self._encoded(bitmap))
                    file.flush()
                    os.fsync(file.fileno())
                draft.replace(self._record)
                folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
            except OSError as error:
                self._dirty = True
                self._refuse(error.strerror or str(error))
                return False
            return True

    def _sync(self, bitmap: bytes) -> None:
        try:
            os.fdatasync(self._file)
        except OSError:
            # What the kernel could not write it forgets, and then the file reads as before the write.
            with self._lock:
                self._have[:] = self._synced
            raise
        self._synced = bitmap

    def close(self) -> None:
        """Let go, without a flush."""
        os.close(self._file)
