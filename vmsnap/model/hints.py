"""Which blocks of a disk may differ from the snapshot before, so that only they have to be read.

A stored disk is the guest's disk at the capture, and what the clone wrote over it. So it differs from the one before at most
where the guest wrote between the two captures, where this clone wrote, *and where the clone before wrote*: its blocks are in
the snapshot before, and never were in the guest.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from heapq import merge

from vmsnap.model.ids import SnapshotId
from vmsnap.model.manifest import DiskRecord

HINT_BLOCK_BYTES = 64 * 1024
MOST_HINTED_IN_A_ROW = 29
"""After so many snapshots by hints, one is read in full, whatever the hints say."""


@dataclass(frozen=True, kw_only=True)
class BlockSet:
    """Blocks of 64 KiB of a disk. It takes 16 bytes for each run of neighbouring blocks.

    ``bounds``: the first block of a run, the first after it, the first of the next run, and so on, ever larger.
    """

    size_bytes: int
    bounds: array[int] = field(repr=False)

    @staticmethod
    def of(stretches: Iterable[tuple[int, int]], *, size_bytes: int) -> BlockSet:
        """Return the blocks that stretches (offset, length in bytes) touch. What lies beyond the disk's end is left out."""
        last = _count(size_bytes)
        touched = (
            (offset // HINT_BLOCK_BYTES, min(_count(offset + length), last))
            for offset, length in stretches
            if length > 0 and offset // HINT_BLOCK_BYTES < last
        )
        return BlockSet(size_bytes=size_bytes, bounds=_joined(touched))

    def __or__(self, other: BlockSet) -> BlockSet:
        """Return the blocks of either. The disks must be of one size."""
        if self.size_bytes != other.size_bytes:
            raise ValueError(f"blocks of disks of {self.size_bytes} and {other.size_bytes} bytes")
        return BlockSet(size_bytes=self.size_bytes, bounds=_joined(merge(self._bounded(), other._bounded())))

    def __and__(self, other: BlockSet) -> BlockSet:
        """Return the blocks of both. The disks must be of one size."""
        return ~(~self | ~other)

    def __invert__(self) -> BlockSet:
        """Return all other blocks."""
        bounds, last = array("Q", self.bounds), _count(self.size_bytes)
        if bounds and bounds[0] == 0:
            del bounds[0]
        else:
            bounds.insert(0, 0)
        if bounds[-1:] == array("Q", [last]):
            del bounds[-1]
        else:
            bounds.append(last)
        return BlockSet(size_bytes=self.size_bytes, bounds=bounds)

    def __contains__(self, block: int) -> bool:
        """Tell whether a block is among them."""
        return bisect_right(self.bounds, block) % 2 == 1

    @property
    def count(self) -> int:
        """Return how many blocks there are."""
        return sum(self.bounds[1::2]) - sum(self.bounds[::2])

    def runs(self) -> Iterator[tuple[int, int]]:
        """Yield (first, count) of neighbouring blocks, in order."""
        for first, end in self._bounded():
            yield first, end - first

    def _bounded(self) -> Iterator[tuple[int, int]]:
        return zip(self.bounds[::2], self.bounds[1::2], strict=True)


def _count(size_bytes: int) -> int:
    return -(-size_bytes // HINT_BLOCK_BYTES)


def _joined(runs: Iterable[tuple[int, int]]) -> array[int]:
    """Return the bounds of runs (first, first after), which may overlap. Those that come in order are not held in memory."""
    bounds, left = array("Q"), iter(runs)
    for first, end in left:
        if bounds and first < bounds[-2]:
            seen = zip(bounds[::2], bounds[1::2], strict=True)
            return _joined(sorted((*seen, (first, end), *left)))
        if bounds and first <= bounds[-1]:
            bounds[-1] = max(bounds[-1], end)
        else:
            bounds.extend((first, end))
    return bounds


@dataclass(frozen=True, kw_only=True)
class DiskHint:
    """What is known of a guest's writes to one disk since the capture of the snapshot ``since``.

    ``written`` None: nothing is known, for ``reason``, and the disk has to be read in full.
    """

    target: str
    since: SnapshotId | None = None
    written: BlockSet | None = None
    reason: str = ""


def may_differ(*, by_guest: BlockSet, by_clone: BlockSet, by_previous_clone: BlockSet) -> BlockSet:
    """Return the blocks in which a disk can differ from the one in the snapshot before.

    ``by_guest``: what the guest wrote between the two captures. ``by_clone``, ``by_previous_clone``: what each clone wrote.
    """
    return by_guest | by_clone | by_previous_clone


def why_full(
    hint: DiskHint | None, *, base: SnapshotId | None, before: DiskRecord | None, size_bytes: int
) -> str | None:
    """Return why a disk has to be read in full, or None where its hint can be used.

    ``base``: the snapshot it is stored over, ``before``: the record of the disk there. ``size_bytes``: the disk's size now.
    """
    if base is None or before is None:
        return "there is no earlier snapshot of this disk to build upon"
    if hint is None:
        return "nobody gave a hint"
    return next(_obstacles(hint, base=base, before=before, size_bytes=size_bytes), None)


def _obstacles(hint: DiskHint, *, base: SnapshotId, before: DiskRecord, size_bytes: int) -> Iterator[str]:
    if hint.written is None:
        yield hint.reason
    elif hint.since != base:
        yield f"what changed is known since {hint.since}, and this snapshot is built upon {base}"
    elif {before.size_bytes, hint.written.size_bytes} != {size_bytes}:
        yield f"the disk changed its size from {before.size_bytes:,} to {size_bytes:,} bytes"
    if before.written is None:
        yield f"snapshot {base} does not say where its clone wrote"
    if before.read is not None and before.read.hinted_in_a_row >= MOST_HINTED_IN_A_ROW:
        yield f"{MOST_HINTED_IN_A_ROW} snapshots in a row were stored by hints; now and then one is read in full"
