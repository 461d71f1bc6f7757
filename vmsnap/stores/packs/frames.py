"""Frames: a few blocks compressed together as one zstd frame (RFC 8878), sealed where the repository is keyed."""

from __future__ import annotations

import hashlib
import threading
from typing import NamedTuple

import zstandard

from vmsnap.stores.blocks import BLOCK_BYTES, HOLE
from vmsnap.stores.packs.names import damaged
from vmsnap.stores.packs.seals import Seal

MOST_FRAME_BLOCKS = 64
_LEVEL = 2
_local = threading.local()


class Place(NamedTuple):
    """Where a block lies: bytes ``offset`` to ``offset + length`` of a pack are its frame, and it is number ``slot`` in it."""

    pack: bytes
    offset: int
    length: int
    slot: int


class Frame(NamedTuple):
    """A frame as stored, and the ids of its blocks in order."""

    data: bytes
    ids: tuple[bytes, ...]


def compress(data: bytes | memoryview) -> bytes:
    """Return one zstd frame with its content's size in its header."""
    compressor: zstandard.ZstdCompressor | None = getattr(_local, "compressor", None)
    if compressor is None:
        compressor = _local.compressor = zstandard.ZstdCompressor(level=_LEVEL)
    return compressor.compress(data)


def decompress(data: bytes, *, most_bytes: int, name: str) -> bytes:
    """Return the content of one zstd frame of at most that size. Raises VerificationError that names the object."""
    decompressor: zstandard.ZstdDecompressor | None = getattr(_local, "decompressor", None)
    if decompressor is None:
        decompressor = _local.decompressor = zstandard.ZstdDecompressor()
    try:
        size = zstandard.frame_content_size(data)
        if not 0 <= size <= most_bytes:
            raise damaged(name, what=f"a frame claims {size} bytes, at most {most_bytes} are allowed")
        return decompressor.decompress(data, max_output_size=max(size, 1))
    except zstandard.ZstdError as error:
        raise damaged(name, what=f"a frame cannot be decompressed ({error})") from error


def make_frame(blocks: memoryview, *, ids: tuple[bytes, ...], seal: Seal) -> Frame:
    """Return the frame of blocks that lie one after another; only the last may be shorter than the others."""
    return Frame(data=seal.seal(compress(blocks)), ids=ids)


def open_frame(stored: bytes, *, seal: Seal, name: str) -> bytes:
    """Return the blocks of a frame, one after another, not compared with their ids yet. Raises VerificationError."""
    plain = seal.unseal(stored, name=name)
    return decompress(plain, most_bytes=MOST_FRAME_BLOCKS * BLOCK_BYTES, name=name)


def block_of(blocks: bytes, *, slot: int) -> memoryview:
    """Return one block of an opened frame; shorter, or empty, where the frame ends before."""
    return memoryview(blocks)[slot * BLOCK_BYTES : (slot + 1) * BLOCK_BYTES]


def checked(block: memoryview, *, identity: bytes, seal: Seal, name: str) -> bytes:
    """Return the SHA-256 of a block. Raises VerificationError where it is not the one with that id."""
    digest = hashlib.sha256(block).digest()
    if identity == HOLE or seal.block_id(digest) != identity:
        raise damaged(name, what=f"a block is not the one with id {identity.hex()}")
    return digest
