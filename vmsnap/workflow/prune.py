"""Retention: decide by the policy, remove what it does not keep."""

from __future__ import annotations

from datetime import timedelta

from vmsnap.errors import HeldError
from vmsnap.model.policy import Policy
from vmsnap.model.report import PruneDecision
from vmsnap.model.retention import decide
from vmsnap.workflow.world import World

_LOCK_TIMEOUT = timedelta(minutes=1)


def prune(world: World, *, policy: Policy, dry_run: bool) -> tuple[PruneDecision, ...]:
    """Remove what the policy does not keep; say of every snapshot why. A dry run only says.

    Raises BusyError, DriverError; what was removed before stays removed.
    """
    with world.store.lock(policy.guest, timeout=_LOCK_TIMEOUT):
        snapshots = world.store.snapshots(policy.guest)
        held = frozenset(snapshot.id for snapshot in snapshots if world.store.holders(snapshot))
        decisions = decide(snapshots, policy=policy.retention, held=held, now=world.clock.now())
        if dry_run:
            return decisions
        return tuple(_carry_out(world, decision) for decision in decisions)


def _carry_out(world: World, decision: PruneDecision) -> PruneDecision:
    if decision.keep:
        return decision
    try:
        removed = world.store.remove(decision.snapshot)
    except HeldError as error:
        # An environment was made of it since the decision.
        return decision.model_copy(update={"keep": True, "reasons": (error.brief,)})
    return decision.model_copy(update={"removed_bytes": removed})
