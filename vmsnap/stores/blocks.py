"""Disks as blocks of 64 KiB, and a digest for each.

A digests file is flat: 32 bytes a block, in order: the SHA-256 of the block, or 32 zero bytes for a block of zeroes,
which is a hole in the image. So the digests of an empty stretch are a hole as well. The last block of a disk may be
shorter than the others.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from vmsnap.errors import DriverError
from vmsnap.model.hints import HINT_BLOCK_BYTES, BlockSet
from vmsnap.ports.clock import Cancel
from vmsnap.ports.disks import Extent
from vmsnap.ports.store import ByteProgress

# Hints are about the very blocks that are stored.
BLOCK_BYTES = HINT_BLOCK_BYTES
DIGEST_BYTES = 32
HOLE = bytes(DIGEST_BYTES)

_THREADS = 2
_DATA_BLOCKS = 64
_HOLE_BLOCKS = 1 << 14
_ZERO_BLOCK = hashlib.sha256(bytes(BLOCK_BYTES)).digest()
_HASH_STEP = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Blocks ``first`` to ``first + count - 1``, to be looked at by one thread in one go."""

    first: int
    count: int
    data: bool


@dataclass(frozen=True, kw_only=True)
class Scope:
    """The disk that threads work on together, whom they tell, and who may stop them."""

    size_bytes: int
    progress: ByteProgress
    cancel: Cancel


def block_count(size_bytes: int) -> int:
    """Return how many blocks a disk of that size has."""
    return -(-size_bytes // BLOCK_BYTES)


def digest_of(block: memoryview) -> bytes:
    """Return a block's entry in the digests file."""
    digest = hashlib.sha256(block).digest()
    if len(block) == BLOCK_BYTES:
        return HOLE if digest == _ZERO_BLOCK else digest
    return HOLE if not any(block) else digest


def stretches(extents: Iterable[Extent], *, size_bytes: int) -> Iterator[Stretch]:
    """Cut a disk into stretches that cover it once. A block that any data touches is data."""
    position = 0
    for extent in extents:
        if not extent.data:
            continue
        first = max(position, extent.offset // BLOCK_BYTES)
        end = min(block_count(extent.offset + extent.length), block_count(size_bytes))
        if end <= first:
            continue
        yield from _cut(position, end=first, step=_HOLE_BLOCKS, data=False)
        yield from _cut(first, end=end, step=_DATA_BLOCKS, data=True)
        position = end
    yield from _cut(position, end=block_count(size_bytes), step=_HOLE_BLOCKS, data=False)


def _cut(first: int, *, end: int, step: int, data: bool) -> Iterator[Stretch]:
    while first < end:
        count = min(step - first % step, end - first)
        yield Stretch(first=first, count=count, data=data)
        first += count


def file_extents(descriptor: int, *, size_bytes: int) -> Iterator[Extent]:
    """Yield where a file holds data and where holes. Raises OSError. Source: lseek(2), SEEK_DATA and SEEK_HOLE."""
    position = 0
    while position < size_bytes:
        try:
            start = os.lseek(descriptor, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            start = size_bytes
        end = min(size_bytes, os.lseek(descriptor, start, os.SEEK_HOLE)) if start < size_bytes else size_bytes
        if start > position:
            yield Extent(offset=position, length=min(start, size_bytes) - position, data=False)
        if end > start:
            yield Extent(offset=start, length=end - start, data=True)
        position = end


def read_into(descriptor: int, *, buffer: memoryview, offset: int) -> None:
    """Fill a buffer from a file. Raises OSError, and DriverError where the file ends before."""
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if count == 0:
            raise DriverError(
                f"a disk ended at byte {offset + done}, before its size", remedy="look whether it was changed meanwhile"
            )
        done += count


def read_digests(descriptor: int, *, stretch: Stretch) -> bytes:
    """Return the digests of a stretch; blocks beyond the end of the file count as holes. Raises OSError."""
    wanted = stretch.count * DIGEST_BYTES
    data = b""
    while len(data) < wanted:
        part = os.pread(descriptor, wanted - len(data), stretch.first * DIGEST_BYTES + len(data))
        if not part:
            break
        data += part
    return data.ljust(wanted, b"\0")


def file_digest(descriptor: int) -> str:
    """Return the SHA-256 of a whole file in hexadecimal. Raises OSError."""
    digest, position = hashlib.sha256(), 0
    while part := os.pread(descriptor, _HASH_STEP, position):
        digest.update(part)
        position += len(part)
    return digest.hexdigest()


def stretches_of(blocks: BlockSet, *, data: bool) -> Iterator[Stretch]:
    """Cut a set of blocks into stretches, all of data or all of holes."""
    for first, count in blocks.runs():
        yield from _cut(first, end=first + count, step=_DATA_BLOCKS if data else _HOLE_BLOCKS, data=data)


def for_each(
    work: Iterable[Stretch], *, scope: Scope, task: Callable[[Stretch, memoryview], None], done_bytes: int = 0
) -> None:
    """Run ``task`` on every stretch in a few threads, each with a buffer that is large enough for a stretch of data.

    ``done_bytes`` of the disk are not among the stretches. Stops at the first error, or when the run is cancelled, and raises
    it once all threads have ended.
    """
    todo = iter(work)
    lock = threading.Lock()
    stop = threading.Event()

    def next_stretch() -> Stretch | None:
        with lock:
            return None if stop.is_set() else next(todo, None)

    def loop() -> None:
        nonlocal done_bytes
        buffer = memoryview(bytearray(_DATA_BLOCKS * BLOCK_BYTES))
        try:
            while (stretch := next_stretch()) is not None:
                scope.cancel.check()
                end = min((stretch.first + stretch.count) * BLOCK_BYTES, scope.size_bytes)
                length = end - stretch.first * BLOCK_BYTES
                task(stretch, buffer[:length] if stretch.data else buffer[:0])
                with lock:
                    done_bytes += length
                    scope.progress(done_bytes, scope.size_bytes)
        finally:
            stop.set()

    with ThreadPoolExecutor(_THREADS) as pool:
        futures = [pool.submit(loop) for _ in range(_THREADS)]
    for future in futures:
        future.result()
