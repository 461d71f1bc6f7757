"""What storing by hints needs: where a clone wrote, kept beside its disk, and a look at blocks that a hint calls unchanged.

A file of the former kind has a line for each stretch of blocks: the number of the first and how many, in decimal.
"""

from __future__ import annotations

import hashlib
import random
import re
import threading
from dataclasses import dataclass, replace
from pathlib import Path

from vmsnap.model.hints import BlockSet
from vmsnap.ports.disks import DiskView
from vmsnap.stores.blocks import (
    BLOCK_BYTES,
    Scope,
    Stretch,
    digest_of,
    for_each,
    read_digests,
    read_into,
    stretches_of,
)
from vmsnap.stores.layout import write_new_file

_LINE = re.compile(rb"(\d{1,15}) (\d{1,15})\n")
_LEAST_SAMPLE = 64
_SAMPLED_SHARE = 256
_LARGEST_SAMPLE = 1 << 14


def own_blocks(view: DiskView) -> BlockSet:
    """Return the blocks that a disk's image itself holds. Raises ToolError."""
    return BlockSet.of(view.written(), size_bytes=view.size_bytes)


def write_blocks(path: Path, *, blocks: BlockSet) -> str:
    """Write a new file that lists blocks, put it on the disk, and return its SHA-256. Raises OSError."""
    data = b"".join(b"%d %d\n" % run for run in blocks.runs())
    write_new_file(path, data=data, mode=0o400)
    return hashlib.sha256(data).hexdigest()


def read_blocks(path: Path, *, sha256: str | None, size_bytes: int) -> BlockSet | None:
    """Return what a file lists, or None where it is missing, or not the file that the manifest vouches for."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if hashlib.sha256(data).hexdigest() != sha256:
        return None
    runs = ((int(match[1]), int(match[2])) for match in _LINE.finditer(data))
    return BlockSet.of(
        ((first * BLOCK_BYTES, count * BLOCK_BYTES) for first, count in runs),
        size_bytes=size_bytes,
    )


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a look at blocks that should be unchanged came to. ``mismatch``: which one is not, and how that was seen."""

    read_bytes: int
    sampled_blocks: int
    mismatch: str | None


def look_at_unchanged(source: int, *, digests: int, unchanged: BlockSet, data: BlockSet, scope: Scope) -> Look:
    """Compare some of the blocks that should be unchanged with their digests: all that are holes now, and a few others.

    ``source``, ``digests``: descriptors of the disk and of the digests of the snapshot before. ``data``: the blocks that are
    not holes now. Raises OSError, DriverError, CancelledError.
    """
    for stretch in stretches_of(unchanged & ~data, data=False):
        entries = read_digests(digests, stretch=stretch)
        if entries.count(0) != len(entries):
            place = f"in blocks {stretch.first} to {stretch.first + stretch.count - 1}"
            return Look(read_bytes=0, sampled_blocks=0, mismatch=f"{place} data became a hole")
    sample = pick(unchanged & data)
    comparison = _Comparison(source=source, digests=digests)
    quiet = replace(scope, progress=lambda _done, _total: None)
    for_each((Stretch(first=block, count=1, data=True) for block in sample), scope=quiet, task=comparison.compare)
    mismatch = None if not comparison.changed else f"block {min(comparison.changed)} changed"
    return Look(read_bytes=comparison.read_bytes, sampled_blocks=len(sample), mismatch=mismatch)


def pick(blocks: BlockSet) -> list[int]:
    """Return some blocks by chance, in order: every 256th, and at least 64 where there are as many."""
    count = blocks.count
    wanted = min(count, max(_LEAST_SAMPLE, min(count // _SAMPLED_SHARE, _LARGEST_SAMPLE)))
    ranks = iter(sorted(random.SystemRandom().sample(range(count), wanted)))
    rank, passed, picked = next(ranks, None), 0, []
    for first, length in blocks.runs():
        while rank is not None and rank < passed + length:
            picked.append(first + rank - passed)
            rank = next(ranks, None)
        passed += length
    return picked


class _Comparison:
    def __init__(self, *, source: int, digests: int) -> None:
        self._source = source
        self._digests = digests
        self._lock = threading.Lock()
        self.changed: list[int] = []
        self.read_bytes = 0

    def compare(self, stretch: Stretch, buffer: memoryview) -> None:
        """Compare one block. Different blocks may be compared at the same time."""
        read_into(self._source, buffer=buffer, offset=stretch.first * BLOCK_BYTES)
        changed = digest_of(buffer) != read_digests(self._digests, stretch=stretch)
        with self._lock:
            self.read_bytes += len(buffer)
            if changed:
                self.changed.append(stretch.first)
