"""Bringing whole disks out of a repository into files: many ranges at a time, holes stay holes, every block compared."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count

from vmsnap.errors import VerificationError
from vmsnap.ports.clock import Cancel
from vmsnap.ports.store import ByteProgress
from vmsnap.stores.blocks import BLOCK_BYTES, DIGEST_BYTES, HOLE, file_digest
from vmsnap.stores.packs.imaging import ImageWriter
from vmsnap.stores.packs.maps import LEAF_BLOCKS, Leaf, leaf_count
from vmsnap.stores.packs.reading import Fetch, PackedDisk, Wanted, fetches

_AHEAD = 3
_MOST_RUN = 16


@dataclass(frozen=True, kw_only=True)
class Target:
    """Files to write, open for writing and empty, with the sizes that they are to have."""

    image: int
    digests: int


@dataclass(kw_only=True)
class _LeafInHand:
    number: int
    digests: bytearray
    parts: list[Future[None]]


def download(
    disk: PackedDisk, *, target: Target, digests_sha256: str, connections: int, progress: ByteProgress, cancel: Cancel
) -> None:
    """Write a disk and its digests. Whoever keeps the files puts them on the disk.

    Raises VerificationError where a block, or all of them together, are not what the manifest vouches for, CancelledError,
    OSError, StoreUnreachableError.
    """
    stop = threading.Event()
    writer = ImageWriter(target.image)
    work = _Download(disk, target=target, writer=writer, stop=stop)
    pool = ThreadPoolExecutor(connections, thread_name_prefix="fetch")
    try:
        leaves: deque[_LeafInHand] = deque()
        for number, leaf in enumerate(_leaves(disk, pool=pool)):
            cancel.check()
            if leaf is not None:
                leaves.append(work.begin(number, leaf=leaf, pool=pool))
            while len(leaves) > _AHEAD:
                work.finish(leaves.popleft())
            progress(min(number * LEAF_BLOCKS * BLOCK_BYTES, disk.size_bytes), disk.size_bytes)
        while leaves:
            cancel.check()
            work.finish(leaves.popleft())
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        writer.close()
    if file_digest(target.digests) != digests_sha256:
        raise VerificationError(
            "what was read from the replica is not the disk that the snapshot's manifest vouches for",
            remedy="run 'vmsnap verify --replica' on the snapshot",
        )
    progress(disk.size_bytes, disk.size_bytes)


def _leaves(disk: PackedDisk, *, pool: ThreadPoolExecutor) -> Iterator[Leaf | None]:
    """Yield a disk's leaves, a few of them read ahead."""
    total = leaf_count(disk.size_bytes)
    ahead: deque[Future[Leaf | None]] = deque()
    following = count()
    for _ in range(total):
        while len(ahead) <= _AHEAD and (number := next(following)) < total:
            ahead.append(pool.submit(disk.leaf, number))
        yield ahead.popleft().result()


class _Download:
    def __init__(self, disk: PackedDisk, *, target: Target, writer: ImageWriter, stop: threading.Event) -> None:
        self._disk = disk
        self._target = target
        self._stop = stop
        self._writer = writer

    def begin(self, number: int, *, leaf: Leaf, pool: ThreadPoolExecutor) -> _LeafInHand:
        """Give the reads of one leaf to the threads."""
        first = number * LEAF_BLOCKS
        wanted = [
            Wanted(first + at, leaf.identity(at), place)
            for at in range(len(leaf))
            if (place := leaf.place(at)) is not None
        ]
        in_hand = _LeafInHand(number=number, digests=bytearray(HOLE * len(leaf)), parts=[])
        in_hand.parts.extend(pool.submit(self._write, fetch, in_hand) for fetch in fetches(wanted))
        return in_hand

    def _write(self, fetch: Fetch, in_hand: _LeafInHand) -> None:
        """Read one range, and write its blocks; those that follow each other at once."""
        if self._stop.is_set():
            return
        run: list[memoryview] = []
        begin = end = 0
        for wanted, block, digest in self._disk.reader.fetch(fetch):
            at = wanted.number - in_hand.number * LEAF_BLOCKS
            in_hand.digests[at * DIGEST_BYTES : (at + 1) * DIGEST_BYTES] = digest
            if wanted.number != end or len(run) >= _MOST_RUN:
                self._put(run, first=begin)
                run, begin = [], wanted.number
            run.append(block)
            end = wanted.number + 1
        self._put(run, first=begin)

    def _put(self, run: list[memoryview], *, first: int) -> None:
        if run:
            self._writer.write(run, offset=first * BLOCK_BYTES)

    def finish(self, in_hand: _LeafInHand) -> None:
        """Wait for a leaf's blocks, and write its digests."""
        for part in in_hand.parts:
            part.result()
        data, offset = memoryview(in_hand.digests), in_hand.number * LEAF_BLOCKS * DIGEST_BYTES
        while data:
            done = os.pwrite(self._target.digests, data, offset)
            data, offset = data[done:], offset + done
