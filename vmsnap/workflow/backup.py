"""The main job: clone the running guest, drain and stop its database in the clone, prove it clean, keep the disks."""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

from vmsnap.errors import BugError, BusyError, CleanupError, DriverError, IsolationError, PreconditionError, VmsnapError
from vmsnap.model.admission import Place
from vmsnap.model.capture import CapturePlan
from vmsnap.model.drain import CleanShutdown, DrainReport, Instance
from vmsnap.model.guest import Finding, Guest, Severity
from vmsnap.model.ids import RunId, SnapshotId
from vmsnap.model.isolation import FencePlan, IsolationEvidence
from vmsnap.model.journal import RunKind
from vmsnap.model.lifecycle import Event, State, advance
from vmsnap.model.manifest import Snapshot
from vmsnap.model.policy import Policy
from vmsnap.model.report import BackupReport
from vmsnap.ports.clock import Cancel
from vmsnap.ports.disks import DiskView
from vmsnap.ports.engine import Engine
from vmsnap.ports.guest import GuestControl
from vmsnap.ports.progress import Progress
from vmsnap.ports.state import RunJournal
from vmsnap.workflow import identity, prune, reach
from vmsnap.workflow.booting import absent_since, discover_booted
from vmsnap.workflow.chronicle import Chronicle
from vmsnap.workflow.clone_service import clone_served
from vmsnap.workflow.fencing import prove_fence
from vmsnap.workflow.guard import IsolationGuard, OverlayGuard
from vmsnap.workflow.hinting import Hinting
from vmsnap.workflow.manifests import NVRAM_FILE, Stored, manifest_of
from vmsnap.workflow.pauses import tell_pause, usual_rest_ms
from vmsnap.workflow.proof import StoppedInstance, prove_clean
from vmsnap.workflow.reconcile import left_dead_runs, reconcile
from vmsnap.workflow.run import Run, as_vmsnap_error, closing, undone_on_failure
from vmsnap.workflow.stages import Facts, Quiesced, Running, Subject
from vmsnap.workflow.taking import Taking
from vmsnap.workflow.talk import converse
from vmsnap.workflow.wishes import settings_of
from vmsnap.workflow.world import World

_LOG = logging.getLogger(__name__)
_STOP_SLACK = timedelta(seconds=30)
_RECONCILE_PATIENCE = timedelta(minutes=2)
_RECONCILE_POLL = timedelta(milliseconds=200)


def refuse(findings: tuple[Finding, ...], *, what: str) -> tuple[str, ...]:
    """Raise PreconditionError with every refusal and its remedy; return the warnings."""
    refusals = [finding for finding in findings if finding.severity is Severity.REFUSAL]
    if refusals:
        raise PreconditionError(
            f"{what}: {refusals[0].check}: {refusals[0].message}",
            details="\n".join(f"{item.check}: {item.message}\n  -> {item.remedy}" for item in refusals),
            remedy=refusals[0].remedy,
        )
    return tuple(f"{finding.check}: {finding.message}" for finding in findings if finding.severity is Severity.WARNING)


class Backup:
    """One backup of one guest. Use once."""

    def __init__(self, world: World, *, policy: Policy, progress: Progress, cancel: Cancel) -> None:
        self._world = world
        self._policy = policy
        self._chronicle = Chronicle(world, kind=RunKind.BACKUP, guest=policy.guest)
        self._progress = self._chronicle.telling(progress)
        self._cancel = cancel
        self._state = State.PLANNED
        self._journal: RunJournal | None = None
        self._warnings: tuple[str, ...] = ()

    def run(self) -> BackupReport:
        """Back up the guest.

        Raises BusyError where the guest is worked on already or its clone has no room on the host, PreconditionError before
        anything was touched, and otherwise what went wrong; everything the run made is then undone. CleanupError: the
        snapshot is stored, or not, as it says, and something is left.
        """
        world = self._world
        with world.locks.guest(self._policy.guest, purpose="backup"):
            run_id = world.new_run_id()
            with self._chronicle.of(run_id):
                return self._run(run_id)

    def _run(self, run_id: RunId) -> BackupReport:
        world = self._world
        self._undo_dead_runs(run_id)
        started = world.clock.now()
        subject = self._preflight()
        guest = subject.source.guest
        needed = world.hypervisor.clone_memory_bytes(guest, settings=settings_of(self._policy))
        place = Place(run=run_id, guest=guest.name, memory_bytes=needed)
        with world.admissions.admitted(place, look=world.hypervisor.host_memory):
            self._journal = world.journals.begin(run_id, kind=RunKind.BACKUP, guest=guest.name, at=started)
            run = Run(world, journal=self._journal, progress=self._progress)
            with closing(self._journal):
                snapshot = self._work(run, subject=subject, started=started)
                with run.step("prune"):
                    pruned = self._prune()
        report = self._report(run, snapshot=snapshot, started=started, pruned=pruned)
        self._chronicle.learned(warnings=report.warnings)
        return report

    def _undo_dead_runs(self, run_id: RunId) -> None:
        """Undo what dead runs left of this guest. While another process reconciles, wait, but only if there is something."""
        world = self._world
        patience = world.clock.monotonic() + _RECONCILE_PATIENCE.total_seconds()
        while True:
            try:
                report = reconcile(world, guest=self._policy.guest, holder=run_id)
                break
            except BusyError:
                if not left_dead_runs(world, guest=self._policy.guest):
                    return
                if world.clock.monotonic() >= patience:
                    raise
            self._cancel.check()
            world.clock.sleep(_RECONCILE_POLL)
        for item in report.undone:
            self._progress.note(f"left by dead run {item.run}: {item.kind} {item.name}: {item.failure or 'removed'}")

    def _preflight(self) -> Subject:
        world, policy = self._world, self._policy
        self._progress.step("preflight")
        guest = world.hypervisor.inspect(policy.guest)
        settings = settings_of(policy)
        choice = world.hypervisor.choose_mode(guest, settings=settings)
        warnings = refuse(
            world.hypervisor.findings(guest, settings=settings), what=f"{guest.name!r} cannot be captured"
        )
        needed = sum(disk.size_bytes for disk in guest.disks) if not world.store.snapshots(guest.name) else 0
        warnings += refuse(world.store.findings(needed_bytes=needed), what="the store cannot take a snapshot")
        login = reach.choose(world, policy=policy, guest=guest)
        self._warnings = warnings
        source = identity.know(world, guest=guest, by_agent=login.agent)
        return Subject(source=source, login=login, choice=choice)

    def _advance(self, event: Event) -> None:
        self._state = advance(self._state, event)
        if self._journal is not None:
            self._journal.state(self._state)

    def _work(self, run: Run, *, subject: Subject, started: datetime) -> Snapshot:
        """Do the run and undo what it made; the first error wins, errors of the clean-up go beside it."""
        guest = subject.source.guest
        with undone_on_failure(lambda: self._give_up(run, guest=guest), doing="the backup"):
            snapshot = self._clone_and_store(run, subject=subject, started=started)
        errors = self._discard(run, guest=guest)
        if errors:
            raise CleanupError(f"snapshot {snapshot.id} is stored, but the run left something behind", causes=errors)
        return snapshot

    def _give_up(self, run: Run, *, guest: Guest) -> tuple[VmsnapError, ...]:
        if self._state not in (State.FAILED, State.STORED):
            self._state = advance(self._state, Event.FAIL)
        return self._discard(run, guest=guest)

    def _discard(self, run: Run, *, guest: Guest) -> tuple[VmsnapError, ...]:
        """Undo what the run made; return what went wrong. The journal is finished only where nothing is left."""
        with run.step("discard"):
            errors = run.release_all()
            if errors:
                return errors
            try:
                self._require_home(guest)
                self._advance(Event.DISCARD)
                if self._journal is not None:
                    self._journal.finish()
            except Exception as error:  # noqa: BLE001 - whatever it is, it must not hide why the run failed
                return (as_vmsnap_error(error, doing="the end of the run"),)
            return ()

    def _require_home(self, guest: Guest) -> None:
        if not self._world.hypervisor.source_is_home(guest):
            raise DriverError(
                f"{guest.name!r} is not on its own disks", remedy=f"'vmsnap doctor {guest.name}' says what it is on"
            )

    def _clone_and_store(self, run: Run, *, subject: Subject, started: datetime) -> Snapshot:
        world, policy = self._world, self._policy
        hypervisor = world.hypervisor
        source, login = subject.source, subject.login
        guest = source.guest
        settings = hypervisor.settle(guest, settings=settings_of(policy))
        rest_ms = usual_rest_ms(world.store.snapshots(guest.name))
        plan = CapturePlan(run=run.id, guest=guest, settings=settings, choice=subject.choice, usual_rest_ms=rest_ms)
        fence = FencePlan.for_guest(run.id, guest=guest, addresses=login.addresses)
        clone_resource = hypervisor.clone_resource(plan)
        machine = hypervisor.machine(guest)
        taking = Taking(world, run=run, plan=plan, fence=fence)
        hinting = Hinting(world, run=run, plan=plan, policy=policy, warn=self._warn)
        taking.prepare()
        hinting.begin()
        self._cancel.check()
        capture = taking.capture(cancel=self._cancel)
        self._advance(Event.CAPTURE)
        self._chronicle.learned(pause_ms=capture.pause_ms)
        self._warnings += tell_pause(capture, promised=settings.max_pause, progress=self._progress)
        capture = taking.detach(capture)
        hinting.read()

        def kill_clone() -> None:
            hypervisor.release(clone_resource, deadline=timedelta(seconds=30))

        overlays = OverlayGuard(
            self._cancel,
            free_bytes=lambda: hypervisor.overlay_free_bytes(plan),
            floor_bytes=settings.min_overlay_free_bytes // 2,
            kill_clone=kill_clone,
        )
        guard = IsolationGuard(overlays, cut=lambda: world.fence.cut(fence), kill_clone=kill_clone)
        with overlays:
            try:
                with run.step("restore clone"):
                    clone = hypervisor.restore_clone(plan, fence=fence)
                    taking.give_back_memory()
                with run.step("prove fence"):
                    proof = prove_fence(world, clone=clone, fence=fence)
                    watch = world.fence.watch(fence, proof=proof, alarm=guard.sound)
                with closing(watch):
                    self._advance(Event.FENCE)
                    guard.check()
                    # A command in a clone that a guard has ended would wait for its answer until its deadline.
                    watched = replace(world, access=world.access.cancelled_by(guard))
                    running = Running(
                        world=watched,
                        clone=clone,
                        fence=fence,
                        proof=proof,
                        watch=watch,
                        guard=guard,
                        booted=not plan.choice.mode.takes_memory,
                    )
                    quiesced = self._quiesce(run, running=running, login=login, source=source)
                guard.check()
                views = self._open(run, plan=plan)
                clean = self._prove(run, quiesced=quiesced, views=views)
                facts = Facts(
                    plan=plan,
                    started=started,
                    capture=capture,
                    proof=proof,
                    quiesced=quiesced,
                    clean=clean,
                    machine=machine,
                )
                return self._store(run, hinting=hinting, views=views, facts=facts, cancel=guard)
            except VmsnapError as error:
                if isinstance(error, IsolationError):
                    guard.sound(error)
                # What failed because a guard ended the clone is the guard's failure.
                reason = guard.reason or overlays.reason
                if reason is not None and error is not reason:
                    raise reason from error
                raise

    def _quiesce(self, run: Run, *, running: Running, login: reach.Login, source: identity.Source) -> Quiesced:
        """Let the clone run, reach it, drain and stop its database, and let it power off."""
        world, policy = running.world, self._policy
        clone, guard, watch = running.clone, running.guard, running.watch
        with run.step("resume clone"):
            world.hypervisor.resume_clone(clone, proof=running.proof)
            self._advance(Event.RESUME)
        with run.step("reach clone"):
            control, addressed = reach.reach_clone(
                world,
                policy=policy,
                clone=clone,
                login=login,
                fence=running.fence,
                cancel=guard,
                progress=run.progress,
            )
        with closing(control):
            with run.step("identify clone"):
                evidence = identity.identify(
                    world, source=source, clone=clone, control=control, watch=watch, booted=running.booted
                )
            guard.check()
            with clone_served(
                world,
                run=run,
                fence=running.fence,
                address=addressed.address,
                ports=policy.isolation.clone_ports,
                warn=self._warn,
            ):
                drains, stopped = self._drain_and_stop(run, running=running, control=control, isolation=evidence)
        with run.step("shut down clone"):
            deadline = policy.clone.shutdown_deadline
            self._progress.waiting("the guest to power off", deadline_seconds=deadline.total_seconds())
            by_agent = control.method == "agent"
            shut_down_by = world.hypervisor.shut_down_clone(
                clone, agent_answers=by_agent, deadline=deadline, cancel=guard
            )
            self._advance(Event.SHUT_DOWN)
        return Quiesced(
            addressed=addressed,
            evidence=evidence,
            last=watch.observed(),
            drains=drains,
            stopped=stopped,
            shut_down_by=shut_down_by,
        )

    def _warn(self, text: str) -> None:
        self._progress.note(text)
        self._warnings += (text,)

    def _drain_and_stop(
        self, run: Run, *, running: Running, control: GuestControl, isolation: IsolationEvidence
    ) -> tuple[tuple[DrainReport, ...], tuple[StoppedInstance, ...]]:
        if isolation.run != run.id:
            raise BugError(f"the evidence of isolation is of run {isolation.run}, not of {run.id}")
        world, database = self._world, self._policy.database
        guard, timeout = running.guard, self._policy.control.command_timeout
        engine = world.engine_for(database)
        with run.step("find databases"):
            instances = self._find_databases(engine, running=running, control=control)
            paths = {
                instance: converse(engine.locate(instance), control=control, timeout=timeout, cancel=guard)
                for instance in instances
            }
            reach.run_hooks(database.before_drain, control=control, timeout=timeout)
        drains = []
        with run.step("drain"):
            self._advance(Event.REFUSE_WORK)
            self._progress.waiting("work in flight", deadline_seconds=database.drain_deadline.total_seconds())
            for instance in instances:
                report = converse(
                    engine.drain(instance, deadline=database.drain_deadline),
                    control=control,
                    timeout=database.drain_deadline + timeout,
                    cancel=guard,
                )
                drains.append(report)
                self._progress.note(
                    f"{instance.name}: {report.in_flight_at_start} in flight, {report.finished} finished, "
                    f"{report.rolled_back} rolled back"
                )
            self._advance(Event.DRAIN)
        stopped = []
        with run.step("stop databases"):
            self._progress.waiting("the database to stop", deadline_seconds=database.stop_deadline.total_seconds())
            for instance in instances:
                converse(
                    engine.stop(instance, deadline=database.stop_deadline),
                    control=control,
                    timeout=database.stop_deadline + _STOP_SLACK,
                    cancel=guard,
                )
            for instance in instances:
                evidence = converse(engine.evidence_in_guest(instance), control=control, timeout=timeout, cancel=guard)
                stopped.append(StoppedInstance(instance=instance, in_guest=evidence, paths=paths[instance]))
            # What came up meanwhile would be ended by the power-off, and nobody would know how.
            converse(engine.require_all_stopped(), control=control, timeout=timeout, cancel=guard)
        return tuple(drains), tuple(stopped)

    def _find_databases(self, engine: Engine, *, running: Running, control: GuestControl) -> tuple[Instance, ...]:
        world, policy = running.world, self._policy
        snapshots = world.store.snapshots(policy.guest)
        if running.booted:
            return discover_booted(
                engine, policy=policy, control=control, clock=world.clock, cancel=running.guard, snapshots=snapshots
            )
        timeout = policy.control.command_timeout
        instances = converse(engine.discover(), control=control, timeout=timeout, cancel=running.guard)
        for folder in absent_since(snapshots, instances=instances, engine=engine.name):
            self._warn(f"the server on {folder}, which is in the newest snapshot, does not run, and was not looked at")
        return instances

    def _open(self, run: Run, *, plan: CapturePlan) -> tuple[DiskView, ...]:
        world = self._world
        with run.step("open disks"):
            images = world.hypervisor.clone_images(plan)
            resource = world.export.resource(run.id, guest=plan.guest.name)
            return run.acquire(resource, lambda: world.export.open(run.id, images=images))

    def _prove(self, run: Run, *, quiesced: Quiesced, views: tuple[DiskView, ...]) -> CleanShutdown:
        with run.step("prove clean"):
            clean = prove_clean(
                run.id,
                engine=self._world.engine_for(self._policy.database),
                stopped=quiesced.stopped,
                views=views,
                inspector=self._world.inspector,
                shut_down_by=quiesced.shut_down_by,
                clock=self._world.clock,
            )
            self._advance(Event.PROVE)
            return clean

    def _store(
        self, run: Run, *, hinting: Hinting, views: tuple[DiskView, ...], facts: Facts, cancel: Cancel
    ) -> Snapshot:
        world = self._world
        guest = facts.plan.guest.name
        with run.step("store"):
            began = world.clock.monotonic()
            with world.store.lock(guest, timeout=timedelta(minutes=5)):
                resource = world.store.staging_resource(run.id, guest=guest)
                staging = run.acquire(resource, lambda: world.store.stage(run.id, guest=guest))
                disks = tuple(
                    world.store.write_disk(
                        staging,
                        view=view,
                        progress=self._progress.bytes_done,
                        cancel=cancel,
                        hint=hinting.for_disk(view.target),
                    )
                    for view in views
                )
                nvram = world.hypervisor.clone_nvram(facts.plan)
                if nvram is not None:
                    world.store.add_file(staging, name=NVRAM_FILE, source=Path(nvram))
                stored = Stored(
                    staging=staging,
                    disks=disks,
                    seconds=world.clock.monotonic() - began,
                    hints_distrusted=hinting.verdict(disks),
                )
                manifest = manifest_of(world, run=run, policy=self._policy, facts=facts, stored=stored, warn=self._warn)
                snapshot = world.store.publish(staging, manifest=manifest, clean=facts.clean)
                self._chronicle.learned(snapshot=snapshot.id, store=manifest.store)
            self._advance(Event.STORE)
            hinting.keep()
        return snapshot

    def _prune(self) -> tuple[SnapshotId, ...]:
        """Prune by the policy; the backup is done, so a failure here is a warning."""
        try:
            decisions = prune.prune(self._world, policy=self._policy, dry_run=False)
        except Exception as error:  # noqa: BLE001 - not even a bug there takes the backup back
            told = as_vmsnap_error(error, doing="pruning")
            _LOG.warning("pruning failed: %s", told.brief, exc_info=told is not error)
            self._warnings += (f"pruning failed: {told.brief}",)
            return ()
        return tuple(decision.snapshot.id for decision in decisions if decision.removed_bytes is not None)

    def _report(
        self, run: Run, *, snapshot: Snapshot, started: datetime, pruned: tuple[SnapshotId, ...]
    ) -> BackupReport:
        manifest = snapshot.manifest
        return BackupReport(
            snapshot=snapshot.id,
            guest=manifest.guest,
            started=started,
            finished=self._world.clock.now(),
            capture=manifest.capture,
            isolation=manifest.isolation,
            drain=manifest.drain,
            clean=manifest.clean,
            store=manifest.store,
            reads={disk.target: disk.read for disk in manifest.disks if disk.read is not None},
            steps=run.steps,
            pruned=pruned,
            warnings=self._warnings,
        )
