"""Packs: frames one after another, then an index in a zstd skippable frame, so that ``zstd -d`` decodes an open pack.

``docs/packs.md`` gives the layout. Nothing here reads or writes an object.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from vmsnap.stores.blocks import DIGEST_BYTES
from vmsnap.stores.packs.frames import Frame, Place
from vmsnap.stores.packs.names import damaged, pack_name
from vmsnap.stores.packs.seals import Seal

PACK_BYTES = 16 * 1024 * 1024
"""A pack is closed once its frames have so many bytes."""
MOST_PACK_BLOCKS = 4096
TOKEN_BYTES = 16
SKIPPABLE = struct.Struct("<II")
SKIPPABLE_MAGIC = 0x184D2A56
TRAILER_BYTES = 48
USUAL_TAIL_BYTES = 192 * 1024
"""The index of a full pack fits into so much of its end."""

_TRAILER = struct.Struct("<16s16sII8s")
_MAGIC = b"vmsnapP1"
_ROW = struct.Struct("<II")


class FrameRow(NamedTuple):
    """One frame of a pack."""

    offset: int
    length: int
    blocks: int


@dataclass(frozen=True, kw_only=True)
class PackIndex:
    """What a pack holds. ``token`` is of the upload that wrote it; ``ids`` are of all blocks in order, 32 bytes each."""

    token: bytes
    frames: tuple[FrameRow, ...]
    ids: bytes

    def places(self, pack: bytes) -> Iterator[tuple[bytes, Place]]:
        """Yield every block's id and place."""
        number = 0
        for row in self.frames:
            for slot in range(row.blocks):
                identity = self.ids[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]
                yield identity, Place(pack=pack, offset=row.offset, length=row.length, slot=slot)
                number += 1


@dataclass(frozen=True, kw_only=True)
class Pack:
    """A finished pack: its digest, its bytes and its index."""

    digest: bytes
    data: bytes
    index: PackIndex

    @property
    def name(self) -> str:
        """Return the object's name."""
        return pack_name(self.digest)


@dataclass(kw_only=True)
class PackBuilder:
    """A pack in the making."""

    seal: Seal
    token: bytes
    _parts: list[bytes] = field(default_factory=list)
    _rows: list[FrameRow] = field(default_factory=list)
    _ids: list[bytes] = field(default_factory=list)
    _bytes: int = 0

    @property
    def is_empty(self) -> bool:
        """Tell whether there is no frame yet."""
        return not self._rows

    @property
    def is_full(self) -> bool:
        """Tell whether the pack is to be finished."""
        return self._bytes >= PACK_BYTES or len(self._ids) >= MOST_PACK_BLOCKS

    def add(self, frame: Frame) -> None:
        """Add a frame at the end."""
        self._rows.append(FrameRow(offset=self._bytes, length=len(frame.data), blocks=len(frame.ids)))
        self._parts.append(frame.data)
        self._ids.extend(frame.ids)
        self._bytes += len(frame.data)

    def finish(self) -> Pack:
        """Return the pack. The builder is not to be used after."""
        index = PackIndex(token=self.token, frames=tuple(self._rows), ids=b"".join(self._ids))
        self._parts.append(index_bytes(index, seal=self.seal))
        data = b"".join(self._parts)
        self._parts.clear()  # several packs are on their way at a time: each is in memory once
        return Pack(digest=hashlib.sha256(data).digest(), data=data, index=index)


def index_bytes(index: PackIndex, *, seal: Seal) -> bytes:
    """Return the end of a pack: its index and trailer, in a skippable frame."""
    rows = b"".join(_ROW.pack(row.length, row.blocks) for row in index.frames)
    stored = seal.seal(struct.pack("<I", len(index.frames)) + rows + index.ids)
    count = len(index.ids) // DIGEST_BYTES
    trailer = _TRAILER.pack(index.token, hashlib.sha256(stored).digest()[:16], len(stored), count, _MAGIC)
    return SKIPPABLE.pack(SKIPPABLE_MAGIC, len(stored) + len(trailer)) + stored + trailer


class Trailer(NamedTuple):
    """The last 48 bytes of a pack, readable without a key."""

    token: bytes
    check: bytes
    index_length: int
    blocks: int

    @property
    def tail_bytes(self) -> int:
        """Return how many bytes at the end of the pack are index and trailer."""
        return SKIPPABLE.size + self.index_length + TRAILER_BYTES


def read_trailer(tail: bytes, *, name: str) -> Trailer:
    """Read the trailer at the end of a pack's last bytes. Raises VerificationError."""
    if len(tail) < TRAILER_BYTES:
        raise damaged(name, what="it is too short to be a pack")
    token, check, length, blocks, magic = _TRAILER.unpack(tail[-TRAILER_BYTES:])
    if magic != _MAGIC:
        raise damaged(name, what="it does not end as a pack does")
    return Trailer(token=token, check=check, index_length=length, blocks=blocks)


def read_index(tail: bytes, *, size_bytes: int, seal: Seal, name: str) -> PackIndex:
    """Read a pack's index from its last bytes, at least ``tail_bytes`` of its trailer. Raises VerificationError."""
    trailer = read_trailer(tail, name=name)
    if not trailer.tail_bytes <= min(len(tail), size_bytes):
        raise damaged(name, what="its index does not fit into it")
    begin = len(tail) - trailer.tail_bytes + SKIPPABLE.size
    stored = tail[begin : begin + trailer.index_length]
    if hashlib.sha256(stored).digest()[:16] != trailer.check:
        raise damaged(name, what="its index is not what its trailer says")
    plain = seal.unseal(stored, name=name)
    count = struct.unpack_from("<I", plain)[0] if len(plain) >= 4 else 0
    end_of_rows = 4 + count * _ROW.size
    if len(plain) != end_of_rows + trailer.blocks * DIGEST_BYTES:
        raise damaged(name, what="its index has another length than its trailer says")
    rows, offset = [], 0
    for length, blocks in _ROW.iter_unpack(plain[4:end_of_rows]):
        rows.append(FrameRow(offset=offset, length=length, blocks=blocks))
        offset += length
    if offset != size_bytes - trailer.tail_bytes or sum(row.blocks for row in rows) != trailer.blocks:
        raise damaged(name, what="its frames are not those of its index")
    return PackIndex(token=trailer.token, frames=tuple(rows), ids=plain[end_of_rows:])
