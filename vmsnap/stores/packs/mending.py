"""Repairing a snapshot of a repository from an intact copy elsewhere.

It is uploaded again, past what is damaged: blocks of bad packs go into new packs, all its maps are written anew, and the
manifest goes in the place of the old one, last and on condition that nobody replaced that meanwhile. Then ``moves`` say where the
blocks of the bad packs are, for all other snapshots that have them. A repair that is cut has changed nothing that is read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

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
    needed = _needed(repository, packs=digests, cancel=cancel)
    for pack in sorted(digests):
        _tell_moves(repository, pack=pack, needed=needed[pack], index=index, token=bytes.fromhex(means.upload))


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


def _needed(repository: Repository, *, packs: Collection[bytes], cancel: Cancel) -> dict[bytes, set[bytes]]:
    """Return the ids of the blocks that snapshots need of some packs. Maps that cannot be read are left out."""
    needed: dict[bytes, set[bytes]] = {pack: set() for pack in packs}
    for leaf in _leaves(repository):
        cancel.check()
        if not needed.keys().isdisjoint(leaf.packs):
            for identity, place in leaf.places():
                if place.pack in needed:
                    needed[place.pack].add(identity)
    return needed


def _leaves(repository: Repository) -> Iterator[Leaf]:
    seen = {HOLE}
    for _, entry in repository.entries():
        if isinstance(entry, VerificationError):
            continue
        for root in entry.body.roots:
            try:
                leaves = repository.root(root).leaves
            except (VerificationError, ObjectNotFoundError):
                continue
            for digest in leaves:
                if digest in seen:
                    continue
                seen.add(digest)
                try:
                    yield repository.leaf(digest)
                except (VerificationError, ObjectNotFoundError):
                    continue


def _tell_moves(
    repository: Repository, *, pack: bytes, needed: Collection[bytes], index: BlockIndex, token: bytes
) -> None:
    """Say where the blocks of a bad pack are now; remove it where all that is needed of it is elsewhere."""
    places = dict(_moved(repository, pack=pack))
    places.update(index.find(needed))
    if not places:
        return
    ids = sorted(places)
    leaf = leaf_of(b"".join(ids), places=[places[identity] for identity in ids])
    stored = encode_leaf(leaf, seal=repository.seal, token=token, tag=MOVES_TAG)
    repository.store.put(move_name(pack), data=stored.data)
    if set(needed) <= places.keys():
        try:
            repository.store.delete(pack_name(pack))
        except (HeldError, DriverError):
            return  # readers go by the moves where it is damaged, too


def _moved(repository: Repository, *, pack: bytes) -> Iterator[tuple[bytes, Place]]:
    name = move_name(pack)
    try:
        data = repository.store.get(name).data
        yield from decode_leaf(data, seal=repository.seal, name=name, tag=MOVES_TAG).places()
    except (ObjectNotFoundError, VerificationError):
        return
