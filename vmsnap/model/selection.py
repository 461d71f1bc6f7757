"""What the ``keep_*`` rules of a policy choose: the newest of each hour, day, week, month and year, up to a number.

Calendar periods are those of the policy's time zone. A day in which clocks are put forward or back is one day; the
hour that comes twice when they are put back is two hours. Weeks are ISO 8601 weeks, Monday to Sunday.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, tzinfo

from vmsnap.model.ids import SnapshotId
from vmsnap.model.manifest import Pin
from vmsnap.model.retention_policy import Counting, RetentionPolicy

Period = Callable[[datetime], Hashable]


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """What retention needs to know of a snapshot. ``verified``: all its blocks were read once and were right.

    ``doubt``: how much of the time before it is in doubt, see ``model.doubt``.
    """

    id: SnapshotId
    captured: datetime
    pin: Pin | None = None
    verified: bool = False
    damaged: bool = False
    held: bool = False
    doubt: timedelta = timedelta(0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A rule chose a snapshot as its ``number``-th. ``oldest``: only because there is nothing older yet."""

    rule: str
    id: SnapshotId
    number: int
    oldest: bool = False


PERIODS: dict[str, Period] = {
    "keep_hourly": lambda local: (local.replace(minute=0, second=0, microsecond=0, tzinfo=None), local.utcoffset()),
    "keep_daily": lambda local: local.date(),
    "keep_weekly": lambda local: local.isocalendar()[:2],
    "keep_monthly": lambda local: (local.year, local.month),
    "keep_yearly": lambda local: local.year,
}
RULES = ("keep_last", *PERIODS)
"""The rules in the order in which they take their turn."""


def newest_first(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return candidates newest first. Of two of the same instant the one with the higher id counts as newer."""
    return sorted(candidates, key=lambda one: (one.captured, one.id), reverse=True)


def choose(candidates: Sequence[Candidate], *, policy: RetentionPolicy, zone: tzinfo) -> Iterator[Choice]:
    """Yield what each rule of a policy chooses. ``candidates`` come newest first."""
    locals_of = {one.id: one.captured.astimezone(zone) for one in candidates} if _has_periods(policy) else {}
    if policy.counting is Counting.IN_TURN:
        yield from _in_turn(candidates, policy=policy, locals_of=locals_of)
    else:
        yield from _last(candidates, count=policy.keep_last)
        for rule, period in PERIODS.items():
            yield from _newest_of_each(
                candidates, rule=rule, count=getattr(policy, rule), keys=_keys(candidates, period, locals_of)
            )


def _has_periods(policy: RetentionPolicy) -> bool:
    return any(getattr(policy, rule) for rule in PERIODS)


def _keys(candidates: Sequence[Candidate], period: Period, locals_of: dict[SnapshotId, datetime]) -> Iterator[Hashable]:
    return (period(locals_of[one.id]) for one in candidates)


def _last(candidates: Sequence[Candidate], *, count: int) -> Iterator[Choice]:
    for number, one in enumerate(candidates[:count], start=1):
        yield Choice(rule="keep_last", id=one.id, number=number)


def _newest_of_each(
    candidates: Sequence[Candidate], *, rule: str, count: int, keys: Iterator[Hashable]
) -> Iterator[Choice]:
    """Choose the newest of each of the newest ``count`` periods that have a snapshot.

    Where there are fewer periods, the oldest snapshot is chosen as well: it becomes the first of the history that the
    rule asks for (restic does the same).
    """
    chosen, current = 0, None
    for one, key in zip(candidates, keys, strict=True) if count else ():
        is_oldest = one is candidates[-1]
        if chosen and key == current and not is_oldest:
            continue
        chosen += 1
        yield Choice(rule=rule, id=one.id, number=chosen, oldest=chosen > 1 and key == current)
        if chosen == count:
            return
        current = key


def _in_turn(
    candidates: Sequence[Candidate], *, policy: RetentionPolicy, locals_of: dict[SnapshotId, datetime]
) -> Iterator[Choice]:
    """Let each rule begin where the one before it ended.

    A rule passes over periods from which an earlier rule keeps something, and what it passes over in the periods it
    chooses from, no later rule looks at.
    """
    kept = set()
    settled: set[SnapshotId] = set()
    for choice in _last(candidates, count=policy.keep_last):
        kept.add(choice.id)
        yield choice
    for rule, period in PERIODS.items():
        count = getattr(policy, rule)
        if not count:
            continue
        covered = {period(locals_of[identity]) for identity in kept}
        chosen: set[Hashable] = set()
        for one in candidates:
            if one.id in kept or one.id in settled or (key := period(locals_of[one.id])) in covered:
                continue
            if key in chosen:
                settled.add(one.id)
                continue
            if len(chosen) == count:
                break
            chosen.add(key)
            kept.add(one.id)
            yield Choice(rule=rule, id=one.id, number=len(chosen))
