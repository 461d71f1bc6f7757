"""Which snapshots stay. A pure decision: the same snapshots, policy, holds and time give the same answer.

A snapshot stays where anything keeps it, and everything that keeps it is named. Some stay whatever the policy says:
the newest, the newest without known damage, the newest verified one, pinned ones, those an environment uses, and those
whose time lies ahead of the clock. Every snapshot is proven clean, so the newest is the newest proven one.

Clocks are not trusted. A snapshot from the future stays and takes no other's place. Ages, and ends of pins, are reckoned
without time that is in doubt (``model.doubt``): that of long pauses, in which the clock may have jumped. Each snapshot tells how
much that was before it. So a clock that jumped far ahead removes nothing by age, however many backups it makes, and neither
does a guest whose backups paused. The ``keep_*`` rules look at no clock at all.

A damaged snapshot takes no place from a sound one: the rules choose among the sound ones, and once more among all.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, tzinfo
from enum import StrEnum

from vmsnap.model.doubt import doubt_up_to
from vmsnap.model.durations import format_duration
from vmsnap.model.ids import SnapshotId
from vmsnap.model.manifest import Pin, Snapshot
from vmsnap.model.report import PruneDecision
from vmsnap.model.retention_policy import Counting, RetentionPolicy
from vmsnap.model.selection import PERIODS, RULES, Candidate, choose, newest_first

_NAMES = {
    "keep_hourly": "hour",
    "keep_daily": "day",
    "keep_weekly": "week",
    "keep_monthly": "month",
    "keep_yearly": "year",
}


class Keeper(StrEnum):
    """What keeps a snapshot beside the ``keep_*`` rules, or lets it go."""

    NEWEST = "newest"
    NEWEST_SOUND = "newest-undamaged"
    NEWEST_VERIFIED = "newest-verified"
    PINNED = "pinned"
    IN_USE = "in-use"
    AHEAD_OF_CLOCK = "ahead-of-clock"
    CLOCK_IN_DOUBT = "clock-in-doubt"
    MIN_AGE = "min_age"
    MAX_AGE = "max_age"
    REPLACED = "replace_on_next"
    BEYOND = "beyond"
    ANOTHER_STAYS = "another-stays"
    PIN_ENDED = "pin-ended"
    LAST_COPY = "last-copy"
    COPY_STAYS = "copy-stays"
    REPLICA_UNKNOWN = "replica-unknown"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reason:
    """One reason to keep a snapshot or to let it go. ``rule`` is the name of a ``keep_*`` key, or a ``Keeper``."""

    rule: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What retention says of one candidate."""

    candidate: Candidate
    keep: bool
    reasons: tuple[Reason, ...]


@dataclass(kw_only=True, slots=True)
class _Now:
    """The clock, the doubt about it, and what is kept so far. ``chosen``: by each ``keep_*`` rule.

    ``doubt``: how much of the time up to now is in doubt; None: nothing is.
    """

    clock: datetime
    doubt: timedelta | None
    kept: dict[SnapshotId, list[Reason]] = field(default_factory=dict)
    chosen: dict[str, set[SnapshotId]] = field(default_factory=dict)

    def keep(self, one: Candidate, rule: str, text: str) -> None:
        self.kept.setdefault(one.id, []).append(Reason(rule=rule, text=text))

    def after(self, doubt: timedelta) -> datetime:
        """Return what time it is at least, reckoned from a moment that had so much doubt before it."""
        return self.clock if self.doubt is None else self.clock - max(self.doubt - doubt, timedelta(0))


def decide(
    snapshots: Sequence[Snapshot],
    *,
    policy: RetentionPolicy,
    held: frozenset[SnapshotId],
    now: datetime,
    zone: tzinfo = UTC,
    trust_clock: bool = False,
) -> tuple[PruneDecision, ...]:
    """Return what retention says of each of one guest's snapshots, oldest first, with its reasons.

    ``held`` are in use (by environments). ``now`` is aware. ``zone`` is where the policy's days begin. ``trust_clock``:
    somebody looked at the clock, and it is right. Raises ValueError for snapshots of several guests.
    """
    if len({snapshot.manifest.guest for snapshot in snapshots}) > 1:
        msg = "retention decides for one guest at a time"
        raise ValueError(msg)
    by_id = {snapshot.id: snapshot for snapshot in snapshots}
    verdicts = judge(
        [candidate_of(snapshot, held=held) for snapshot in snapshots],
        policy=policy,
        now=now,
        zone=zone,
        trust_clock=trust_clock,
    )
    return tuple(
        PruneDecision(
            snapshot=by_id[verdict.candidate.id],
            keep=verdict.keep,
            reasons=tuple(reason.text for reason in verdict.reasons),
            rules=tuple(reason.rule for reason in verdict.reasons),
        )
        for verdict in verdicts
    )


def candidate_of(snapshot: Snapshot, *, held: frozenset[SnapshotId]) -> Candidate:
    """Return what retention needs to know of a snapshot."""
    verification = snapshot.marks.verification
    return Candidate(
        id=snapshot.id,
        captured=snapshot.manifest.ranked,
        pin=snapshot.marks.pin,
        verified=verification is not None and verification.bad_blocks == 0,
        damaged=verification is not None and verification.bad_blocks > 0,
        held=snapshot.id in held,
        doubt=timedelta(seconds=snapshot.manifest.clock_doubt_seconds),
    )


def judge(
    candidates: Sequence[Candidate], *, policy: RetentionPolicy, now: datetime, zone: tzinfo, trust_clock: bool = False
) -> tuple[Verdict, ...]:
    """Return what retention says of each of one guest's candidates, oldest first. See ``decide``."""
    ordered = newest_first(candidates)
    past = [one for one in ordered if one.captured <= now]
    moment = _Now(clock=now, doubt=None if trust_clock else doubt_up_to(now, past=past, policy=policy))
    for one in ordered[: len(ordered) - len(past)]:
        moment.keep(one, Keeper.AHEAD_OF_CLOCK, f"its time is ahead of the clock, which says {now:%Y-%m-%d %H:%MZ}")
    _protect(past, moment=moment)
    _apply_rules(past, policy=policy, zone=zone, moment=moment)
    _respect_pins_and_age(ordered, policy=policy, moment=moment)
    stand_ins = _stand_ins(past, policy=policy, zone=zone, moment=moment)
    return tuple(
        Verdict(
            candidate=one,
            keep=one.id in moment.kept,
            reasons=tuple(moment.kept.get(one.id, ()))
            or tuple(_why_not(one, policy=policy, zone=zone, moment=moment, stand_ins=stand_ins)),
        )
        for one in reversed(ordered)
    )


def _protect(past: Sequence[Candidate], *, moment: _Now) -> None:
    """Keep the newest, the newest without known damage, and the newest verified one."""
    if not past:
        return
    moment.keep(past[0], Keeper.NEWEST, "the newest")
    sound = next((one for one in past if not one.damaged), past[0])
    if sound is not past[0]:
        moment.keep(sound, Keeper.NEWEST_SOUND, "the newest without known damage")
    verified = next((one for one in past if one.verified), None)
    if verified is not None and verified is not past[0]:
        moment.keep(verified, Keeper.NEWEST_VERIFIED, "the newest verified one")


def _apply_rules(past: Sequence[Candidate], *, policy: RetentionPolicy, zone: tzinfo, moment: _Now) -> None:
    young = [one for one in past if not _is_too_old(one, policy=policy, now=moment.after(one.doubt))]
    sound = [one for one in young if not one.damaged]
    by_id = {one.id: one for one in young}
    for group in (sound, young) if len(sound) < len(young) else (young,):
        for choice in choose(group, policy=policy, zone=zone):
            chosen = moment.chosen.setdefault(choice.rule, set())
            if choice.id not in chosen:
                chosen.add(choice.id)
                count = getattr(policy, choice.rule)
                oldest = " (the oldest there is)" if choice.oldest else ""
                moment.keep(by_id[choice.id], choice.rule, f"{choice.rule} {choice.number} of {count}{oldest}")
    for one in young:
        if one.id in moment.kept and _is_too_old(one, policy=policy, now=moment.clock):
            moment.keep(one, Keeper.CLOCK_IN_DOUBT, "past max_age by a clock in doubt")


def _respect_pins_and_age(ordered: Sequence[Candidate], *, policy: RetentionPolicy, moment: _Now) -> None:
    for one in ordered:
        if one.pin is not None and one.pin.holds(moment.after(_doubt_at(one.pin.since, one=one, past=ordered))):
            moment.keep(one, Keeper.PINNED, _pin_text(one.pin))
            if not one.pin.holds(moment.clock):
                moment.keep(one, Keeper.CLOCK_IN_DOUBT, "the pin has ended by a clock in doubt")
        if one.held:
            moment.keep(one, Keeper.IN_USE, "in use by an environment")
        if policy.min_age and moment.after(one.doubt) - one.captured < policy.min_age and one.captured <= moment.clock:
            moment.keep(one, Keeper.MIN_AGE, f"younger than {format_duration(policy.min_age)} (min_age)")


def _doubt_at(since: datetime, *, one: Candidate, past: Sequence[Candidate]) -> timedelta:
    """Return how much of the time up to a pin's beginning is in doubt, as far as snapshots from before it tell."""
    return max((other.doubt for other in past if other.captured <= since), default=one.doubt)


def _pin_text(pin: Pin) -> str:
    end = f" until {pin.until.astimezone(UTC):%Y-%m-%d %H:%MZ}" if pin.until is not None else ""
    return f"pinned by {pin.owner}{end}: {pin.reason}"


def _is_too_old(one: Candidate, *, policy: RetentionPolicy, now: datetime) -> bool:
    return policy.max_age is not None and now - one.captured > policy.max_age


def _stand_ins(
    past: Sequence[Candidate], *, policy: RetentionPolicy, zone: tzinfo, moment: _Now
) -> dict[str, set[Hashable]]:
    """Return for each rule in use the periods of which something stays on its account."""
    found: dict[str, set[Hashable]] = {}
    standing: set[SnapshotId] = set()
    for rule in RULES:
        mine = moment.chosen.get(rule, set())
        # In turn, a rule also passes over the periods from which an earlier one keeps something.
        standing = standing | mine if policy.counting is Counting.IN_TURN else mine
        if getattr(policy, rule) and rule in PERIODS:
            found[rule] = {PERIODS[rule](one.captured.astimezone(zone)) for one in past if one.id in standing}
    return found


def _why_not(
    one: Candidate, *, policy: RetentionPolicy, zone: tzinfo, moment: _Now, stand_ins: dict[str, set[Hashable]]
) -> Iterator[Reason]:
    if policy.max_age is not None and _is_too_old(one, policy=policy, now=moment.after(one.doubt)):
        yield Reason(rule=Keeper.MAX_AGE, text=f"older than {format_duration(policy.max_age)} (max_age)")
    elif policy.replace_on_next:
        yield Reason(rule=Keeper.REPLACED, text="a newer one is there (replace_on_next)")
    else:
        local = one.captured.astimezone(zone)
        replaced = [rule for rule, periods in stand_ins.items() if PERIODS[rule](local) in periods]
        beyond = [f"{rule} {getattr(policy, rule)}" for rule in RULES if getattr(policy, rule) and rule not in replaced]
        if beyond:
            yield Reason(rule=Keeper.BEYOND, text=f"beyond {', '.join(beyond)}")
        if replaced:
            periods = " and ".join(_NAMES[rule] for rule in replaced)
            yield Reason(rule=Keeper.ANOTHER_STAYS, text=f"another of its {periods} stays")
    if one.pin is not None and one.pin.until is not None:
        end = one.pin.until.astimezone(UTC)
        yield Reason(rule=Keeper.PIN_ENDED, text=f"its pin ended {end:%Y-%m-%d %H:%MZ}")
