"""Reading disks out of packs: where their blocks lie, and the blocks themselves, each compared with its id."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from vmsnap.errors import DriverError, ObjectNotFoundError, VerificationError
from vmsnap.stores.blocks import BLOCK_BYTES, HOLE, block_count
from vmsnap.stores.packs.frames import Place, block_of, checked, open_frame
from vmsnap.stores.packs.maps import LEAF_BLOCKS, MOVES_TAG, Leaf, Root, decode_leaf, leaf_length
from vmsnap.stores.packs.names import damaged, map_name, move_name, pack_name
from vmsnap.stores.packs.repository import Repository

_LEAVES_KEPT = 16
_GAP_BYTES = 64 * 1024
_MOST_FETCH_BYTES = 4 * 1024 * 1024


class Wanted(NamedTuple):
    """A block to read: its number on the disk, its id and where it lies."""

    number: int
    identity: bytes
    place: Place


class Fetch(NamedTuple):
    """One ranged read of a pack, and the blocks to take out of it."""

    pack: bytes
    offset: int
    length: int
    blocks: tuple[Wanted, ...]


@dataclass(kw_only=True)
class PackReader:
    """Reads blocks out of a repository's packs. Safe to use from several threads."""

    repository: Repository
    _moves: dict[bytes, Leaf | None] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def fetch(self, fetch: Fetch) -> Iterator[tuple[Wanted, memoryview, bytes]]:
        """Read the blocks of one fetch, each compared with its id; with each comes the SHA-256 of its bytes.

        A pack that was rewritten is followed to where its blocks are now, be it gone or damaged. Raises VerificationError,
        StoreUnreachableError.
        """
        done = 0
        try:
            for found in self._here(fetch):
                done += 1
                yield found
        except (VerificationError, DriverError) as error:
            if error.transient:
                raise
            yield from self._moved(fetch, done=done, error=error)

    def _here(self, fetch: Fetch) -> Iterator[tuple[Wanted, memoryview, bytes]]:
        name, seal = pack_name(fetch.pack), self.repository.seal
        data = self.repository.store.get_range(name, offset=fetch.offset, length=fetch.length)
        opened: tuple[tuple[int, int], bytes] | None = None
        for wanted in fetch.blocks:
            frame = (wanted.place.offset, wanted.place.length)
            if opened is None or opened[0] != frame:
                start = frame[0] - fetch.offset
                opened = (frame, open_frame(data[start : start + frame[1]], seal=seal, name=name))
            block = block_of(opened[1], slot=wanted.place.slot)
            yield wanted, block, checked(block, identity=wanted.identity, seal=seal, name=name)

    def _moved(
        self, fetch: Fetch, *, done: int, error: VerificationError | DriverError
    ) -> Iterator[tuple[Wanted, memoryview, bytes]]:
        """Read from where they are now the blocks of a fetch that were not ``done`` when it failed."""
        moves = self._moves_of(fetch.pack)
        missing = isinstance(error, ObjectNotFoundError)
        if moves is None:
            raise damaged(pack_name(fetch.pack), what="it is missing") if missing else error
        places = dict(moves.places())
        again = []
        for wanted in fetch.blocks[done:]:
            place = places.get(wanted.identity)
            if place is None and not missing:
                raise error
            if place is None:
                raise damaged(
                    pack_name(fetch.pack), what=f"it was rewritten without block {wanted.identity.hex()}"
                ) from error
            again.append(Wanted(number=wanted.number, identity=wanted.identity, place=place))
        for part in fetches(again):
            yield from self.fetch(part)

    def _moves_of(self, pack: bytes) -> Leaf | None:
        with self._lock:
            if pack in self._moves:
                return self._moves[pack]
        name = move_name(pack)
        try:
            data = self.repository.store.get(name).data
        except ObjectNotFoundError:
            return None
        moves = decode_leaf(data, seal=self.repository.seal, name=name, tag=MOVES_TAG)
        with self._lock:
            self._moves[pack] = moves
        return moves


def fetches(blocks: Iterable[Wanted], *, gap_bytes: int = _GAP_BYTES) -> tuple[Fetch, ...]:
    """Return the ranged reads that bring blocks: near frames of a pack in one read, in the order of packs and offsets."""
    found: list[Fetch] = []
    pending: list[Wanted] = []
    end = 0
    for wanted in sorted(blocks, key=lambda one: (one.place.pack, one.place.offset, one.place.slot)):
        place = wanted.place
        if pending:
            first = pending[0].place
            near = place.pack == first.pack and place.offset <= end + gap_bytes
            if not near or place.offset + place.length - first.offset > _MOST_FETCH_BYTES:
                found.append(_fetch(pending, end=end))
                pending, end = [], 0
        pending.append(wanted)
        end = max(end, place.offset + place.length)
    if pending:
        found.append(_fetch(pending, end=end))
    return tuple(found)


def _fetch(blocks: Sequence[Wanted], *, end: int) -> Fetch:
    first = blocks[0].place
    return Fetch(pack=first.pack, offset=first.offset, length=end - first.offset, blocks=tuple(blocks))


class PackedDisk:
    """One disk of a snapshot in a repository. Safe to use from several threads.

    The root is read at once, leaves when they are needed; a few of them are kept.
    """

    def __init__(
        self, repository: Repository, *, root: bytes, size_bytes: int, reader: PackReader | None = None
    ) -> None:
        self._repository = repository
        self._root_digest = root
        self._size_bytes = size_bytes
        self.reader = reader or PackReader(repository=repository)
        self._root: Root | None = None
        self._leaves: OrderedDict[int, Leaf | None] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def size_bytes(self) -> int:
        """Return the disk's size."""
        return self._size_bytes

    def root(self) -> Root:
        """Return the disk's root map. Raises VerificationError where it is of a disk of another size."""
        if self._root is None:
            root = self._repository.root(self._root_digest)
            if root.size_bytes != self._size_bytes:
                raise damaged(
                    map_name(self._root_digest),
                    what=f"it is of a disk of {root.size_bytes} bytes, the manifest says {self._size_bytes}",
                )
            self._root = root
        return self._root

    def leaf(self, number: int) -> Leaf | None:
        """Return a leaf map; None where all its blocks are holes. Raises VerificationError."""
        with self._lock:
            if number in self._leaves:
                self._leaves.move_to_end(number)
                return self._leaves[number]
        digest = self.root().leaves[number]
        leaf = None if digest == HOLE else self._repository.leaf(digest)
        if leaf is not None and len(leaf) != leaf_length(self._size_bytes, number=number):
            raise damaged(map_name(digest), what=f"it has {len(leaf)} blocks, not those of its place on the disk")
        with self._lock:
            self._leaves[number] = leaf
            while len(self._leaves) > _LEAVES_KEPT:
                self._leaves.popitem(last=False)
        return leaf

    def places(self, first: int, count: int) -> tuple[Wanted | None, ...]:
        """Return where blocks ``first`` to ``first + count - 1`` lie, with their ids; None for a hole."""
        found: list[Wanted | None] = []
        for number in range(first, min(first + count, block_count(self._size_bytes))):
            leaf = self.leaf(number // LEAF_BLOCKS)
            place = None if leaf is None else leaf.place(number % LEAF_BLOCKS)
            if leaf is None or place is None:
                found.append(None)
            else:
                identity = leaf.identity(number % LEAF_BLOCKS)
                found.append(Wanted(number=number, identity=identity, place=place))
        return tuple(found)

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes of the disk, fewer where it ends before. Raises VerificationError, StoreUnreachableError."""
        end = min(offset + length, self._size_bytes)
        if offset < 0 or end <= offset:
            return b""
        first = offset // BLOCK_BYTES
        wanted = self.places(first, block_count(end) - first)
        data = bytearray(len(wanted) * BLOCK_BYTES)
        for fetch in fetches(one for one in wanted if one is not None):
            for one, block, _ in self.reader.fetch(fetch):
                start = (one.number - first) * BLOCK_BYTES
                data[start : start + len(block)] = block
        return bytes(data[offset - first * BLOCK_BYTES : end - first * BLOCK_BYTES])
