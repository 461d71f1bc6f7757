"""Undoing what dead runs left: from their journals, then from the tags of things that no journal has listed.

What bears the id of a run that no journal here knows is told, and left alone: see workflow.adopt.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from vmsnap.errors import BusyError, VmsnapError
from vmsnap.model.history import Action
from vmsnap.model.ids import RunId
from vmsnap.model.journal import Resource, ResourceKind, RunRecord
from vmsnap.model.report import ReconcileReport, TaggedThing, Undone, UnknownRun
from vmsnap.workflow.chronicle import audit, close_dead_runs
from vmsnap.workflow.run import as_vmsnap_error, closing, release_each
from vmsnap.workflow.world import World

_LOG = logging.getLogger(__name__)

ADOPTED = "adopted"
"""The state of a run that no journal knew, once it has one."""

# A thing found by its tag alone is removed in this order: a VM before its fence and the disks it reads, and the source's
# overlays before other files, whose removal may take long.
_ORDER = (
    ResourceKind.DNS_RECORD,
    ResourceKind.SERVICE,
    ResourceKind.ENVIRONMENT,
    ResourceKind.EXPORT,
    ResourceKind.CLONE,
    ResourceKind.FENCE,
    ResourceKind.SOURCE_OVERLAYS,
    ResourceKind.CLONE_OVERLAYS,
    ResourceKind.DISK_COPIES,
    ResourceKind.ENVIRONMENT_DISKS,
    ResourceKind.REPLICA_EXPORT,
    ResourceKind.STAGING,
    ResourceKind.EXPORTED_FILES,
    ResourceKind.MEMORY,
    ResourceKind.HOLD,
)
_OF_TEST_VMS = frozenset(
    {
        ResourceKind.DNS_RECORD,
        ResourceKind.SERVICE,
        ResourceKind.ENVIRONMENT,
        ResourceKind.ENVIRONMENT_DISKS,
        ResourceKind.REPLICA_EXPORT,
        ResourceKind.HOLD,
    }
)


def reconcile(world: World, *, guest: str | None = None, holder: RunId | None = None) -> ReconcileReport:
    """Undo dead runs, of one guest or of all. May be repeated; a run that is alive, or kept, is not touched.

    ``holder``: the run that this is done for, which holds the guest. The history is told which runs have died.
    Raises BusyError where another process reconciles.
    """
    with world.locks.reconcile():
        return undo_dead_runs(world, guest=guest, holder=holder)


def undo_dead_runs(world: World, *, guest: str | None = None, holder: RunId | None = None) -> ReconcileReport:
    """As ``reconcile``, for a caller that holds the lock of reconciling."""
    dead: list[RunId] = []
    undone: list[Undone] = []
    failures: list[VmsnapError] = []
    for record in world.journals.records():
        if _is_over(record) or (guest is not None and record.guest != guest):
            continue
        try:
            found = _undo_run(world, record)
        except Exception as error:  # noqa: BLE001 - one run's broken journal must not keep the others' things
            failures.append(as_vmsnap_error(error, doing=f"undoing run {record.run}"))
            continue
        if found is not None:
            dead.append(record.run)
            undone.extend(found)
    over = _runs_that_are_over(world, guest=guest)
    tagged = _tagged(world)
    unknown = _of_unknown_runs(world, tagged) if guest is None else {}
    strays, stray_runs = _undo_strays(world, [thing for thing in tagged if thing.run in over])
    undone.extend(strays)
    dead.extend(run for run in stray_runs if run not in dead)
    close_dead_runs(world, guest=guest, holder=holder)
    if failures:
        failures[0].also.extend(failures[1:])
        raise failures[0]
    told = tuple(describe(run, things=things) for run, things in unknown.items())
    return ReconcileReport(runs=tuple(dead), undone=tuple(undone), unknown=told)


def things_of_unknown_runs(world: World) -> dict[RunId, tuple[Resource, ...]]:
    """Return what bears the ids of runs that no journal here knows, in the order of its removal. Changes nothing."""
    return _of_unknown_runs(world, _tagged(world))


def describe(run: RunId, *, things: Sequence[Resource]) -> UnknownRun:
    """Return what is told of a run that no journal knows."""
    return UnknownRun(
        run=run,
        guest=next((thing.guest for thing in things if thing.guest), ""),
        test_vm=any(thing.kind in _OF_TEST_VMS for thing in things),
        things=tuple(TaggedThing(kind=thing.kind, name=thing.name, guest=thing.guest) for thing in things),
    )


def left_dead_runs(world: World, *, guest: str) -> bool:
    """Tell whether a run of a guest died and is not undone yet."""
    return any(record.guest == guest and not _is_over(record) for record in world.journals.records())


def _is_over(record: RunRecord) -> bool:
    return record.alive or record.closed or record.kept_for is not None


def _undo_run(world: World, record: RunRecord) -> list[Undone] | None:
    """Undo one run; None where somebody else took it over meanwhile."""
    try:
        journal = world.journals.reopen(record.run)
    except BusyError:
        return None
    _LOG.warning("run %s of %r died in state %s; undoing it", record.run, record.guest, record.state)
    done: list[Undone] = []
    with closing(journal):
        # Of an adopted run they were written down in the order of removal: a clone that runs must not lose its fence or its
        # disks where only some of them were.
        resources = record.unreleased if record.state == ADOPTED else tuple(reversed(record.unreleased))
        released = release_each(world, resources, journal=journal)
        done.extend(_undone(resource, error) for resource, error in released)
        for environment in world.book.all():
            if environment.run == record.run:
                world.book.remove(environment.name)
        if all(item.failure is None for item in done):
            journal.finish()
    failed = [item.failure for item in done if item.failure is not None]
    audit(
        world,
        Action.RECONCILE,
        guest=record.guest,
        subject=record.run,
        detail=f"a {record.kind} that died in state '{record.state}': {len(done) - len(failed)} things removed",
        failure="; ".join(failed) or None,
    )
    return done


def _tagged(world: World) -> list[Resource]:
    """Return everything that bears a run's id, in the order of its removal."""
    found = [resource for owner in world.owners for resource in owner.owned()]
    return sorted(found, key=lambda resource: _ORDER.index(resource.kind))


def _runs_that_are_over(world: World, *, guest: str | None) -> set[RunId]:
    # Not every tag names the guest, so the run's journal does: a fence must not go while its guest's clone is passed over.
    return {record.run for record in world.journals.records() if record.closed and guest in (None, record.guest)}


def _undo_strays(world: World, strays: list[Resource]) -> tuple[list[Undone], list[RunId]]:
    """Undo tagged things whose run's journal says that it is over."""
    done = [_undone(stray, error) for stray, error in release_each(world, strays, journal=None)]
    return done, sorted({stray.run for stray in strays})


def _of_unknown_runs(world: World, tagged: list[Resource]) -> dict[RunId, tuple[Resource, ...]]:
    # The journals are read after the tags: a run begins its journal before it makes anything.
    known = {record.run for record in world.journals.records()}
    unknown = sorted({resource.run for resource in tagged} - known)
    return {run: tuple(resource for resource in tagged if resource.run == run) for run in unknown}


def _undone(resource: Resource, error: VmsnapError | None) -> Undone:
    return Undone(
        run=resource.run,
        kind=resource.kind,
        name=resource.name,
        guest=resource.guest,
        failure=None if error is None else error.brief,
    )
