"""What an upload reads: a file of the local store and the digests of its blocks."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

from vmsnap.errors import VerificationError
from vmsnap.ports.store import DiskContent
from vmsnap.stores.blocks import BLOCK_BYTES, DIGEST_BYTES, Stretch, block_count, file_digest, read_digests, read_into
from vmsnap.stores.packs.frames import Frame, make_frame
from vmsnap.stores.packs.maps import LEAF_BLOCKS, leaf_length
from vmsnap.stores.packs.seals import Seal

FRAME_BLOCKS = 4
BATCH_BLOCKS = 32


class Source:
    """An open disk. Blocks may be read from several threads."""

    def __init__(self, name: str, *, size_bytes: int, image: int, digests: int | bytes) -> None:
        self.name = name
        self.size_bytes = size_bytes
        self._image = image
        self._digests = digests

    def digests(self, leaf: int) -> bytes:
        """Return the digests of a leaf's blocks. Raises OSError."""
        stretch = Stretch(first=leaf * LEAF_BLOCKS, count=leaf_length(self.size_bytes, number=leaf), data=True)
        if isinstance(self._digests, bytes):
            return self._digests[stretch.first * DIGEST_BYTES : (stretch.first + stretch.count) * DIGEST_BYTES]
        return read_digests(self._digests, stretch=stretch)

    def frames(self, blocks: Sequence[int], *, ids: Sequence[bytes], seal: Seal) -> list[Frame]:
        """Read blocks, compare each with its id, and return their frames.

        Raises VerificationError where a block is not the one with that id, OSError.
        """
        length = min(blocks[-1] * BLOCK_BYTES + BLOCK_BYTES, self.size_bytes) - blocks[-1] * BLOCK_BYTES
        buffer = memoryview(bytearray((len(blocks) - 1) * BLOCK_BYTES + length))
        for begin, end in _runs(blocks):
            part = buffer[begin * BLOCK_BYTES : end * BLOCK_BYTES]
            read_into(self._image, buffer=part, offset=blocks[begin] * BLOCK_BYTES)
        for number, identity in enumerate(ids):
            digest = hashlib.sha256(buffer[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]).digest()
            if seal.block_id(digest) != identity:
                raise VerificationError(
                    f"{self.name}: block {blocks[number]} (byte {blocks[number] * BLOCK_BYTES}) differs from its digest: "
                    "it is not uploaded",
                    remedy="run 'vmsnap verify' on the snapshot; 'vmsnap verify --repair' takes what it can from the replica",
                )
        return [
            make_frame(
                buffer[start * BLOCK_BYTES : (start + FRAME_BLOCKS) * BLOCK_BYTES],
                ids=tuple(ids[start : start + FRAME_BLOCKS]),
                seal=seal,
            )
            for start in range(0, len(blocks), FRAME_BLOCKS)
        ]


def _runs(blocks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield begin and end, in the sequence, of blocks that follow each other on the disk."""
    begin = 0
    for end, (block, following) in enumerate(pairwise(blocks), start=1):
        if following != block + 1:
            yield begin, end
            begin = end
    yield begin, len(blocks)


@contextmanager
def open_disk(disk: DiskContent) -> Iterator[Source]:
    """Open a stored disk. Raises VerificationError where its digests are not what the manifest vouches for, OSError."""
    image = os.open(disk.image, os.O_RDONLY)
    try:
        digests = os.open(disk.digests, os.O_RDONLY)
        try:
            record = disk.record
            wanted = block_count(record.size_bytes) * DIGEST_BYTES
            if os.fstat(digests).st_size != wanted or file_digest(digests) != record.digests_sha256:
                raise VerificationError(
                    f"{disk.digests} is not what the snapshot's manifest vouches for: nothing is uploaded from it",
                    remedy="run 'vmsnap verify' on the snapshot",
                )
            yield Source(str(disk.image), size_bytes=record.size_bytes, image=image, digests=digests)
        finally:
            os.close(digests)
    finally:
        os.close(image)


@contextmanager
def open_bytes(name: str, *, data: bytes) -> Iterator[Source]:
    """Open a few bytes as a disk. Raises OSError."""
    blocks = (data[start : start + BLOCK_BYTES] for start in range(0, len(data), BLOCK_BYTES))
    digests = b"".join(hashlib.sha256(one).digest() if any(one) else bytes(DIGEST_BYTES) for one in blocks)
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(data)
        yield Source(name, size_bytes=len(data), image=descriptor, digests=digests)
    finally:
        os.close(descriptor)
