"""Repairing a snapshot of a repository from an intact copy elsewhere.

It is uploaded again, past what is damaged: blocks of bad packs go into new packs, all its maps are written anew, and the
manifest goes in the place of the old one, last and on condition that nobody replaced that meanwhile. Then ``moves`` say where the
blocks of the bad packs are, for all other snapshots that have them. A repair that is cut has changed nothing that is read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeVar

from vmsnap.errors import DriverError, HeldError, ObjectNotFoundError, SnapshotNotFoundError, VerificationError
from vmsnap.model.verification import Checked
from vmsnap.ports.clock import Cancel
from vmsnap.ports.objects import ObjectInfo
from vmsnap.ports.replica import LocalCopy
from vmsnap.ports.store import ByteProgress
from vmsnap.stores.blocks import HOLE
from vmsnap.stores.packs.frames import Place
from vmsnap.stores.packs.index import BlockIndex
from vmsnap.stores.packs.manifests import Absence, decode
from vmsnap.stores.packs.maps import MOVES_TAG, Leaf, decode_leaf, encode_leaf, leaf_of
from vmsnap.stores.packs.names import PACKS, digest_in, move_name, pack_name, snapshot_name
from vmsnap.stores.packs.repository import Repository
from vmsnap.stores.packs.uploading import Damaged, Means, upload

T = TypeVar("T")


def mend(
    repository: Repository,
    *,
    copy: LocalCopy,
    found: Checked,
    means: Means,
    index: BlockIndex,
    progress: ByteProgress,
    cancel: Cancel,
) -> None:
    """Repair what ``found`` names. May be repeated, and cut anywhere.

    Every block of the copy is compared with its digest before it is used. Raises VerificationError where the copy itself is
    damaged, with the repository as it was, and what ``upload`` raises.
    """
    info = _info(repository, copy=copy)
    packs = frozenset(name for name in found.bad if name.startswith(PACKS))
    instead_of = Damaged(version=None if info is None else info.version, packs=packs)
    retain_until = None if info is None else info.retained_until
    how = replace(means, instead_of=instead_of, retain_until=retain_until)
    upload(repository, copy=copy, means=how, index=index, progress=progress, cancel=cancel)
    digests = {digest for name in packs if (digest := digest_in(name)) is not None}
    if not digests:
        return
    needs = _Needs(packs={digest: set() for digest in digests})
    needs.learn(repository, cancel=cancel)
    for pack, needed in sorted(needs.packs.items()):
        moved = _tell_moves(repository, pack=pack, needed=needed, index=index, token=bytes.fromhex(means.upload))
        if needs.complete and needed <= moved:
            # Where it is locked, or cannot be removed now, readers go by the moves just as well.
            with suppress(HeldError, DriverError):
                repository.store.delete(pack_name(pack))


def _info(repository: Repository, *, copy: LocalCopy) -> ObjectInfo | None:
    """Return what is in the manifest's place, None for nothing. Raises SnapshotNotFoundError for a mark: it was removed."""
    manifest = copy.snapshot.manifest
    name = snapshot_name(manifest.guest, snapshot=manifest.id)
    try:
        found = repository.store.get(name)
    except ObjectNotFoundError:
        return None
    version = found.info.version
    try:
        entry = decode(found.data, name=name, version=version, repository=repository.id, seal=repository.seal)
    except VerificationError:
        return found.info
    if isinstance(entry, Absence):
        raise SnapshotNotFoundError(
            f"snapshot {manifest.id} was removed from the replica", remedy="'vmsnap replicate' copies it there again"
        )
    return found.info


@dataclass(kw_only=True)
class _Needs:
    """Which blocks snapshots need of some packs. ``complete``: every manifest and map could be read."""

    packs: dict[bytes, set[bytes]]
    complete: bool = True

    def learn(self, repository: Repository, *, cancel: Cancel) -> None:
        """Read all maps."""
        for leaf in self._leaves(repository):
            cancel.check()
            if not self.packs.keys().isdisjoint(leaf.packs):
                for identity, place in leaf.places():
                    if place.pack in self.packs:
                        self.packs[place.pack].add(identity)

    def _leaves(self, repository: Repository) -> Iterator[Leaf]:
        seen = {HOLE}
        for _, entry in repository.entries():
            if isinstance(entry, VerificationError):
                self.complete = False
                continue
            for root in entry.body.roots:
                found = self._readable(repository.root, root)
                for digest in () if found is None else found.leaves:
                    if digest not in seen:
                        seen.add(digest)
                        leaf = self._readable(repository.leaf, digest)
                        if leaf is not None:
                            yield leaf

    def _readable(self, read: Callable[[bytes], T], digest: bytes) -> T | None:
        try:
            return read(digest)
        except (VerificationError, ObjectNotFoundError):
            self.complete = False
            return None


def _tell_moves(
    repository: Repository, *, pack: bytes, needed: Collection[bytes], index: BlockIndex, token: bytes
) -> set[bytes]:
    """Say where the blocks of a bad pack are now, as far as they are elsewhere; return which."""
    places = dict(_moved(repository, pack=pack))
    places.update(index.find(needed))
    if places:
        ids = sorted(places)
        leaf = leaf_of(b"".join(ids), places=[places[identity] for identity in ids])
        stored = encode_leaf(leaf, seal=repository.seal, token=token, tag=MOVES_TAG)
        repository.store.put(move_name(pack), data=stored.data)
    return set(places)


def _moved(repository: Repository, *, pack: bytes) -> Iterator[tuple[bytes, Place]]:
    name = move_name(pack)
    try:
        data = repository.store.get(name).data
        yield from decode_leaf(data, seal=repository.seal, name=name, tag=MOVES_TAG).places()
    except (ObjectNotFoundError, VerificationError):
        return
