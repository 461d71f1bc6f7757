"""Receiving a disk of a snapshot that was published elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from vmsnap.errors import VerificationError
from vmsnap.linux.writeback import put_on_disk
from vmsnap.model.manifest import DiskRecord
from vmsnap.ports.store import DiskContent
from vmsnap.stores.blocks import DIGEST_BYTES, block_count, file_digest

_READ_ONLY = 0o400


def receive_disk(folder: Path, *, record: DiskRecord, fill: Callable[[DiskContent], None]) -> None:
    """Let ``fill`` write a disk's image and digests into a staging folder; put them on the disk, read-only.

    Raises VerificationError where the digests are not those that the record vouches for, OSError, and what ``fill`` raises.
    """
    content = DiskContent(record=record, image=folder / record.image, digests=folder / record.digests)
    sizes = ((content.image, record.size_bytes), (content.digests, block_count(record.size_bytes) * DIGEST_BYTES))
    for path, size in sizes:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.ftruncate(descriptor, size)
        finally:
            os.close(descriptor)
    fill(content)
    for path, size in sizes:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            whole = os.fstat(descriptor).st_size == size
            if not whole or (path == content.digests and file_digest(descriptor) != record.digests_sha256):
                raise VerificationError(
                    f"disk {record.target} is not what the snapshot's manifest vouches for: it is not kept",
                    remedy="verify the copy that it was taken from: 'vmsnap verify --replica'",
                )
            os.fchmod(descriptor, _READ_ONLY)
            put_on_disk(descriptor)
        finally:
            os.close(descriptor)
