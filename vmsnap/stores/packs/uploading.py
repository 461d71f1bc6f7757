"""Uploading one snapshot: blocks that the repository lacks into packs, then maps, then the manifest.

The order of what is written is the whole safety of the repository; ``docs/packs.md`` says why it is this one.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from datetime import datetime

from vmsnap.errors import DriverError, ObjectConflictError, ObjectNotFoundError, VerificationError
from vmsnap.model.manifest import Manifest
from vmsnap.ports.clock import Cancel
from vmsnap.ports.objects import ObjectStore
from vmsnap.ports.replica import LocalCopy, Sent
from vmsnap.ports.store import ByteProgress
from vmsnap.stores.blocks import BLOCK_BYTES, HOLE
from vmsnap.stores.packs import intents
from vmsnap.stores.packs.frames import Frame
from vmsnap.stores.packs.heartbeat import Heartbeat, taken_for_dead
from vmsnap.stores.packs.index import BlockIndex, ids_in
from vmsnap.stores.packs.manifests import Absence, Body, PackedSnapshot, StoredDisk, StoredFile, encode_snapshot
from vmsnap.stores.packs.maps import LEAF_BLOCKS, Root, encode_leaf, encode_root, leaf_count, leaf_of
from vmsnap.stores.packs.names import PACKS, digest_in, map_name, pack_name, snapshot_name
from vmsnap.stores.packs.packfile import PackIndex, read_index, read_trailer
from vmsnap.stores.packs.packing import Packer
from vmsnap.stores.packs.repository import Repository
from vmsnap.stores.packs.sources import BATCH_BLOCKS, Source, open_bytes, open_disk

_LOG = logging.getLogger(__name__)
_FIRST_TAIL_BYTES = 64 * 1024
_HOLES = HOLE * LEAF_BLOCKS


@dataclass(frozen=True, kw_only=True)
class Means:
    """How to upload. ``upload`` is the token; the same again continues where a dead process stopped.

    ``instead_of``: the snapshot is there, damaged, and is written anew in its place; its maps are not used, and nor are the
    packs that are known to be damaged.
    """

    upload: str
    host: str
    connections: int = 4
    retain_until: datetime | None = None
    instead_of: Damaged | None = None
    now: Callable[[], datetime]


@dataclass(frozen=True, kw_only=True)
class Damaged:
    """A snapshot to write anew: the version of its manifest's object, None for a lost one, and the names of bad packs."""

    version: str | None
    packs: frozenset[str]


def upload(
    repository: Repository,
    *,
    copy: LocalCopy,
    means: Means,
    index: BlockIndex,
    progress: ByteProgress,
    cancel: Cancel,
) -> Sent:
    """Upload a snapshot. May be repeated, with the same token, until it returns; finished packs are not repeated.

    Raises VerificationError for local data that is damaged, CancelledError, what the object store raises, and DriverError
    where a collector took the upload for dead, which is then to be begun again with another token. OSError for local files.
    """
    manifest = copy.snapshot.manifest
    name = snapshot_name(manifest.guest, snapshot=manifest.id)
    anew = means.instead_of
    before = repository.versioned_entry(name) if anew is None else None
    over = anew.version if anew is not None else None if before is None else before[1]
    total = sum(disk.size_bytes for disk in manifest.disks)
    if before is not None and isinstance(before[0], PackedSnapshot):
        intents.end(repository.store, upload=means.upload)
        return Sent(logical_bytes=total, stored_bytes=0, there=True)
    if before is not None and isinstance(before[0], Absence) and before[0].upload == means.upload:
        raise taken_for_dead(means.upload)
    record = intents.IntentRecord(
        upload=means.upload,
        guest=manifest.guest,
        snapshot=manifest.id,
        host=means.host,
        since=means.now(),
        renewed=means.now(),
    )
    intent = intents.begin(repository.store, record=record)
    with Heartbeat(repository.store, intent=intent, now=means.now) as heart:
        sending = _Sending(repository, means=means, index=index, token=intent.token, check=_both(cancel, heart))
        with closing(sending):
            sending.learn()
            base = _base(repository, manifest=manifest) if anew is None else None
            body = sending.send(copy, base=base, progress=progress)
            sending.check_presence()
        data = encode_snapshot(
            body, repository=repository.id, upload=means.upload, at=means.now(), seal=repository.seal
        )
        heart.confirm()
        _publish(repository, name=name, data=data, over=over, means=means)
    intents.end(repository.store, upload=means.upload)
    return Sent(logical_bytes=total, stored_bytes=sending.stored_bytes)


def _both(cancel: Cancel, heart: Heartbeat) -> Callable[[], None]:
    def check() -> None:
        cancel.check()
        heart.check()

    return check


def _publish(repository: Repository, *, name: str, data: bytes, over: str | None, means: Means) -> None:
    """Write the manifest where nothing was, or over the mark that was seen before the upload began."""
    store = repository.store
    try:
        if over is None:
            store.put_new(name, data=data, retain_until=means.retain_until)
        else:
            store.replace(name, data=data, version=over)
            if means.retain_until is not None:
                store.retain(name, until=means.retain_until)
    except ObjectConflictError as error:
        # Where the first try's answer was lost, or another host was faster, the snapshot is there.
        if means.instead_of is not None or isinstance(repository.entry(name), Absence | None):
            raise taken_for_dead(means.upload) from error


def _base(repository: Repository, *, manifest: Manifest) -> PackedSnapshot | None:
    """Return a snapshot of the guest in the repository whose maps may be shared: its parent, else the newest before it."""
    if manifest.parent is not None:
        with contextlib.suppress(VerificationError):  # what is damaged there keeps nothing new from being sent
            parent = repository.entry(snapshot_name(manifest.guest, snapshot=manifest.parent))
            if isinstance(parent, PackedSnapshot):
                return parent
    found: PackedSnapshot | None = None
    for _, entry in repository.entries(manifest.guest):
        if isinstance(entry, PackedSnapshot) and entry.body.manifest.ranked < manifest.ranked:
            newer = found is None or found.body.manifest.ranked < entry.body.manifest.ranked
            found = entry if newer else found
    return found


@dataclass(frozen=True, kw_only=True)
class _WaitingLeaf:
    """A leaf whose blocks are not all stored yet. ``batch``: the last batch that it needs."""

    number: int
    ids: bytes
    batch: int


@dataclass(kw_only=True)
class _DiskInHand:
    source: Source
    base: tuple[bytes, ...]
    done: Callable[[int], None]
    leaves: list[bytes] = field(default_factory=list)
    waiting: deque[_WaitingLeaf] = field(default_factory=deque)


class _Sending:
    """One attempt at sending a snapshot's blocks and maps."""

    def __init__(
        self, repository: Repository, *, means: Means, index: BlockIndex, token: bytes, check: Callable[[], None]
    ) -> None:
        self._repository = repository
        self._index = index
        self._means = means
        self._token = token
        self._check = check
        self._packer = Packer(
            repository, index=index, token=token, connections=means.connections, retain_until=means.retain_until
        )
        self._map_puts: deque[Future[object]] = deque()
        self._needed: set[bytes] = set()
        self._shared: set[bytes] = set()
        self._condemned: frozenset[str] = frozenset()
        self._map_bytes = 0

    @property
    def stored_bytes(self) -> int:
        return self._packer.stored_bytes + self._map_bytes

    def close(self) -> None:
        self._packer.close()

    def learn(self) -> None:
        """Bring the index to what may be relied upon: packs that are there, and that no collector has condemned.

        First the tombstones are read, then the packs are listed; the intent was put before both.
        """
        store = self._repository.store
        condemned = self._condemned = intents.condemned(store)
        bad = self._means.instead_of.packs if self._means.instead_of is not None else frozenset()
        sizes: dict[bytes, int] = {}
        for info in store.list(PACKS):
            digest = digest_in(info.name)
            if digest is not None and info.name not in condemned and info.name not in bad:
                sizes[digest] = info.size_bytes
        self._index.forget_others(sizes.keys())

        def load(digest: bytes) -> tuple[bytes, PackIndex | None]:
            self._check()
            try:
                return digest, load_index(self._repository, pack=digest, size_bytes=sizes[digest])
            except ObjectNotFoundError:
                return digest, None
            except VerificationError as error:
                _LOG.warning("%s; nothing is stored in reliance on it", error.brief)
                return digest, None

        for digest, found in self._packer.ahead(self._index.unknown(sizes), task=load):
            if found is not None:
                self._index.add(digest, index=found)

    def send(self, copy: LocalCopy, *, base: PackedSnapshot | None, progress: ByteProgress) -> Body:
        """Send all disks and files, and return what the manifest is to say."""
        roots = {} if base is None else {disk.target: disk.root for disk in base.body.disks}
        manifest = copy.snapshot.manifest
        total, before = sum(disk.size_bytes for disk in manifest.disks), 0
        in_hand: list[_DiskInHand] = []
        files: list[tuple[str, str, _DiskInHand]] = []
        with ExitStack() as stack:
            for disk in copy.disks:
                source = stack.enter_context(open_disk(disk))
                done = _counted(progress, before=before, size_bytes=source.size_bytes, total=total)
                in_hand.append(self._scan(source, root=roots.get(disk.record.target), done=done))
                before += source.size_bytes
            for file in copy.files:
                source = stack.enter_context(open_bytes(file.name, data=file.data))
                sha256 = hashlib.sha256(file.data).hexdigest()
                files.append((file.name, sha256, self._scan(source, root=None, done=lambda _: None)))
            self._packer.flush()
            for one in (*in_hand, *(entry[2] for entry in files)):
                self._write_settled(one)
            digests = [self._root(one) for one in in_hand]
            file_digests = [self._root(entry[2]) for entry in files]
            self._finish_maps(most=0)
        return Body(
            manifest=manifest,
            disks=tuple(
                StoredDisk(target=disk.record.target, root=digest.hex())
                for disk, digest in zip(copy.disks, digests, strict=True)
            ),
            files=tuple(
                StoredFile(name=name, size_bytes=one.source.size_bytes, sha256=sha256, root=digest.hex())
                for (name, sha256, one), digest in zip(files, file_digests, strict=True)
            ),
        )

    def check_presence(self) -> None:
        """Raise DriverError where something that the manifest is to rely upon is not there any more."""
        store = self._repository.store
        missing = {pack_name(digest) for digest in self._needed}
        if missing:
            for info in store.list(PACKS):
                missing.discard(info.name)

        def look(digest: bytes) -> str | None:
            self._check()
            return None if _is_there(store, map_name(digest)) else map_name(digest)

        looks = self._packer.ahead(self._shared, task=look)
        missing.update(name for name in looks if name is not None)
        if missing:
            raise DriverError(
                f"{len(missing)} objects that the snapshot relies upon went away during the upload, {min(missing)} first",
                remedy="does somebody else remove objects of the replica? Run 'vmsnap replicate' again",
            )

    def _scan(self, source: Source, *, root: str | None, done: Callable[[int], None]) -> _DiskInHand:
        """Give all blocks of a disk that the repository lacks to the packer; write the leaves that are settled."""
        base = self._base_leaves(root)
        disk = _DiskInHand(source=source, base=base, done=done)
        for number in range(leaf_count(source.size_bytes)):
            self._check()
            digests = source.digests(number)
            disk.leaves.append(HOLE)
            if digests != _HOLES[: len(digests)]:
                ids = b"".join(map(self._repository.seal.block_id, ids_in(digests)))
                shared = base[number] if number < len(base) else HOLE
                if shared != HOLE and self._index.leaf_ids(shared) == hashlib.sha256(ids).digest():
                    disk.leaves[number] = shared
                    self._shared.add(shared)
                else:
                    batch = self._give_missing(source, number=number, ids=ids)
                    disk.waiting.append(_WaitingLeaf(number=number, ids=ids, batch=batch))
            self._write_settled(disk)
        return disk

    def _base_leaves(self, root: str | None) -> tuple[bytes, ...]:
        """Return the leaves of the disk in the snapshot before, and learn those that this host does not know."""
        if root is None:
            return ()
        try:
            leaves = self._repository.root(bytes.fromhex(root)).leaves
        except (VerificationError, ObjectNotFoundError) as error:
            _LOG.warning("no maps are shared with the snapshot before: %s", error.brief)
            return ()
        unknown = [leaf for leaf in dict.fromkeys(leaves) if leaf != HOLE and self._index.leaf_ids(leaf) is None]

        def read(leaf: bytes) -> tuple[bytes, bytes, bytes] | None:
            self._check()
            try:
                found = self._repository.leaf(leaf)
            except (VerificationError, ObjectNotFoundError) as error:
                _LOG.warning("a map of the snapshot before is not shared: %s", error.brief)
                return None
            return leaf, hashlib.sha256(found.ids).digest(), b"".join(found.packs)

        found = self._packer.ahead(unknown, task=read)
        self._index.remember_leaves(one for one in found if one is not None)
        return tuple(HOLE if self._is_condemned(leaf) else leaf for leaf in leaves)

    def _is_condemned(self, leaf: bytes) -> bool:
        """Tell whether a leaf, or a pack it speaks of, has a tombstone.

        Although the snapshot before needs it: that may be removed at any time, and a collector does not wait for an upload
        that began after the tombstone was put.
        """
        if leaf == HOLE or not self._condemned:
            return False
        if map_name(leaf) in self._condemned:
            return True
        return any(pack_name(pack) in self._condemned for pack in self._index.leaf_packs(leaf))

    def _give_missing(self, source: Source, *, number: int, ids: bytes) -> int:
        """Give the blocks of a leaf that are nowhere yet; return the batch after which all of them are."""
        listed = list(ids_in(ids))
        unknown = {one for one in listed if one != HOLE and not self._packer.is_pending(one)}
        missing = unknown.difference(self._index.find(unknown))
        blocks: list[int] = []
        for block, identity in enumerate(listed):
            if identity in missing:
                missing.discard(identity)
                blocks.append(block)
        for start in range(0, len(blocks), BATCH_BLOCKS):
            part = blocks[start : start + BATCH_BLOCKS]
            part_ids = [listed[block] for block in part]
            on_disk = [number * LEAF_BLOCKS + block for block in part]
            self._packer.add(part_ids, make=_maker(source, on_disk, part_ids, self._repository))
        return self._packer.given

    def _write_settled(self, disk: _DiskInHand) -> None:
        """Write the leaves whose blocks are all in stored packs."""
        while disk.waiting and disk.waiting[0].batch <= self._packer.settled:
            leaf = disk.waiting.popleft()
            listed = list(ids_in(leaf.ids))
            found = self._index.find({one for one in listed if one != HOLE})
            stored = encode_leaf(
                leaf_of(leaf.ids, places=[None if one == HOLE else found[one] for one in listed]),
                seal=self._repository.seal,
                token=self._token,
            )
            self._needed.update(place.pack for place in found.values())
            disk.leaves[leaf.number] = stored.digest
            self._put_map(stored.digest, data=stored.data)
            packs = {place.pack for place in found.values()}
            self._index.remember_leaves([(stored.digest, hashlib.sha256(leaf.ids).digest(), b"".join(packs))])
        settled = disk.waiting[0].number if disk.waiting else len(disk.leaves)
        disk.done(settled * LEAF_BLOCKS * BLOCK_BYTES)

    def _root(self, disk: _DiskInHand) -> bytes:
        root = Root(size_bytes=disk.source.size_bytes, leaves=tuple(disk.leaves))
        stored = encode_root(root, seal=self._repository.seal, token=self._token)
        self._put_map(stored.digest, data=stored.data)
        kept = set(disk.leaves)
        self._index.forget_leaves(leaf for leaf in disk.base if leaf not in kept)
        return stored.digest

    def _put_map(self, digest: bytes, *, data: bytes) -> None:
        store, until = self._repository.store, self._means.retain_until
        self._map_puts.append(
            self._packer.storing.submit(lambda: store.put(map_name(digest), data=data, retain_until=until))
        )
        self._map_bytes += len(data)
        self._finish_maps(most=4 * self._means.connections)

    def _finish_maps(self, *, most: int) -> None:
        while len(self._map_puts) > most:
            self._map_puts.popleft().result()


def _maker(source: Source, blocks: list[int], ids: list[bytes], repository: Repository) -> Callable[[], list[Frame]]:
    return lambda: source.frames(blocks, ids=ids, seal=repository.seal)


def _counted(progress: ByteProgress, *, before: int, size_bytes: int, total: int) -> Callable[[int], None]:
    return lambda done: progress(before + min(done, size_bytes), total)


def _is_there(store: ObjectStore, name: str) -> bool:
    try:
        store.info(name)
    except ObjectNotFoundError:
        return False
    return True


def load_index(repository: Repository, *, pack: bytes, size_bytes: int) -> PackIndex:
    """Read the index of a pack of that size from its end. Raises VerificationError, ObjectNotFoundError."""
    name, store = pack_name(pack), repository.store
    length = min(size_bytes, _FIRST_TAIL_BYTES)
    tail = store.get_range(name, offset=size_bytes - length, length=length)
    wanted = read_trailer(tail, name=name).tail_bytes
    if length < wanted <= size_bytes:
        tail = store.get_range(name, offset=size_bytes - wanted, length=wanted)
    return read_index(tail, size_bytes=size_bytes, seal=repository.seal, name=name)
