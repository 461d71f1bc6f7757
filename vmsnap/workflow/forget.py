"""Removing snapshots by hand: what somebody has to have erased, or all of a guest that is retired."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

from vmsnap.errors import (
    ConfigError,
    HeldError,
    PreconditionError,
    SnapshotNotFoundError,
    VmsnapError,
)
from vmsnap.model.copies import ReplicaCopies
from vmsnap.model.forgetting import ForgetReport, ForgetWishes, entries_of, objections, reasons_to_confirm
from vmsnap.model.history import Action
from vmsnap.model.ids import SnapshotId
from vmsnap.model.journal import Resource, ResourceKind
from vmsnap.model.manifest import Snapshot
from vmsnap.model.report import Place
from vmsnap.ports.upkeep import Upkeep
from vmsnap.workflow.chronicle import audited
from vmsnap.workflow.collect import copies_of
from vmsnap.workflow.prune import finish_removals
from vmsnap.workflow.world import World

_LOCK_TIMEOUT = timedelta(minutes=1)
_LET_GO = (
    "'vmsnap unpin SNAPSHOT', 'vmsnap env destroy NAME', or wait: what a dead run holds is let go by 'vmsnap reconcile', and a "
    "lock at the replica ends by itself"
)


def forget(world: World, *, wishes: ForgetWishes) -> ForgetReport:
    """Remove the snapshots that somebody names, or all of a guest, and write down who did it, and why. A dry run only says.

    All of them or none: where anything holds one, or the guest's name is asked for and was not given, nothing is removed.
    Copies at the replica go first: while that fails, the snapshots are still here, and the command can be given again.
    One removal that is cut is finished by the next, by ``prune`` or by ``reconcile``.

    Raises ConfigError, SnapshotNotFoundError, HeldError, PreconditionError, BusyError, DriverError. What was removed before an
    error stays removed, and its details name it.
    """
    upkeep = _upkeep(world) if wishes.replica else None
    guest, ids = _named(world, wishes)
    if wishes.confirmed not in (None, guest):
        raise ConfigError(
            f"--yes names {wishes.confirmed!r}, and these are snapshots of {guest!r}: nothing was removed",
            remedy="look at what was named with --dry-run",
        )
    copies = _copies(world, guest=guest, upkeep=upkeep)
    foreseen = _foresee(world, wishes=wishes, guest=guest, ids=ids, copies=copies)
    if not foreseen.entries:
        return _finish_only(world, foreseen)
    _refuse_what_is_held(world, foreseen, upkeep=upkeep)
    if wishes.dry_run:
        return foreseen
    _require_confirmed(foreseen, wishes=wishes)
    removed: list[str] = []
    with _telling_what_is_gone(removed):
        if upkeep is not None:
            _remove_away(world, upkeep, foreseen=foreseen, removed=removed)
        if not foreseen.of(Place.LOCAL):
            return foreseen
        with world.store.lock(guest, timeout=_LOCK_TIMEOUT):
            finish_removals(world, guest)
            # Meanwhile somebody may have pinned one, or made an environment of it.
            now = _foresee(world, wishes=wishes, guest=guest, ids=ids, copies=copies)
            _refuse_what_is_held(world, now, upkeep=None)
            _require_confirmed(now, wishes=wishes)
            _remove_here(world, now, wishes=wishes, removed=removed)
    return now


def _remove_away(world: World, upkeep: Upkeep, *, foreseen: ForgetReport, removed: list[str]) -> None:
    # Not under the lock: a replica that does not answer must keep no backup from being stored.
    for snapshot in foreseen.of(Place.REPLICA):
        with _audited(world, snapshot, reason=foreseen.reason, where="at the replica, "):
            upkeep.remove(snapshot)
        removed.append(f"{snapshot.id} at the replica")


def _remove_here(world: World, now: ForgetReport, *, wishes: ForgetWishes, removed: list[str]) -> None:
    _hand_distrust_on(world, guest=now.guest, going=now.of(Place.LOCAL))
    for entry in (one for one in now.entries if one.place is Place.LOCAL):
        snapshot = entry.snapshot
        if entry.copy_stays and wishes.confirmed is None:
            _require_copy(world, snapshot)
        with _audited(world, snapshot, reason=wishes.reason):
            world.store.remove(snapshot)
        removed.append(snapshot.id)


def _upkeep(world: World) -> Upkeep:
    if world.upkeep is None:
        raise ConfigError(
            "vmsnap.toml names no replica", remedy="leave --replica out: the copies here are all there are"
        )
    return world.upkeep


def _named(world: World, wishes: ForgetWishes) -> tuple[str, frozenset[SnapshotId] | None]:
    """Return the guest, and which of its snapshots; None: all."""
    if wishes.guest is not None:
        return wishes.guest, None
    found = [_find(world, one, wishes=wishes) for one in wishes.references]
    guests = sorted({guest for guest, _ in found})
    if len(guests) > 1:
        names = ", ".join(repr(one) for one in guests)
        raise ConfigError(
            f"these are snapshots of several guests: {names}; nothing was removed", remedy="give those of one at a time"
        )
    return guests[0], frozenset(identity for _, identity in found)


def _find(world: World, reference: str, *, wishes: ForgetWishes) -> tuple[str, SnapshotId]:
    """Return the guest and the id of a snapshot, also of one whose removal was cut."""
    if "@" in reference:
        # The same command given twice would remove two snapshots.
        raise ConfigError(
            f"{reference!r} names another snapshot as soon as this one is gone: what is to go is named by its id",
            remedy="'vmsnap list' shows the ids",
        )
    try:
        found = world.store.find(reference)
    except SnapshotNotFoundError as error:
        cut = next((item.guest for item in world.store.owned() if _is_cut(item, reference=reference)), None)
        if cut is not None:
            return cut, SnapshotId(reference)
        several = any(one.id.startswith(reference.lower()) for one in world.store.snapshots())
        if world.replica is None or several:
            raise
        if not wishes.replica:
            remedy = "one that is only at the replica goes with --replica; 'vmsnap list' shows where each is"
            raise SnapshotNotFoundError(error.brief, details=error.details, remedy=remedy) from error
        found = world.replica.find(reference)
    return found.manifest.guest, found.id


def _is_cut(item: Resource, *, reference: str) -> bool:
    return item.kind is ResourceKind.STAGING and item.run == reference


def _copies(world: World, *, guest: str, upkeep: Upkeep | None) -> ReplicaCopies:
    """Return what the replica has of a guest. Where copies there are to go it must be known, else it may stay unknown."""
    if upkeep is not None:
        return ReplicaCopies(replica=True, snapshots=upkeep.copies(guest).snapshots)
    return ReplicaCopies() if world.replica is None else copies_of(world.replica, guest=guest)


def _foresee(
    world: World, *, wishes: ForgetWishes, guest: str, ids: frozenset[SnapshotId] | None, copies: ReplicaCopies
) -> ForgetReport:
    here = world.store.snapshots(guest)
    going = tuple(one for one in here if ids is None or one.id in ids)
    away = tuple(one for one in copies.snapshots if wishes.replica and (ids is None or one.id in ids))
    entries = entries_of(going, away, copies=copies, replica=wishes.replica)
    return ForgetReport(
        guest=guest,
        reason=wishes.reason,
        dry_run=wishes.dry_run,
        entries=entries,
        freed_bytes=world.store.freed_by(going),
        confirm=reasons_to_confirm(here, entries=entries, copies=copies, guest=guest),
        problem=copies.problem,
    )


def _finish_only(world: World, report: ForgetReport) -> ForgetReport:
    """Finish what was cut of a guest's removals, where there is nothing to remove. Raises SnapshotNotFoundError without any."""
    guest = report.guest
    if not report.dry_run and any(item.guest == guest for item in world.store.owned()):
        with world.store.lock(guest, timeout=_LOCK_TIMEOUT):
            if finish_removals(world, guest):
                return report
    raise SnapshotNotFoundError(
        f"there are no such snapshots of guest {guest!r}",
        details=None if report.problem is None else report.problem.brief,
        remedy="'vmsnap list' shows what there is; copies at the replica go with --replica",
    )


def _refuse_what_is_held(world: World, report: ForgetReport, *, upkeep: Upkeep | None) -> None:
    """Raise HeldError that names everything that holds what is to go. ``upkeep`` None: without what is at the replica."""
    going = report.of(Place.LOCAL)
    found = list(objections(going, holders=_holders(world, going), now=world.clock.now()))
    if upkeep is not None:
        found += _held_away(upkeep, report.of(Place.REPLICA))
    if found:
        brief = found[0] if len(found) == 1 else f"{len(found)} things hold snapshots of {report.guest!r}"
        details = None if len(found) == 1 else "\n".join(found)
        raise HeldError(f"{brief}: nothing was removed", details=details, remedy=_LET_GO)


def _held_away(upkeep: Upkeep, snapshots: Sequence[Snapshot]) -> Iterator[str]:
    for snapshot in snapshots:
        try:
            upkeep.require_removable(snapshot)
        except HeldError as error:
            yield error.brief


def _holders(world: World, snapshots: Sequence[Snapshot]) -> Mapping[SnapshotId, Sequence[str]]:
    """Return in words who uses each snapshot."""
    runs = {one.id: world.store.holders(one) for one in snapshots}
    if not any(runs.values()):
        return {}
    names = {one.run: f"environment {one.name!r}" for one in world.book.all()}
    kinds = {record.run: f"{record.kind.value} run {record.run}" for record in world.journals.records()}
    return {
        identity: [names.get(run) or kinds.get(run) or f"run {run}" for run in found]
        for identity, found in runs.items()
    }


def _require_confirmed(report: ForgetReport, *, wishes: ForgetWishes) -> None:
    if report.confirm and wishes.confirmed is None:
        raise PreconditionError(
            f"this takes --yes {report.guest}: nothing was removed",
            details="\n".join(report.confirm),
            remedy=f"look at it with --dry-run; if that is what you want, add --yes {report.guest}",
        )


def _require_copy(world: World, snapshot: Snapshot) -> None:
    if world.upkeep is None or not world.upkeep.has(snapshot):
        raise PreconditionError(
            f"the copy of snapshot {snapshot.id} at the replica has just gone, so the last one stays here",
            remedy=f"if it is to go all the same, add --yes {snapshot.manifest.guest}",
        )


def _hand_distrust_on(world: World, *, guest: str, going: Sequence[Snapshot]) -> None:
    """Let the newest that stays say what the newest that goes says of hints: they are believed by the newest alone."""
    here, gone = world.store.snapshots(guest), {one.id for one in going}
    left = [one for one in here if one.id not in gone]
    if left and here[-1].hints_distrusted is not None and left[-1].hints_distrusted is None:
        marks = left[-1].marks.model_copy(update={"hints_distrusted": here[-1].hints_distrusted})
        world.store.mark(left[-1], marks=marks)


@contextmanager
def _audited(world: World, snapshot: Snapshot, *, reason: str, where: str = "") -> Iterator[None]:
    detail = f"{where}of {snapshot.manifest.captured:%Y-%m-%d %H:%M:%SZ}: {reason}"
    with audited(world, Action.FORGET, guest=snapshot.manifest.guest, subject=snapshot.id, detail=detail):
        yield


@contextmanager
def _telling_what_is_gone(removed: Sequence[str]) -> Iterator[None]:
    """Add to an error what was removed before it."""
    try:
        yield
    except VmsnapError as error:
        if removed:
            told = f"removed before that: {', '.join(removed)}"
            error.details = told if error.details is None else f"{error.details}\n{told}"
        raise
