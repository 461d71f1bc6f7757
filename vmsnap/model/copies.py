"""Retention where a guest's snapshots are in two places: here, and at the replica. Each place has rules of its own.

The last copy of a snapshot goes only where the rules of both places let it go. Where it is not known what the replica has,
nothing goes here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, tzinfo

from vmsnap.errors import VmsnapError
from vmsnap.model.ids import SnapshotId
from vmsnap.model.manifest import Snapshot
from vmsnap.model.report import Place, PruneDecision
from vmsnap.model.retention import Keeper, Verdict, candidate_of, judge
from vmsnap.model.retention_policy import SHORTEST_PERIOD, RetentionPolicy
from vmsnap.model.selection import Candidate, choose, newest_first

LOCKED_AT_LEAST = timedelta(days=7)
"""Copies are locked for so long when they are made, and, those that are kept, from each collection on."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The rules of both places, and what both need to know of the time."""

    here: RetentionPolicy
    away: RetentionPolicy
    now: datetime
    zone: tzinfo
    trust_clock: bool = False

    def judge(self, candidates: Sequence[Candidate], *, policy: RetentionPolicy) -> dict[SnapshotId, Verdict]:
        """Return what a policy says of each candidate."""
        verdicts = judge(candidates, policy=policy, now=self.now, zone=self.zone, trust_clock=self.trust_clock)
        return {one.candidate.id: one for one in verdicts}


@dataclass(frozen=True, kw_only=True)
class ReplicaCopies:
    """What is at the replica. ``replica`` false: there is none. ``problem``: why it could not be asked."""

    replica: bool = False
    snapshots: tuple[Snapshot, ...] = ()
    problem: VmsnapError | None = None

    @property
    def ids(self) -> frozenset[SnapshotId]:
        """Return the ids of all copies."""
        return frozenset(one.id for one in self.snapshots)

    def only_there(self, here: Sequence[Snapshot]) -> tuple[Snapshot, ...]:
        """Return the snapshots that are not here."""
        known = {one.id for one in here}
        return tuple(one for one in self.snapshots if one.id not in known)


@dataclass(frozen=True, kw_only=True)
class Held:
    """The snapshots that environments use, in each place."""

    here: frozenset[SnapshotId] = frozenset()
    away: frozenset[SnapshotId] = frozenset()


def decide_copies(
    here: Sequence[Snapshot], away: Sequence[Snapshot] | None, *, rules: Rules, held: Held
) -> tuple[PruneDecision, ...]:
    """Return what retention says of each copy of one guest's snapshots: those here, then those at the replica, oldest first.

    ``away`` None: it is not known what the replica has. Pins and verifications are those of the copy here where there is one.
    """
    near = {one.id: one for one in here}
    far = {one.id: _with_marks(one, near) for one in away or ()}
    near_candidates = [candidate_of(one, held=held.here) for one in near.values()]
    far_candidates = [candidate_of(one, held=held.away) for one in far.values()]
    near_verdicts = rules.judge(near_candidates, policy=rules.here)
    if away is None:
        return tuple(_decision(near[one], verdict=_unknown(verdict)) for one, verdict in near_verdicts.items())
    far_verdicts = rules.judge(far_candidates, policy=rules.away)
    everything = list({one.id: one for one in (*far_candidates, *near_candidates)}.values())
    wanted_here = rules.judge(everything, policy=rules.here)
    wanted_away = rules.judge(everything, policy=rules.away)
    decisions = []
    for one, verdict in near_verdicts.items():
        other = far_verdicts.get(one)
        decisions.append(
            _decision(near[one], verdict=_last_here(verdict, other=other, wanted=wanted_away[one]), other=other)
        )
    for one, verdict in far_verdicts.items():
        other = near_verdicts.get(one)
        told = _last_away(verdict, other=other, wanted=wanted_here[one])
        decisions.append(_decision(far[one], verdict=told, other=other, place=Place.REPLICA))
    return tuple(decisions)


@dataclass(frozen=True, kw_only=True)
class _Told:
    """A verdict in words. ``keep`` may be more than the rules of the place alone say."""

    keep: bool
    rules: tuple[str, ...]
    reasons: tuple[str, ...]


def _told(verdict: Verdict) -> _Told:
    return _Told(
        keep=verdict.keep,
        rules=tuple(reason.rule for reason in verdict.reasons),
        reasons=tuple(reason.text for reason in verdict.reasons),
    )


def _kept(rule: Keeper, text: str) -> _Told:
    return _Told(keep=True, rules=(rule.value,), reasons=(text,))


def _unknown(verdict: Verdict) -> _Told:
    if verdict.keep:
        return _told(verdict)
    return _kept(Keeper.REPLICA_UNKNOWN, "whether the replica has a copy is not known")


def _last_here(verdict: Verdict, *, other: Verdict | None, wanted: Verdict) -> _Told:
    if not verdict.keep and other is None and wanted.keep:
        why = "; ".join(reason.text for reason in wanted.reasons)
        return _kept(Keeper.LAST_COPY, f"the last copy: not at the replica, whose rules want it ({why})")
    if (
        not verdict.keep
        and not verdict.candidate.damaged
        and other is not None
        and other.keep
        and other.candidate.damaged
    ):
        return _kept(Keeper.LAST_COPY, "the last sound copy: the one at the replica is damaged")
    return _told(verdict)


def _last_away(verdict: Verdict, *, other: Verdict | None, wanted: Verdict) -> _Told:
    if verdict.keep:
        return _told(verdict)
    if other is None and wanted.keep:
        why = "; ".join(reason.text for reason in wanted.reasons)
        return _kept(Keeper.LAST_COPY, f"the last copy: not in the local store, whose rules want it ({why})")
    if other is not None and other.keep and other.candidate.damaged:
        return _kept(Keeper.LAST_COPY, "the last sound copy: the one in the local store is damaged")
    return _told(verdict)


def _decision(
    snapshot: Snapshot, *, verdict: _Told, other: Verdict | None = None, place: Place = Place.LOCAL
) -> PruneDecision:
    rules, reasons = verdict.rules, verdict.reasons
    if not verdict.keep and other is not None and other.keep:
        where = "at the replica" if place is Place.LOCAL else "in the local store"
        rules, reasons = (*rules, Keeper.COPY_STAYS.value), (*reasons, f"a copy stays {where}")
    return PruneDecision(snapshot=snapshot, keep=verdict.keep, reasons=reasons, rules=rules, place=place)


def _with_marks(snapshot: Snapshot, near: dict[SnapshotId, Snapshot]) -> Snapshot:
    """Return a copy with the pin of the one here; that one's damage is not the copy's."""
    known = near.get(snapshot.id)
    if known is None:
        return snapshot
    return snapshot.model_copy(update={"marks": snapshot.marks.model_copy(update={"pin": known.marks.pin})})


def locked_until(
    kept: Sequence[Snapshot],
    *,
    policy: RetentionPolicy,
    now: datetime,
    zone: tzinfo,
    at_least: timedelta = LOCKED_AT_LEAST,
) -> dict[SnapshotId, datetime]:
    """Return until when each copy that is kept is to be locked: as long as it stays in any case, and ``at_least`` from now.

    A rule that chose a snapshot as the k-th of n periods keeps it while fewer than n - k newer periods have begun. The newest
    of a period that is not over may yet give way to a newer one: for it the rule promises nothing. To be renewed often.
    """
    candidates = newest_first([candidate_of(one, held=frozenset()) for one in kept])
    until = {one.id: max(now + at_least, one.captured + policy.min_age) for one in candidates}
    for choice in choose(candidates, policy=policy, zone=zone):
        shortest = SHORTEST_PERIOD.get(choice.rule)
        if shortest is not None and choice.number > 1 and not choice.oldest:
            sure = (getattr(policy, choice.rule) - choice.number) * shortest
            until[choice.id] = max(until[choice.id], now + sure)
    for one in candidates:
        if one.pin is not None and one.pin.until is not None:
            until[one.id] = max(until[one.id], one.pin.until)
    return until
