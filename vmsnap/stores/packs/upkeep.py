"""The port ``Upkeep`` over a repository of packs."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Mapping
from datetime import datetime

from vmsnap.errors import VerificationError
from vmsnap.model.collection import CollectReport
from vmsnap.model.ids import SnapshotId
from vmsnap.model.manifest import Snapshot
from vmsnap.ports.clock import Cancel, Clock
from vmsnap.ports.progress import Progress
from vmsnap.ports.upkeep import CollectWishes, Copies
from vmsnap.stores.packs import holds
from vmsnap.stores.packs.collecting import Collecting, collect, estimate
from vmsnap.stores.packs.lease import Clocks
from vmsnap.stores.packs.manifests import PackedSnapshot
from vmsnap.stores.packs.names import snapshot_name
from vmsnap.stores.packs.removing import remove, require_removable
from vmsnap.stores.packs.repository import Repository
from vmsnap.stores.packs.retaining import retain

_REWRITTEN_BYTES = 4 * 1024 * 1024 * 1024
"""So much is written anew by one pass at most."""


class PackedUpkeep:
    """Keeps a repository of packs in order. It is opened when it is first needed."""

    def __init__(self, opened: Callable[[], Repository], *, clock: Clock, locks: bool, connections: int = 1) -> None:
        self._open = opened
        self._opened: Repository | None = None
        self._guard = threading.Lock()
        self._clock = clock
        self._locks = locks
        self._connections = connections

    @property
    def locks(self) -> bool:
        """Tell whether copies are to be locked."""
        return self._locks

    def copies(self, guest: str) -> Copies:
        """Return what there is of a guest."""
        held = holds.held(self._repository.store, now=self._clock.now())
        found = [Snapshot(manifest=one.body.manifest) for one in self._snapshots(guest)]
        found.sort(key=lambda one: (one.manifest.ranked, one.id))
        return Copies(snapshots=tuple(found), held=frozenset(held))

    def has(self, snapshot: Snapshot) -> bool:
        """Tell whether a copy of a snapshot is there now."""
        name = snapshot_name(snapshot.manifest.guest, snapshot=snapshot.id)
        return isinstance(self._repository.entry(name), PackedSnapshot)

    def require_removable(self, snapshot: Snapshot) -> None:
        """Raise HeldError where removing a copy would."""
        now = self._clock.now()
        require_removable(self._repository, guest=snapshot.manifest.guest, snapshot=snapshot.id, now=now)

    def remove(self, snapshot: Snapshot) -> bool:
        """Remove a copy."""
        return remove(self._repository, guest=snapshot.manifest.guest, snapshot=snapshot.id, now=self._clock.now())

    def lock(self, guest: str, *, until: Mapping[SnapshotId, datetime]) -> int:
        """Lock copies and what they need."""
        return retain(
            self._repository,
            snapshots=self._snapshots(guest),
            until=until,
            connections=self._connections,
            check=lambda: None,
        )

    def collect(self, wishes: CollectWishes, *, progress: Progress, cancel: Cancel) -> CollectReport:
        """Remove garbage, once."""
        how = Collecting(
            holder=socket.gethostname(),
            clocks=Clocks(now=self._clock.now, sleep=self._clock.sleep),
            grace=wishes.grace,
            connections=self._connections,
            rewrite_bytes=_REWRITTEN_BYTES if wishes.rewrite else 0,
            takes_over=wishes.waits,
            note=progress.step,
            check=cancel.check,
        )
        return estimate(self._repository, how=how) if wishes.dry_run else collect(self._repository, how=how)

    @property
    def _repository(self) -> Repository:
        with self._guard:
            if self._opened is None:
                self._opened = self._open()
            return self._opened

    def _snapshots(self, guest: str) -> list[PackedSnapshot]:
        found = []
        for _, entry in self._repository.entries(guest):
            if isinstance(entry, VerificationError):
                raise entry
            found.append(entry)
        return found
