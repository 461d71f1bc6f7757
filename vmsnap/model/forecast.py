"""What a policy will have kept after some time of backups: retention, applied after each of them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from zoneinfo import ZoneInfo

from vmsnap.model.ids import SnapshotId
from vmsnap.model.policy import Policy
from vmsnap.model.retention import Verdict, judge
from vmsnap.model.schedule import newest_before, upcoming
from vmsnap.model.selection import Candidate

MOST_BACKUPS = 100_000
_PRUNING_EVERY = timedelta(hours=6)
_LONGEST = timedelta(days=365_000)
_LAST = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What is there at the end. ``backups`` were imagined, at these times; ``most`` is the largest number ever kept.

    ``every`` is the time between them; None: they are as the policy's schedule has it. ``kept`` are the verdicts on what is
    left, oldest first; the ids of imagined snapshots begin with ``+``.
    """

    guest: str
    time_zone: str
    start: datetime
    end: datetime
    every: timedelta | None
    backups: tuple[datetime, ...]
    most: int
    kept: tuple[Verdict, ...]


def every_so_often(every: timedelta, *, now: datetime) -> Iterator[datetime]:
    """Yield ``now``, and a time each ``every`` after it, as long as there is a calendar."""
    yield now
    while every <= _LAST - now:
        now += every
        yield now


def as_scheduled(policy: Policy, *, existing: Sequence[Candidate], now: datetime) -> Iterator[datetime]:
    """Yield when the policy's schedule has backups from ``now`` on, the next one first."""
    newest = newest_before((one.captured for one in existing), now=now)
    return (due.at for due in upcoming(policy, newest=newest, now=now) if due.at is not None)


def forecast(
    existing: Sequence[Candidate],
    *,
    policy: Policy,
    moments: Iterable[datetime],
    now: datetime,
    span: timedelta,
    every: timedelta | None,
) -> Forecast:
    """Return what stays of ``existing`` snapshots and of backups at ``moments``, up to ``now + span``.

    Retention is applied after each backup, but every six hours at most: for the rules it is the same, and quicker.
    What environments hold now, they hold to the end. Raises ValueError for more than ``MOST_BACKUPS``, and for
    more than a thousand years.
    """
    if span > _LONGEST:
        msg = "that is more than a thousand years"
        raise ValueError(msg)
    zone = ZoneInfo(policy.time_zone)
    left = list(existing)
    most = len(left)
    verdicts: tuple[Verdict, ...] = ()
    pruned = None
    backups = _between(now, now + span, moments)
    for number, moment in enumerate(backups):
        left.append(Candidate(id=SnapshotId(f"+{number:09}"), captured=moment))
        if pruned is None or moment - pruned >= _PRUNING_EVERY:
            pruned = moment
            left = [
                verdict.candidate
                for verdict in judge(left, policy=policy.retention, zone=zone, now=moment)
                if verdict.keep
            ]
            most = max(most, len(left))
    verdicts = judge(left, policy=policy.retention, zone=zone, now=backups[-1] if backups else now)
    return Forecast(
        guest=policy.guest,
        time_zone=policy.time_zone,
        start=now,
        end=now + span,
        every=every,
        backups=backups,
        most=max(most, sum(verdict.keep for verdict in verdicts)),
        kept=tuple(verdict for verdict in verdicts if verdict.keep),
    )


def _between(start: datetime, end: datetime, moments: Iterable[datetime]) -> tuple[datetime, ...]:
    """Return the moments up to ``end``. One that is overdue is made up for at the start."""
    found: list[datetime] = []
    for moment in takewhile(lambda one: one <= end, moments):
        if len(found) == MOST_BACKUPS:
            msg = f"that would be more than {MOST_BACKUPS} backups"
            raise ValueError(msg)
        found.append(max(moment, start))
    return tuple(found)
