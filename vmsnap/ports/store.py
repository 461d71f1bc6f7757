"""Where snapshots live."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Protocol

from vmsnap.model.capture import DiskImage
from vmsnap.model.drain import CleanShutdown
from vmsnap.model.guest import Finding
from vmsnap.model.hints import DiskHint
from vmsnap.model.ids import RunId, SnapshotId
from vmsnap.model.journal import Resource
from vmsnap.model.manifest import DiskRecord, Manifest, Marks, Pin, Snapshot
from vmsnap.model.verification import Share
from vmsnap.ports.clock import Cancel
from vmsnap.ports.disks import DiskView
from vmsnap.ports.owner import Owner

ByteProgress = Callable[[int, int], None]
"""Called with bytes done and bytes in all, from any thread."""


@dataclass(frozen=True, kw_only=True)
class Staging:
    """A snapshot in the making. It does not exist for anybody else."""

    run: RunId
    guest: str
    previous: SnapshotId | None


@dataclass(frozen=True, kw_only=True)
class DiskContent:
    """A stored disk: its record, its image and its digests, as files that are only to be read."""

    record: DiskRecord
    image: Path
    digests: Path


class SnapshotStore(Owner, Protocol):
    """Keeps snapshots. A folder without a manifest does not exist.

    Holds (by environments) are resources of kind HOLD; releasing one lets the snapshot go.
    Errors: NoSpaceError, SnapshotNotFoundError, HeldError, SafetyError, DriverError.
    """

    def findings(self, *, needed_bytes: int) -> tuple[Finding, ...]:
        """Look whether the store can be used and has room. Changes nothing that stays."""

    def staging_resource(self, run: RunId, *, guest: str) -> Resource:
        """Name the staging folder."""

    def stage(self, run: RunId, *, guest: str) -> Staging:
        """Begin a snapshot, over the guest's newest one where there is one."""

    def write_disk(
        self,
        staging: Staging,
        *,
        view: DiskView,
        progress: ByteProgress,
        cancel: Cancel,
        hint: DiskHint | None = None,
    ) -> DiskRecord:
        """Store one disk: blocks that differ from the previous snapshot's are written, zeroes become holes.

        With a hint since that very snapshot, only blocks that can have changed are read, and a few others: where one of those
        has changed, the hint is wrong, and all is read. The record tells what was done and why.
        """

    def add_file(self, staging: Staging, *, name: str, source: Path) -> None:
        """Store a small file (firmware variables) beside the disks."""

    def publish(self, staging: Staging, *, manifest: Manifest, clean: CleanShutdown) -> Snapshot:
        """Make the snapshot exist: everything on disk, manifest last, then one rename.

        Raises SafetyError where the evidence is not of this run. After a crash the snapshot exists whole or not at all.
        """

    def receive_disk(self, staging: Staging, *, record: DiskRecord, fill: Callable[[DiskContent], None]) -> None:
        """Store one disk as it is in another copy of the snapshot: ``fill`` writes new files, sized already, sparsely.

        Raises VerificationError where the digests that were written are not those of the record.
        """

    def publish_copy(self, staging: Staging, *, manifest: Manifest, pin: Pin | None = None) -> Snapshot:
        """Make a snapshot exist here that was published elsewhere: as ``publish``, but by the digests of its disks.

        With a pin, it is held as soon as it exists: no death and no removal comes between. Raises SafetyError where its
        disks were not all received, PreconditionError where the snapshot is here already.
        """

    def guests(self) -> tuple[str, ...]:
        """Return the guests that have snapshots."""

    def snapshots(self, guest: str | None = None) -> tuple[Snapshot, ...]:
        """Return snapshots, oldest first by guest."""

    def captured(self, guest: str) -> tuple[datetime, ...]:
        """Return when a guest's snapshots were captured, oldest first. Quicker than reading them: it may be asked often."""

    def find(self, reference: str) -> Snapshot:
        """Return the snapshot an id, an unambiguous prefix, ``GUEST@latest`` or ``GUEST@TIME`` names.

        Raises SnapshotNotFoundError, which lists what would match.
        """

    def images(self, snapshot: Snapshot) -> tuple[DiskImage, ...]:
        """Return the stored disks as read-only raw images."""

    def contents(self, snapshot: Snapshot) -> tuple[DiskContent, ...]:
        """Return the stored disks with their digests, for copying them elsewhere. Hold the snapshot meanwhile."""

    def file(self, snapshot: Snapshot, *, name: str) -> Path:
        """Return the path of a file that ``add_file`` stored."""

    def mark(self, snapshot: Snapshot, *, marks: Marks) -> Snapshot:
        """Replace a snapshot's marks, atomically."""

    def hold_resource(self, run: RunId, *, snapshot: Snapshot) -> Resource:
        """Name the hold of a run on a snapshot."""

    def hold(self, resource: Resource) -> None:
        """Hold a snapshot against removal. Raises SnapshotNotFoundError where it is gone."""

    def holders(self, snapshot: Snapshot) -> tuple[RunId, ...]:
        """Return the runs that hold a snapshot."""

    def remove(self, snapshot: Snapshot) -> int:
        """Remove a snapshot: manifest first. Returns bytes that were its own. Raises HeldError."""

    def freed_by(self, snapshots: Sequence[Snapshot]) -> int:
        """Return how many bytes would be free once these snapshots of one guest are all removed. Changes nothing."""

    def finish_removals(self, guest: str) -> tuple[SnapshotId, ...]:
        """Finish removals of a guest's snapshots that were cut, however long ago. Returns which they were.

        Call it under the guest's lock. One that is held meanwhile is a snapshot again.
        """

    def verify(
        self, snapshot: Snapshot, *, share: Share | None = None, progress: ByteProgress, cancel: Cancel
    ) -> tuple[int, tuple[str, ...]]:
        """Read every block, or those of a share, and compare it. Returns the count of blocks read and a line a defect."""

    def mend(self, snapshot: Snapshot, *, read: Callable[[str, int], bytes], cancel: Cancel) -> int:
        """Repair the disks of a snapshot in place, with blocks that ``read`` returns by disk and number. Returns how many.

        Nothing is written that has not the digest of its place. May be repeated. Blocks for which ``read`` raises
        VerificationError stay as they are. Call it under the guest's lock.
        """

    def lock(self, guest: str, *, timeout: timedelta) -> AbstractContextManager[None]:
        """Keep others from publishing or removing snapshots of a guest meanwhile. Raises BusyError."""
