"""Maps: a root for each disk lists leaves, a leaf says which blocks a stretch of the disk has and where they lie.

A map is a skippable frame with a tag and the upload's token, then one zstd frame (sealed where the repository is keyed).
``docs/packs.md`` gives the layout. Nothing here reads or writes an object.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vmsnap.stores.blocks import BLOCK_BYTES, DIGEST_BYTES, HOLE, block_count
from vmsnap.stores.packs.frames import Place, compress, decompress
from vmsnap.stores.packs.names import damaged
from vmsnap.stores.packs.packfile import SKIPPABLE, SKIPPABLE_MAGIC, TOKEN_BYTES
from vmsnap.stores.packs.seals import Seal

LEAF_BLOCKS = 2048
"""Blocks of a leaf: 128 MiB of a disk."""
LEAF_TAG = b"vmsnapL1"
ROOT_TAG = b"vmsnapR1"
MOVES_TAG = b"vmsnapV1"
MAP_HEAD_BYTES = SKIPPABLE.size + 8 + TOKEN_BYTES

_COLUMNS = 4
_LEAF_HEAD = struct.Struct("<II")
_ROOT_HEAD = struct.Struct("<QII")
_MOST_BYTES = 64 * 1024 * 1024


class StoredMap(NamedTuple):
    """A map as stored, and its digest."""

    digest: bytes
    data: bytes


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """Blocks and their places. ``ids``: 32 bytes each, zeroes for a hole.

    ``columns`` are the pack's number in ``packs``, the offset, the length and the slot of each block, one column after
    another, zeroes for holes.
    """

    ids: bytes
    packs: tuple[bytes, ...]
    columns: array[int]

    def __len__(self) -> int:
        return len(self.ids) // DIGEST_BYTES

    def identity(self, number: int) -> bytes:
        """Return a block's id."""
        return self.ids[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]

    def place(self, number: int) -> Place | None:
        """Return a block's place; None for a hole."""
        if self.identity(number) == HOLE:
            return None
        count, columns = len(self), self.columns
        return Place(
            pack=self.packs[columns[number]],
            offset=columns[count + number],
            length=columns[2 * count + number],
            slot=columns[3 * count + number],
        )

    def places(self) -> Iterator[tuple[bytes, Place]]:
        """Yield id and place of every block that is no hole, in order."""
        for number in range(len(self)):
            place = self.place(number)
            if place is not None:
                yield self.identity(number), place


@dataclass(frozen=True, kw_only=True)
class Root:
    """The leaves of one disk, in order; ``HOLE`` stands for a leaf that is all holes."""

    size_bytes: int
    leaves: tuple[bytes, ...]


def leaf_of(ids: bytes, *, places: Sequence[Place | None]) -> Leaf:
    """Return the leaf of blocks with these ids at these places; None for holes."""
    numbers: dict[bytes, int] = {}
    columns = array("I", bytes(4 * _COLUMNS * len(places)))
    count = len(places)
    for number, place in enumerate(places):
        if place is not None:
            columns[number] = numbers.setdefault(place.pack, len(numbers))
            columns[count + number] = place.offset
            columns[2 * count + number] = place.length
            columns[3 * count + number] = place.slot
    return Leaf(ids=ids, packs=tuple(numbers), columns=columns)


def encode_leaf(leaf: Leaf, *, seal: Seal, token: bytes, tag: bytes = LEAF_TAG) -> StoredMap:
    """Return a leaf as stored. With ``MOVES_TAG``: where the blocks of a pack are that was rewritten."""
    head = _LEAF_HEAD.pack(len(leaf), len(leaf.packs))
    return _encode(head + b"".join(leaf.packs) + leaf.ids + _little(leaf.columns), seal=seal, token=token, tag=tag)


def decode_leaf(data: bytes, *, seal: Seal, name: str, tag: bytes = LEAF_TAG) -> Leaf:
    """Read a leaf. The caller has compared the digest with the name. Raises VerificationError."""
    plain = _decode(data, seal=seal, name=name, tag=tag)
    if len(plain) < _LEAF_HEAD.size:
        raise damaged(name, what="it is too short to be a leaf")
    count, packs = _LEAF_HEAD.unpack_from(plain)
    ids = _LEAF_HEAD.size + packs * DIGEST_BYTES
    places = ids + count * DIGEST_BYTES
    if len(plain) != places + 4 * _COLUMNS * count:
        raise damaged(name, what="it has another length than its head says")
    columns = array("I", plain[places:])
    if sys.byteorder == "big":
        columns.byteswap()
    if count and max(columns[:count]) >= max(packs, 1):
        raise damaged(name, what="it speaks of a pack that it does not name")
    names = tuple(plain[at : at + DIGEST_BYTES] for at in range(_LEAF_HEAD.size, ids, DIGEST_BYTES))
    return Leaf(ids=plain[ids:places], packs=names, columns=columns)


def encode_root(root: Root, *, seal: Seal, token: bytes) -> StoredMap:
    """Return a root as stored."""
    head = _ROOT_HEAD.pack(root.size_bytes, LEAF_BLOCKS, len(root.leaves))
    return _encode(head + b"".join(root.leaves), seal=seal, token=token, tag=ROOT_TAG)


def decode_root(data: bytes, *, seal: Seal, name: str) -> Root:
    """Read a root. The caller has compared the digest with the name. Raises VerificationError."""
    plain = _decode(data, seal=seal, name=name, tag=ROOT_TAG)
    if len(plain) < _ROOT_HEAD.size:
        raise damaged(name, what="it is too short to be a root")
    size_bytes, leaf_blocks, count = _ROOT_HEAD.unpack_from(plain)
    if leaf_blocks != LEAF_BLOCKS or count != leaf_count(size_bytes):
        raise damaged(name, what=f"{count} leaves of {leaf_blocks} blocks do not make a disk of {size_bytes} bytes")
    if len(plain) != _ROOT_HEAD.size + count * DIGEST_BYTES:
        raise damaged(name, what="it has another length than its head says")
    leaves = (plain[at : at + DIGEST_BYTES] for at in range(_ROOT_HEAD.size, len(plain), DIGEST_BYTES))
    return Root(size_bytes=size_bytes, leaves=tuple(leaves))


def leaf_count(size_bytes: int) -> int:
    """Return how many leaves a disk of that size has."""
    return -(-size_bytes // (LEAF_BLOCKS * BLOCK_BYTES))


def leaf_length(size_bytes: int, *, number: int) -> int:
    """Return how many blocks a leaf of a disk of that size has."""
    return min(LEAF_BLOCKS, block_count(size_bytes) - number * LEAF_BLOCKS)


def map_token(head: bytes, *, name: str) -> bytes:
    """Return the token of the upload that wrote a map, from its first 32 bytes; no key is needed."""
    if len(head) < MAP_HEAD_BYTES or SKIPPABLE.unpack_from(head) != (SKIPPABLE_MAGIC, 8 + TOKEN_BYTES):
        raise damaged(name, what="it does not begin as a map does")
    return head[SKIPPABLE.size + 8 : MAP_HEAD_BYTES]


def _encode(plain: bytes, *, seal: Seal, token: bytes, tag: bytes) -> StoredMap:
    data = SKIPPABLE.pack(SKIPPABLE_MAGIC, 8 + TOKEN_BYTES) + tag + token + seal.seal(compress(plain))
    return StoredMap(digest=hashlib.sha256(data).digest(), data=data)


def _decode(data: bytes, *, seal: Seal, name: str, tag: bytes) -> bytes:
    map_token(data, name=name)
    if data[SKIPPABLE.size : SKIPPABLE.size + 8] != tag:
        raise damaged(name, what=f"it is no map of the kind {tag.decode()}")
    plain = seal.unseal(data[MAP_HEAD_BYTES:], name=name)
    return decompress(plain, most_bytes=_MOST_BYTES, name=name)


def _little(columns: array[int]) -> bytes:
    if sys.byteorder == "big":
        columns = columns[:]
        columns.byteswap()
    return columns.tobytes()
