"""A ``SnapshotStore`` that keeps everything in memory, for workflow tests. It passes the store's contract suite."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from vmsnap.errors import (
    BugError,
    BusyError,
    HeldError,
    NoSpaceError,
    PreconditionError,
    SafetyError,
    SnapshotNotFoundError,
    VerificationError,
)
from vmsnap.model.capture import DiskImage
from vmsnap.model.drain import CleanShutdown
from vmsnap.model.guest import Finding, Severity
from vmsnap.model.hints import BlockSet, DiskHint, may_differ, why_full
from vmsnap.model.ids import RunId, SnapshotId, folder_name
from vmsnap.model.journal import Resource, ResourceKind
from vmsnap.model.manifest import DiskRecord, Manifest, Marks, Pin, ReadRecord, Snapshot
from vmsnap.model.verification import Share
from vmsnap.ports.clock import Cancel
from vmsnap.ports.disks import DiskView
from vmsnap.ports.store import ByteProgress, DiskContent, Staging
from vmsnap.stores.references import by_age, not_ahead, resolve

_BLOCK = 64 * 1024


@dataclass
class _Disk:
    size_bytes: int
    blocks: dict[int, bytes] = field(default_factory=dict)
    own: BlockSet | None = None

    def digests(self) -> dict[int, bytes]:
        return {index: hashlib.sha256(block).digest() for index, block in self.blocks.items()}

    def flat_digests(self) -> bytes:
        found = self.digests()
        return b"".join(found.get(index, bytes(32)) for index in range(-(-self.size_bytes // _BLOCK)))

    def digests_sha256(self) -> str:
        return hashlib.sha256(self.flat_digests()).hexdigest()


@dataclass
class _Kept:
    guest: str
    disks: dict[str, _Disk] = field(default_factory=dict)
    records: dict[str, DiskRecord] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    manifest: Manifest | None = None
    marks: Marks = field(default_factory=Marks)
    holders: set[RunId] = field(default_factory=set)


def _read_by_hint(disk: _Disk, *, old: _Disk, hint: DiskHint) -> ReadRecord:
    """Take over what cannot have changed, unless it has; here all of it is looked at."""
    if hint.written is None or disk.own is None or old.own is None:
        raise BugError("a hint without blocks was found usable")
    changed = may_differ(by_guest=hint.written, by_clone=disk.own, by_previous_clone=old.own)
    same = [index for first, count in (~changed).runs() for index in range(first, first + count)]
    wrong = next((index for index in same if disk.blocks.get(index) != old.blocks.get(index)), None)
    if wrong is not None:
        reason = f"the hint since {hint.since} is wrong: block {wrong} changed"
        return ReadRecord(read_bytes=disk.size_bytes, full_because=reason, mismatch=f"block {wrong} changed")
    read_bytes = sum(len(block) for index, block in disk.blocks.items() if index in changed)
    return ReadRecord(read_bytes=read_bytes, since=hint.since, hinted_in_a_row=1)


def _utc_now() -> datetime:
    return datetime.now(UTC)


class MemoryStore:
    """Keeps snapshots in memory; ``folder`` is where it shows a disk or a file when somebody asks for a path.

    ``capacity_bytes`` bounds what all disks together may hold; beyond it there is no space.
    """

    def __init__(
        self, folder: Path, *, capacity_bytes: int | None = None, now: Callable[[], datetime] = _utc_now
    ) -> None:
        self._folder = folder
        self._now = now
        self.capacity_bytes = capacity_bytes
        self._staged: dict[RunId, _Kept] = {}
        self._published: dict[SnapshotId, _Kept] = {}
        self._of: dict[str, dict[SnapshotId, _Kept]] = {}
        self._locked: set[str] = set()

    @property
    def kinds(self) -> frozenset[ResourceKind]:
        """Return the kinds of resource that this owner releases."""
        return frozenset({ResourceKind.STAGING, ResourceKind.HOLD})

    def findings(self, *, needed_bytes: int) -> tuple[Finding, ...]:
        """Tell whether the capacity would do."""
        if self.capacity_bytes is not None and self._used_bytes() + needed_bytes > self.capacity_bytes:
            return (Finding(check="store", severity=Severity.REFUSAL, message="too little room", remedy="prune"),)
        return (Finding(check="store", severity=Severity.OK, message="in memory"),)

    def staging_resource(self, run: RunId, *, guest: str) -> Resource:
        """Name the staging entry."""
        return Resource(kind=ResourceKind.STAGING, run=run, guest=guest, name=f".staging-{run}")

    def stage(self, run: RunId, *, guest: str) -> Staging:
        """Begin a snapshot."""
        if run in self._staged:
            raise BugError(f"run {run} has a staging folder already")
        self._staged[run] = _Kept(guest=guest)
        mine = self.snapshots(guest)
        return Staging(run=run, guest=guest, previous=not_ahead(mine, now=self._now())[-1].id if mine else None)

    def write_disk(
        self,
        staging: Staging,
        *,
        view: DiskView,
        progress: ByteProgress,
        cancel: Cancel,
        hint: DiskHint | None = None,
    ) -> DiskRecord:
        """Keep the blocks that are not zero."""
        kept = self._staging(staging)
        past = self._published.get(staging.previous) if staging.previous is not None else None
        old, record = (None, None) if past is None else (past.disks.get(view.target), past.records.get(view.target))
        before = {} if old is None else old.blocks
        disk = _Disk(size_bytes=view.size_bytes, own=BlockSet.of(view.written(), size_bytes=view.size_bytes))
        with view.path.open("rb") as file:
            for extent in view.extents():
                cancel.check()
                first, last = extent.offset // _BLOCK, -(-(extent.offset + extent.length) // _BLOCK)
                for index in range(first, last) if extent.data else ():
                    file.seek(index * _BLOCK)
                    block = file.read(min(_BLOCK, view.size_bytes - index * _BLOCK))
                    if block.count(0) != len(block):
                        disk.blocks[index] = block
                progress(extent.offset + extent.length, view.size_bytes)
        read = ReadRecord(read_bytes=sum(extent.length for extent in view.extents() if extent.data))
        reason = why_full(hint, base=staging.previous, before=record, size_bytes=view.size_bytes)
        if reason is None and hint is not None and old is not None:
            read = _read_by_hint(disk, old=old, hint=hint)
        else:
            read = read.model_copy(update={"full_because": reason})
        new_bytes = sum(len(block) for index, block in disk.blocks.items() if before.get(index) != block)
        if self.capacity_bytes is not None and self._used_bytes() + new_bytes > self.capacity_bytes:
            raise NoSpaceError(f"the store has no room for {new_bytes} bytes", remedy="prune snapshots")
        kept.disks[view.target] = disk
        record = DiskRecord(
            target=view.target,
            image=f"{folder_name(view.target)}.raw",
            digests=f"{folder_name(view.target)}.digests",
            digests_sha256=disk.digests_sha256(),
            size_bytes=view.size_bytes,
            data_bytes=sum(len(block) for block in disk.blocks.values()),
            new_bytes=new_bytes,
            written=f"{folder_name(view.target)}.written",
            read=read,
        )
        kept.records[view.target] = record
        return record

    def add_file(self, staging: Staging, *, name: str, source: Path) -> None:
        """Keep a small file."""
        self._staging(staging).files[name] = source.read_bytes()

    def publish(self, staging: Staging, *, manifest: Manifest, clean: CleanShutdown) -> Snapshot:
        """Make the snapshot exist. Raises SafetyError where the evidence is not of this run."""
        kept = self._staging(staging)
        if {staging.run, manifest.run, RunId(manifest.id)} != {clean.run} or manifest.guest != staging.guest:
            raise SafetyError(f"the evidence of run {clean.run} is not of run {staging.run}", remedy="report it")
        if {disk.target: disk for disk in manifest.disks} != kept.records:
            raise SafetyError(
                f"the manifest of run {staging.run} lists other disks than were stored", remedy="report it"
            )
        kept.manifest = manifest
        self._keep(manifest.id, self._staged.pop(staging.run))
        return Snapshot(manifest=manifest)

    def receive_disk(self, staging: Staging, *, record: DiskRecord, fill: Callable[[DiskContent], None]) -> None:
        """Let ``fill`` write a disk into files, and keep what they hold."""
        kept = self._staging(staging)
        image, digests = (self._folder / f"received-{staging.run}-{name}" for name in (record.image, record.digests))
        for path, size in ((image, record.size_bytes), (digests, -(-record.size_bytes // _BLOCK) * 32)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes(size))
        fill(DiskContent(record=record, image=image, digests=digests))
        disk, data = _Disk(size_bytes=record.size_bytes), image.read_bytes()
        for index in range(-(-record.size_bytes // _BLOCK)):
            block = data[index * _BLOCK : (index + 1) * _BLOCK]
            if block.count(0) != len(block):
                disk.blocks[index] = block
        if disk.flat_digests() != digests.read_bytes() or disk.digests_sha256() != record.digests_sha256:
            raise VerificationError(f"disk {record.target} is not what its manifest vouches for", remedy="verify it")
        kept.disks[record.target] = disk
        kept.records[record.target] = record

    def publish_copy(self, staging: Staging, *, manifest: Manifest, pin: Pin | None = None) -> Snapshot:
        """Make a snapshot exist that was published elsewhere."""
        kept = self._staging(staging)
        if manifest.id in self._published:
            raise PreconditionError(f"snapshot {manifest.id} is here already", remedy="use it")
        nvram = manifest.machine.nvram
        complete = {disk.target: disk for disk in manifest.disks} == kept.records
        if not complete or manifest.guest != staging.guest or (nvram is not None and nvram not in kept.files):
            raise SafetyError(f"snapshot {manifest.id} was not received whole", remedy="report it")
        kept.manifest = manifest
        kept.marks = Marks(pin=pin)
        self._keep(manifest.id, self._staged.pop(staging.run))
        return Snapshot(manifest=manifest, marks=kept.marks)

    def put(self, snapshot: Snapshot) -> None:
        """Have a snapshot without disks, for tests that need many."""
        kept = _Kept(guest=snapshot.manifest.guest, manifest=snapshot.manifest, marks=snapshot.marks)
        self._keep(snapshot.id, kept)

    def _keep(self, identity: SnapshotId, kept: _Kept) -> None:
        self._published[identity] = kept
        self._of.setdefault(kept.guest, {})[identity] = kept

    def guests(self) -> tuple[str, ...]:
        """Return the guests that have snapshots."""
        return tuple(sorted({kept.guest for kept in self._published.values()}))

    def snapshots(self, guest: str | None = None) -> tuple[Snapshot, ...]:
        """Return snapshots, oldest first by guest."""
        return by_age(
            [
                Snapshot(manifest=kept.manifest, marks=kept.marks)
                for kept in (self._published if guest is None else self._of.get(guest, {})).values()
                if kept.manifest is not None
            ]
        )

    def captured(self, guest: str) -> tuple[datetime, ...]:
        """Return when a guest's snapshots were captured, oldest first."""
        every = self._of.get(guest, {}).values()
        return tuple(sorted(kept.manifest.captured for kept in every if kept.manifest is not None))

    def find(self, reference: str) -> Snapshot:
        """Return the snapshot that the reference names."""
        return resolve(reference, snapshots=self.snapshots(), now=self._now())

    def images(self, snapshot: Snapshot) -> tuple[DiskImage, ...]:
        """Write the disks out as sparse files, and return them."""
        kept = self._kept(snapshot)
        images = []
        for record in snapshot.manifest.disks:
            path = self._shown(snapshot, name=record.image)
            if not path.exists():
                with path.open("wb") as file:
                    for index, block in kept.disks[record.target].blocks.items():
                        file.seek(index * _BLOCK)
                        file.write(block)
                    file.truncate(record.size_bytes)
            images.append(
                DiskImage(target=record.target, path=str(path), image_format="raw", size_bytes=record.size_bytes)
            )
        return tuple(images)

    def contents(self, snapshot: Snapshot) -> tuple[DiskContent, ...]:
        """Write the disks and their digests out, and return them."""
        kept, found = self._kept(snapshot), []
        for image, record in zip(self.images(snapshot), snapshot.manifest.disks, strict=True):
            digests = self._shown(snapshot, name=record.digests)
            digests.write_bytes(kept.disks[record.target].flat_digests())
            found.append(DiskContent(record=record, image=Path(image.path), digests=digests))
        return tuple(found)

    def file(self, snapshot: Snapshot, *, name: str) -> Path:
        """Write a kept file out, and return its path."""
        files = self._kept(snapshot).files
        if name not in files:
            raise SnapshotNotFoundError(f"snapshot {snapshot.id} has no file {name!r}")
        path = self._shown(snapshot, name=name)
        path.write_bytes(files[name])
        return path

    def mark(self, snapshot: Snapshot, *, marks: Marks) -> Snapshot:
        """Replace a snapshot's marks."""
        self._kept(snapshot).marks = marks
        return Snapshot(manifest=snapshot.manifest, marks=marks)

    def hold_resource(self, run: RunId, *, snapshot: Snapshot) -> Resource:
        """Name a hold."""
        return Resource(
            kind=ResourceKind.HOLD,
            run=run,
            guest=snapshot.manifest.guest,
            name=f"{snapshot.id}/{run}",
            detail=snapshot.id,
        )

    def hold(self, resource: Resource) -> None:
        """Hold a snapshot against removal."""
        kept = self._published.get(SnapshotId(resource.detail))
        if kept is None:
            raise SnapshotNotFoundError(f"snapshot {resource.detail} is gone")
        kept.holders.add(resource.run)

    def holders(self, snapshot: Snapshot) -> tuple[RunId, ...]:
        """Return the runs that hold a snapshot."""
        return tuple(sorted(self._kept(snapshot).holders))

    def remove(self, snapshot: Snapshot) -> int:
        """Remove a snapshot. Returns its own bytes. Raises HeldError."""
        kept = self._kept(snapshot)
        if kept.holders:
            raise HeldError(f"snapshot {snapshot.id} is used by {', '.join(sorted(kept.holders))}")
        del self._published[snapshot.id]
        del self._of[kept.guest][snapshot.id]
        others = {
            (one.guest, target, index, digest)
            for one in self._published.values()
            for target, disk in one.disks.items()
            for index, digest in disk.digests().items()
        }
        return sum(
            len(disk.blocks[index])
            for target, disk in kept.disks.items()
            for index, digest in disk.digests().items()
            if (kept.guest, target, index, digest) not in others
        )

    def freed_by(self, snapshots: Sequence[Snapshot]) -> int:
        """Return the bytes of blocks that only these snapshots have."""
        going = {snapshot.id for snapshot in snapshots}
        mine, others = (
            {
                (kept.guest, target, index, block)
                for identity, kept in self._published.items()
                if (identity in going) is goes
                for target, disk in kept.disks.items()
                for index, block in disk.blocks.items()
            }
            for goes in (True, False)
        )
        return sum(len(block) for _, _, _, block in mine - others)

    def finish_removals(self, guest: str) -> tuple[SnapshotId, ...]:
        """Return nothing: here a removal cannot be cut."""
        del guest
        return ()

    def verify(
        self, snapshot: Snapshot, *, share: Share | None = None, progress: ByteProgress, cancel: Cancel
    ) -> tuple[int, tuple[str, ...]]:
        """Compare every disk with its digest; with a share, count its part of the blocks."""
        kept = self._kept(snapshot)
        defects, blocks, total = [], 0, sum(record.size_bytes for record in snapshot.manifest.disks)
        done = 0
        for record in snapshot.manifest.disks:
            cancel.check()
            count = -(-record.size_bytes // record.block_bytes)
            blocks += count if share is None else sum(share.has(number) for number in range(count))
            done += record.size_bytes
            if kept.disks[record.target].digests_sha256() != record.digests_sha256:
                defects.append(f"{record.image}: blocks differ from their digests")
            progress(done, total)
        return blocks, tuple(defects)

    @contextmanager
    def lock(self, guest: str, *, timeout: timedelta) -> Iterator[None]:
        """Lock a guest's snapshots. It never waits: where the lock is taken it raises BusyError at once."""
        del timeout
        if guest in self._locked:
            raise BusyError(f"somebody else publishes or removes snapshots of {guest!r}", remedy="try again later")
        self._locked.add(guest)
        try:
            yield
        finally:
            self._locked.discard(guest)

    def release(self, resource: Resource, *, deadline: timedelta) -> None:
        """Forget a staging entry or a hold. Content where it is gone."""
        del deadline
        if resource.kind is ResourceKind.STAGING:
            self._staged.pop(resource.run, None)
        elif (kept := self._published.get(SnapshotId(resource.detail))) is not None:
            kept.holders.discard(resource.run)

    def owned(self) -> tuple[Resource, ...]:
        """Return staging entries and holds."""
        staged = [self.staging_resource(run, guest=kept.guest) for run, kept in self._staged.items()]
        held = [
            self.hold_resource(run, snapshot=snapshot)
            for snapshot in self.snapshots()
            for run in self.holders(snapshot)
        ]
        return (*staged, *held)

    def mend(self, snapshot: Snapshot, *, read: Callable[[str, int], bytes], cancel: Cancel) -> int:
        """Repair disks with blocks of another copy, where the result is what the manifest vouches for."""
        kept, mended = self._kept(snapshot), 0
        for record in snapshot.manifest.disks:
            disk = kept.disks[record.target]
            if disk.digests_sha256() == record.digests_sha256:
                continue
            cancel.check()
            found = _Disk(size_bytes=record.size_bytes)
            for index in range(-(-record.size_bytes // _BLOCK)):
                with suppress(VerificationError):
                    block = read(record.target, index)
                    if any(block):
                        found.blocks[index] = block
            if found.digests_sha256() == record.digests_sha256:
                mended += sum(disk.blocks.get(index) != block for index, block in found.blocks.items())
                disk.blocks = found.blocks
        return mended

    def damage(self, snapshot: Snapshot, *, target: str) -> None:
        """Change a stored block, as a failing disk would."""
        blocks = self._kept(snapshot).disks[target].blocks
        index = min(blocks)
        blocks[index] = bytes(byte ^ 0xFF for byte in blocks[index])

    def _staging(self, staging: Staging) -> _Kept:
        try:
            return self._staged[staging.run]
        except KeyError:
            raise BugError(f"run {staging.run} has no staging folder") from None

    def _kept(self, snapshot: Snapshot) -> _Kept:
        try:
            return self._published[snapshot.id]
        except KeyError:
            raise SnapshotNotFoundError(f"snapshot {snapshot.id} is gone", remedy="list what is there") from None

    def _shown(self, snapshot: Snapshot, *, name: str) -> Path:
        folder = self._folder / snapshot.id
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name

    def _used_bytes(self) -> int:
        every = (*self._staged.values(), *self._published.values())
        return sum(len(block) for kept in every for disk in kept.disks.values() for block in disk.blocks.values())
