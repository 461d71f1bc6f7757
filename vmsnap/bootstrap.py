"""The one place that puts drivers into workflows."""

from __future__ import annotations

import logging
import socket
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
from vmsnap.errors import EnvironmentNotFoundError, GuestUnreachableError, PreconditionError, VmsnapError
from vmsnap.exporting import exports_of
from vmsnap.guests.access import Access
from vmsnap.model.collection import CollectReport
from vmsnap.model.copies import ReplicaCopies
from vmsnap.model.due import DueEntry, DueReport, Limits, Outcome, PruneFailure, PruneReport
from vmsnap.model.forecast import Forecast
from vmsnap.model.guest import Finding, Guest, GuestState, Nic, Severity
from vmsnap.model.history import Action, AuditEntry, RunEntry, Trigger
from vmsnap.model.ids import new_run_id
from vmsnap.model.isolation import Exchange
from vmsnap.model.manifest import Pin, Snapshot
from vmsnap.model.policy import EnvironmentPolicy, Policy
from vmsnap.model.report import (
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
    RestoreReport,
    ServeOptions,
    ServeReport,
    VerifyReport,
)
from vmsnap.model.schedule import Due
from vmsnap.model.verification import VerifyChoice, VerifyEntry
from vmsnap.monitoring.metrics import Metric
from vmsnap.network.dns import DnsNames
from vmsnap.network.service import HostServices
from vmsnap.network.watcher import DhcpWatcher, Watched, bridges_of
from vmsnap.offsite import replica_of, upkeep_of
from vmsnap.oversight import Hearing, Oversight
from vmsnap.ports.clock import Cancel
from vmsnap.ports.observer import Observer
from vmsnap.ports.progress import Progress
from vmsnap.ports.upkeep import CollectWishes
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
from vmsnap.stores.images import ImagesStore
from vmsnap.virtual import open_virtual
from vmsnap.workflow.backup import Backup
from vmsnap.workflow.chronicle import audited, known_runs
from vmsnap.workflow.collect import collect, copies_of
from vmsnap.workflow.due import DueRuns, NamedProgress, upcoming_of
from vmsnap.workflow.export import export
from vmsnap.workflow.hinting import hint_findings
from vmsnap.workflow.lazily import find_snapshot, hydrate, tend
from vmsnap.workflow.naming import register
from vmsnap.workflow.provision import Provision, destroy_environment, status_of
from vmsnap.workflow.prune import foresee, prune
from vmsnap.workflow.reach import choose
from vmsnap.workflow.reconcile import reconcile
from vmsnap.workflow.replicate import replicate, replicate_due, with_replica
from vmsnap.workflow.restore import restore
from vmsnap.workflow.run import as_vmsnap_error
from vmsnap.workflow.serve import forward, serve
from vmsnap.workflow.verify import verify, verify_due
from vmsnap.workflow.wishes import settings_of
from vmsnap.workflow.world import World

_LOG = logging.getLogger(__name__)
_LOCK_TIMEOUT = timedelta(minutes=1)


def connect_directly(host: str, port: int, timeout: timedelta) -> socket.socket:
    """Open a TCP connection from the host, as the host's routing says. Raises GuestUnreachableError."""
    try:
        return socket.create_connection((host, port), timeout=timeout.total_seconds())
    except OSError as error:
        raise GuestUnreachableError(
            f"{host} port {port} cannot be reached from this host: {error}",
            remedy="is the address right, and the guest's SSH server running? Where this host may not reach the guest, "
            "give host_key in the policy's [control.ssh]: only the clone is asked then",
        ) from error


def make_world(settings: Settings, *, trigger: Trigger | None = None) -> World:
    """Make the drivers that the settings name. Opens nothing yet. ``trigger`` None: as the process itself tells."""
    clock = SystemClock()
    state = settings.state.path
    virtual = open_virtual(settings, clock=clock)
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
        replica=None if settings.replica is None else replica_of(settings.replica, state=state, clock=clock),
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
        history=SqliteHistory(state),
        starter=starter_of_process(trigger),
        clock=clock,
        engine_for=engine_for,
        new_run_id=new_run_id,
        upkeep=None if settings.replica is None else upkeep_of(settings.replica, clock=clock),
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
        sent = tuple(replicate_due(self._world, policies=policies, progress=progress, cancel=cancel))
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

    def collect(self, wishes: CollectWishes, *, progress: Progress, cancel: Cancel) -> CollectReport:
        """Remove what nobody needs at the replica."""
        return collect(self._world, policies=self._policies.all(), wishes=wishes, progress=progress, cancel=cancel)

    def forecast(self, guest: str | None, *, span: timedelta, every: timedelta | None) -> tuple[Forecast, ...]:
        """Return what retention will have kept, of one guest or of all that have a policy."""
        return tuple(foresee(self._world, policy=policy, span=span, every=every) for policy in self._policies_of(guest))

    def _policies_of(self, guest: str | None) -> tuple[Policy, ...]:
        return (self._policies.get(guest),) if guest is not None else self._policies.all()

    def reconcile(self) -> ReconcileReport:
        """Undo what dead runs left, and look after environments straight from the replica."""
        report = reconcile(self._world)
        tend(self._world, failed=lambda environment, error: _LOG.warning("%s: %s", environment.name, error.brief))
        return report

    def doctor(self, guest: str | None) -> tuple[Finding, ...]:
        """Look whether this host, and a guest on it, can be backed up."""
        found = [*_attempt("hypervisor", self._world.hypervisor.host_findings)]
        if guest is None:
            found.extend(_attempt("store", lambda: self._world.store.findings(needed_bytes=0)))
            replica = self._world.replica
            if replica is not None:
                found.extend(_attempt("replica", replica.findings))
            return tuple(found)
        policy = self._policies.get(guest)
        found.extend(_attempt("guest", lambda: self._guest_findings(policy)))
        return tuple(found)

    def _guest_findings(self, policy: Policy) -> tuple[Finding, ...]:
        world = self._world
        guest = world.hypervisor.inspect(policy.guest)
        first = not world.store.snapshots(guest.name)
        needed = sum(disk.size_bytes for disk in guest.disks) if first else 0
        return (
            *world.hypervisor.findings(guest, settings=settings_of(policy)),
            *world.store.findings(needed_bytes=needed),
            *hint_findings(world, policy=policy, guest=guest),
            *(_attempt("control", lambda: self._control(policy, guest)) if guest.state is GuestState.RUNNING else ()),
        )

    def _control(self, policy: Policy, guest: Guest) -> tuple[Finding, ...]:
        login = choose(self._world, policy=policy, guest=guest)
        way = "its guest agent" if login.agent else "SSH inside the fence"
        return (Finding(check="control", severity=Severity.OK, message=f"the clone will be controlled by {way}"),)

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

    def restore(self, reference: str, *, progress: Progress, cancel: Cancel) -> RestoreReport:
        """Bring a snapshot from the replica into the local store."""
        return restore(self._world, reference=reference, progress=progress, cancel=cancel)

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
        policies = tuple(self._policies.get(guest) for guest in guests) or self._policies.all()
        watched = tuple(policy for policy in policies if policy.isolation.exchanges == "watch")
        if not watched:
            raise PreconditionError(
                "no policy wants its guest's DHCP exchanges watched",
                remedy='write a policy, or set isolation.exchanges = "watch" in it',
            )
        names: dict[str, str] = {}

        def look() -> Watched:
            names.clear()
            taps: set[str] = set()
            for policy in watched:
                for nic in _nics(self._world, guest=policy.guest):
                    names[nic.mac.lower()] = policy.guest
                    taps.update(() if nic.tap is None else (nic.tap,))
            found = frozenset(interfaces) or frozenset(bridges_of(frozenset(taps)))
            return Watched(macs=frozenset(names), interfaces=found)

        def told(exchange: Exchange) -> None:
            tell(names.get(exchange.mac, ""), exchange)

        DhcpWatcher(self._world.exchanges, look=look, tell=told).run(cancel=cancel)

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


def _nics(world: World, *, guest: str) -> tuple[Nic, ...]:
    """Return a guest's NICs; none where it cannot be described now: watching the others goes on."""
    try:
        return world.hypervisor.inspect(guest).nics
    except VmsnapError as error:
        _LOG.warning("the DHCP exchanges of %r are not watched for now: %s", guest, error.brief)
        return ()


def _attempt(check: str, look: Callable[[], tuple[Finding, ...]]) -> tuple[Finding, ...]:
    """Return the findings, or the error as a finding: doctor reports, it does not fail."""
    try:
        return look()
    except VmsnapError as error:
        return (Finding(check=check, severity=Severity.REFUSAL, message=error.brief, remedy=error.remedy),)


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
