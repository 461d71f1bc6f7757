"""``SnapshotStore`` on a local file system: one plain raw sparse file per disk and snapshot.

Snapshots of a guest share unchanged blocks by reflinks, so each is a whole disk: copied with ``cp``, read with any tool,
removed on its own. ``docs/formats.md`` describes the layout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from vmsnap.errors import BugError, DriverError, PreconditionError, SnapshotNotFoundError
from vmsnap.linux.reflink import can_reflink
from vmsnap.model.capture import DiskImage
from vmsnap.model.drain import CleanShutdown
from vmsnap.model.guest import Finding, Severity
from vmsnap.model.hints import DiskHint
from vmsnap.model.ids import RunId, SnapshotId, is_run_id
from vmsnap.model.journal import Resource, ResourceKind
from vmsnap.model.manifest import DiskRecord, Manifest, Marks, Pin, Snapshot
from vmsnap.model.verification import Share
from vmsnap.ports.clock import Cancel
from vmsnap.ports.disks import DiskView
from vmsnap.ports.store import ByteProgress, DiskContent, Staging
from vmsnap.stores import copying, removal
from vmsnap.stores.blocks import Scope
from vmsnap.stores.catalogue import Captures, is_half_removed, read_snapshot, take_inventory
from vmsnap.stores.layout import (
    HOLDS,
    LOCK,
    MANIFEST,
    STAGING_PREFIX,
    Layout,
    disk_failure,
    free_bytes,
    guest_of,
    make_folder,
)
from vmsnap.stores.locking import locked
from vmsnap.stores.mending import mend_disk
from vmsnap.stores.publishing import Publisher, usable_base, write_marks
from vmsnap.stores.references import resolve
from vmsnap.stores.verification import verify_disk

_ROOT_REMEDY = "create it on a file system with reflinks: mkfs.xfs -m reflink=1, or btrfs, or ZFS 2.2"
_COPIES_REMEDY = (
    "put the store on XFS (mkfs.xfs -m reflink=1), btrfs or ZFS 2.2 or newer, "
    "or set allow_copies = true in [store] of vmsnap.toml (each snapshot then takes the room of all its data)"
)


def _utc_now() -> datetime:
    return datetime.now(UTC)


class ImagesStore:
    """Keeps snapshots in ``root``. ``allow_copies``: without reflinks, store whole sparse copies instead of refusing."""

    def __init__(self, root: Path, *, allow_copies: bool = False, now: Callable[[], datetime] = _utc_now) -> None:
        self._layout = Layout(root=root)
        self._now = now
        self._allow_copies = allow_copies
        self._publisher = Publisher(layout=self._layout)
        self._captures = Captures(self._layout)
        self._reflinks: bool | None = None

    @property
    def kinds(self) -> frozenset[ResourceKind]:
        """Return the kinds of resource that this owner releases."""
        return frozenset({ResourceKind.STAGING, ResourceKind.HOLD})

    def findings(self, *, needed_bytes: int) -> tuple[Finding, ...]:
        """Look whether the store can be used and has room. Changes nothing that stays."""
        root = self._layout.root
        try:
            reflinks = self._probe()
            free = free_bytes(root)
        except OSError as error:
            message = f"the store {root} cannot be used: {error.strerror}"
            return (Finding(check="store", severity=Severity.REFUSAL, message=message, remedy=_ROOT_REMEDY),)
        findings = [self._reflink_finding(reflinks)]
        enough = free >= needed_bytes
        findings.append(
            Finding(
                check="store room",
                severity=Severity.OK if enough else Severity.REFUSAL,
                message=f"{free:,} bytes are free in {root}, {needed_bytes:,} are needed",
                remedy=None if enough else "prune snapshots ('vmsnap prune'), or make the file system larger",
            )
        )
        findings += [
            Finding(
                check="store contents",
                severity=Severity.WARNING,
                message=f"{damage.folder}: {damage.reason}; it is left alone",
                remedy="look at the folder; its images may still be of use. Remove it by hand when they are not",
            )
            for damage in take_inventory(self._layout).damaged
        ]
        cut = [folder for folder in self._layout.snapshot_folders() if is_half_removed(folder)]
        findings += [
            Finding(
                check="store contents",
                severity=Severity.WARNING,
                message=f"{folder}: the removal of this snapshot was cut, and its room is not free",
                remedy=f"run 'vmsnap prune {guest_of(folder.parent)}' or, without a policy for it, "
                f"'vmsnap forget {folder.name} --reason TEXT'",
            )
            for folder in cut
        ]
        return tuple(findings)

    def staging_resource(self, run: RunId, *, guest: str) -> Resource:
        """Name the staging folder."""
        folder = self._layout.staging(guest, run=run)
        return self._resource(folder, kind=ResourceKind.STAGING, run=run, guest=guest)

    def stage(self, run: RunId, *, guest: str) -> Staging:
        """Begin a snapshot, over the guest's newest one that is not known to be damaged.

        Raises PreconditionError for a file system without reflinks, where whole copies are not allowed.
        """
        with self._translated(f"begin a snapshot of {guest!r}"):
            if not self._probe() and not self._allow_copies:
                raise PreconditionError(
                    f"the file system of the store {self._layout.root} has no reflinks", remedy=_COPIES_REMEDY
                )
            self._publisher.stage(run, guest=guest)
            return Staging(run=run, guest=guest, previous=usable_base(self.snapshots(guest), now=self._now()))

    def write_disk(
        self,
        staging: Staging,
        *,
        view: DiskView,
        progress: ByteProgress,
        cancel: Cancel,
        hint: DiskHint | None = None,
    ) -> DiskRecord:
        """Store one disk: blocks that differ from the previous snapshot's are written, zeroes become holes."""
        with self._translated(f"store disk {view.target} of {staging.guest!r}"):
            base = self._base(staging) if self._probe() else None
            scope = Scope(size_bytes=view.size_bytes, progress=progress, cancel=cancel)
            return self._publisher.write_disk(staging, view=view, base=base, scope=scope, hint=hint)

    def add_file(self, staging: Staging, *, name: str, source: Path) -> None:
        """Store a small file (firmware variables) beside the disks."""
        with self._translated(f"store {source} as {name}"):
            self._publisher.add_file(staging, name=name, source=source)

    def publish(self, staging: Staging, *, manifest: Manifest, clean: CleanShutdown) -> Snapshot:
        """Make the snapshot exist: everything on disk, manifest last, then one rename.

        Raises SafetyError where the evidence is not of this run. After a crash the snapshot exists whole or not at all.
        """
        with self._translated(f"publish snapshot {manifest.id} of {staging.guest!r}"):
            return self._publisher.publish(staging, manifest=manifest, clean=clean)

    def receive_disk(self, staging: Staging, *, record: DiskRecord, fill: Callable[[DiskContent], None]) -> None:
        """Store one disk as it is in another copy of the snapshot. Raises VerificationError where it turns out another."""
        with self._translated(f"store disk {record.target} of {staging.guest!r}"):
            copying.receive_disk(self._publisher.folder(staging), record=record, fill=fill)

    def publish_copy(self, staging: Staging, *, manifest: Manifest, pin: Pin | None = None) -> Snapshot:
        """Make a snapshot exist here that was published elsewhere. Raises SafetyError, PreconditionError."""
        with self._translated(f"publish snapshot {manifest.id} of {staging.guest!r}"):
            return self._publisher.publish_copy(staging, manifest=manifest, pin=pin)

    def guests(self) -> tuple[str, ...]:
        """Return the guests that have snapshots."""
        return tuple(sorted({snapshot.manifest.guest for snapshot in self.snapshots()}))

    def snapshots(self, guest: str | None = None) -> tuple[Snapshot, ...]:
        """Return snapshots, oldest first by guest. Damaged ones are logged and left out."""
        return take_inventory(self._layout, guest=guest).snapshots

    def captured(self, guest: str) -> tuple[datetime, ...]:
        """Return when a guest's snapshots were captured, oldest first. What did not change is not read again."""
        return self._captures.of(guest)

    def find(self, reference: str) -> Snapshot:
        """Return the snapshot an id, an unambiguous prefix, ``GUEST@latest`` or ``GUEST@TIME`` names.

        Raises SnapshotNotFoundError, which lists what would match.
        """
        return resolve(reference, snapshots=self.snapshots(), now=self._now())

    def images(self, snapshot: Snapshot) -> tuple[DiskImage, ...]:
        """Return the stored disks as read-only raw images. Raises SnapshotNotFoundError, DriverError."""
        folder = self._existing(snapshot)
        for disk in snapshot.manifest.disks:
            if not (folder / disk.image).is_file():
                raise DriverError(
                    f"snapshot {snapshot.id} has lost its image {disk.image}",
                    remedy=f"run 'vmsnap verify {snapshot.id}'",
                )
        return tuple(
            DiskImage(target=disk.target, path=str(folder / disk.image), image_format="raw", size_bytes=disk.size_bytes)
            for disk in snapshot.manifest.disks
        )

    def contents(self, snapshot: Snapshot) -> tuple[DiskContent, ...]:
        """Return the stored disks with their digests. Raises SnapshotNotFoundError."""
        folder = self._existing(snapshot)
        return tuple(
            DiskContent(record=disk, image=folder / disk.image, digests=folder / disk.digests)
            for disk in snapshot.manifest.disks
        )

    def file(self, snapshot: Snapshot, *, name: str) -> Path:
        """Return the path of a file that ``add_file`` stored. Raises SnapshotNotFoundError."""
        path = self._existing(snapshot) / name
        if path.parent != self._folder(snapshot) or not path.is_file():
            raise SnapshotNotFoundError(f"snapshot {snapshot.id} has no file {name!r}", remedy="take a new snapshot")
        return path

    def mark(self, snapshot: Snapshot, *, marks: Marks) -> Snapshot:
        """Replace a snapshot's marks, atomically."""
        folder = self._existing(snapshot)
        with self._translated(f"mark snapshot {snapshot.id}"):
            write_marks(folder, marks=marks)
        return Snapshot(manifest=snapshot.manifest, marks=marks)

    def hold_resource(self, run: RunId, *, snapshot: Snapshot) -> Resource:
        """Name the hold of a run on a snapshot."""
        path = self._folder(snapshot) / HOLDS / run
        return self._resource(path, kind=ResourceKind.HOLD, run=run, guest=snapshot.manifest.guest)

    def hold(self, resource: Resource) -> None:
        """Hold a snapshot against removal. Raises SnapshotNotFoundError where it is gone."""
        folder = self._path(resource).parent.parent
        with self._translated(f"hold snapshot {folder.name}"):
            removal.hold(folder, run=resource.run)

    def holders(self, snapshot: Snapshot) -> tuple[RunId, ...]:
        """Return the runs that hold a snapshot."""
        folder = self._existing(snapshot)
        with self._translated(f"read the holds on snapshot {snapshot.id}"):
            return removal.holders(folder)

    def remove(self, snapshot: Snapshot) -> int:
        """Remove a snapshot: manifest first. Returns bytes that were its own. Raises HeldError.

        Pins are retention's business and do not count here.
        """
        return removal.remove_snapshot(snapshot, folder=self._existing(snapshot))

    def freed_by(self, snapshots: Sequence[Snapshot]) -> int:
        """Return how many bytes would be free once these snapshots of one guest are all removed."""
        if not snapshots:
            return 0
        guest = snapshots[0].manifest.guest
        with self._translated(f"look what removing snapshots of {guest!r} would free"):
            return removal.freed_by(snapshots, folder=self._layout.guest(guest))

    def finish_removals(self, guest: str) -> tuple[SnapshotId, ...]:
        """Finish removals of a guest's snapshots that were cut. Call it under the guest's lock. Returns which they were."""
        with self._translated(f"finish removing snapshots of {guest!r}"):
            folders = [folder for folder in self._layout.snapshot_folders(guest) if is_half_removed(folder)]
            return tuple(SnapshotId(folder.name) for folder in folders if removal.finish_removal(folder))

    def verify(
        self, snapshot: Snapshot, *, share: Share | None = None, progress: ByteProgress, cancel: Cancel
    ) -> tuple[int, tuple[str, ...]]:
        """Read every block, or those of a share, and compare it. Returns the count of blocks compared and a line a defect.

        Raises SnapshotNotFoundError, DriverError, CancelledError.
        """
        folder = self._existing(snapshot)
        total = sum(disk.size_bytes for disk in snapshot.manifest.disks)
        blocks, done = 0, 0
        defects: list[str] = []
        for disk in snapshot.manifest.disks:
            with self._translated(f"read {disk.image} of snapshot {snapshot.id}"):
                scope = Scope(size_bytes=disk.size_bytes, progress=_after(done, total, progress), cancel=cancel)
                count, lines = verify_disk(folder, record=disk, scope=scope, share=share)
            blocks += count
            defects += lines
            done += disk.size_bytes
        nvram = snapshot.manifest.machine.nvram
        if nvram is not None and not (folder / nvram).is_file():
            defects.append(f"{nvram}: missing")
        return blocks, tuple(defects)

    def mend(self, snapshot: Snapshot, *, read: Callable[[str, int], bytes], cancel: Cancel) -> int:
        """Repair the disks of a snapshot in place, with blocks from another copy. Returns how many were written.

        Raises SnapshotNotFoundError, VerificationError, DriverError, CancelledError.
        """
        folder = self._existing(snapshot)
        mended = 0
        for disk in snapshot.manifest.disks:
            with self._translated(f"repair {disk.image} of snapshot {snapshot.id}"):
                mended += mend_disk(folder, record=disk, read=functools.partial(read, disk.target), cancel=cancel)
        return mended

    @contextmanager
    def lock(self, guest: str, *, timeout: timedelta) -> Iterator[None]:
        """Keep others from publishing or removing snapshots of a guest meanwhile. Raises BusyError."""
        folder = self._layout.guest(guest)
        with self._translated(f"lock the snapshots of {guest!r}"):
            make_folder(folder)
        with locked(folder / LOCK, guest=guest, timeout=timeout):
            yield

    def release(self, resource: Resource, *, deadline: timedelta) -> None:
        """Remove a staging folder and what a half-done removal left, or let a snapshot go. A snapshot itself stays."""
        path = self._path(resource)
        with self._translated(f"remove {path}"):
            if resource.kind is ResourceKind.HOLD:
                removal.let_go(path.parent.parent, run=resource.run)
                return
            removal.remove_staging(path.parent / f"{STAGING_PREFIX}{resource.run}")
            folder = path.parent / resource.run
            if is_half_removed(folder) and folder.exists():
                # Or somebody is removing it just now.
                with locked(folder.parent / LOCK, guest=resource.guest, timeout=deadline):
                    removal.finish_removal(folder)

    def owned(self) -> tuple[Resource, ...]:
        """Return staging folders, snapshots whose removal did not end, and holds."""
        staged = [
            self._resource(
                folder,
                kind=ResourceKind.STAGING,
                run=RunId(folder.name.removeprefix(STAGING_PREFIX)),
                guest=guest_of(folder.parent),
            )
            for folder in self._layout.staging_folders()
        ]
        folders = self._layout.snapshot_folders()
        half_removed = [
            self._resource(folder, kind=ResourceKind.STAGING, run=RunId(folder.name), guest=guest_of(folder.parent))
            for folder in folders
            if is_half_removed(folder)
        ]
        with self._translated("read holds"):
            held = [
                self._resource(folder / HOLDS / run, kind=ResourceKind.HOLD, run=run, guest=guest_of(folder.parent))
                for folder in folders
                for run in removal.holders(folder)
            ]
        return (*staged, *half_removed, *held)

    def _probe(self) -> bool:
        if self._reflinks is None:
            self._reflinks = can_reflink(self._layout.root)
        return self._reflinks

    def _reflink_finding(self, reflinks: bool) -> Finding:  # noqa: FBT001
        root = self._layout.root
        if reflinks:
            return Finding(check="store", severity=Severity.OK, message=f"{root} shares blocks between snapshots")
        return Finding(
            check="store",
            severity=Severity.WARNING if self._allow_copies else Severity.REFUSAL,
            message=f"the file system of {root} has no reflinks"
            + (": each snapshot takes the room of all its data" if self._allow_copies else ""),
            remedy=_COPIES_REMEDY,
        )

    def _base(self, staging: Staging) -> Snapshot | None:
        if staging.previous is None:
            return None
        found = read_snapshot(self._layout.snapshot(staging.guest, snapshot=staging.previous))
        return found if isinstance(found, Snapshot) else None

    def _folder(self, snapshot: Snapshot) -> Path:
        return self._layout.snapshot(snapshot.manifest.guest, snapshot=SnapshotId(snapshot.id))

    def _existing(self, snapshot: Snapshot) -> Path:
        folder = self._folder(snapshot)
        if not (folder / MANIFEST).is_file():
            raise SnapshotNotFoundError(f"snapshot {snapshot.id} is gone", remedy="'vmsnap list' shows what is there")
        return folder

    def _resource(self, path: Path, *, kind: ResourceKind, run: RunId, guest: str) -> Resource:
        relative = str(path.relative_to(self._layout.root))
        return Resource(kind=kind, run=run, guest=guest, name=relative, detail=relative)

    def _path(self, resource: Resource) -> Path:
        """Return the path that a resource of this store stands for; nothing else may be reached through one."""
        parts = Path(resource.detail).parts
        ends = {
            ResourceKind.STAGING: ((f"{STAGING_PREFIX}{resource.run}",), (resource.run,)),
            ResourceKind.HOLD: tuple((part, HOLDS, resource.run) for part in parts[1:2] if is_run_id(part)),
        }.get(resource.kind, ())
        if not is_run_id(resource.run) or parts[1:] not in ends or parts[0].startswith((".", "/")):
            raise BugError(f"{resource.detail!r} names nothing in a store", remedy="report it")
        return self._layout.root / resource.detail

    @contextmanager
    def _translated(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise disk_failure(error, doing=doing, folder=self._layout.root) from error


def _after(done: int, total: int, progress: ByteProgress) -> ByteProgress:
    return lambda more, _of_disk: progress(done + more, total)
