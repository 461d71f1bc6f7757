"""What is in use: every map, pack and move that a manifest leads to.

Uploads are looked for before manifests: one that publishes meanwhile is then seen as open, or by its manifest, or as both.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from vmsnap.errors import ObjectNotFoundError, VerificationError
from vmsnap.model.ids import SnapshotId
from vmsnap.stores.blocks import HOLE
from vmsnap.stores.packs.intents import IntentRecord, intents
from vmsnap.stores.packs.maps import MOVES_TAG, Leaf, decode_leaf
from vmsnap.stores.packs.names import MAPS, MOVES, PACKS, digest_in, map_name, move_name
from vmsnap.stores.packs.repository import Repository

S = TypeVar("S")
T = TypeVar("T")
_MOST_COUNTED_PACKS = 400_000
"""Of more packs it is not counted how much of each is in use, and none is rewritten: memory has its bounds."""
_SLOTS = 1021


@dataclass(kw_only=True, slots=True)
class Use:
    """How much of a pack is in use, at most. Two frames may look like one: it is a guess, to be made sure of."""

    frames: int = 0
    frame_bytes: int = 0

    def add(self, *, offset: int, length: int) -> None:
        """Count a frame, once."""
        bit = 1 << (offset % _SLOTS)
        if not self.frames & bit:
            self.frames |= bit
            self.frame_bytes += length


@dataclass(kw_only=True)
class Marks:
    """What is in use. ``uploads`` are open; ``snapshots`` have a manifest. ``leaves`` are among ``maps``."""

    uploads: dict[str, IntentRecord] = field(default_factory=dict)
    snapshots: set[SnapshotId] = field(default_factory=set)
    maps: set[bytes] = field(default_factory=set)
    leaves: set[bytes] = field(default_factory=set)
    packs: dict[bytes, Use | None] = field(default_factory=dict)
    moves: set[bytes] = field(default_factory=set)

    def holds(self, name: str) -> bool:
        """Tell whether an object is in use."""
        digest = digest_in(name)
        if digest is None:
            return True  # whatever it is, it is not for a collector to judge
        if name.startswith(PACKS):
            return digest in self.packs
        if name.startswith(MAPS):
            return digest in self.maps
        return not name.startswith(MOVES) or digest in self.moves


@dataclass(frozen=True, kw_only=True)
class Marking:
    """How to mark. ``hold`` is called often, and raises where the work must end; ``connections`` reads go on at a time."""

    connections: int = 1
    hold: Callable[[], None]
    note: Callable[[str], None] = lambda _: None


def mark(repository: Repository, *, how: Marking) -> Marks:
    """Find what is in use. Changes nothing.

    Raises VerificationError where a manifest or a map cannot be read: then nobody can say what it needs.
    """
    marks = Marks()
    for record in intents(repository.store):
        marks.uploads[record.upload] = record
    roots: dict[bytes, None] = {}
    for name, entry in repository.entries():
        how.hold()
        if isinstance(entry, VerificationError):
            raise VerificationError(
                f"garbage cannot be told from what is needed: {entry.brief}",
                details=name,
                remedy="run 'vmsnap verify --replica --repair', then collect again",
            ) from entry
        marks.snapshots.add(entry.id)
        roots.update(dict.fromkeys(entry.body.roots))
    leaves: dict[bytes, None] = {}
    for digest, found in ahead(roots, task=lambda one: (one, repository.root(one)), connections=how.connections):
        how.hold()
        marks.maps.add(digest)
        leaves.update(dict.fromkeys(leaf for leaf in found.leaves if leaf != HOLE))
    how.note(f"{len(marks.snapshots)} snapshots lead to {len(leaves)} maps")
    for digest, leaf in ahead(leaves, task=lambda one: (one, _leaf(repository, one)), connections=how.connections):
        how.hold()
        marks.maps.add(digest)
        marks.leaves.add(digest)
        _count(marks, leaf)
    _follow_moves(repository, marks=marks, how=how)
    return marks


def _leaf(repository: Repository, digest: bytes) -> Leaf:
    try:
        return repository.leaf(digest)
    except ObjectNotFoundError as error:
        raise VerificationError(
            f"garbage cannot be told from what is needed: the map {map_name(digest)} is missing",
            remedy="run 'vmsnap verify --replica --repair', then collect again",
        ) from error


def _count(marks: Marks, leaf: Leaf) -> None:
    for pack in leaf.packs:
        marks.packs.setdefault(pack, Use() if len(marks.packs) < _MOST_COUNTED_PACKS else None)
    uses = [marks.packs[pack] for pack in leaf.packs]
    count, columns = len(leaf), leaf.columns
    rows = set(zip(columns[:count], columns[count : 2 * count], columns[2 * count : 3 * count], strict=True))
    for number, offset, length in rows:
        use = uses[number] if length else None  # holes have zeroes everywhere
        if use is not None:
            use.add(offset=offset, length=length)


def _follow_moves(repository: Repository, *, marks: Marks, how: Marking) -> None:
    """Mark where the blocks of rewritten packs are now, and where those are if they were rewritten again."""
    there = {digest for info in repository.store.list(MOVES) if (digest := digest_in(info.name)) is not None}
    todo = deque(there & marks.packs.keys())
    while todo:
        how.hold()
        pack = todo.popleft()
        if pack in marks.moves:
            continue
        leaf = read_moves(repository, pack=pack)
        if leaf is None:
            continue
        marks.moves.add(pack)
        _count(marks, leaf)
        todo.extend(target for target in leaf.packs if target in there)


def read_moves(repository: Repository, *, pack: bytes) -> Leaf | None:
    """Read where the blocks of a rewritten pack are now; None where it was not rewritten. Raises VerificationError."""
    name = move_name(pack)
    try:
        data = repository.store.get(name).data
    except ObjectNotFoundError:
        return None
    return decode_leaf(data, seal=repository.seal, name=name, tag=MOVES_TAG)


def ahead(items: Iterable[S], *, task: Callable[[S], T], connections: int) -> Iterator[T]:
    """Yield what ``task`` returns for each item, in order; up to ``connections`` at a time, in threads where it is not 1."""
    if connections == 1:
        yield from map(task, items)
        return
    with ThreadPoolExecutor(connections, thread_name_prefix="mark") as pool:
        todo: deque[Future[T]] = deque()
        try:
            for item in items:
                todo.append(pool.submit(task, item))
                if len(todo) > 2 * connections:
                    yield todo.popleft().result()
            while todo:
                yield todo.popleft().result()
        finally:
            for future in todo:
                future.cancel()
