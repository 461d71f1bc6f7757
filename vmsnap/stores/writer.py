"""Writing one disk: what differs from the snapshot before is written, the rest stays shared with it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from vmsnap.linux.reflink import clone, punch_hole
from vmsnap.linux.writeback import put_on_disk
from vmsnap.model.hints import BlockSet
from vmsnap.ports.disks import DiskView
from vmsnap.stores.blocks import (
    BLOCK_BYTES,
    DIGEST_BYTES,
    HOLE,
    Scope,
    Stretch,
    block_count,
    digest_of,
    file_digest,
    for_each,
    read_digests,
    read_into,
    stretches,
    stretches_of,
)
from vmsnap.stores.hinted import Look, look_at_unchanged

_READ_ONLY = 0o400
_PAGE_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class DiskFiles:
    """The two files of a stored disk."""

    image: Path
    digests: Path


@dataclass(frozen=True, kw_only=True)
class Written:
    """What writing a disk came to. ``data_bytes`` are not zero, ``new_bytes`` were written, the rest was there.

    ``look``: at blocks that should not have changed, where not all were read.
    """

    data_bytes: int
    new_bytes: int
    read_bytes: int
    digests_sha256: str
    look: Look | None


@dataclass(frozen=True, kw_only=True)
class Base:
    """The same disk in the snapshot before, whose blocks are shared; its digests must have been checked.

    ``data_bytes`` of it are not zero. ``may_differ``: the blocks in which the disk can differ from it, where that is known;
    the disks are of one size then.
    """

    files: DiskFiles
    data_bytes: int
    may_differ: BlockSet | None = None


def write_disk(view: DiskView, *, files: DiskFiles, base: Base | None, scope: Scope) -> Written:
    """Write a disk and its digests to new files, fsync them and make them read-only.

    Raises OSError, DriverError, CancelledError.
    """
    with (
        _opened(view.path, os.O_RDONLY) as source,
        _opened(files.image, os.O_RDWR | os.O_CREAT | os.O_EXCL) as image,
        _opened(files.digests, os.O_RDWR | os.O_CREAT | os.O_EXCL) as digests,
    ):
        if base is not None:
            old = base.files
            with _opened(old.image, os.O_RDONLY) as old_image, _opened(old.digests, os.O_RDONLY) as old_digests:
                clone(source=old_image, target=image)
                clone(source=old_digests, target=digests)
        # A new file is all holes, and so are its digests: without a base, everything but zeroes differs.
        os.ftruncate(image, scope.size_bytes)
        os.ftruncate(digests, block_count(scope.size_bytes) * DIGEST_BYTES)
        writer = _Writer(source=source, image=image, digests=digests, size_bytes=scope.size_bytes)
        look = None
        if base is not None and base.may_differ is not None:
            look = _store_by_hint(view, writer=writer, may_differ=base.may_differ, scope=scope)
        by_hint = look is not None and look.mismatch is None
        if not by_hint:
            for_each(stretches(view.extents(), size_bytes=scope.size_bytes), scope=scope, task=writer.store)
        for descriptor in (image, digests):
            os.fchmod(descriptor, _READ_ONLY)
            put_on_disk(descriptor)
        return Written(
            data_bytes=writer.data_bytes + (base.data_bytes - writer.replaced_bytes if base and by_hint else 0),
            new_bytes=writer.new_bytes,
            read_bytes=writer.read_bytes + (0 if look is None else look.read_bytes),
            digests_sha256=file_digest(digests),
            look=look,
        )


def _store_by_hint(view: DiskView, *, writer: _Writer, may_differ: BlockSet, scope: Scope) -> Look:
    """Store the blocks that can differ, unless a look at the others shows that the hint is wrong: then nothing is stored."""
    data = BlockSet.of(
        ((extent.offset, extent.length) for extent in view.extents() if extent.data), size_bytes=scope.size_bytes
    )
    look = look_at_unchanged(writer.source, digests=writer.digests, unchanged=~may_differ, data=data, scope=scope)
    if look.mismatch is None:
        work = chain(stretches_of(may_differ & data, data=True), stretches_of(may_differ & ~data, data=False))
        unread_bytes = scope.size_bytes - sum(
            min((first + count) * BLOCK_BYTES, scope.size_bytes) - first * BLOCK_BYTES
            for first, count in may_differ.runs()
        )
        scope.progress(unread_bytes, scope.size_bytes)
        for_each(work, scope=scope, task=writer.store, done_bytes=unread_bytes)
    return look


class _Writer:
    def __init__(self, *, source: int, image: int, digests: int, size_bytes: int) -> None:
        self.source = source
        self.digests = digests
        self._size_bytes = size_bytes
        self._image = image
        self._lock = threading.Lock()
        self.data_bytes = 0
        self.replaced_bytes = 0
        self.new_bytes = 0
        self.read_bytes = 0

    def store(self, stretch: Stretch, buffer: memoryview) -> None:
        """Store one stretch. Different stretches may be stored at the same time."""
        before = read_digests(self.digests, stretch=stretch)
        if stretch.data:
            read_into(self.source, buffer=buffer, offset=stretch.first * BLOCK_BYTES)
            now = b"".join(
                digest_of(buffer[start : start + BLOCK_BYTES]) for start in range(0, len(buffer), BLOCK_BYTES)
            )
        else:
            now = bytes(len(before))
        new_bytes = 0
        if now != before:
            for start, count, hole in _changes(before, now=now):
                offset = (stretch.first + start) * BLOCK_BYTES
                if hole:
                    punch_hole(self._image, offset=offset, length=count * BLOCK_BYTES)
                else:
                    changed = buffer[start * BLOCK_BYTES : (start + count) * BLOCK_BYTES]
                    new_bytes += self._write_changed_pages(changed, offset=offset)
            _write(self.digests, data=memoryview(now), offset=stretch.first * DIGEST_BYTES)
        length = min(stretch.count * BLOCK_BYTES, self._size_bytes - stretch.first * BLOCK_BYTES)
        data_bytes = _data_bytes(now, length=length)
        replaced_bytes = _data_bytes(before, length=length)
        with self._lock:
            self.new_bytes += new_bytes
            self.data_bytes += data_bytes
            self.replaced_bytes += replaced_bytes
            self.read_bytes += len(buffer)

    def _write_changed_pages(self, data: memoryview, *, offset: int) -> int:
        """Write what differs from the image as it is, in pages: a database changes 8 KiB here and there."""
        written, first, end = 0, 0, 0
        for page in self._changed_pages(data, offset=offset):
            if page != end:
                written += _write(self._image, data=data[first:end], offset=offset + first)
                first = page
            end = min(page + _PAGE_BYTES, len(data))
        return written + _write(self._image, data=data[first:end], offset=offset + first)

    def _changed_pages(self, data: memoryview, *, offset: int) -> Iterator[int]:
        # Block by block: large copies would cost more than all the comparing.
        for start in range(0, len(data), BLOCK_BYTES):
            new = bytes(data[start : start + BLOCK_BYTES])
            old = self._present(len(new), offset=offset + start)
            for page in range(0, len(new), _PAGE_BYTES):
                if old[page : page + _PAGE_BYTES] != new[page : page + _PAGE_BYTES]:
                    yield start + page

    def _present(self, length: int, *, offset: int) -> bytes:
        """Return what the image holds there now; nothing where it cannot be read, so that all of it is written."""
        try:
            return os.pread(self._image, length, offset)
        except OSError:
            return b""


def _data_bytes(entries: bytes, *, length: int) -> int:
    """Return how many of the ``length`` bytes that these digests are of lie in blocks that are not zero."""
    if entries.count(0) == len(entries):
        return 0
    return sum(
        min(BLOCK_BYTES, length - index * BLOCK_BYTES)
        for index in range(len(entries) // DIGEST_BYTES)
        if entries[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES] != HOLE
    )


def _changes(before: bytes, *, now: bytes) -> Iterator[tuple[int, int, bool]]:
    """Yield (first, count, whether holes) for runs of blocks whose digests differ."""
    first, count, hole = 0, 0, False
    for index in range(len(now) // DIGEST_BYTES):
        digest = now[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]
        changed = digest != before[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]
        if changed and count and hole == (digest == HOLE):
            count += 1
            continue
        if count:
            yield first, count, hole
        first, count, hole = index, int(changed), digest == HOLE
    if count:
        yield first, count, hole


def _write(descriptor: int, *, data: memoryview, offset: int) -> int:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)
    return done


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
