"""A sample snapshot, and an application that does nothing but remember, for tests of the command line.

``python -m tests.unit.cli_samples ARGUMENTS`` is the real program over that application: ``VMSNAP_TEST_BEHAVIOUR`` says how
it behaves.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

from vmsnap.cli.context import Session
from vmsnap.cli.main import main
from vmsnap.config.policies import PolicyBook
from vmsnap.config.settings import Settings
from vmsnap.errors import (
    BusyError,
    CleanupError,
    ConfigError,
    DeadlineError,
    EnvironmentNotFoundError,
    NotCleanError,
    PreconditionError,
    SnapshotNotFoundError,
    ToolError,
    VmsnapError,
)
from vmsnap.model.capture import CaptureMode
from vmsnap.model.collection import CollectReport, Heap
from vmsnap.model.copies import ReplicaCopies
from vmsnap.model.due import DueEntry, DueReport, ForecastReport, Outcome, PruneFailure, PruneReport
from vmsnap.model.environment import Environment, Expiry
from vmsnap.model.forecast import Forecast, every_so_often, forecast
from vmsnap.model.forgetting import ForgetReport, ForgetWishes, Forgotten
from vmsnap.model.guest import Finding, GuestState, Severity
from vmsnap.model.history import AuditEntry, RunEntry
from vmsnap.model.ids import RunId, SnapshotId
from vmsnap.model.isolation import Exchange, ProofKind, Rung
from vmsnap.model.journal import ResourceKind
from vmsnap.model.manifest import (
    AttemptRecord,
    CaptureRecord,
    CleanRecord,
    DiskRecord,
    DrainRecord,
    FileSystemRecord,
    InstanceRecord,
    IsolationRecord,
    MachineRecord,
    Manifest,
    Marks,
    PausePartRecord,
    Pin,
    ProofRecord,
    ReadRecord,
    Snapshot,
    StepRecord,
    StoreRecord,
)
from vmsnap.model.policy import Policy
from vmsnap.model.report import (
    Adoption,
    BackupReport,
    EnvironmentStatus,
    ExportOptions,
    ExportReport,
    ForwardOptions,
    ForwardReport,
    Place,
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
    TaggedThing,
    Undone,
    UnknownRun,
    VerifyReport,
)
from vmsnap.model.retention_policy import RetentionPolicy
from vmsnap.model.schedule import Due
from vmsnap.model.selection import Candidate
from vmsnap.model.verification import VerifyChoice, VerifyEntry
from vmsnap.monitoring.metrics import Metric, Sample
from vmsnap.ports.clock import Cancel
from vmsnap.ports.progress import Progress
from vmsnap.ports.upkeep import CollectWishes

AT = datetime(2026, 11, 21, 2, 0, 3, tzinfo=UTC)
NOW = AT + timedelta(hours=6)
BEHAVIOUR = "VMSNAP_TEST_BEHAVIOUR"

UNKNOWN_RUNS = (
    UnknownRun(
        run=RunId("00000000e1"),
        guest="db1",
        test_vm=False,
        things=(
            TaggedThing(kind=ResourceKind.CLONE, name="vmsnap-clone-00000000e1", guest="db1"),
            TaggedThing(kind=ResourceKind.SOURCE_OVERLAYS, name="source overlays of db1", guest="db1"),
        ),
    ),
    UnknownRun(
        run=RunId("00000000e2"),
        guest="",
        test_vm=True,
        things=(TaggedThing(kind=ResourceKind.ENVIRONMENT, name="db1-\x1b[31mtest", guest=""),),
    ),
)

ISOLATION = IsolationRecord(
    rung=Rung.NONE,
    address=None,
    seconds=0.412,
    proof=(
        ProofRecord(kind=ProofKind.TOPOLOGY, name="bridge members", observed="vs3fa9b0c1d2t0"),
        ProofRecord(kind=ProofKind.CONTROL, name="nft drop", observed="2"),
    ),
    attempts=(AttemptRecord(rung=Rung.LINK_FLAP, seconds=1.5, failure="no answer"),),
)
DRAIN = (
    DrainRecord(engine="postgresql", instance="15/main", in_flight_at_start=7, finished=6, rolled_back=1, seconds=5.25),
    DrainRecord(engine="postgresql", instance="15/two", in_flight_at_start=2, finished=2, rolled_back=0, seconds=1.5),
)
CLEAN = CleanRecord(
    made=AT + timedelta(seconds=60),
    guest_shut_down_by="agent",
    instances=tuple(
        InstanceRecord(
            engine="postgresql",
            instance=name,
            data_directory=f"/var/lib/postgresql/{name}",
            method="disk",
            observed={"Database cluster state": "shut down"},
        )
        for name in ("15/main", "15/two")
    ),
    file_systems=(FileSystemRecord(disk="vda", kind="ext4", uuid="0a1b", observed="clean"),),
)


def sample(
    identity: str = "3fa9b0c1d2", *, guest: str = "db1", captured: datetime = AT, marks: Marks | None = None
) -> Snapshot:
    """Return a snapshot."""
    manifest = Manifest(
        id=SnapshotId(identity),
        run=RunId(identity),
        guest=guest,
        created=captured + timedelta(seconds=90),
        parent=None,
        machine=MachineRecord(
            hypervisor="libvirt",
            definition="<domain>\n\t<name>db1</name>\n</domain>",
            uuid="u",
            memory_bytes=1 << 30,
            vcpus=2,
        ),
        capture=CaptureRecord(
            mode=CaptureMode.LIVE,
            captured=captured,
            pause_ms=23.4,
            ram_bytes=1 << 30,
            reason="the policy says so",
            parts=(PausePartRecord(name="last pass and devices", ms=11.2), PausePartRecord(name="resume", ms=12.25)),
        ),
        isolation=ISOLATION,
        drain=DRAIN,
        clean=CLEAN,
        disks=(
            DiskRecord(
                target="vda",
                image="vda.raw",
                digests="vda.digests",
                digests_sha256="ab" * 32,
                size_bytes=8 << 30,
                data_bytes=2 << 30,
                new_bytes=300 << 20,
            ),
        ),
        store=StoreRecord(logical_bytes=8 << 30, new_bytes=300 << 20, seconds=4.2, read_bytes=5 << 30),
        steps=(StepRecord(name="capture", seconds=3.25), StepRecord(name="drain", seconds=6.75)),
        vmsnap_version="0.1.0",
    )
    return Snapshot(manifest=manifest, marks=marks or Marks())


def booted(identity: str = "3fa9b0c1d2") -> Snapshot:
    """Return a snapshot of which the disks alone were captured, its guest on its own disks again at once."""
    snapshot = sample(identity)
    said = {"mode": CaptureMode.BOOT, "memory_captured": False, "ram_bytes": 0, "on_overlay_seconds": 0.44, "parts": ()}
    capture = snapshot.manifest.capture.model_copy(update=said)
    return snapshot.model_copy(update={"manifest": snapshot.manifest.model_copy(update={"capture": capture})})


def sample_environment(name: str = "db1-test") -> EnvironmentStatus:
    """Return an environment that runs."""
    environment = Environment(
        name=name,
        run=RunId("00000000e1"),
        guest="db1",
        snapshot=SnapshotId("3fa9b0c1d2"),
        created=AT,
        expires=AT + timedelta(days=1),
        network=None,
    )
    return EnvironmentStatus(environment=environment, state=GuestState.RUNNING, overlay_bytes=196_608)


def failing(behaviour: str) -> VmsnapError | None:
    """Return the error that a behaviour stands for."""
    errors: dict[str, VmsnapError] = {
        "config": ConfigError("wrong file", remedy="mend it"),
        "precondition": PreconditionError("no such guest", remedy="look"),
        "busy": BusyError("guest 'db1' is held by process 1", remedy="wait"),
        "safety": NotCleanError("not clean", details="state: in production\nline two", remedy="look at the log"),
        "deadline": DeadlineError("too slow", remedy="more time"),
        "driver": ToolError("qemu-img failed", details="\x1b[31mred\x1b[0m", remedy="look"),
        "cleanup": CleanupError("left something", causes=[ToolError("bridge is busy")]),
    }
    return errors.get(behaviour)


@dataclass
class FakeApplication:
    """Remembers calls, and answers with samples. ``behaviour`` names an error to raise, or ``bug``, or ``slow``."""

    behaviour: str = ""
    stored: tuple[Snapshot, ...] = (sample(),)
    findings: tuple[Finding, ...] = (Finding(check="libvirt", severity=Severity.OK, message="10.0 answers"),)
    defects: tuple[str, ...] = ()
    repaired: tuple[str, ...] = ()
    verified: tuple[VerifyEntry, ...] = ()
    left: str | None = None
    entries: tuple[DueEntry, ...] = ()
    runs: tuple[Due, ...] = tuple(Due(at=AT + timedelta(days=day), reason="'02:00'") for day in range(1, 9))
    retention: RetentionPolicy = field(
        default_factory=lambda: RetentionPolicy(keep_daily=7, keep_weekly=5, keep_monthly=12)
    )
    existing: tuple[Candidate, ...] = ()
    forecasts: tuple[Forecast, ...] | None = None
    unlocked: tuple[str, ...] = ()
    doubtful: bool = False
    prune_failures: tuple[PruneFailure, ...] = ()
    replica_copies: ReplicaCopies = field(default_factory=ReplicaCopies)
    history: tuple[RunEntry, ...] = ()
    trail: tuple[AuditEntry, ...] = ()
    expiries: tuple[Expiry, ...] = ()
    unknown: tuple[UnknownRun, ...] = ()
    calls: list[tuple[object, ...]] = field(default_factory=list)

    def _called(self, *call: object) -> None:
        self.calls.append(call)
        error = failing(self.behaviour)
        if error is not None:
            error.also.append(ToolError("and then the bridge stayed", remedy="vmsnap reconcile"))
            raise error
        if self.behaviour == "bug":
            msg = "nobody thought of this"
            raise ZeroDivisionError(msg)

    def backup(self, guest: str, *, progress: Progress, cancel: Cancel) -> BackupReport:
        progress.step("check")
        progress.step("capture")
        progress.bytes_done(512, 1024)
        self._called("backup", guest)
        if self.behaviour == "slow":
            self._be_slow(progress, cancel)
        progress.note("rung \x1b[31mlink-flap\x07 failed")
        progress.step("drain")
        progress.waiting("3 transactions", deadline_seconds=60.0)
        progress.waiting("3 transactions", deadline_seconds=59.0)
        return BackupReport(
            snapshot=SnapshotId("3fa9b0c1d2"),
            guest=guest,
            started=AT,
            finished=AT + timedelta(seconds=93.5),
            capture=self.stored[0].manifest.capture,
            isolation=ISOLATION,
            drain=DRAIN,
            clean=CLEAN,
            store=sample().manifest.store,
            reads={
                "vda": ReadRecord(read_bytes=40 << 20, since=SnapshotId("0123456789"), sampled_blocks=512),
                "vdb": ReadRecord(read_bytes=1 << 30, full_because="the guest\nwas off"),
            },
            steps=sample().manifest.steps,
            warnings=("one cluster\nhas a standby",),
        )

    @staticmethod
    def _be_slow(progress: Progress, cancel: Cancel) -> None:
        sys.stderr.write("ready\n")
        sys.stderr.flush()
        try:
            for _ in range(1000):
                cancel.check()
                time.sleep(0.01)
        finally:
            # Clean-up, in which a second signal arrives.
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            progress.step("clean up")
            sys.stderr.write("cleaned up\n")

    def run_due(self, *, dry_run: bool, progress: Progress, cancel: Cancel) -> DueReport:
        self._called("run_due", dry_run)
        reason = "1d after the newest snapshot (2026-11-20 02:00Z)"
        due = Due(at=AT, reason=reason)
        following = Due(at=AT + timedelta(days=1), reason="1d after the newest snapshot (2026-11-21 02:00Z)")
        if dry_run:
            entries = (DueEntry(guest="db1", outcome=Outcome.DUE, due=due),)
        else:
            made = self.backup("db1", progress=progress, cancel=cancel)
            entries = (DueEntry(guest="db1", outcome=Outcome.DONE, due=due, report=made, following=following),)
        return DueReport(started=AT, finished=AT, dry_run=dry_run, entries=(*entries, *self.entries))

    def replicate(self, reference: str, *, progress: Progress, cancel: Cancel) -> ReplicateReport:
        self._called("replicate", reference)
        progress.bytes_done(512, 1024)
        there = reference == "there"
        return ReplicateReport(
            snapshot=SnapshotId("3fa9b0c1d2"),
            guest="db1",
            there=there,
            logical_bytes=8 << 30,
            sent_bytes=0 if there else 3 << 20,
            seconds=1.5,
        )

    def restore(self, reference: str, *, options: RestoreOptions, progress: Progress, cancel: Cancel) -> RestoreReport:
        self._called("restore", reference, options)
        until = None if options.keep is None else AT + options.keep
        pin = None if until is None else Pin(owner=options.owner, reason="restored", since=AT, until=until)
        return RestoreReport(
            snapshot=SnapshotId("3fa9b0c1d2"),
            guest="db1",
            there=reference == "there",
            logical_bytes=8 << 30,
            seconds=1.5,
            pin=pin,
        )

    def export(self, reference: str, *, options: ExportOptions, progress: Progress, cancel: Cancel) -> ExportReport:
        self._called("export", reference, options)
        return ExportReport(
            snapshot=SnapshotId("3fa9b0c1d2"),
            guest="db1",
            source="replica" if options.replica_only else "local",
            image_format=options.image_format,
            files=(str(options.folder / f"vda.{options.image_format}"),),
            seconds=1.5,
        )

    def upcoming(self, guest: str, *, count: int) -> tuple[Due, ...]:
        self._called("upcoming", guest, count)
        return self.runs[:count]

    def provision(
        self, reference: str, *, options: ProvisionOptions, progress: Progress, cancel: Cancel
    ) -> ProvisionReport:
        self._called("provision", reference, options)
        return ProvisionReport(
            environment=options.name or "db1-3fa9",
            snapshot=SnapshotId("3fa9b0c1d2"),
            guest="db1",
            state=GuestState.RUNNING,
            defined_ms=312.0,
            running_ms=604.0,
            overlay_bytes=196_608,
            address=None,
            expires=AT + timedelta(days=1),
            reach=f"vmsnap env forward {options.name or 'db1-3fa9'} PORT",
        )

    def prune(self, guest: str | None, *, dry_run: bool, trust_clock: bool = False, many: bool = False) -> PruneReport:
        self._called("prune", guest, dry_run, trust_clock, many)
        decisions = (
            PruneDecision(
                snapshot=sample("00000000a1", captured=AT - timedelta(days=9)),
                keep=False,
                reasons=("beyond keep_last 7",),
                removed_bytes=None if dry_run else 3 << 20,
            ),
            PruneDecision(
                snapshot=sample(),
                keep=True,
                reasons=("the newest", "in use by an environment"),
                rules=("newest", "in-use", *(["clock-in-doubt"] if self.doubtful else [])),
            ),
        )
        return PruneReport(decisions=decisions, failures=self.prune_failures)

    def forget(self, wishes: ForgetWishes) -> ForgetReport:
        self._called("forget", wishes)
        if wishes.references == ("cut",):
            return ForgetReport(guest="db1", reason=wishes.reason, dry_run=False)
        away = (Place.REPLICA,) if wishes.replica else ()
        entries = tuple(
            Forgotten(snapshot=sample(), place=place, copy_stays=not wishes.replica) for place in (Place.LOCAL, *away)
        )
        return ForgetReport(
            guest="db1",
            reason=wishes.reason,
            dry_run=wishes.dry_run,
            entries=entries,
            freed_bytes=3 << 20,
            confirm=("no copy is left anywhere of 3fa9b0c1d2",) if wishes.replica else (),
        )

    def collect(self, wishes: CollectWishes, *, progress: Progress, cancel: Cancel) -> CollectReport:
        self._called("collect", wishes)
        progress.step("looking what the snapshots need")
        return CollectReport(
            started=AT,
            finished=AT + timedelta(seconds=9),
            dry_run=wishes.dry_run,
            snapshots=3,
            used=Heap(objects=40, size_bytes=600 << 20),
            removed=Heap() if wishes.dry_run else Heap(objects=2, size_bytes=30 << 20),
            found=Heap(objects=1, size_bytes=16 << 20),
            waiting=Heap(objects=4, size_bytes=64 << 20),
            reasons=() if wishes.dry_run else ("what is found stays for 1d first",),
            unlocked=self.unlocked,
        )

    def forecast(self, guest: str | None, *, span: timedelta, every: timedelta | None) -> ForecastReport:
        self._called("forecast", guest, span, every)
        if self.forecasts is not None:
            return ForecastReport(forecasts=self.forecasts, failures=self.prune_failures)
        policy = Policy(guest=guest or "db1", retention=self.retention, time_zone="Europe/Berlin")
        moments = every_so_often(every or timedelta(days=1), now=NOW)
        found = forecast(self.existing, policy=policy, moments=moments, now=NOW, span=span, every=every)
        return ForecastReport(forecasts=(found,), failures=self.prune_failures)

    def reconcile(self, adoption: Adoption | None = None) -> ReconcileReport:
        self._called("reconcile", adoption)
        run = RunId("00000000d1")
        if adoption is not None and adoption.dry_run:
            return ReconcileReport(runs=(), undone=(), adopted=UNKNOWN_RUNS[:1], dry_run=True)
        return ReconcileReport(
            unknown=self.unknown,
            runs=(run,),
            undone=(
                Undone(run=run, kind=ResourceKind.CLONE, name="vmsnap-clone", guest="db1"),
                Undone(run=run, kind=ResourceKind.FENCE, name="vmsnap-fence", guest="db1", failure=self.left),
            ),
        )

    def doctor(self, guest: str | None) -> tuple[Finding, ...]:
        self._called("doctor", guest)
        return self.findings

    def metrics(self) -> tuple[Metric, ...]:
        self._called("metrics")
        return (
            Metric(name="vmsnap_alarms", text="Wrong.", label_names=(), samples=(Sample(value=2, labels={}),)),
            Metric(
                name="vmsnap_guest_overdue",
                text="Overdue.",
                label_names=("guest",),
                samples=(Sample(value=1, labels={"guest": 'db"1'}),),
            ),
        )

    def verify(self, reference: str, *, choice: VerifyChoice, progress: Progress, cancel: Cancel) -> VerifyReport:
        self._called("verify", reference, choice)
        return VerifyReport(
            snapshot=SnapshotId("3fa9b0c1d2"),
            guest="db1",
            replica=choice.replica,
            sample=None if choice.sample is None else "3 of 20",
            blocks=32768,
            defects=self.defects,
            repaired=self.repaired,
            seconds=1.9,
        )

    def verify_due(self, *, progress: Progress, cancel: Cancel) -> tuple[VerifyEntry, ...]:
        self._called("verify_due")
        return self.verified

    def pin(self, reference: str, *, pin: Pin | None) -> Snapshot:
        self._called("pin", reference, pin)
        return sample(marks=Marks(pin=pin))

    def watch_dhcp(
        self,
        guests: tuple[str, ...],
        *,
        interfaces: tuple[str, ...],
        tell: Callable[[str, Exchange], None],
        cancel: Cancel,
    ) -> None:
        self._called("watch_dhcp", guests, interfaces)
        exchange = Exchange(
            mac="52:54:00:aa:00:01", address=IPv4Address("192.0.2.7"), server=IPv4Address("192.0.2.1"), xid=1, seen=AT,
            nonce=b"0123456789abcdef", client="dhcpcd\x1b[1m", vlan=7,
        )  # fmt: skip
        tell("db1", exchange)
        tell("db1", replace(exchange, nonce=None, vlan=None, client=""))

    def snapshots(self, guest: str | None) -> tuple[Snapshot, ...]:
        return tuple(item for item in self.stored if guest in {None, item.manifest.guest})

    def copies(self, guest: str | None) -> ReplicaCopies:
        self._called("copies", guest)
        return self.replica_copies

    def snapshot(self, reference: str) -> Snapshot:
        self._called("snapshot", reference)
        if reference.startswith("3fa9") or "@" in reference:
            return self.stored[0]
        raise SnapshotNotFoundError(f"no snapshot '{reference}'", remedy="there is 3fa9b0c1d2")

    def forward_environment(
        self,
        name: str,
        *,
        options: ForwardOptions,
        ready: Callable[[ForwardReport], None],
        progress: Progress,
        cancel: Cancel,
    ) -> None:
        self._called("forward", name, options)
        progress.step("reach")
        ready(
            ForwardReport(
                environment=name,
                port=options.port,
                listen_address=options.listen_address,
                listen_port=options.listen_port or 40001,
                address="10.9.8.77",
            )
        )
        self._until_stopped(cancel)

    def serve_environment(
        self,
        name: str,
        *,
        options: ServeOptions,
        ready: Callable[[ServeReport], None],
        progress: Progress,
        cancel: Cancel,
    ) -> None:
        self._called("serve", name, options)
        ready(
            ServeReport(
                environment=name,
                service_address="198.18.3.1",
                ports=options.ports or (22, 5432),
                address="10.9.8.77",
                dns_name="db1-test.test.example",
            )
        )
        self._until_stopped(cancel)

    def _until_stopped(self, cancel: Cancel) -> None:
        """Go on until a signal comes, which a test sends; where it sends none, end at once."""
        while self.behaviour == "slow" and not cancel.is_set():
            time.sleep(0.01)

    def register_environment(self, name: str) -> RegisterReport:
        self._called("register", name)
        return RegisterReport(environment=name, dns_name="db1-test.test.example", address="198.18.3.1")

    def environments(self) -> tuple[EnvironmentStatus, ...]:
        self._called("environments")
        return (sample_environment(),)

    def destroy_environment(self, name: str) -> None:
        self._called("destroy", name)
        if name != "db1-test":
            raise EnvironmentNotFoundError(f"there is no environment '{name}'", remedy="there is 'db1-test'")

    def expire_environments(self, *, dry_run: bool) -> tuple[Expiry, ...]:
        self._called("expire", dry_run)
        return self.expiries

    def hydrate_environment(self, name: str, *, progress: Progress, cancel: Cancel) -> EnvironmentStatus:
        self._called("hydrate", name)
        return sample_environment(name)

    def extend_environment(self, name: str, *, expires: datetime | None) -> EnvironmentStatus:
        self._called("extend", name, expires)
        status = sample_environment(name)
        environment = Environment(
            name=name,
            run=status.environment.run,
            guest="db1",
            snapshot=status.environment.snapshot,
            created=AT,
            expires=expires,
            network=None,
        )
        return EnvironmentStatus(environment=environment, state=status.state, overlay_bytes=0)

    def past_runs(self, guest: str | None, *, failures_only: bool, limit: int | None) -> tuple[RunEntry, ...]:
        self._called("past_runs", guest, failures_only, limit)
        return self.history

    def audit_trail(self, guest: str | None, *, limit: int | None) -> tuple[AuditEntry, ...]:
        self._called("audit_trail", guest, limit)
        return self.trail


def session_over(application: FakeApplication) -> Session:
    """Return a session whose application is the given one, at a fixed time."""

    def open_application(_settings: Settings, _policies: PolicyBook) -> FakeApplication:
        return application

    return Session(open_application=open_application, now=lambda: NOW)


def write_config(folder: Path) -> Path:
    """Write a configuration with one policy, for the guest ``db1``, and return its file."""
    (folder / "policies").mkdir()
    (folder / "policies" / "db1.toml").write_text("[retention]\nkeep_last = 3\n")
    path = folder / "vmsnap.toml"
    path.write_text(f'[store]\npath = "{folder}/store"\n[state]\npath = "{folder}/state"\n')
    return path


if __name__ == "__main__":
    main(session_over(FakeApplication(behaviour=os.environ.get(BEHAVIOUR, ""))))
