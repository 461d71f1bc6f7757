"""Serving the replica's disks to environments while their data still lies in the replica."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Protocol

from vmsnap.model.capture import DiskImage
from vmsnap.model.export import ExportPlan, ExportStatus
from vmsnap.model.ids import RunId
from vmsnap.model.journal import Resource
from vmsnap.ports.owner import Owner


class BlockSource(Protocol):
    """One disk as it lies in the replica, in blocks of 64 KiB. Safe to use from several threads."""

    @property
    def size_bytes(self) -> int:
        """Return the disk's size."""

    @property
    def identity(self) -> bytes:
        """Return 32 bytes that differ wherever a disk's content, or the repository it lies in, does."""

    def holes(self, first: int, count: int) -> Sequence[bool]:
        """Tell of blocks in a row which are holes. Raises as ``read``."""

    def read(self, first: int, count: int) -> bytes:
        """Return blocks in a row, each checked against its digest; the last block of a disk may be short.

        Raises StoreUnreachableError or PreconditionError where another try may help, any other VmsnapError where the data is
        damaged or gone.
        """


class ReplicaExports(Owner, Protocol):
    """Processes of their own, one an environment, that outlive whoever started them. Owns REPLICA_EXPORT.

    An export holds its snapshot in the replica as long as its environment needs it.
    """

    def resource(self, plan: ExportPlan) -> Resource:
        """Name an export: its process, its socket and its folder with what was fetched."""

    def socket(self, run: RunId) -> str:
        """Return the path of the export's socket: the same for the same run. Raises PreconditionError for one too long."""

    def begin(self, plan: ExportPlan) -> None:
        """Begin an export without waiting for it. May be repeated: what runs goes on, what died is started again."""

    def revive(self, run: RunId) -> None:
        """Start an export again that died. Does nothing where there is none, it lives, or nobody needs it any more."""

    def hurry(self, run: RunId) -> None:
        """Let an export that hydrates do so at once, instead of when its guest is quiet. May be repeated."""

    def wait(self, plan: ExportPlan, *, deadline: timedelta) -> tuple[DiskImage, ...]:
        """Return the disks as soon as they are served: images of format ``nbd`` whose path is the socket.

        Raises what the export died of, DeadlineError.
        """

    def images(self, run: RunId) -> tuple[DiskImage, ...]:
        """Return the local images of a hydrated export. Raises PreconditionError where it is not."""

    def settled(self, run: RunId) -> None:
        """End the process, and the hold: the environment is on the local images. They stay. May be repeated."""

    def status(self, run: RunId) -> ExportStatus | None:
        """Return how an export is; None where the run has none."""

    def all(self) -> tuple[ExportStatus, ...]:
        """Return all exports of this host, by run."""
