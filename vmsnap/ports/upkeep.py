"""Keeping the replica in order: which copies are there, removing them, locking them, and collecting garbage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol

from vmsnap.model.collection import CollectReport
from vmsnap.model.ids import SnapshotId
from vmsnap.model.manifest import Snapshot
from vmsnap.ports.clock import Cancel
from vmsnap.ports.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Copies:
    """A guest's snapshots at the replica, oldest first, and which of them some environment, of any host, reads from."""

    snapshots: tuple[Snapshot, ...] = ()
    held: frozenset[SnapshotId] = frozenset()


@dataclass(frozen=True, kw_only=True)
class CollectWishes:
    """How to collect. ``grace``: what is found stays for so long. ``waits``: for a collector that may be dead."""

    dry_run: bool = False
    grace: timedelta = timedelta(days=1)
    rewrite: bool = True
    waits: bool = False


class Upkeep(Protocol):
    """Keeps the replica in order. Errors: PreconditionError, VerificationError, StoreUnreachableError, other DriverErrors."""

    @property
    def locks(self) -> bool:
        """Tell whether copies are to be locked against removal by anybody (Object Lock)."""

    def copies(self, guest: str) -> Copies:
        """Return what there is of a guest. Raises VerificationError where a manifest cannot be read."""

    def has(self, snapshot: Snapshot) -> bool:
        """Tell whether a copy of a snapshot is there now."""

    def require_removable(self, snapshot: Snapshot) -> None:
        """Raise HeldError where ``remove`` would, as things are now. Changes nothing."""

    def remove(self, snapshot: Snapshot) -> bool:
        """Remove a copy: its manifest; what only it needed is garbage then. Returns whether it was there. Raises HeldError."""

    def lock(self, guest: str, *, until: Mapping[SnapshotId, datetime]) -> int:
        """Lock copies, with everything they need, at least so long. Returns how many objects were locked for longer."""

    def collect(self, wishes: CollectWishes, *, progress: Progress, cancel: Cancel) -> CollectReport:
        """Remove garbage, once. Raises BusyError where another collector is at it, CancelledError."""
