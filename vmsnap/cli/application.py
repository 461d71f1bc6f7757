"""What the commands need. ``vmsnap.bootstrap`` has a class of this shape; tests have another."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Protocol

from vmsnap.model.collection import CollectReport
from vmsnap.model.copies import ReplicaCopies
from vmsnap.model.due import DueReport, ForecastReport, PruneReport
from vmsnap.model.environment import Expiry
from vmsnap.model.forgetting import ForgetReport, ForgetWishes
from vmsnap.model.guest import Finding
from vmsnap.model.history import AuditEntry, RunEntry
from vmsnap.model.isolation import Exchange
from vmsnap.model.manifest import Pin, Snapshot
from vmsnap.model.report import (
    Adoption,
    BackupReport,
    EnvironmentStatus,
    ExportOptions,
    ExportReport,
    ForwardOptions,
    ForwardReport,
    ProvisionOptions,
    ProvisionReport,
    ReconcileReport,
    RegisterReport,
    ReplicateReport,
    RestoreOptions,
    RestoreReport,
    ServeOptions,
    ServeReport,
    VerifyReport,
)
from vmsnap.model.schedule import Due
from vmsnap.model.verification import VerifyChoice, VerifyEntry
from vmsnap.monitoring.metrics import Metric
from vmsnap.ports.clock import Cancel
from vmsnap.ports.progress import Progress
from vmsnap.ports.upkeep import CollectWishes


class Application(Protocol):
    """Everything vmsnap can do. Methods raise subclasses of VmsnapError and nothing else, bugs apart.

    ``reference`` is a snapshot's id, an unambiguous prefix of one, ``GUEST@latest`` or ``GUEST@TIME`` (newest not after).
    """

    def backup(self, guest: str, *, progress: Progress, cancel: Cancel) -> BackupReport:
        """Back up a guest once."""

    def run_due(self, *, dry_run: bool, progress: Progress, cancel: Cancel) -> DueReport:
        """Back up what is due, one after another; failures are in the report. Raises BusyError where another does it."""

    def upcoming(self, guest: str, *, count: int) -> tuple[Due, ...]:
        """Return the next runs of a guest by its schedule; fewer where no more come, one with ``at`` None for none."""

    def provision(
        self, reference: str, *, options: ProvisionOptions, progress: Progress, cancel: Cancel
    ) -> ProvisionReport:
        """Make a test VM of a snapshot."""

    def hydrate_environment(self, name: str, *, progress: Progress, cancel: Cancel) -> EnvironmentStatus:
        """Wait until all data of an environment straight from the replica is here, and it runs on that."""

    def prune(self, guest: str | None, *, dry_run: bool, trust_clock: bool = False, many: bool = False) -> PruneReport:
        """Apply retention to one guest or all; a dry run removes nothing. ``trust_clock``: the clock is right.

        ``many``: remove even most of a guest's snapshots. Of all, one that fails stops no other and is in the report.
        """

    def forget(self, wishes: ForgetWishes) -> ForgetReport:
        """Remove snapshots by hand, all that are named or none. Raises HeldError, PreconditionError; nothing is removed then."""

    def collect(self, wishes: CollectWishes, *, progress: Progress, cancel: Cancel) -> CollectReport:
        """Remove what nobody needs at the replica, and lock for longer what is kept. Raises PreconditionError without one.

        Copies of guests whose policy files are wrong are not locked for longer; the report says so.
        """

    def forecast(self, guest: str | None, *, span: timedelta, every: timedelta | None) -> ForecastReport:
        """Return what retention will have kept after ``span`` of a backup each ``every``; None: as scheduled.

        Of all guests, a policy file that is wrong stops no other and is in the report.
        """

    def reconcile(self, adoption: Adoption | None = None) -> ReconcileReport:
        """Undo what dead runs left; with an adoption also runs that no journal knows. See workflow.adopt for what it raises."""

    def doctor(self, guest: str | None) -> tuple[Finding, ...]:
        """Look whether this host, and a guest on it, can be backed up. Changes nothing."""

    def verify(self, reference: str, *, choice: VerifyChoice, progress: Progress, cancel: Cancel) -> VerifyReport:
        """Re-read a snapshot and record what was found; repair it where that is chosen."""

    def verify_due(self, *, progress: Progress, cancel: Cancel) -> tuple[VerifyEntry, ...]:
        """Re-read what the policies want read again; failures are in the entries. Ends early when cancelled."""

    def replicate(self, reference: str, *, progress: Progress, cancel: Cancel) -> ReplicateReport:
        """Copy a snapshot of the local store to the replica. May be repeated; what was sent is not sent again."""

    def restore(self, reference: str, *, options: RestoreOptions, progress: Progress, cancel: Cancel) -> RestoreReport:
        """Bring a snapshot of the replica into the local store, and hold it there as the options say."""

    def export(self, reference: str, *, options: ExportOptions, progress: Progress, cancel: Cancel) -> ExportReport:
        """Write the disks of a snapshot as plain files; one that is not in the local store is taken from the replica."""

    def metrics(self) -> tuple[Metric, ...]:
        """Return all metrics as they are now. Changes nothing, and tells nobody."""

    def pin(self, reference: str, *, pin: Pin | None) -> Snapshot:
        """Hold a snapshot against retention, or (None) let it go."""

    def watch_dhcp(
        self,
        guests: tuple[str, ...],
        *,
        interfaces: tuple[str, ...],
        tell: Callable[[str, Exchange], None],
        cancel: Cancel,
    ) -> None:
        """Keep the last DHCP exchange of the guests, or of all that have a policy, until cancelled.

        ``interfaces`` empty: the bridges that the guests are on. ``tell`` gets the guest and each exchange. Policies are read
        again every few minutes; one that is wrong stops its own guest and no other.
        """

    def snapshots(self, guest: str | None) -> tuple[Snapshot, ...]:
        """Return snapshots, oldest first by guest."""

    def copies(self, guest: str | None) -> ReplicaCopies:
        """Return what the replica has, of one guest or of all. One that cannot be asked is no failure, and is told."""

    def snapshot(self, reference: str) -> Snapshot:
        """Return one snapshot. Raises SnapshotNotFoundError."""

    def environments(self) -> tuple[EnvironmentStatus, ...]:
        """Return all environments, by name."""

    def destroy_environment(self, name: str) -> None:
        """Remove an environment and let its snapshot go. Raises EnvironmentNotFoundError."""

    def expire_environments(self, *, dry_run: bool) -> tuple[Expiry, ...]:
        """Remove the environments whose time has come; one that fails stops no other, and is told. A dry run removes none."""

    def extend_environment(self, name: str, *, expires: datetime | None) -> EnvironmentStatus:
        """Set when an environment expires; None: never. Raises EnvironmentNotFoundError."""

    def forward_environment(
        self,
        name: str,
        *,
        options: ForwardOptions,
        ready: Callable[[ForwardReport], None],
        progress: Progress,
        cancel: Cancel,
    ) -> None:
        """Relay a port of the host to an environment's until cancelled; ``ready`` is told once, when it listens."""

    def serve_environment(
        self,
        name: str,
        *,
        options: ServeOptions,
        ready: Callable[[ServeReport], None],
        progress: Progress,
        cancel: Cancel,
    ) -> None:
        """Relay an environment's ports at its service address until cancelled; ``ready`` is told once."""

    def register_environment(self, name: str) -> RegisterReport:
        """Register an environment's name in the DNS. Raises PreconditionError where its policy says of none."""

    def past_runs(self, guest: str | None, *, failures_only: bool, limit: int | None) -> tuple[RunEntry, ...]:
        """Return runs by the history, the newest first. ``failures_only``: those that failed or died."""

    def audit_trail(self, guest: str | None, *, limit: int | None) -> tuple[AuditEntry, ...]:
        """Return what was done to snapshots and environments, the newest first."""
