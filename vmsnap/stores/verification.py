"""Reading a stored disk again and comparing every block with its digest."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from vmsnap.model.manifest import DiskRecord
from vmsnap.model.verification import Share
from vmsnap.stores.blocks import (
    BLOCK_BYTES,
    DIGEST_BYTES,
    Scope,
    Stretch,
    block_count,
    digest_of,
    file_digest,
    file_extents,
    for_each,
    read_digests,
    read_into,
    stretches,
)

_MOST_LINES = 200


_SHARE_BLOCKS = 64
"""Stretches of so many blocks, in order, go to the shares in turn."""


def verify_disk(
    folder: Path, *, record: DiskRecord, scope: Scope, share: Share | None = None
) -> tuple[int, tuple[str, ...]]:
    """Return how many blocks were compared, and a line for each defect: what is damaged and where.

    The disk is asked, not the page cache. Raises OSError for what is no defect of one file, CancelledError.
    """
    missing = [f"{name}: missing" for name in (record.image, record.digests) if not (folder / name).is_file()]
    if missing:
        return 0, tuple(missing)
    image = os.open(folder / record.image, os.O_RDONLY)
    try:
        digests = os.open(folder / record.digests, os.O_RDONLY)
        try:
            return _compare(image, digests, record=record, scope=scope, share=share)
        finally:
            os.close(digests)
    finally:
        os.close(image)


def _compare(
    image: int, digests: int, *, record: DiskRecord, scope: Scope, share: Share | None
) -> tuple[int, tuple[str, ...]]:
    for descriptor in (image, digests):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    size_bytes, blocks = os.fstat(image).st_size, block_count(record.size_bytes)
    if size_bytes != record.size_bytes:
        return 0, (f"{record.image}: has {size_bytes} bytes instead of {record.size_bytes}",)
    defects = []
    if os.fstat(digests).st_size != blocks * DIGEST_BYTES or file_digest(digests) != record.digests_sha256:
        defects.append(f"{record.digests}: is not what the manifest vouches for")
    comparison = _Comparison(image=image, digests=digests)
    extents = file_extents(image, size_bytes=size_bytes)
    work = stretches(extents, size_bytes=size_bytes)
    if share is not None:
        # Holes are compared each time: that costs nothing.
        work = (one for one in work if not one.data or share.has(one.first // _SHARE_BLOCKS))
    for_each(work, scope=scope, task=comparison.compare)
    defects += _lines(sorted(comparison.bad), name=record.image)
    return blocks if share is None else comparison.blocks, tuple(defects)


class _Comparison:
    def __init__(self, *, image: int, digests: int) -> None:
        self._image = image
        self._digests = digests
        self._lock = threading.Lock()
        self.bad: list[int] = []
        self.blocks = 0

    def compare(self, stretch: Stretch, buffer: memoryview) -> None:
        """Compare one stretch. Different stretches may be compared at the same time."""
        wanted = read_digests(self._digests, stretch=stretch)
        with self._lock:
            self.blocks += stretch.count
        if stretch.data:
            offset = stretch.first * BLOCK_BYTES
            try:
                read_into(self._image, buffer=buffer, offset=offset)
                found = b"".join(
                    digest_of(buffer[start : start + BLOCK_BYTES]) for start in range(0, len(buffer), BLOCK_BYTES)
                )
            except OSError:
                found = self._one_by_one(stretch, buffer=buffer)
            os.posix_fadvise(self._image, offset, len(buffer), os.POSIX_FADV_DONTNEED)
        else:
            found = bytes(len(wanted))
        if found == wanted:
            return
        bad = [
            stretch.first + index
            for index in range(stretch.count)
            if found[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]
            != wanted[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]
        ]
        with self._lock:
            self.bad += bad

    def _one_by_one(self, stretch: Stretch, *, buffer: memoryview) -> bytes:
        """Read block by block, so that an unreadable sector costs one block; such a block gets a digest of nothing."""
        found = []
        for start in range(0, len(buffer), BLOCK_BYTES):
            block = buffer[start : start + BLOCK_BYTES]
            try:
                read_into(self._image, buffer=block, offset=stretch.first * BLOCK_BYTES + start)
                found.append(digest_of(block))
            except OSError:
                found.append(b"\xff" * DIGEST_BYTES)
        return b"".join(found)


def _lines(bad: list[int], *, name: str) -> list[str]:
    runs: list[tuple[int, int]] = []
    for block in bad:
        if runs and runs[-1][1] == block - 1:
            runs[-1] = (runs[-1][0], block)
        else:
            runs.append((block, block))
    lines = [
        f"{name}: block {first} (byte {first * BLOCK_BYTES}) differs from its digest"
        if first == last
        else f"{name}: blocks {first} to {last} (from byte {first * BLOCK_BYTES}) differ from their digests"
        for first, last in runs
    ]
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES:] = [f"{name}: and {len(lines) - _MOST_LINES} more places"]
    return lines
