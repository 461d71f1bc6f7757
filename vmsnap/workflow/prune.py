"""Retention: decide by the policy, remove what it does not keep."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import timedelta
from zoneinfo import ZoneInfo

from vmsnap.errors import ConfigError, HeldError, PreconditionError, VmsnapError
from vmsnap.model.copies import Held, Rules, decide_copies, locked_until
from vmsnap.model.forecast import Forecast, as_scheduled, every_so_often, forecast
from vmsnap.model.history import Action
from vmsnap.model.ids import SnapshotId
from vmsnap.model.policy import Policy
from vmsnap.model.report import Place, PruneDecision
from vmsnap.model.retention import Keeper, candidate_of, decide
from vmsnap.ports.upkeep import Copies, Upkeep
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

    Where the guest has copies at a replica: of those too, by their own rules, and the last copy of a snapshot goes only where
    both places' rules let it go. Where the replica cannot be asked, nothing goes here.

    ``trust_clock``: somebody says that the clock is right, however far it is from the newest snapshots. ``many``: somebody
    wants more than half of a guest's snapshots removed at once, if the policy does.
    Raises PreconditionError for so many without that, and then removes none; BusyError, DriverError; what was removed
    before stays removed.
    """
    upkeep = world.upkeep if policy.replica.enabled else None
    # Not under the lock: a replica that does not answer must keep no backup from being stored.
    copies = None if upkeep is None else _ask(upkeep, guest=policy.guest)
    with world.store.lock(policy.guest, timeout=_LOCK_TIMEOUT):
        if not dry_run:
            finish_removals(world, policy.guest)
        snapshots = world.store.snapshots(policy.guest)
        held = frozenset(snapshot.id for snapshot in snapshots if world.store.holders(snapshot))
        if upkeep is None:
            decisions = decide(
                snapshots,
                policy=policy.retention,
                held=held,
                now=world.clock.now(),
                zone=ZoneInfo(policy.time_zone),
                trust_clock=trust_clock,
            )
        else:
            rules = _rules(world, policy, trust_clock=trust_clock)
            away = None if copies is None else copies.snapshots
            there = frozenset() if copies is None else copies.held
            decisions = decide_copies(snapshots, away, rules=rules, held=Held(here=held, away=there))
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
            for place in Place:
                _brake([one for one in decisions if one.place is place], guest=policy.guest)
        done = [_carry_out(world, one) for one in decisions if one.place is Place.LOCAL]
    if upkeep is not None:
        done += [_carry_out_away(world, upkeep, decision=one) for one in decisions if one.place is Place.REPLICA]
    return tuple(done)


def lock_copies(world: World, upkeep: Upkeep, *, policy: Policy) -> int:
    """Lock a guest's copies at the replica, those that retention keeps, for as long as they stay in any case.

    Returns how many objects were locked for longer. May be repeated. Raises VerificationError, StoreUnreachableError.
    """
    copies = upkeep.copies(policy.guest)
    here = world.store.snapshots(policy.guest)
    rules, held = _rules(world, policy, trust_clock=False), Held(away=copies.held)
    decisions = decide_copies(here, copies.snapshots, rules=rules, held=held)
    until = locked_until(
        [one.snapshot for one in decisions if one.place is Place.REPLICA and one.keep],
        policy=rules.away,
        now=rules.now,
        zone=rules.zone,
    )
    return upkeep.lock(policy.guest, until=until)


def _rules(world: World, policy: Policy, *, trust_clock: bool) -> Rules:
    return Rules(
        here=policy.retention,
        away=policy.replica.retention or policy.retention,
        now=world.clock.now(),
        zone=ZoneInfo(policy.time_zone),
        trust_clock=trust_clock,
    )


def _ask(upkeep: Upkeep, *, guest: str) -> Copies | None:
    """Return what the replica has of a guest; None where that is not known."""
    try:
        return upkeep.copies(guest)
    except VmsnapError as error:
        _LOG.warning("the replica cannot be asked for copies of %s, so none goes here: %s", guest, error.brief)
        return None


def _brake(decisions: Sequence[PruneDecision], *, guest: str) -> None:
    """Refuse to remove most of a guest's snapshots at once. Day by day few go: so many mean that a policy was changed."""
    goes = sum(not decision.keep for decision in decisions)
    if goes > _FEW and goes > len(decisions) / 2:
        raise PreconditionError(
            f"retention would remove {goes} of the {len(decisions)} snapshots of {guest!r} at once: nothing was removed",
            remedy=f"look at its policy and at 'vmsnap prune {guest} --dry-run'; if that is what you want, "
            f"run 'vmsnap prune {guest} --many'",
        )


def finish_removals(world: World, guest: str) -> tuple[SnapshotId, ...]:
    """Finish removals of a guest's snapshots that were cut, tell, and return which. Call it under the guest's lock."""
    finished = world.store.finish_removals(guest)
    for snapshot in finished:
        _LOG.warning("the removal of snapshot %s of %s had been cut, and is finished now", snapshot, guest)
        audit(world, Action.PRUNE, guest=guest, subject=snapshot, detail="a removal that was cut is finished")
    return finished


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
    snapshot, upkeep = decision.snapshot, world.upkeep
    if Keeper.COPY_STAYS in decision.rules and upkeep is not None:
        decision = _only_with_a_copy(decision, upkeep=upkeep)
        if decision.keep:
            return decision
    try:
        with audited(world, Action.PRUNE, guest=snapshot.manifest.guest, subject=snapshot.id, detail=_why(decision)):
            removed = world.store.remove(snapshot)
    except HeldError as error:
        # An environment was made of it since the decision.
        return decision.model_copy(update={"keep": True, "reasons": (error.brief,), "rules": (Keeper.IN_USE.value,)})
    return decision.model_copy(update={"removed_bytes": removed})


def _carry_out_away(world: World, upkeep: Upkeep, *, decision: PruneDecision) -> PruneDecision:
    """Remove a copy at the replica. One that is locked or in use stays: that is no event, and comes again each time."""
    if decision.keep:
        return decision
    snapshot, guest = decision.snapshot, decision.snapshot.manifest.guest
    detail = f"at the replica, {_why(decision)}"
    try:
        upkeep.remove(snapshot)
    except HeldError as error:
        return decision.model_copy(update={"keep": True, "reasons": (error.brief,), "rules": (Keeper.IN_USE.value,)})
    except VmsnapError as error:
        audit(world, Action.PRUNE, guest=guest, subject=snapshot.id, detail=detail, failure=error.brief)
        raise
    audit(world, Action.PRUNE, guest=guest, subject=snapshot.id, detail=detail)
    return decision.model_copy(update={"removed_bytes": 0})


def _why(decision: PruneDecision) -> str:
    return f"of {decision.snapshot.manifest.captured:%Y-%m-%d %H:%M:%SZ}: {'; '.join(decision.reasons)}"


def _only_with_a_copy(decision: PruneDecision, *, upkeep: Upkeep) -> PruneDecision:
    """Return a decision to remove because a copy stays as one to keep, where that copy is not there at this moment."""
    try:
        if upkeep.has(decision.snapshot):
            return decision
        rule, why = Keeper.LAST_COPY, "the last copy: the one at the replica has just gone"
    except VmsnapError as error:
        rule, why = Keeper.REPLICA_UNKNOWN, f"whether the replica has a copy is not known: {error.brief}"
    return decision.model_copy(update={"keep": True, "reasons": (why,), "rules": (rule.value,)})
