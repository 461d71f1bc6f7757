"""Reading a snapshot of a repository again: its manifest, its maps, and its blocks or a share of them."""

from __future__ import annotations

import hashlib
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from vmsnap.errors import DriverError, ObjectNotFoundError, VerificationError, VmsnapError
from vmsnap.model.ids import SnapshotId
from vmsnap.model.verification import Checked, Share
from vmsnap.ports.clock import Cancel
from vmsnap.ports.store import ByteProgress
from vmsnap.stores.blocks import BLOCK_BYTES, HOLE
from vmsnap.stores.packs.maps import LEAF_BLOCKS, Leaf, leaf_count, leaf_length
from vmsnap.stores.packs.names import map_name, pack_name, snapshot_name
from vmsnap.stores.packs.reading import Fetch, PackedDisk, PackReader, Wanted, fetches
from vmsnap.stores.packs.repository import Repository

_AHEAD = 3
_MOST_LINES = 200


@dataclass(frozen=True, kw_only=True)
class Checking:
    """How to check. ``share`` None: every block is read."""

    share: Share | None = None
    connections: int = 4
    progress: ByteProgress
    cancel: Cancel


def check(repository: Repository, *, guest: str, snapshot: SnapshotId, how: Checking) -> Checked:
    """Read a snapshot and compare all that can be compared. Changes nothing, and may be repeated.

    With a share, the manifest and all maps are read, and of the blocks those in packs whose turn it is. Raises
    SnapshotNotFoundError, CancelledError, StoreUnreachableError.
    """
    name = snapshot_name(guest, snapshot=snapshot)
    try:
        body = repository.snapshot(guest, snapshot=snapshot).body
    except VerificationError as error:
        return Checked(blocks=0, defects=(f"snapshot {snapshot} of '{guest}': {error.brief}",), bad=frozenset({name}))
    check_of = _Check(repository, about=f"snapshot {snapshot} of '{guest}'", how=how)
    records = {disk.target: disk for disk in body.manifest.disks}
    check_of.total = sum(disk.size_bytes for disk in records.values())
    with check_of:
        for disk in body.disks:
            record = records.get(disk.target)
            if record is None:
                check_of.tell(f"{disk.target}: the manifest says nothing of this disk", bad=name)
                continue
            check_of.disk(disk.target, root=disk.root, size_bytes=record.size_bytes, digests=record.digests_sha256)
        for target in records.keys() - {disk.target for disk in body.disks}:
            check_of.tell(f"{target}: the manifest does not say where this disk is", bad=name)
        for file in body.files:
            check_of.file(file.name, root=file.root, size_bytes=file.size_bytes, sha256=file.sha256)
    return check_of.result()


@dataclass(kw_only=True)
class _LeafInHand:
    number: int
    leaf: Leaf
    parts: list[Future[_Part]]


@dataclass(kw_only=True)
class _Part:
    """What one read brought. ``digests``: of blocks, where their ids are keyed; ``bad``: blocks, and why."""

    blocks: int = 0
    digests: dict[int, bytes] = field(default_factory=dict)
    bad: list[tuple[Wanted, VmsnapError]] = field(default_factory=list)


class _Check:
    def __init__(self, repository: Repository, *, about: str, how: Checking) -> None:
        self._repository = repository
        self._about = about
        self._how = how
        self._reader = PackReader(repository=repository)
        self._pool = ThreadPoolExecutor(how.connections, thread_name_prefix="verify")
        self._lines: list[str] = []
        self._told = 0
        self._bad: set[str] = set()
        self._blocks = 0
        self._before = 0
        self.total = 0

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def result(self) -> Checked:
        """Return what was found."""
        left = self._told - len(self._lines)
        more = (f"{self._about}: and {left} more places",) if left else ()
        return Checked(blocks=self._blocks, defects=(*self._lines, *more), bad=frozenset(self._bad))

    def tell(self, line: str, *, bad: str) -> None:
        """Note a defect, and the object that is to blame."""
        self._bad.add(bad)
        self._told += 1
        if len(self._lines) < _MOST_LINES:
            self._lines.append(f"{self._about}, {line}")

    def file(self, name: str, *, root: str, size_bytes: int, sha256: str) -> None:
        """Check a small file: as a disk, and then as a whole."""
        known = self._told
        self.disk(name, root=root, size_bytes=size_bytes, digests=None)
        if self._told != known:
            return
        disk = PackedDisk(self._repository, root=bytes.fromhex(root), size_bytes=size_bytes, reader=self._reader)
        if self._how.share is None and hashlib.sha256(disk.read(0, size_bytes)).hexdigest() != sha256:
            map_of_it = map_name(bytes.fromhex(root))
            self.tell(f"{name}: {map_of_it} is of another file", bad=map_of_it)

    def disk(self, target: str, *, root: str, size_bytes: int, digests: str | None) -> None:
        """Check a disk, a leaf after another, a few of them ahead. ``digests``: what the manifest vouches for."""
        disk = PackedDisk(self._repository, root=bytes.fromhex(root), size_bytes=size_bytes, reader=self._reader)
        root_map = map_name(bytes.fromhex(root))
        try:
            disk.root()
        except (VerificationError, ObjectNotFoundError) as error:
            self.tell(f"{target}: all blocks: {error.brief}", bad=root_map)
            return
        known = self._told
        # Without a key the ids vouch for the whole disk, read or not; with one, only its blocks do.
        partly = self._repository.seal.keyed and self._how.share is not None
        vouching = None if digests is None or partly else hashlib.sha256()
        waiting: deque[_LeafInHand] = deque()
        for number, leaf in self._leaves(disk, target=target, size_bytes=size_bytes):
            waiting.append(self._begin(number, leaf=leaf))
            while len(waiting) > _AHEAD:
                self._finish(waiting.popleft(), target=target, vouching=vouching)
            done = min((number + 1) * LEAF_BLOCKS * BLOCK_BYTES, size_bytes)
            self._how.progress(self._before + done, self.total)
        while waiting:
            self._finish(waiting.popleft(), target=target, vouching=vouching)
        self._before += size_bytes
        self._how.progress(self._before, self.total)
        if vouching is not None and self._told == known and vouching.hexdigest() != digests:
            self.tell(
                f"{target}: {root_map} is of another state of the disk than the manifest vouches for", bad=root_map
            )

    def _leaves(self, disk: PackedDisk, *, target: str, size_bytes: int) -> Iterator[tuple[int, Leaf]]:
        ahead: deque[tuple[int, Future[Leaf | None]]] = deque()
        for number in range(leaf_count(size_bytes)):
            self._how.cancel.check()
            ahead.append((number, self._pool.submit(disk.leaf, number)))
            if len(ahead) > _AHEAD:
                yield from self._leaf(ahead.popleft(), disk=disk, target=target, size_bytes=size_bytes)
        while ahead:
            yield from self._leaf(ahead.popleft(), disk=disk, target=target, size_bytes=size_bytes)

    def _leaf(
        self, one: tuple[int, Future[Leaf | None]], *, disk: PackedDisk, target: str, size_bytes: int
    ) -> Iterator[tuple[int, Leaf]]:
        number, future = one
        length = leaf_length(size_bytes, number=number)
        try:
            leaf = future.result()
        except (VerificationError, ObjectNotFoundError) as error:
            first = number * LEAF_BLOCKS
            where = _range(first, last=first + length - 1)
            self.tell(f"{target}: {where}: {error.brief}", bad=map_name(disk.root().leaves[number]))
            return
        yield number, leaf or Leaf(ids=HOLE * length, packs=(), columns=array("I"))

    def _begin(self, number: int, *, leaf: Leaf) -> _LeafInHand:
        first, share = number * LEAF_BLOCKS, self._how.share
        wanted = []
        for at in range(len(leaf)):
            place = leaf.place(at)
            if place is not None and (share is None or share.has(int.from_bytes(place.pack[:8], "big"))):
                wanted.append(Wanted(number=first + at, identity=leaf.identity(at), place=place))
        parts = [self._pool.submit(self._read, fetch) for fetch in fetches(wanted)]
        return _LeafInHand(number=number, leaf=leaf, parts=parts)

    def _read(self, fetch: Fetch) -> _Part:
        self._how.cancel.check()
        part = _Part()
        try:
            self._take(fetch, part=part)
        except DriverError as error:
            if error.transient:
                raise
            part = self._one_by_one(fetch)
        except VerificationError:
            part = self._one_by_one(fetch)
        return part

    def _one_by_one(self, fetch: Fetch) -> _Part:
        """Read each block by itself, to learn which are bad."""
        part = _Part()
        for wanted in fetch.blocks:
            (single,) = fetches([wanted])
            try:
                self._take(single, part=part)
            except (VerificationError, DriverError) as error:
                if error.transient:
                    raise
                part.bad.append((wanted, error))
        return part

    def _take(self, fetch: Fetch, *, part: _Part) -> None:
        keyed = self._repository.seal.keyed
        for wanted, block, *_ in self._reader.fetch(fetch):
            part.blocks += 1
            if keyed:
                part.digests[wanted.number] = hashlib.sha256(block).digest()

    def _finish(self, in_hand: _LeafInHand, *, target: str, vouching: hashlib._Hash | None) -> None:
        digests: dict[int, bytes] = {}
        bad: list[tuple[Wanted, VmsnapError]] = []
        for future in in_hand.parts:
            part = future.result()
            digests.update(part.digests)
            bad += part.bad
            self._blocks += part.blocks
        self._tell_blocks(sorted(bad, key=lambda one: one[0].number), target=target)
        if vouching is None:
            return
        if not self._repository.seal.keyed:
            vouching.update(in_hand.leaf.ids)
            return
        first = in_hand.number * LEAF_BLOCKS
        vouching.update(b"".join(digests.get(first + at, HOLE) for at in range(len(in_hand.leaf))))

    def _tell_blocks(self, bad: Sequence[tuple[Wanted, VmsnapError]], *, target: str) -> None:
        """Note blocks that follow each other, and are bad for the same reason, in one line."""
        begin = 0
        for at, (wanted, error) in enumerate(bad):
            following = bad[at + 1] if at + 1 < len(bad) else None
            if (
                following is not None
                and following[0].number == wanted.number + 1
                and following[0].place.pack == wanted.place.pack
            ):
                continue
            pack = pack_name(wanted.place.pack)
            said = error.brief if pack in error.brief else f"the object {pack}: {error.brief}"
            self.tell(f"{target}: {_range(bad[begin][0].number, last=wanted.number)}: {said}", bad=pack)
            begin = at + 1


def _range(first: int, *, last: int) -> str:
    if first == last:
        return f"block {first} (byte {first * BLOCK_BYTES})"
    return f"blocks {first} to {last} (from byte {first * BLOCK_BYTES})"
