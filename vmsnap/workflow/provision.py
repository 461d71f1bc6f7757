"""Environments: a test VM from a snapshot, without copying, and its end."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from ipaddress import IPv4Address
from shlex import quote

from vmsnap.errors import CleanupError, IsolationError, PreconditionError, VmsnapError
from vmsnap.model.environment import Environment, EnvironmentPlan
from vmsnap.model.guest import GuestState
from vmsnap.model.history import Action
from vmsnap.model.ids import RunId
from vmsnap.model.isolation import FencePlan, IsolationProof
from vmsnap.model.journal import ResourceKind, RunKind
from vmsnap.model.manifest import Snapshot
from vmsnap.model.policy import EnvironmentPolicy
from vmsnap.model.report import EnvironmentStatus, Origin, ProvisionOptions, ProvisionReport
from vmsnap.ports.clock import Cancel
from vmsnap.ports.progress import Progress
from vmsnap.ports.state import RunJournal
from vmsnap.workflow.chronicle import Chronicle, audit, audited
from vmsnap.workflow.guard import IsolationGuard, alarmed
from vmsnap.workflow.lazily import LazyDisks, find_snapshot
from vmsnap.workflow.location import known_address, resources_of, wait_for_address
from vmsnap.workflow.naming import register_quietly
from vmsnap.workflow.run import Run, as_vmsnap_error, closing, release_each, undone_on_failure
from vmsnap.workflow.talk import wait_until_answers
from vmsnap.workflow.world import World

_ANSWER_DEADLINE = timedelta(minutes=5)
_ADDRESS_DEADLINE = timedelta(seconds=10)
_KILL_DEADLINE = timedelta(seconds=30)
_UUIDS = uuid.UUID("1d3b9a52-7a39-5d0b-8a37-3d2f0d1b8c44")
_MIB = 1 << 20
_LONGEST_NAME = 64


def plan_environment(
    run: RunId, *, snapshot: Snapshot, options: ProvisionOptions, policy: EnvironmentPolicy
) -> EnvironmentPlan:
    """Return the plan of an environment: name, UUID and MACs are new, and the same for the same run."""
    name = options.name or f"{snapshot.manifest.guest[: _LONGEST_NAME - 12]}-test-{run[:4]}"
    if "/" in name or name in (".", "..") or not name.isprintable() or len(name) > _LONGEST_NAME:
        raise PreconditionError(
            f"{name!r} cannot be the name of a VM", remedy=f"up to {_LONGEST_NAME} printable characters without a slash"
        )
    return EnvironmentPlan(
        run=run,
        guest=snapshot.manifest.guest,
        name=name,
        uuid=str(uuid.uuid5(_UUIDS, run)),
        macs=tuple(_mac(run, index) for index in range(len(snapshot.manifest.machine.macs))),
        network=options.network or policy.network,
        memory_bytes=None if policy.memory_mib is None else policy.memory_mib * _MIB,
        vcpus=policy.vcpus,
    )


def _mac(run: RunId, index: int) -> str:
    """Return a MAC with QEMU's prefix (52:54:00), different for each run and NIC."""
    digits = uuid.uuid5(_UUIDS, f"{run}-{index}").hex[:6]
    return f"52:54:00:{digits[:2]}:{digits[2:4]}:{digits[4:]}"


class Provision:
    """One environment to make. Use once."""

    def __init__(
        self, world: World, *, options: ProvisionOptions, policy: EnvironmentPolicy, progress: Progress, cancel: Cancel
    ) -> None:
        self._world = world
        self._options = options
        self._policy = policy
        self._progress = progress
        self._cancel = cancel
        self._origin = Origin.STORE
        self._lazy: LazyDisks | None = None

    def run(self, reference: str, *, found: tuple[Snapshot, Origin] | None = None) -> ProvisionReport:
        """Make the environment and record it; whatever fails before that is undone. ``found``: what the reference names.

        Raises SnapshotNotFoundError, PreconditionError, SafetyError, DriverError. With ``wait``, a test VM whose agent
        does not answer in time raises GuestUnreachableError and stays, for a look at it.
        """
        world = self._world
        snapshot, self._origin = found or find_snapshot(world, reference, origin=self._options.origin)
        chronicle = Chronicle(world, kind=RunKind.PROVISION, guest=snapshot.manifest.guest)
        self._progress = chronicle.telling(self._progress)
        run_id = world.new_run_id()
        with chronicle.of(run_id):
            plan = plan_environment(run_id, snapshot=snapshot, options=self._options, policy=self._policy)
            if self._origin is Origin.REPLICA:
                plan = replace(plan, export_socket=world.exports.socket(run_id))
            chronicle.learned(snapshot=snapshot.id, environment=plan.name)
            where = "in a fence" if plan.network is None else f"on network '{plan.network}'"
            whence = " straight from the replica" if self._origin is Origin.REPLICA else ""
            detail = f"of snapshot {snapshot.id}{whence}, {where}"
            with audited(world, Action.PROVISION, guest=plan.guest, subject=plan.name, detail=detail):
                report = self._make(plan, snapshot=snapshot)
            chronicle.learned(warnings=report.warnings)
        return report

    def _make(self, plan: EnvironmentPlan, *, snapshot: Snapshot) -> ProvisionReport:
        world = self._world
        began, started = world.clock.monotonic(), world.clock.now()
        self._refuse_taken_name(plan.name)
        journal = world.journals.begin(plan.run, kind=RunKind.PROVISION, guest=plan.guest, at=started)
        run = Run(world, journal=journal, progress=self._progress)
        with ExitStack() as watching:
            with (
                closing(journal),
                undone_on_failure(lambda: self._undo(run, plan=plan, journal=journal), doing="provisioning"),
            ):
                fence, defined_ms = self._define(run, plan=plan, snapshot=snapshot, began=began)
                proof = self._attach(run, plan=plan, snapshot=snapshot, fence=fence)
                guard = watching.enter_context(self._watched(plan, fence=fence, proof=proof))
                with run.step("start"):
                    world.hypervisor.start_environment(plan, proof=proof)
                    running_ms = (world.clock.monotonic() - began) * 1000
                environment = self._record(plan, snapshot=snapshot, started=started)
                guard.check()
                journal.keep(plan.name)
                run.keep_all()
            answered_ms = self._settle(run, plan=plan, began=began, guard=guard)
        address, dns_name, warnings = self._name(environment)
        return ProvisionReport(
            environment=plan.name,
            snapshot=snapshot.id,
            guest=plan.guest,
            state=world.hypervisor.environment_state(plan.name),
            defined_ms=round(defined_ms, 1),
            running_ms=round(running_ms, 1),
            overlay_bytes=world.hypervisor.environment_written_bytes(plan.run),
            address=None if address is None else str(address),
            expires=environment.expires,
            answered_ms=answered_ms,
            reach=f"vmsnap env forward {quote(plan.name)} PORT",
            origin=self._origin,
            dns_name=dns_name,
            warnings=warnings,
        )

    def _name(self, environment: Environment) -> tuple[IPv4Address | None, str | None, tuple[str, ...]]:
        """Return the address of one on a network, where it was waited for, and register it where the policy says so."""
        address = None
        unknown: tuple[str, ...] = ()
        if self._options.wait and environment.network is not None:
            try:
                address = wait_for_address(self._world, environment, deadline=_ADDRESS_DEADLINE)
            except Exception as error:  # noqa: BLE001 - it runs; how it is reached can be asked for later
                told = as_vmsnap_error(error, doing="looking for the address")
                unknown = (f"its address is not known: {told.brief}",)
        dns_name, unregistered = register_quietly(self._world, environment, policy=self._policy, address=address)
        warnings = (*unknown, *unregistered)
        for warning in warnings:
            self._progress.note(warning)
        return address, dns_name, warnings

    def _refuse_taken_name(self, name: str) -> None:
        if any(environment.name == name for environment in self._world.book.all()):
            raise PreconditionError(
                f"there is already an environment {name!r}",
                remedy=f"vmsnap env destroy {name}, or choose another --name",
            )

    def _define(
        self, run: Run, *, plan: EnvironmentPlan, snapshot: Snapshot, began: float
    ) -> tuple[FencePlan | None, float]:
        world, hypervisor, store = self._world, self._world.hypervisor, self._world.store
        machine = snapshot.manifest.machine
        with run.step("define"):
            if plan.export_socket is not None:
                self._lazy = LazyDisks(world, run=run, plan=plan, snapshot=snapshot)
                self._lazy.prepare(policy=self._policy)
            else:
                hold = store.hold_resource(run.id, snapshot=snapshot)
                run.acquire(hold, lambda: store.hold(hold))
                nvram = None if machine.nvram is None else str(store.file(snapshot, name=machine.nvram))
                images = store.images(snapshot)
                run.acquire(
                    hypervisor.environment_disks_resource(plan),
                    lambda: hypervisor.prepare_environment_disks(plan, images=images, nvram=nvram),
                )
            fence = None
            if plan.network is None:
                fence = FencePlan.for_macs(run.id, guest=plan.guest, macs=plan.macs)
                built = fence
                with alarmed():
                    run.acquire(world.fence.resource(built), lambda: world.fence.build(built))
            run.acquire(
                hypervisor.environment_resource(plan),
                lambda: hypervisor.define_environment(plan, machine=machine, fence=fence),
            )
        self._cancel.check()
        return fence, (world.clock.monotonic() - began) * 1000

    def _attach(
        self, run: Run, *, plan: EnvironmentPlan, snapshot: Snapshot, fence: FencePlan | None
    ) -> IsolationProof | None:
        world = self._world
        with run.step("attach"):
            if self._lazy is not None:
                self._lazy.wait()
            world.hypervisor.attach_environment(plan, machine=snapshot.manifest.machine, fence=fence)
            with alarmed():
                return None if fence is None else world.fence.prove(fence)

    @contextmanager
    def _watched(
        self, plan: EnvironmentPlan, *, fence: FencePlan | None, proof: IsolationProof | None
    ) -> Iterator[IsolationGuard]:
        """Watch the environment's fence as long as this run lasts; a breach ends the VM at once, and then the run."""
        hypervisor = self._world.hypervisor
        resource = hypervisor.environment_resource(plan)
        guard = IsolationGuard(
            self._cancel,
            cut=lambda: None if fence is None else self._world.fence.cut(fence),
            kill_clone=lambda: hypervisor.release(resource, deadline=_KILL_DEADLINE),
        )
        if fence is None or proof is None:
            yield guard
            return
        with closing(self._world.fence.watch(fence, proof=proof, alarm=guard.sound)):
            try:
                yield guard
            except VmsnapError as error:
                # What failed because the guard ended the VM is the guard's failure.
                if guard.reason is None or error is guard.reason:
                    raise
                guard.reason.also.extend(error.also)
                raise guard.reason from error

    def _record(self, plan: EnvironmentPlan, *, snapshot: Snapshot, started: datetime) -> Environment:
        ttl = self._options.ttl if self._options.ttl is not None else self._policy.ttl
        environment = Environment(
            name=plan.name,
            run=plan.run,
            guest=plan.guest,
            snapshot=snapshot.id,
            created=started,
            expires=None if ttl is None else started + ttl,
            network=plan.network,
        )
        self._world.book.add(environment)
        return environment

    def _undo(self, run: Run, *, plan: EnvironmentPlan, journal: RunJournal) -> tuple[VmsnapError, ...]:
        """Undo what was made; return what went wrong. The journal is finished only where nothing is left."""
        errors: list[VmsnapError] = []
        try:
            # It may be kept already. If this process dies now, reconcile goes on.
            journal.unkeep()
        except Exception as error:  # noqa: BLE001 - whatever it is, the rest is undone
            errors.append(as_vmsnap_error(error, doing="the journal"))
        left = run.release_all()
        errors.extend(left)
        try:
            _forget(self._world, name=plan.name, run=plan.run)
            if not left:
                journal.finish()
        except Exception as error:  # noqa: BLE001 - it must not hide why provisioning failed
            errors.append(as_vmsnap_error(error, doing="the end of the run"))
        return tuple(errors)

    def _settle(self, run: Run, *, plan: EnvironmentPlan, began: float, guard: IsolationGuard) -> float | None:
        """Wait where that was asked for; remove the environment whose fence broke meanwhile."""
        try:
            answered_ms = self._wait(run, plan=plan, began=began, cancel=guard) if self._options.wait else None
            if guard.reason is not None:
                raise guard.reason
        except IsolationError as breach:
            try:
                destroy_environment(self._world, name=plan.name)
            except VmsnapError as error:
                breach.also.append(error)
            raise
        return answered_ms

    def _wait(self, run: Run, *, plan: EnvironmentPlan, began: float, cancel: Cancel) -> float:
        world = self._world
        with run.step("wait"):
            self._progress.waiting("the guest agent", deadline_seconds=_ANSWER_DEADLINE.total_seconds())
            control = world.access.agent(world.hypervisor.agent(plan.name))
            with closing(control):
                wait_until_answers(control, deadline=_ANSWER_DEADLINE, clock=world.clock, cancel=cancel)
        return round((world.clock.monotonic() - began) * 1000, 1)


def destroy_environment(world: World, *, name: str, action: Action = Action.DESTROY) -> None:
    """End an environment and let its snapshot go. May be repeated after a failure. ``action``: for the audit trail.

    Raises EnvironmentNotFoundError, BusyError, CleanupError.
    """
    environment = world.book.get(name)
    detail = f"of snapshot {environment.snapshot}"
    if action is Action.EXPIRE:
        # Nobody asked, and it is tried again at each tick: what fails is in the log, and would fill the trail.
        _destroy(world, environment)
        audit(world, action, guest=environment.guest, subject=name, detail=detail)
        return
    with audited(world, action, guest=environment.guest, subject=name, detail=detail):
        _destroy(world, environment)


def _destroy(world: World, environment: Environment) -> None:
    name = environment.name
    records = {record.run: record for record in world.journals.records()}
    record = records.get(environment.run)
    if record is None:
        raise PreconditionError(
            f"the journal of environment {name!r} (run {environment.run}) is missing",
            remedy="remove the VM with 'virsh destroy' and 'virsh undefine', then its entry in the state folder",
        )
    journal = world.journals.reopen(environment.run)
    with closing(journal):
        # From here on the run counts as dead: if this process dies too, reconcile goes on.
        journal.unkeep()
        released = release_each(world, reversed(record.unreleased), journal=journal)
        stuck = [(resource, error) for resource, error in released if error is not None]
        errors = [error for _, error in stuck]
        if any(resource.kind is not ResourceKind.DNS_RECORD for resource, _ in stuck):
            raise CleanupError(f"environment {name!r} was not removed completely", causes=errors)
        _forget(world, name=name, run=environment.run)
        if errors:
            raise CleanupError(f"environment {name!r} is gone, but its name is still in the DNS", causes=errors)
        journal.finish()


def _forget(world: World, *, name: str, run: RunId) -> None:
    """Take an environment out of the book, unless the name meanwhile belongs to another run's."""
    if any(item.name == name and item.run == run for item in world.book.all()):
        world.book.remove(name)


def status_of(world: World, environment: Environment) -> EnvironmentStatus:
    """Return an environment and how it is now; a VM that is gone has no state."""
    state: GuestState | None = None
    try:
        state = world.hypervisor.environment_state(environment.name)
    except PreconditionError:
        state = None
    return EnvironmentStatus(
        environment=environment,
        state=state,
        overlay_bytes=world.hypervisor.environment_written_bytes(environment.run),
        service_address=None if environment.network is not None else _text(known_address(world, environment)),
        dns_name=next((item.name for item in resources_of(world, environment, kind=ResourceKind.DNS_RECORD)), None),
        export=world.exports.status(environment.run),
    )


def _text(address: IPv4Address | None) -> str | None:
    return None if address is None else str(address)
