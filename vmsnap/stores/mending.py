"""Repairing a stored disk, in place, by blocks from another copy of the snapshot.

Only blocks that differ from their digests are written, each only with what has its digest, so a repair that is cut leaves no
block worse than it was. Files are read again afterwards.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vmsnap.errors import VerificationError
from vmsnap.linux.reflink import punch_hole
from vmsnap.model.manifest import DiskRecord
from vmsnap.ports.clock import Cancel
from vmsnap.stores.blocks import BLOCK_BYTES, DIGEST_BYTES, HOLE, block_count, digest_of
from vmsnap.stores.layout import sync_folder

BlockReader = Callable[[int], bytes]
"""Returns a block of the disk, by number, from the other copy. Raises VerificationError where it is damaged there, too."""

_READ_ONLY, _WRITABLE = 0o400, 0o600
_STEP = 64


def mend_disk(folder: Path, *, record: DiskRecord, read: BlockReader, cancel: Cancel) -> int:
    """Repair a disk and its digests; return how many blocks were written.

    May be repeated. What is damaged in the other copy, too, stays as it is. Raises VerificationError where not even the
    digests can be had, OSError, CancelledError.
    """
    digests = _digests(folder, record=record, read=read, cancel=cancel)
    mended = 0
    with _writable(folder / record.image, size_bytes=record.size_bytes) as image:
        for number, present in _blocks(image, size_bytes=record.size_bytes):
            cancel.check()
            wanted = digests[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]
            if digest_of(memoryview(present)) != wanted and _mend_block(image, number=number, wanted=wanted, read=read):
                mended += 1
        os.fsync(image)
    return mended


def _mend_block(image: int, *, number: int, wanted: bytes, read: BlockReader) -> bool:
    try:
        data = read(number)
    except VerificationError:
        return False
    if digest_of(memoryview(data)) != wanted:
        return False
    offset = number * BLOCK_BYTES
    if wanted == HOLE:
        punch_hole(image, offset=offset, length=len(data))
        return True
    done = 0
    while done < len(data):
        done += os.pwrite(image, memoryview(data)[done:], offset + done)
    return True


def _digests(folder: Path, *, record: DiskRecord, read: BlockReader, cancel: Cancel) -> bytes:
    """Return the digests that the manifest vouches for; write them anew where they are damaged.

    They are made again from the image; where that is damaged as well, from the image and the other copy block by block.
    """
    path = folder / record.digests
    present = path.read_bytes() if path.is_file() else b""
    if _vouched(present, record=record):
        return present
    image = folder / record.image
    made = _made(image, record=record, cancel=cancel) if image.is_file() else bytearray()
    if not _vouched(made, record=record):
        made = bytearray()
        for number in range(block_count(record.size_bytes)):
            cancel.check()
            made += digest_of(memoryview(read(number)))
        if not _vouched(made, record=record):
            raise VerificationError(
                f"{record.digests} is damaged, and the other copy is not what the manifest vouches for",
                remedy="use another snapshot",
            )
    draft = path.with_name(f".{path.name}.mending")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _READ_ONLY)
    with os.fdopen(descriptor, "wb") as file:
        file.write(made)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    sync_folder(folder)
    return bytes(made)


def _made(image: Path, *, record: DiskRecord, cancel: Cancel) -> bytearray:
    made = bytearray()
    descriptor = os.open(image, os.O_RDONLY)
    try:
        for _, present in _blocks(descriptor, size_bytes=record.size_bytes):
            cancel.check()
            made += digest_of(memoryview(present))
    finally:
        os.close(descriptor)
    return made


def _vouched(digests: bytes | bytearray, *, record: DiskRecord) -> bool:
    wanted = block_count(record.size_bytes) * DIGEST_BYTES
    return len(digests) == wanted and hashlib.sha256(digests).hexdigest() == record.digests_sha256


def _blocks(descriptor: int, *, size_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Yield all blocks by number; one that cannot be read is as empty as one behind the file's end."""
    for first in range(0, block_count(size_bytes), _STEP):
        offset = first * BLOCK_BYTES
        length = min(_STEP * BLOCK_BYTES, size_bytes - offset)
        try:
            data = os.pread(descriptor, length, offset)
        except OSError:
            data = b""
        whole = len(data) == length
        for start in range(0, length, BLOCK_BYTES):
            size = min(BLOCK_BYTES, length - start)
            yield (
                first + start // BLOCK_BYTES,
                data[start : start + size] if whole else _block(descriptor, offset=offset + start, size=size),
            )


def _block(descriptor: int, *, offset: int, size: int) -> bytes:
    try:
        data = os.pread(descriptor, size, offset)
    except OSError:
        data = b""
    return data if len(data) == size else b"?"  # whose digest is of no block


@contextmanager
def _writable(path: Path, *, size_bytes: int) -> Iterator[int]:
    """Open an image for writing, made where it is missing, with the size that it is to have."""
    if path.exists():
        path.chmod(_WRITABLE)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _WRITABLE)
    try:
        if os.fstat(descriptor).st_size != size_bytes:
            os.ftruncate(descriptor, size_bytes)
        yield descriptor
    finally:
        os.fchmod(descriptor, _READ_ONLY)
        os.close(descriptor)
