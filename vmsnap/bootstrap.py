"""The one place that puts drivers into workflows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime, timedelta

from vmsnap.config.policies import PolicyBook
from vmsnap.config.settings import Settings
from vmsnap.disks.export import QemuExport
from vmsnap.disks.exporting import LocalFolders
from vmsnap.disks.filesystems import OfflineInspector
from vmsnap.engines.registry import engine_for
from vmsnap.errors import EnvironmentNotFoundError, PreconditionError, VmsnapError
from vmsnap.exporting import exports_of
from vmsnap.guests.access import Access
from vmsnap.model.collection import CollectReport
from vmsnap.model.copies import ReplicaCopies
from vmsnap.model.due import DueEntry, DueReport, ForecastReport, Limits, Outcome, PruneFailure, PruneReport
from vmsnap.model.environment import Expiry
from vmsnap.model.forgetting import ForgetReport, ForgetWishes
from vmsnap.model.guest import Finding
from vmsnap.model.history import Action, AuditEntry, RunEntry, Trigger
from vmsnap.model.ids import new_run_id
from vmsnap.model.isolation import Exchange
from vmsnap.model.manifest import Pin, Snapshot
from vmsnap.model.policy import EnvironmentPolicy, Policy
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
    PruneDecision,
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
from vmsnap.network.direct import connect_directly
from vmsnap.network.dns import DnsNames
from vmsnap.network.service import HostServices
from vmsnap.oversight import Hearing, Oversight
from vmsnap.ports.clock import Cancel, Clock
from vmsnap.ports.observer import Observer
from vmsnap.ports.progress import Progress
from vmsnap.ports.replica import Replica
from vmsnap.ports.upkeep import CollectWishes, Upkeep
from vmsnap.state.admissions import FileAdmissions
from vmsnap.state.attempts import FileAttemptBook
from vmsnap.state.clock import SystemClock
from vmsnap.state.environments import FileEnvironmentBook
from vmsnap.state.exchanges import FileExchanges
from vmsnap.state.history import SqliteHistory
from vmsnap.state.journal import FileJournals
from vmsnap.state.locks import FileLocks
from vmsnap.state.rungs import FileRungMemory
from vmsnap.state.samples import FileSampleBook
from vmsnap.state.starter import starter_of_process
from vmsnap.state.vitals import ProcessVitals
from vmsnap.stores.images import ImagesStore
from vmsnap.virtual import open_virtual
from vmsnap.watching import GuestWatch, watch_dhcp
from vmsnap.workflow.adopt import adopt
from vmsnap.workflow.backup import Backup
from vmsnap.workflow.chronicle import audited, known_runs
from vmsnap.workflow.collect import collect, copies_of
from vmsnap.workflow.due import DueRuns, NamedProgress, upcoming_of
from vmsnap.workflow.examine import examine_guest, examine_host
from vmsnap.workflow.expire import expire
from vmsnap.workflow.export import export
from vmsnap.workflow.forget import forget
from vmsnap.workflow.lazily import find_snapshot, hydrate, tend
from vmsnap.workflow.naming import register
from vmsnap.workflow.provision import Provision, destroy_environment, status_of
from vmsnap.workflow.prune import foresee, prune
from vmsnap.workflow.reconcile import reconcile
from vmsnap.workflow.replicate import replicate, replicate_due, with_replica
from vmsnap.workflow.restore import restore
from vmsnap.workflow.run import as_vmsnap_error
from vmsnap.workflow.serve import forward, serve
from vmsnap.workflow.verify import verify, verify_due
from vmsnap.workflow.world import World

_LOG = logging.getLogger(__name__)
_LOCK_TIMEOUT = timedelta(minutes=1)


def make_world(settings: Settings, *, trigger: Trigger | None = None) -> World:
    """Make the drivers that the settings name. Opens nothing yet. ``trigger`` None: as the process itself tells."""
    clock = SystemClock()
    state = settings.state.path
    virtual = open_virtual(settings, clock=clock)
    replica, upkeep = _offsite(settings, clock=clock)
    return World(
        hypervisor=virtual.hypervisor,
        hints=virtual.hints,
        fence=virtual.fence,
        addressing=virtual.addressing,
        services=HostServices(network=settings.isolation.service_network),
        residences=virtual.residences,
        names=DnsNames(),
        access=Access(clock=clock),
        direct=connect_directly,
        export=QemuExport(runtime_dir=settings.runtime.path),
        inspector=OfflineInspector(),
        replica=replica,
        folders=LocalFolders(),
        store=ImagesStore(settings.store.path, allow_copies=settings.store.allow_copies, now=clock.now),
        exports=exports_of(settings.store.path, runtime=settings.runtime.path, replica=settings.replica),
        journals=FileJournals(state),
        locks=FileLocks(state, clock=clock),
        admissions=FileAdmissions(state, most=settings.limits.clones_per_host),
        book=FileEnvironmentBook(state),
        attempts=FileAttemptBook(state),
        samples=FileSampleBook(state),
        exchanges=FileExchanges(state),
        rungs=FileRungMemory(state),
        vitals=ProcessVitals(),
        history=SqliteHistory(state),
        starter=starter_of_process(trigger),
        clock=clock,
        engine_for=engine_for,
        new_run_id=new_run_id,
        upkeep=upkeep,
    )


def _offsite(settings: Settings, *, clock: Clock) -> tuple[Replica | None, Upkeep | None]:
    if settings.replica is None:
        return None, None
    from vmsnap.offsite import replica_of, upkeep_of  # noqa: PLC0415 - what knows packs takes long to load

    return replica_of(settings.replica, state=settings.state.path, clock=clock), upkeep_of(
        settings.replica, clock=clock
    )


class Application:
    """Everything vmsnap can do, for the commands. See vmsnap.cli.application for the contract of each method."""

    def __init__(
        self, open_world: Callable[[], World], *, policies: PolicyBook, limits: Limits, oversight: Oversight
    ) -> None:
        self._open_world = open_world
        self._world = open_world()
        self._limits = limits
        self._policies = policies
        self._oversight = oversight

    def backup(self, guest: str, *, progress: Progress, cancel: Cancel) -> BackupReport:
        """Back up a guest once."""
        policy = self._policies.get(guest)
        with self._oversight.of_runs(rounds=False) as hearing, hearing.run(guest):
            return self._back_up(policy, progress=progress, cancel=cancel)

    def _back_up(self, policy: Policy, *, progress: Progress, cancel: Cancel) -> BackupReport:
        # Commands in the clone take as long as a drain; a signal has to reach them.
        world = replace(self._world, access=self._world.access.cancelled_by(cancel))
        report = Backup(world, policy=policy, progress=progress, cancel=cancel).run()
        return with_replica(world, report=report, policy=policy, progress=progress, cancel=cancel)

    def _back_up_beside_others(self, policy: Policy, *, progress: Progress, cancel: Cancel) -> BackupReport:
        if self._limits.per_host == 1:
            return self._back_up(policy, progress=progress, cancel=cancel)
        # Drivers of its own, as each process would have, and lines that say whose they are.
        opened = self._open_world()
        world = replace(opened, access=opened.access.cancelled_by(cancel))
        named = NamedProgress(policy.guest, progress=progress)
        report = Backup(world, policy=policy, progress=named, cancel=cancel).run()
        return with_replica(world, report=report, policy=policy, progress=named, cancel=cancel)

    def run_due(self, *, dry_run: bool, progress: Progress, cancel: Cancel) -> DueReport:
        """Back up what is due. A policy file that is wrong is a failure of its guest, and of no other."""
        checks = self._policies.check()
        with ExitStack() as stack:
            hearing = Hearing(None) if dry_run else stack.enter_context(self._oversight.of_runs(rounds=True))

            def back_up(policy: Policy) -> BackupReport:
                with hearing.run(policy.guest):
                    return self._back_up_beside_others(policy, progress=progress, cancel=cancel)

            runs = DueRuns(
                self._world,
                policies=[check.policy for check in checks if check.policy is not None],
                limits=self._limits,
                back_up=back_up,
                progress=progress,
                cancel=cancel,
                reread=self._policies.find,
            )
            report = runs.run(dry_run=dry_run)
            policies = [check.policy for check in checks if check.policy is not None and not dry_run]
            sending = replicate_due(self._world, policies=policies, progress=progress, cancel=cancel)
            sent = tuple(hearing.of_copies(sending, clock=self._world.clock))
        wrong = tuple(
            DueEntry(guest=check.guest or check.path.name, outcome=Outcome.FAILED, error=check.error)
            for check in checks
            if check.error is not None
        )
        return replace(report, entries=(*report.entries, *wrong), replicated=sent)

    def upcoming(self, guest: str, *, count: int) -> tuple[Due, ...]:
        """Return the next runs of a guest by its schedule."""
        return upcoming_of(self._world, self._policies.get(guest), count=count)

    def provision(
        self, reference: str, *, options: ProvisionOptions, progress: Progress, cancel: Cancel
    ) -> ProvisionReport:
        """Make a test VM of a snapshot."""
        found = find_snapshot(self._world, reference, origin=options.origin)
        policy = self._environment_policy(found[0].manifest.guest)
        provision = Provision(self._world, options=options, policy=policy, progress=progress, cancel=cancel)
        return provision.run(reference, found=found)

    def hydrate_environment(self, name: str, *, progress: Progress, cancel: Cancel) -> EnvironmentStatus:
        """Wait until an environment's data has come from the replica."""
        hydrate(self._world, name=name, progress=progress, cancel=cancel)
        return status_of(self._world, self._world.book.get(name))

    def _environment_policy(self, guest: str) -> EnvironmentPolicy:
        """Return what the policy says of environments; a snapshot outlives its guest's policy."""
        try:
            return self._policies.get(guest).environment
        except PreconditionError:
            return EnvironmentPolicy()

    def prune(self, guest: str | None, *, dry_run: bool, trust_clock: bool = False, many: bool = False) -> PruneReport:
        """Apply retention to one guest or to all that have a policy; one that fails stops no other."""
        if guest is not None:
            policy = self._policies.get(guest)
            found = prune(self._world, policy=policy, dry_run=dry_run, trust_clock=trust_clock, many=many)
            return PruneReport(decisions=found)
        decisions: list[PruneDecision] = []
        failures: list[PruneFailure] = []
        for check in self._policies.check():
            error: VmsnapError | None = check.error
            try:
                if check.policy is not None:
                    decisions.extend(
                        prune(self._world, policy=check.policy, dry_run=dry_run, trust_clock=trust_clock, many=many)
                    )
            except Exception as caught:  # noqa: BLE001 - one guest's failure stops no other
                error = as_vmsnap_error(caught, doing="pruning")
            if error is not None:
                failures.append(PruneFailure(guest=check.guest or check.path.name, error=error))
        return PruneReport(decisions=tuple(decisions), failures=tuple(failures))

    def forget(self, wishes: ForgetWishes) -> ForgetReport:
        """Remove snapshots by hand."""
        return forget(self._world, wishes=wishes)

    def collect(self, wishes: CollectWishes, *, progress: Progress, cancel: Cancel) -> CollectReport:
        """Remove what nobody needs at the replica. What is garbage hangs on no policy; what is locked for longer does."""
        checks = self._policies.check()
        policies = [check.policy for check in checks if check.policy is not None]
        report = collect(self._world, policies=policies, wishes=wishes, progress=progress, cancel=cancel)
        locks = self._world.upkeep is not None and self._world.upkeep.locks and not wishes.dry_run
        wrong = tuple(check.error.brief for check in checks if check.error is not None)
        return report.model_copy(update={"unlocked": wrong}) if locks else report

    def forecast(self, guest: str | None, *, span: timedelta, every: timedelta | None) -> ForecastReport:
        """Return what retention will have kept, of one guest or of all that have a policy."""
        if guest is not None:
            return ForecastReport(
                forecasts=(foresee(self._world, policy=self._policies.get(guest), span=span, every=every),)
            )
        checks = sorted(self._policies.check(), key=lambda check: check.guest or check.path.name)
        policies = [check.policy for check in checks if check.policy is not None]
        return ForecastReport(
            forecasts=tuple(foresee(self._world, policy=policy, span=span, every=every) for policy in policies),
            failures=tuple(
                PruneFailure(guest=check.guest or check.path.name, error=check.error) for check in checks if check.error
            ),
        )

    def reconcile(self, adoption: Adoption | None = None) -> ReconcileReport:
        """Undo what dead runs left, and look after environments straight from the replica, or adopt runs."""
        if adoption is not None:
            return adopt(self._world, adoption)
        report = reconcile(self._world)
        tend(self._world, failed=lambda environment, error: _LOG.warning("%s: %s", environment.name, error.brief))
        return report

    def doctor(self, guest: str | None) -> tuple[Finding, ...]:
        """Look whether this host, and a guest on it, can be backed up."""
        if guest is not None:
            return examine_guest(self._world, policy=self._policies.get(guest))
        try:
            checks = self._policies.check()
        except VmsnapError:
            checks = ()  # 'policy check' says why
        policies = [check.policy for check in checks if check.policy is not None]
        return examine_host(self._world, policies=policies, per_host=self._limits.per_host)

    def verify(self, reference: str, *, choice: VerifyChoice, progress: Progress, cancel: Cancel) -> VerifyReport:
        """Re-read a snapshot, and repair it where that is chosen."""
        wish = choice.on(self._world.clock.now().date())
        return verify(self._world, reference=reference, wish=wish, progress=progress, cancel=cancel)

    def verify_due(self, *, progress: Progress, cancel: Cancel) -> tuple[VerifyEntry, ...]:
        """Re-read what is due. A policy file that is wrong is a failure of its guest, and of no other."""
        checks = self._policies.check()
        policies = [check.policy for check in checks if check.policy is not None]
        wrong = tuple(
            VerifyEntry(guest=check.guest or check.path.name, error=check.error) for check in checks if check.error
        )
        return (*verify_due(self._world, policies=policies, progress=progress, cancel=cancel), *wrong)

    def replicate(self, reference: str, *, progress: Progress, cancel: Cancel) -> ReplicateReport:
        """Copy a snapshot to the replica."""
        return replicate(self._world, reference=reference, progress=progress, cancel=cancel)

    def restore(self, reference: str, *, options: RestoreOptions, progress: Progress, cancel: Cancel) -> RestoreReport:
        """Bring a snapshot from the replica into the local store."""
        return restore(self._world, reference=reference, options=options, progress=progress, cancel=cancel)

    def export(self, reference: str, *, options: ExportOptions, progress: Progress, cancel: Cancel) -> ExportReport:
        """Write the disks of a snapshot as plain files."""
        return export(self._world, reference=reference, options=options, progress=progress, cancel=cancel)

    def metrics(self) -> tuple[Metric, ...]:
        """Return all metrics as they are now."""
        return self._oversight.metrics()

    def pin(self, reference: str, *, pin: Pin | None) -> Snapshot:
        """Hold a snapshot against retention, or let it go."""
        named = self._world.store.find(reference)
        guest, action = named.manifest.guest, Action.UNPIN if pin is None else Action.PIN
        detail = "" if pin is None else f"for {pin.owner}, until {pin.until or 'it is taken off'}: {pin.reason}"
        with (
            audited(self._world, action, guest=guest, subject=named.id, detail=detail),
            # Under the lock, so that no prune removes what is being pinned.
            self._world.store.lock(guest, timeout=_LOCK_TIMEOUT),
        ):
            snapshot = self._world.store.find(reference)
            return self._world.store.mark(snapshot, marks=snapshot.marks.model_copy(update={"pin": pin}))

    def watch_dhcp(
        self,
        guests: tuple[str, ...],
        *,
        interfaces: tuple[str, ...],
        tell: Callable[[str, Exchange], None],
        cancel: Cancel,
    ) -> None:
        """Keep the last DHCP exchange of guests until cancelled."""
        watch = GuestWatch(self._world.hypervisor, policies=self._policies, guests=guests, interfaces=interfaces)
        watch_dhcp(self._world, watch=watch, tell=tell, cancel=cancel)

    def snapshots(self, guest: str | None) -> tuple[Snapshot, ...]:
        """Return snapshots, oldest first by guest."""
        return self._world.store.snapshots(guest)

    def copies(self, guest: str | None) -> ReplicaCopies:
        """Return what the replica has."""
        replica = self._world.replica
        return ReplicaCopies() if replica is None else copies_of(replica, guest=guest)

    def snapshot(self, reference: str) -> Snapshot:
        """Return one snapshot."""
        return self._world.store.find(reference)

    def environments(self) -> tuple[EnvironmentStatus, ...]:
        """Return all environments."""
        return tuple(status_of(self._world, environment) for environment in self._world.book.all())

    def destroy_environment(self, name: str) -> None:
        """Remove an environment."""
        destroy_environment(self._world, name=name)

    def expire_environments(self, *, dry_run: bool) -> tuple[Expiry, ...]:
        """Remove environments whose time has come."""
        return tuple(expire(self._world, dry_run=dry_run))

    def extend_environment(self, name: str, *, expires: datetime | None) -> EnvironmentStatus:
        """Set when an environment expires."""
        environment = replace(self._world.book.get(name), expires=expires)
        detail = "until it is destroyed" if expires is None else f"until {expires}"
        with audited(self._world, Action.EXTEND, guest=environment.guest, subject=name, detail=detail):
            self._world.book.replace(environment)
        return status_of(self._world, environment)

    def forward_environment(
        self,
        name: str,
        *,
        options: ForwardOptions,
        ready: Callable[[ForwardReport], None],
        progress: Progress,
        cancel: Cancel,
    ) -> None:
        """Relay a port of the host to an environment's until cancelled."""
        policy = self._policy_of_environment(name)
        forward(self._world, name=name, options=options, policy=policy, ready=ready, waiting=(progress, cancel))

    def serve_environment(
        self,
        name: str,
        *,
        options: ServeOptions,
        ready: Callable[[ServeReport], None],
        progress: Progress,
        cancel: Cancel,
    ) -> None:
        """Relay an environment's ports at its service address until cancelled."""
        policy = self._policy_of_environment(name)
        serve(self._world, name=name, options=options, policy=policy, ready=ready, waiting=(progress, cancel))

    def register_environment(self, name: str) -> RegisterReport:
        """Register an environment's name in the DNS."""
        environment = self._world.book.get(name)
        with audited(self._world, Action.REGISTER, guest=environment.guest, subject=name):
            return register(self._world, environment, policy=self._environment_policy(environment.guest))

    def past_runs(self, guest: str | None, *, failures_only: bool, limit: int | None) -> tuple[RunEntry, ...]:
        """Return runs, the newest first."""
        return known_runs(self._world, guest=guest, failures_only=failures_only, limit=limit)

    def audit_trail(self, guest: str | None, *, limit: int | None) -> tuple[AuditEntry, ...]:
        """Return what was done, the newest first."""
        return self._world.history.trail(guest=guest, limit=limit)

    def _policy_of_environment(self, name: str) -> Policy | None:
        """Return the policy of an environment's guest; an environment outlives it."""
        try:
            return self._policies.get(self._world.book.get(name).guest)
        except EnvironmentNotFoundError:
            raise
        except PreconditionError:
            return None


def open_application(settings: Settings, policies: PolicyBook, *, trigger: Trigger | None = None) -> Application:
    """Return the application for this host's settings and policies. ``trigger``: what the history says started its runs."""
    limits = Limits(per_host=settings.limits.runs_per_host, per_storage=settings.limits.runs_per_storage)
    oversight = Oversight(settings, policies=policies, world=make_world(settings, trigger=trigger))
    return Application(
        lambda: make_world(settings, trigger=trigger), policies=policies, limits=limits, oversight=oversight
    )


def open_observers(settings: Settings, world: World) -> tuple[Observer, ...]:
    """Return who hears what the daemon does with these settings. Nothing is opened before their ``start``.

    ``world``: drivers that nobody else uses: observers look from threads of their own.
    """
    return Oversight(settings, policies=PolicyBook(settings.policies), world=world).observers()
