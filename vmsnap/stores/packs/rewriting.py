"""Writing what is in use of packs that are mostly garbage into new packs.

Maps are not touched: ``moves/PACK`` says where the blocks of an old pack are now, and readers go by it once the old pack is gone.
The old pack goes in a later pass, as garbage does, and only if all that is in use of it is then told by its move.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime

from vmsnap.errors import HeldError, ObjectConflictError, ObjectNotFoundError, VerificationError
from vmsnap.stores.packs.frames import Frame, Place, block_of, checked, open_frame
from vmsnap.stores.packs.maps import MOVES_TAG, Leaf, encode_leaf, leaf_of
from vmsnap.stores.packs.marking import Marks, ahead, read_moves
from vmsnap.stores.packs.names import digest_in, move_name, pack_name
from vmsnap.stores.packs.packfile import TOKEN_BYTES, Pack, PackBuilder, PackIndex
from vmsnap.stores.packs.repository import Repository
from vmsnap.stores.packs.uploading import load_index

_LITTLE = 0.5


@dataclass(frozen=True, kw_only=True)
class Rewriting:
    """How to rewrite. ``most_bytes``: so much is written at most. ``leave``: packs that have a tombstone already.

    ``sure`` raises where the lease is not held at this very moment.
    """

    most_bytes: int
    hold: Callable[[], None]
    sure: Callable[[], None]
    connections: int = 1
    leave: Collection[str] = ()
    now: datetime


def rewrite(repository: Repository, *, marks: Marks, sizes: Mapping[str, int], work: Rewriting) -> tuple[str, ...]:
    """Write packs anew of which less than half is in use. Returns the names of the old ones, which nobody needs any more.

    May be cut anywhere: new packs that no move speaks of are garbage. Damaged packs are left alone.
    """
    chosen = _chosen(repository, marks=marks, sizes=sizes, work=work)
    if not chosen:
        return ()
    needed = in_use(repository, marks=marks, packs=chosen, connections=work.connections, hold=work.hold)
    writer = _Writer(repository, work=work)
    copied = [pack for pack in chosen if writer.copy(pack, needed=needed[pack], size_bytes=sizes[pack_name(pack)])]
    writer.flush()
    return tuple(pack_name(pack) for pack in copied if writer.tell(pack))


def in_use(
    repository: Repository, *, marks: Marks, packs: Collection[bytes], connections: int, hold: Callable[[], None]
) -> dict[bytes, dict[bytes, Place]]:
    """Return the blocks of some packs that maps and moves speak of, by id. Reads all maps again."""
    found: dict[bytes, dict[bytes, Place]] = {pack: {} for pack in packs}
    for leaf in _leaves(repository, marks=marks, connections=connections):
        hold()
        if found.keys().isdisjoint(leaf.packs):
            continue
        for identity, place in leaf.places():
            if place.pack in found:
                found[place.pack][identity] = place
    return found


def moved_whole(
    repository: Repository,
    *,
    pack: str,
    needed: Mapping[bytes, Place],
    there: Collection[str],
    condemned: Collection[str],
) -> bool:
    """Tell whether everything in use of an old pack is in packs that are there, and stay."""
    digest = digest_in(pack)
    moves = None if digest is None else read_moves(repository, pack=digest)
    if moves is None:
        return False
    targets = {pack_name(target) for target in moves.packs}
    told = {identity for identity, _ in moves.places()}
    return targets <= set(there) and targets.isdisjoint(condemned) and needed.keys() <= told


def _leaves(repository: Repository, *, marks: Marks, connections: int) -> Iterator[Leaf]:
    yield from ahead(sorted(marks.leaves), task=repository.leaf, connections=connections)
    for pack in sorted(marks.moves):
        leaf = read_moves(repository, pack=pack)
        if leaf is not None:
            yield leaf


def _chosen(repository: Repository, *, marks: Marks, sizes: Mapping[str, int], work: Rewriting) -> tuple[bytes, ...]:
    """Return the packs to rewrite, those with the least in use first."""
    shares = []
    for pack, use in marks.packs.items():
        size = sizes.get(pack_name(pack))
        left = pack in marks.moves or pack_name(pack) in work.leave
        if use is not None and size is not None and not left and use.frame_bytes < _LITTLE * size:
            shares.append((use.frame_bytes / size, pack, use.frame_bytes))
    chosen, planned = [], 0
    for _, pack, live in sorted(shares):
        work.hold()
        if planned + live > work.most_bytes:
            break
        try:
            until = repository.store.info(pack_name(pack)).retained_until
        except ObjectNotFoundError:
            continue
        if (
            until is None or until <= work.now
        ):  # a locked one: it could not go, and its blocks would only be there twice
            chosen.append(pack)
            planned += live
    return tuple(chosen)


class _Writer:
    """Copies frames, as they are, into new packs."""

    def __init__(self, repository: Repository, *, work: Rewriting) -> None:
        self._repository = repository
        self._work = work
        self._token = secrets.token_bytes(TOKEN_BYTES)
        self._builder = self._new()
        self._places: dict[bytes, Place] = {}
        self._blocks: dict[bytes, tuple[bytes, ...]] = {}

    def copy(self, pack: bytes, *, needed: Mapping[bytes, Place], size_bytes: int) -> bool:
        """Copy the frames of a pack that hold what is needed of it. Returns False, with none copied, where it is damaged."""
        try:
            index = load_index(self._repository, pack=pack, size_bytes=size_bytes)
            frames = list(self._frames(pack, index=index, needed=needed))
        except (VerificationError, ObjectNotFoundError):
            return False
        copied: list[bytes] = []
        for frame in frames:
            self._builder.add(frame)
            copied.extend(frame.ids)
            if self._builder.is_full:
                self.flush()
        self._blocks[pack] = tuple(dict.fromkeys(copied))
        return needed.keys() <= set(copied)

    def flush(self) -> None:
        """Store what was copied so far."""
        if self._builder.is_empty:
            return
        pack: Pack = self._builder.finish()
        self._builder = self._new()
        self._work.hold()
        self._repository.store.put(pack.name, data=pack.data)
        self._places.update(pack.index.places(pack.digest))

    def tell(self, pack: bytes) -> bool:
        """Say where the blocks of an old pack are now. Returns False where another collector has."""
        ids = self._blocks[pack]
        leaf = leaf_of(b"".join(ids), places=[self._places[identity] for identity in ids])
        data = encode_leaf(leaf, seal=self._repository.seal, token=self._token, tag=MOVES_TAG).data
        self._work.sure()
        try:
            self._repository.store.put_new(move_name(pack), data=data)
        except (ObjectConflictError, HeldError):
            return False
        return True

    def _new(self) -> PackBuilder:
        return PackBuilder(seal=self._repository.seal, token=self._token)

    def _frames(self, pack: bytes, *, index: PackIndex, needed: Mapping[bytes, Place]) -> Iterator[Frame]:
        wanted = {place.offset for place in needed.values()}
        name, number = pack_name(pack), 0
        for row in index.frames:
            ids = tuple(index.ids[32 * at : 32 * at + 32] for at in range(number, number + row.blocks))
            number += row.blocks
            if row.offset not in wanted:
                continue
            self._work.hold()
            data = self._repository.store.get_range(name, offset=row.offset, length=row.length)
            blocks = open_frame(data, seal=self._repository.seal, name=name)
            for slot, identity in enumerate(ids):
                checked(block_of(blocks, slot=slot), identity=identity, seal=self._repository.seal, name=name)
            yield Frame(data=data, ids=ids)
