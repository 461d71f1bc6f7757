"""Object Lock: what snapshots need is locked for as long as the snapshots are to stay, and for longer where newer ones need it.

A copy that is locked can be removed by nobody before its time, not even with the host's own keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime, timedelta

from vmsnap.model.ids import SnapshotId
from vmsnap.stores.blocks import HOLE
from vmsnap.stores.packs.manifests import PackedSnapshot
from vmsnap.stores.packs.marking import ahead, read_moves
from vmsnap.stores.packs.names import MOVES, digest_in, map_name, move_name, pack_name
from vmsnap.stores.packs.repository import Repository

_SLACK = timedelta(days=1)
"""A lock that ends less than so much before the time is long enough: otherwise every object would be locked anew each time."""


def retain(
    repository: Repository,
    *,
    snapshots: Iterable[PackedSnapshot],
    until: Mapping[SnapshotId, datetime],
    connections: int,
    check: Callable[[], None],
) -> int:
    """Lock snapshots and everything they need, each at least until its time. Returns how many objects were locked for longer.

    May be repeated, and cut anywhere. Manifests come last: one that is locked has its blocks locked.
    """
    moved = {digest for info in repository.store.list(MOVES) if (digest := digest_in(info.name)) is not None}
    seen: set[str] = set()
    renewed = 0
    wanted = [one for one in snapshots if one.id in until]
    # What several need is met first with the latest time.
    for snapshot in sorted(wanted, key=lambda one: until[one.id], reverse=True):
        names = (name for name in _needed(repository, snapshot=snapshot, moved=moved) if name not in seen)
        renewed += _extend(
            repository, names=_once(names, seen), until=until[snapshot.id], connections=connections, check=check
        )
        renewed += _extend(
            repository, names=[snapshot.name], until=until[snapshot.id], connections=connections, check=check
        )
    return renewed


def _once(names: Iterable[str], seen: set[str]) -> Iterator[str]:
    for name in names:
        if name not in seen:
            seen.add(name)
            yield name


def _needed(repository: Repository, *, snapshot: PackedSnapshot, moved: set[bytes]) -> Iterator[str]:
    """Yield the names of all packs, moves and maps that a snapshot leads to."""
    for root in snapshot.body.roots:
        for leaf in dict.fromkeys(repository.root(root).leaves):
            if leaf == HOLE:
                continue
            todo = list(repository.leaf(leaf).packs)
            while todo:
                pack = todo.pop()
                moves = read_moves(repository, pack=pack) if pack in moved else None
                if moves is None:
                    yield pack_name(pack)
                else:
                    yield move_name(pack)
                    todo.extend(moves.packs)
            yield map_name(leaf)
        yield map_name(root)


def _extend(
    repository: Repository,
    *,
    names: Iterable[str],
    until: datetime,
    connections: int,
    check: Callable[[], None],
) -> int:
    def one(name: str) -> bool:
        check()
        locked = repository.store.info(name).retained_until
        if locked is not None and locked >= until - _SLACK:
            return False
        repository.store.retain(name, until=until)
        return True

    return sum(ahead(names, task=one, connections=connections))
