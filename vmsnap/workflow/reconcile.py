"""Undoing what dead runs left: from their journals, then from the tags of things that no journal knows."""

from __future__ import annotations

import logging

from vmsnap.errors import BusyError, VmsnapError
from vmsnap.model.history import Action
from vmsnap.model.ids import RunId
from vmsnap.model.journal import Resource, ResourceKind, RunRecord
from vmsnap.model.report import ReconcileReport, Undone
from vmsnap.workflow.chronicle import audit, close_dead_runs
from vmsnap.workflow.run import as_vmsnap_error, closing, release_each
from vmsnap.workflow.world import World

_LOG = logging.getLogger(__name__)

# A thing found by its tag alone is removed in this order: a clone before the disks it reads, the source's overlay last.
_ORDER = (
    ResourceKind.DNS_RECORD,
    ResourceKind.SERVICE,
    ResourceKind.ENVIRONMENT,
    ResourceKind.EXPORT,
    ResourceKind.CLONE,
    ResourceKind.STAGING,
    ResourceKind.EXPORTED_FILES,
    ResourceKind.CLONE_OVERLAYS,
    ResourceKind.DISK_COPIES,
    ResourceKind.ENVIRONMENT_DISKS,
    ResourceKind.REPLICA_EXPORT,
    ResourceKind.SOURCE_OVERLAYS,
    ResourceKind.FENCE,
    ResourceKind.MEMORY,
    ResourceKind.HOLD,
)


def reconcile(world: World, *, guest: str | None = None, holder: RunId | None = None) -> ReconcileReport:
    """Undo dead runs, of one guest or of all. May be repeated; a run that is alive, or kept, is not touched.

    ``holder``: the run that this is done for, which holds the guest. The history is told which runs have died.
    Raises BusyError where another process reconciles.
    """
    with world.locks.reconcile():
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
        strays, stray_runs = _undo_strays(world, guest=guest)
        undone.extend(strays)
        dead.extend(run for run in stray_runs if run not in dead)
        close_dead_runs(world, guest=guest, holder=holder)
        if failures:
            failures[0].also.extend(failures[1:])
            raise failures[0]
        return ReconcileReport(runs=tuple(dead), undone=tuple(undone))


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
        released = release_each(world, reversed(record.unreleased), journal=journal)
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


def _undo_strays(world: World, *, guest: str | None) -> tuple[list[Undone], list[RunId]]:
    """Undo tagged things whose run's journal says that it is over. A run nobody here knows may be another host's."""
    # Not every tag names the guest, so the run's journal does: a fence must not go while its guest's clone is passed over.
    over = {record.run for record in world.journals.records() if record.closed and guest in (None, record.guest)}
    strays: list[Resource] = []
    for owner in world.owners:
        strays.extend(resource for resource in owner.owned() if resource.run in over)
    strays.sort(key=lambda stray: _ORDER.index(stray.kind))
    done = [_undone(stray, error) for stray, error in release_each(world, strays, journal=None)]
    return done, sorted({stray.run for stray in strays})


def _undone(resource: Resource, error: VmsnapError | None) -> Undone:
    return Undone(
        run=resource.run,
        kind=resource.kind,
        name=resource.name,
        guest=resource.guest,
        failure=None if error is None else error.brief,
    )
