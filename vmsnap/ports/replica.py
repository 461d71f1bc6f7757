"""The other place where snapshots are: copies away from the host, in a bucket of S3 or in a directory."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from vmsnap.model.guest import Finding
from vmsnap.model.ids import SnapshotId
from vmsnap.model.manifest import Snapshot
from vmsnap.model.verification import Checked, Share
from vmsnap.ports.clock import Cancel
from vmsnap.ports.store import ByteProgress, DiskContent


@dataclass(frozen=True, kw_only=True)
class LocalCopy:
    """A snapshot of the local store with its files. ``files`` are those beside the disks, by name. Hold it meanwhile."""

    snapshot: Snapshot
    disks: tuple[DiskContent, ...]
    files: tuple[DiskFile, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DiskFile:
    """A small file beside the disks, such as firmware variables."""

    name: str
    data: bytes


@dataclass(frozen=True, kw_only=True)
class Remembered:
    """What this host knows of a guest's copies since it last looked or sent. It may lag behind.

    ``newest``: when the newest copy was captured; None: none is known. ``settled``: snapshots of the local store that were sent
    whole, those that were removed there since then among them.
    """

    newest: datetime | None = None
    settled: frozenset[SnapshotId] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What sending a snapshot came to. ``stored_bytes`` were written. ``there``: it was at the replica already."""

    logical_bytes: int
    stored_bytes: int
    there: bool = False


class Replica(Protocol):
    """Keeps copies of snapshots. What it holds of a guest is shared between snapshots, guests and hosts.

    Errors: SnapshotNotFoundError, VerificationError that names what is damaged, PreconditionError, ConfigError,
    StoreUnreachableError and other DriverErrors.
    """

    def findings(self) -> tuple[Finding, ...]:
        """Look whether the place can be used, and with which key. Changes nothing that stays."""

    def snapshots(self, guest: str | None = None) -> tuple[Snapshot, ...]:
        """Return snapshots, oldest first by guest. Damaged manifests are logged and left out."""

    def find(self, reference: str) -> Snapshot:
        """Return the snapshot that a reference names, as the local store does. Raises SnapshotNotFoundError."""

    def lacking(self, guest: str, *, snapshots: Collection[Snapshot]) -> frozenset[SnapshotId]:
        """Return which of a guest's snapshots were never sent whole. One that was removed there is not lacking.

        What is found is remembered, so that ``remembered`` can tell it.
        """

    def remembered(self, guest: str) -> Remembered:
        """Return what is known here of a guest's copies. Asks nothing of the place: it may be asked often. Raises nothing."""

    def send(self, copy: LocalCopy, *, retain_until: datetime | None, progress: ByteProgress, cancel: Cancel) -> Sent:
        """Copy a snapshot there. May be repeated, after an error too: what was sent is not sent again.

        Blocks are compared with their digests; VerificationError where the local copy is damaged. The snapshot exists there
        once all of it is there. Raises BusyError where another process of this host sends.
        """

    def fetch_disk(self, snapshot: Snapshot, *, content: DiskContent, progress: ByteProgress, cancel: Cancel) -> None:
        """Write a disk's image and digests into files that have their sizes and nothing else. Only reads the replica.

        Every block is compared with its digest. The files are not on the disk for good yet: whoever keeps them sees to that.
        """

    def fetch_files(self, snapshot: Snapshot) -> tuple[DiskFile, ...]:
        """Return the small files beside the disks."""

    def check(
        self, guest: str, *, snapshot: SnapshotId, share: Share | None, progress: ByteProgress, cancel: Cancel
    ) -> Checked:
        """Read a snapshot there again, or a share of it, and compare it with its digests. Defects raise nothing."""

    def mend(self, copy: LocalCopy, *, found: Checked, progress: ByteProgress, cancel: Cancel) -> None:
        """Repair there what ``found`` names, from an intact copy here. May be repeated. Hold the snapshot meanwhile.

        Raises VerificationError where the copy is damaged: nothing there is worse than before then. BusyError where another
        process of this host sends.
        """

    def reader(self, snapshot: Snapshot) -> Callable[[str, int], bytes]:
        """Return what reads a block, by disk and number. It raises VerificationError for one that is damaged there."""
