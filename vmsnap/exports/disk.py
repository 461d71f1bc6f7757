"""A disk whose data comes as it is read."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator

from vmsnap.errors import VmsnapError
from vmsnap.exports.cache import BLOCK_BYTES
from vmsnap.exports.fetching import UNIT_BLOCKS, CachedDisk, Fetcher, Urgency
from vmsnap.nbd.wire import Run

UNIT_BYTES = UNIT_BLOCKS * BLOCK_BYTES
_MOST_AHEAD_UNITS = 16
_STREAMS = 8
_LONGEST_STATUS_BYTES = 128 << 20


class LazyDisk:
    """Answers a guest's reads out of the cache, and what is missing out of the replica. Safe to use from several threads.

    Who reads one unit after another is read ahead for: 1, 2, 4 up to 16 units.
    """

    def __init__(self, disk: CachedDisk, *, fetcher: Fetcher) -> None:
        self._disk = disk
        self._fetcher = fetcher
        self._lock = threading.Lock()
        self._streams: OrderedDict[int, int] = OrderedDict()
        """By the unit that a stream reads next: how many units it has read in a row."""
        self.missed = 0
        """How many reads had to wait for the replica."""

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes; they lie inside the disk. Waits as long as the replica cannot be reached.

        Raises StoppedError, and what the replica says of a block that is damaged.
        """
        cache = self._disk.cache
        first, last = offset // BLOCK_BYTES, (offset + length - 1) // BLOCK_BYTES
        while True:
            missing = tuple(cache.missing(first, last - first + 1))
            self._read_ahead(first // UNIT_BLOCKS, last // UNIT_BLOCKS)
            if not missing:
                data = cache.read(offset, length)
                if data is not None:
                    return data
                continue
            self.missed += 1
            return self._read_through(offset, length)

    def ready(self, offset: int, length: int) -> bool:
        """Tell whether nothing of it has to be fetched."""
        first, last = offset // BLOCK_BYTES, (offset + length - 1) // BLOCK_BYTES
        return not any(self._disk.cache.missing(first, last - first + 1))

    def _read_through(self, offset: int, length: int) -> bytes:
        """Return bytes of which some are missing, whether or not the cache keeps them."""
        cache = self._disk.cache
        end = offset + length
        first, last = offset // BLOCK_BYTES, (end - 1) // BLOCK_BYTES
        units = sorted(
            {
                b // UNIT_BLOCKS
                for run in cache.missing(first, last - first + 1)
                for b in range(run.first, run.first + run.blocks)
            }
        )
        wanted = [self._fetcher.want(self._disk, unit=unit, urgency=Urgency.GUEST) for unit in units]
        brought: dict[int, bytes | VmsnapError] = {}
        for future in wanted:
            brought.update(future.result())
        parts: list[bytes] = []
        for block in range(first, last + 1):
            start, stop = max(offset, block * BLOCK_BYTES), min(end, (block + 1) * BLOCK_BYTES)
            parts.append(self._part(block, start=start, stop=stop, brought=brought.get(block)))
        return b"".join(parts)

    def _part(self, block: int, *, start: int, stop: int, brought: bytes | VmsnapError | None) -> bytes:
        while True:
            if isinstance(brought, VmsnapError):
                raise brought
            if brought is not None:
                return brought[start - block * BLOCK_BYTES : stop - block * BLOCK_BYTES]
            if self._disk.cache.has(block):
                data = self._disk.cache.read(start, stop - start)
                if data is not None:
                    return data
            unit = self._fetcher.want(self._disk, unit=block // UNIT_BLOCKS, urgency=Urgency.GUEST)
            brought = unit.result().get(block)

    def _read_ahead(self, first: int, last: int) -> None:
        with self._lock:
            row = self._streams.pop(first, None)
            if row is None and last > first:
                row = self._streams.pop(first + 1, None)
            if row is None and first in (unit - 1 for unit in self._streams):
                return  # more of the unit that a stream has just read
            row = 0 if row is None else row + 1
            self._streams[last + 1] = row
            while len(self._streams) > _STREAMS:
                self._streams.popitem(last=False)
        if not row:
            return
        for unit in range(last + 1, last + 1 + min(1 << (row - 1), _MOST_AHEAD_UNITS)):
            self.fetch(unit, urgency=Urgency.AHEAD)

    def fetch(self, unit: int, *, urgency: Urgency) -> bool:
        """Want a unit without waiting for it. Tell whether anything of it is missing."""
        cache = self._disk.cache
        first = unit * UNIT_BLOCKS
        if first >= cache.count or not any(cache.missing(first, min(UNIT_BLOCKS, cache.count - first))):
            return False
        self._fetcher.want(self._disk, unit=unit, urgency=urgency)
        return True

    def runs(self, offset: int, length: int) -> Iterator[Run]:
        """Yield which stretches are holes, from ``offset`` on; perhaps fewer than asked for, which the protocol allows.

        Raises as the source does.
        """
        end = min(offset + min(length, _LONGEST_STATUS_BYTES), self._disk.source.size_bytes)
        first = offset // BLOCK_BYTES
        holes = self._disk.source.holes(first, (end - 1) // BLOCK_BYTES - first + 1)
        start, begun = offset, holes[0]
        for number, hole in enumerate(holes):
            if hole != begun:
                edge = (first + number) * BLOCK_BYTES
                yield Run(length=edge - start, hole=begun)
                start, begun = edge, hole
        yield Run(length=end - start, hole=begun)
