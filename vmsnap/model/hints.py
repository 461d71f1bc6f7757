"""Which blocks of a disk may differ from the snapshot before, so that only they have to be read.

A stored disk is the guest's disk at the capture, and what the clone wrote over it. So it differs from the one before at most
where the guest wrote between the two captures, where this clone wrote, *and where the clone before wrote*: its blocks are in
the snapshot before, and never were in the guest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from vmsnap.model.ids import SnapshotId
from vmsnap.model.manifest import DiskRecord

HINT_BLOCK_BYTES = 64 * 1024
MOST_HINTED_IN_A_ROW = 29
"""After so many snapshots by hints, one is read in full, whatever the hints say."""


@dataclass(frozen=True, kw_only=True)
class BlockSet:
    """Blocks of 64 KiB of a disk. ``flags`` has a byte for each, 1 or 0: 2 TiB take 32 MiB."""

    size_bytes: int
    flags: bytes = field(repr=False)

    @staticmethod
    def of(stretches: Iterable[tuple[int, int]], *, size_bytes: int) -> BlockSet:
        """Return the blocks that stretches (offset, length in bytes) touch. What lies beyond the disk's end is left out."""
        count = -(-size_bytes // HINT_BLOCK_BYTES)
        flags = bytearray(count)
        for offset, length in stretches:
            if length > 0:
                first = min(offset // HINT_BLOCK_BYTES, count)
                end = min(-(-(offset + length) // HINT_BLOCK_BYTES), count)
                flags[first:end] = b"\1" * (end - first)
        return BlockSet(size_bytes=size_bytes, flags=bytes(flags))

    def __or__(self, other: BlockSet) -> BlockSet:
        """Return the blocks of either. The disks must be of one size."""
        return self._combined(int.from_bytes(self.flags) | int.from_bytes(other._checked(self)))

    def __and__(self, other: BlockSet) -> BlockSet:
        """Return the blocks of both. The disks must be of one size."""
        return self._combined(int.from_bytes(self.flags) & int.from_bytes(other._checked(self)))

    def __invert__(self) -> BlockSet:
        """Return all other blocks."""
        return BlockSet(size_bytes=self.size_bytes, flags=self.flags.translate(_INVERTED))

    @property
    def count(self) -> int:
        """Return how many blocks there are."""
        return self.flags.count(1)

    def runs(self) -> Iterator[tuple[int, int]]:
        """Yield (first, count) of neighbouring blocks, in order."""
        first = self.flags.find(1)
        while first >= 0:
            end = self.flags.find(0, first)
            if end < 0:
                end = len(self.flags)
            yield first, end - first
            first = self.flags.find(1, end)

    def _combined(self, number: int) -> BlockSet:
        return BlockSet(size_bytes=self.size_bytes, flags=number.to_bytes(len(self.flags)))

    def _checked(self, other: BlockSet) -> bytes:
        if self.size_bytes != other.size_bytes:
            raise ValueError(f"blocks of disks of {other.size_bytes} and {self.size_bytes} bytes")
        return self.flags


_INVERTED = bytes([1, 0]) + bytes(254)


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
