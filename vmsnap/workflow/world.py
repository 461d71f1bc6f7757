"""Everything a workflow needs from outside, in one value made by ``bootstrap``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vmsnap.errors import BugError
from vmsnap.model.history import Starter
from vmsnap.model.ids import RunId
from vmsnap.model.journal import ResourceKind
from vmsnap.model.policy import DatabasePolicy
from vmsnap.ports.clock import Clock
from vmsnap.ports.disks import DiskExport, DiskInspector
from vmsnap.ports.engine import Engine
from vmsnap.ports.exporting import ExportFolders
from vmsnap.ports.exports import ReplicaExports
from vmsnap.ports.guest import Connector, GuestAccess
from vmsnap.ports.hints import ChangeHints
from vmsnap.ports.history import HistoryBook
from vmsnap.ports.hypervisor import Hypervisor
from vmsnap.ports.names import Names
from vmsnap.ports.network import Addressing, Fence
from vmsnap.ports.owner import Owner
from vmsnap.ports.replica import Replica
from vmsnap.ports.service import Residences, Services
from vmsnap.ports.state import (
    Admissions,
    AttemptBook,
    EnvironmentBook,
    Exchanges,
    Journals,
    Locks,
    RungMemory,
    SampleBook,
)
from vmsnap.ports.store import SnapshotStore
from vmsnap.ports.upkeep import Upkeep
from vmsnap.ports.vitals import Vitals


@dataclass(frozen=True, kw_only=True)
class World:
    """The drivers of one installation. ``direct`` connects from the host, to production; it reads SSH host keys.

    ``replica`` None: the host has none. ``starter``: who or what started this process, for the history.
    ``upkeep`` None: there is no replica.
    """

    hypervisor: Hypervisor
    hints: ChangeHints
    fence: Fence
    addressing: Addressing
    services: Services
    residences: Residences
    names: Names
    access: GuestAccess
    direct: Connector
    export: DiskExport
    inspector: DiskInspector
    store: SnapshotStore
    replica: Replica | None
    exports: ReplicaExports
    folders: ExportFolders
    journals: Journals
    locks: Locks
    admissions: Admissions
    book: EnvironmentBook
    attempts: AttemptBook
    samples: SampleBook
    exchanges: Exchanges
    rungs: RungMemory
    vitals: Vitals
    history: HistoryBook
    starter: Starter
    clock: Clock
    engine_for: Callable[[DatabasePolicy], Engine]
    new_run_id: Callable[[], RunId]
    upkeep: Upkeep | None = None

    @property
    def owners(self) -> tuple[Owner, ...]:
        """Return all owners of resources."""
        return (
            self.hypervisor,
            self.hints,
            self.fence,
            self.services,
            self.names,
            self.export,
            self.exports,
            self.store,
            self.folders,
        )

    def owner_of(self, kind: ResourceKind) -> Owner:
        """Return who releases resources of a kind. Raises BugError for a kind nobody owns."""
        for owner in self.owners:
            if kind in owner.kinds:
                return owner
        raise BugError(f"no driver owns resources of kind {kind}")
