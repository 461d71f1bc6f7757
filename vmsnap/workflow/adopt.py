"""Adopting runs that no journal knows: after a state directory was lost, tags are all that is left of its runs.

A run that was adopted has a journal, and is a dead run like any other: whatever dies in the middle, the next reconcile goes
on, with what the journal has and then with what only the tags tell.
"""

from __future__ import annotations

from contextlib import ExitStack

from vmsnap.errors import BusyError, PreconditionError
from vmsnap.model.history import Action
from vmsnap.model.ids import RunId
from vmsnap.model.journal import Resource, ResourceKind, RunKind
from vmsnap.model.report import Adoption, ReconcileReport, UnknownRun
from vmsnap.workflow.chronicle import audit
from vmsnap.workflow.reconcile import ADOPTED, describe, things_of_unknown_runs, undo_dead_runs
from vmsnap.workflow.run import closing
from vmsnap.workflow.world import World

_GUIDE = "see 'If the state directory is lost' in the operator's guide"
# A store may be shared with another host, whose processes cannot be seen from here.
_IN_STORE = frozenset(
    {ResourceKind.STAGING, ResourceKind.HOLD, ResourceKind.ENVIRONMENT_DISKS, ResourceKind.REPLICA_EXPORT}
)
_Things = dict[RunId, tuple[Resource, ...]]


def adopt(world: World, adoption: Adoption) -> ReconcileReport:
    """Take over runs that no journal here knows, and undo them, and dead runs too. May be repeated until it is done.

    None is taken over unless all can be. Raises PreconditionError for a run that is not one of those, or that is a test VM's
    where that was not allowed for; BusyError where a run may be alive, or another process holds its guest or reconciles.
    """
    chosen = _chosen(world, adoption)
    if adoption.dry_run:
        _require_over(world, chosen)
        return ReconcileReport(runs=(), undone=(), adopted=_told(chosen), dry_run=True)
    with ExitStack() as held:
        for guest in sorted({guest for things in chosen.values() for guest in _guests(things)}):
            held.enter_context(world.locks.guest(guest, purpose="reconcile --adopt"))
        held.enter_context(world.locks.reconcile())
        # Somebody may have undone them before these locks were held.
        chosen = _chosen(world, adoption)
        _require_over(world, chosen)
        for run, things in chosen.items():
            _take_over(world, run, things=things)
        return undo_dead_runs(world).model_copy(update={"adopted": _told(chosen)})


def _told(chosen: _Things) -> tuple[UnknownRun, ...]:
    return tuple(describe(run, things=things) for run, things in chosen.items())


def _guests(things: tuple[Resource, ...]) -> tuple[str, ...]:
    return tuple(sorted({thing.guest for thing in things} - {""}))


def _names(things: tuple[Resource, ...]) -> str:
    return ", ".join(f"{thing.kind} {thing.name}" for thing in things)


def _chosen(world: World, adoption: Adoption) -> _Things:
    found = things_of_unknown_runs(world)
    for run in adoption.runs:
        if run in found:
            _require_fit(run, things=found[run], destroy_test_vms=adoption.destroy_test_vms)
        elif any(record.run == run for record in world.journals.records()):
            raise PreconditionError(
                f"run {run} is in the journals here, so there is nothing to adopt",
                remedy="'vmsnap reconcile' undoes it once it is dead; 'vmsnap env destroy' removes a test VM",
            )
        else:
            raise PreconditionError(
                f"nothing here bears the id of run {run}", remedy="'vmsnap reconcile' lists what no journal knows"
            )
    return {run: found[run] for run in adoption.runs}


def _require_fit(run: RunId, *, things: tuple[Resource, ...], destroy_test_vms: bool) -> None:
    if {thing.kind for thing in things} <= _IN_STORE:
        raise PreconditionError(
            f"of run {run} nothing is left but what is in the store, which a vmsnap on another host may be using: "
            f"{_names(things)}",
            remedy="'vmsnap prune' ends a removal that was cut; where no other host uses this store, and no vmsnap is at "
            f"work, remove it by hand; {_GUIDE}",
        )
    if describe(run, things=things).test_vm and not destroy_test_vms:
        raise PreconditionError(
            f"run {run} is a test VM, or what is left of one, and adopting it destroys it with all that was written in it: "
            f"{_names(things)}",
            remedy=f"to destroy it: vmsnap reconcile --adopt {run} --destroy-test-vms; else leave it as it is: it runs on",
        )


def _require_over(world: World, chosen: _Things) -> None:
    """Raise BusyError where anything shows that a run may be alive, or that its undoing would disturb somebody."""
    for run, things in chosen.items():
        guests = _guests(things) or ("",)
        signs = [sign for guest in guests for sign in world.vitals.signs(run, guest=guest)]
        signs += [sign for guest in guests for sign in world.hypervisor.work_on(guest)]
        if signs:
            first, *others = dict.fromkeys(signs)
            raise BusyError(
                f"run {run} may be alive, and is left alone: {first}",
                details="\n".join(others) or None,
                remedy=f"wait until that has ended, or let the vmsnap that made the run undo it; {_GUIDE}",
            )


def _take_over(world: World, run: RunId, *, things: tuple[Resource, ...]) -> None:
    """Write a journal for a run, from its tags."""
    told = describe(run, things=things)
    for environment in world.book.all():
        if environment.run == run:
            world.book.remove(environment.name)
    kind = RunKind.PROVISION if told.test_vm else RunKind.BACKUP
    with closing(world.journals.begin(run, kind=kind, guest=told.guest, at=world.clock.now())) as journal:
        journal.state(ADOPTED)
        for thing in things:
            journal.intend(thing)
    audit(world, Action.RECONCILE, guest=told.guest, subject=run, detail=f"adopted by its tags: {_names(things)}")
