"""Retention: decide by the policy, remove what it does not keep."""

from __future__ import annotations

import logging
from datetime import timedelta
from zoneinfo import ZoneInfo

from vmsnap.errors import ConfigError, HeldError, PreconditionError
from vmsnap.model.forecast import Forecast, as_scheduled, every_so_often, forecast
from vmsnap.model.history import Action
from vmsnap.model.policy import Policy
from vmsnap.model.report import PruneDecision
from vmsnap.model.retention import Keeper, candidate_of, decide
from vmsnap.workflow.chronicle import audit, audited
from vmsnap.workflow.world import World

_LOCK_TIMEOUT = timedelta(minutes=1)
_FEW = 5
"""So many may go at once, whatever part of all they are."""
_LOG = logging.getLogger(__name__)


def prune(
    world: World, *, policy: Policy, dry_run: bool, trust_clock: bool = False, many: bool = False
) -> tuple[PruneDecision, ...]:
    """Remove what the policy does not keep; say of every snapshot why. A dry run only says.

    ``trust_clock``: somebody says that the clock is right, however far it is from the newest snapshots. ``many``: somebody
    wants more than half of a guest's snapshots removed at once, if the policy does.
    Raises PreconditionError for so many without that, and then removes none; BusyError, DriverError; what was removed
    before stays removed.
    """
    with world.store.lock(policy.guest, timeout=_LOCK_TIMEOUT):
        if not dry_run:
            _finish_removals(world, policy.guest)
        snapshots = world.store.snapshots(policy.guest)
        held = frozenset(snapshot.id for snapshot in snapshots if world.store.holders(snapshot))
        decisions = decide(
            snapshots,
            policy=policy.retention,
            held=held,
            now=world.clock.now(),
            zone=ZoneInfo(policy.time_zone),
            trust_clock=trust_clock,
        )
        doubtful = [decision.snapshot.id for decision in decisions if Keeper.CLOCK_IN_DOUBT in decision.rules]
        if doubtful:
            _LOG.warning(
                "the clock is far ahead of the newest snapshots of %s: %s would go by age and stay for now",
                policy.guest,
                ", ".join(doubtful),
            )
        if dry_run:
            return decisions
        if not many:
            _brake(decisions, guest=policy.guest)
        return tuple(_carry_out(world, decision) for decision in decisions)


def _brake(decisions: tuple[PruneDecision, ...], *, guest: str) -> None:
    """Refuse to remove most of a guest's snapshots at once. Day by day few go: so many mean that a policy was changed."""
    goes = sum(not decision.keep for decision in decisions)
    if goes > _FEW and goes > len(decisions) / 2:
        raise PreconditionError(
            f"retention would remove {goes} of the {len(decisions)} snapshots of {guest!r} at once: nothing was removed",
            remedy=f"look at its policy and at 'vmsnap prune {guest} --dry-run'; if that is what you want, "
            f"run 'vmsnap prune {guest} --many'",
        )


def _finish_removals(world: World, guest: str) -> None:
    for snapshot in world.store.finish_removals(guest):
        _LOG.warning("the removal of snapshot %s of %s had been cut, and is finished now", snapshot, guest)
        audit(world, Action.PRUNE, guest=guest, subject=snapshot, detail="a removal that was cut is finished")


def foresee(world: World, *, policy: Policy, span: timedelta, every: timedelta | None) -> Forecast:
    """Return what the policy will have kept after ``span`` of a backup each ``every``; None: as it schedules them.

    Changes nothing. Raises ConfigError where that is too much to reckon, DriverError.
    """
    snapshots = world.store.snapshots(policy.guest)
    held = frozenset(snapshot.id for snapshot in snapshots if world.store.holders(snapshot))
    existing = [candidate_of(snapshot, held=held) for snapshot in snapshots]
    now = world.clock.now()
    try:
        moments = every_so_often(every, now=now) if every else as_scheduled(policy, existing=existing, now=now)
        return forecast(existing, policy=policy, moments=moments, now=now, span=span, every=every)
    except ValueError as error:
        raise ConfigError(f"--simulate: {error}", remedy="give a shorter --simulate, or a longer --every") from error


def _carry_out(world: World, decision: PruneDecision) -> PruneDecision:
    if decision.keep:
        return decision
    snapshot = decision.snapshot
    try:
        with audited(
            world,
            Action.PRUNE,
            guest=snapshot.manifest.guest,
            subject=snapshot.id,
            detail=f"of {snapshot.manifest.captured:%Y-%m-%d %H:%M:%SZ}: {'; '.join(decision.reasons)}",
        ):
            removed = world.store.remove(snapshot)
    except HeldError as error:
        # An environment was made of it since the decision.
        return decision.model_copy(update={"keep": True, "reasons": (error.brief,), "rules": (Keeper.IN_USE.value,)})
    return decision.model_copy(update={"removed_bytes": removed})
