"""What a policy will have kept after some time of regular backups: retention, applied after each of them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from vmsnap.model.ids import SnapshotId
from vmsnap.model.policy import Policy
from vmsnap.model.retention import Verdict, judge
from vmsnap.model.selection import Candidate

MOST_BACKUPS = 100_000
_PRUNING_EVERY = timedelta(hours=6)
_A_DAY = timedelta(days=1)


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What is there at the end. ``backups`` were imagined; ``most`` is the largest number kept at any time.

    ``kept`` are the verdicts on what is left, oldest first; the ids of imagined snapshots begin with ``+``.
    """

    guest: str
    time_zone: str
    start: datetime
    end: datetime
    every: timedelta
    backups: int
    most: int
    kept: tuple[Verdict, ...]


def forecast(
    existing: Sequence[Candidate], *, policy: Policy, now: datetime, span: timedelta, every: timedelta
) -> Forecast:
    """Return what stays of ``existing`` snapshots and of one backup each ``every``, from ``now`` to ``now + span``.

    Retention is applied after each backup, but every six hours at most: for the rules it is the same, and quicker.
    What environments hold now, they hold to the end. Raises ValueError for more than ``MOST_BACKUPS``, and for an end
    beyond the year 9999.
    """
    if span / every >= MOST_BACKUPS:
        msg = f"that would be more than {MOST_BACKUPS} backups"
        raise ValueError(msg)
    if span > datetime.max.replace(tzinfo=UTC) - _A_DAY - now:
        msg = "the calendar ends with the year 9999"
        raise ValueError(msg)
    zone = ZoneInfo(policy.time_zone)
    left = list(existing)
    most = len(left)
    verdicts: tuple[Verdict, ...] = ()
    backups = int(span / every) + 1
    pruned = None
    for number in range(backups):
        moment = now + number * every
        left.append(Candidate(id=SnapshotId(f"+{number:09}"), captured=moment))
        if pruned is not None and moment - pruned < _PRUNING_EVERY and number < backups - 1:
            continue
        pruned = moment
        verdicts = judge(left, policy=policy.retention, zone=zone, now=moment)
        left = [verdict.candidate for verdict in verdicts if verdict.keep]
        most = max(most, len(left))
    return Forecast(
        guest=policy.guest,
        time_zone=policy.time_zone,
        start=now,
        end=now + span,
        every=every,
        backups=backups,
        most=most,
        kept=tuple(verdict for verdict in verdicts if verdict.keep),
    )
