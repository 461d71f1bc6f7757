"""When a guest's next backup is due. Pure: everything comes from what is stored, and ``now`` is given.

1. A backup is wanted: ``every`` (a day, if nothing is said) after the newest snapshot's capture; or at the first time of
   ``at`` and ``calendar`` after it; or at once where there is none. What was missed is made up for by one run in all.
2. A failure since the newest snapshot puts it off: 1, 2, 4 ... times ``retry_after``, at most ``retry_at_most``, after the
   last failure. A failure of safety is not retried: the guest waits for its next regular time, and for that as well.
3. Windows and blackouts move it to the next opening.
4. Jitter: times and openings are shared by many guests, so each guest starts later by its own fraction of ``jitter``,
   which comes from its name, and never beyond the end of the opening.

A snapshot or a failure dated in the future by more than a day was made by a clock that was wrong, and does not count; one
dated less far ahead does, so that a clock set back by an hour makes no second run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta, tzinfo
from functools import lru_cache
from zoneinfo import ZoneInfo

from vmsnap.errors import ExitCode
from vmsnap.model.calendar import parse_calendar
from vmsnap.model.durations import format_duration
from vmsnap.model.openings import Openings, parse_span
from vmsnap.model.policy import Policy
from vmsnap.model.schedule_policy import SchedulePolicy

FUTURE_SLACK = timedelta(days=1)
_LOOK_BACK = timedelta(days=8)
"""How far back an opening is looked for that has not ended; jitter, at most a day, is over by then."""
_LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)
_MOST_DOUBLINGS = 30
_DAY = timedelta(days=1)


@dataclass(frozen=True, kw_only=True)
class FailedAttempt:
    """A run that the schedule began and that made no snapshot.

    ``ended`` None: nobody has heard of its end, so its process died, or it still goes on.
    """

    began: datetime
    ended: datetime | None = None
    exit_code: int | None = None
    brief: str = ""


@dataclass(frozen=True, kw_only=True)
class Due:
    """When the next run starts, and why then. ``at`` None: never. It is due where ``at`` is not after now."""

    at: datetime | None
    reason: str

    def is_due(self, now: datetime) -> bool:
        """Tell whether the run may start now."""
        return self.at is not None and self.at <= now


def newest_before(captured: Iterable[datetime], *, now: datetime) -> datetime | None:
    """Return the newest capture that counts: none that is dated in the future by more than a day."""
    return max((moment for moment in captured if moment <= now + FUTURE_SLACK), default=None)


def next_due(policy: Policy, *, newest: datetime | None, failures: Sequence[FailedAttempt] = (), now: datetime) -> Due:
    """Return when the next run of a guest starts.

    ``newest``: when its newest snapshot was captured. ``failures``: in any order; those before ``newest`` do not count.
    The answer is in a window and in no blackout. While a run stays due, and is not made, the answer stays.
    ``policy.enabled`` is the caller's business.
    """
    schedule = policy.schedule
    if newest is not None and newest > now + FUTURE_SLACK:
        newest = None
    failures = sorted(
        (item for item in failures if item.began <= now + FUTURE_SLACK and (newest is None or item.began > newest)),
        key=lambda item: item.began,
    )
    wanted, reason, shared = _wanted(policy, newest=newest, failures=failures)
    if wanted is None:
        return Due(at=None, reason=reason)
    start, moved = _place(wanted, policy=policy, shared=shared, now=now)
    retry = _retry_at(schedule, failures=failures, now=now)
    if start is not None and retry is not None and retry > start:
        start, moved = _place(retry, policy=policy, shared=False, now=now)
        waits = format_duration(retry - _end_of(failures[-1], now=now))
        reason = f"{reason}; {_attempts(failures)}, so it waits {waits} from the last"
    if start is None:
        return Due(at=None, reason=f"{reason}; no window opens in the next ten years")
    return Due(at=start, reason=f"{reason}; {moved}" if moved else reason)


def upcoming(
    policy: Policy, *, newest: datetime | None, failures: Sequence[FailedAttempt] = (), now: datetime
) -> Iterator[Due]:
    """Return the next runs one after another, as if each succeeded at once. Ends where there is none."""
    while True:
        due = next_due(policy, newest=newest, failures=failures, now=now)
        if due.at is None:
            return
        now = newest = max(due.at, now)
        failures = ()
        yield due


@dataclass(frozen=True, kw_only=True)
class Load:
    """A guest that is backed up, or shall be, and the storage it is on, where its policy names one."""

    guest: str
    storage: str | None


def over_limit(wanted: Load, *, running: Sequence[Load], per_host: int, per_storage: int) -> str | None:
    """Return why a run may not start beside the running ones; None where it may."""
    if len(running) >= per_host:
        return f"{_going_on(running)}, and at most {per_host} may at a time on this host"
    beside = [load for load in running if load.storage == wanted.storage]
    if wanted.storage is not None and len(beside) >= per_storage:
        return f"{_going_on(beside)}, and at most {per_storage} may at a time on storage '{wanted.storage}'"
    return None


def _going_on(running: Sequence[Load]) -> str:
    names = ", ".join(f"'{load.guest}'" for load in running)
    return f"{'a run' if len(running) == 1 else 'runs'} of {names} {'goes' if len(running) == 1 else 'go'} on"


def _wanted(
    policy: Policy, *, newest: datetime | None, failures: Sequence[FailedAttempt]
) -> tuple[datetime | None, str, bool]:
    """Return when a backup is wanted, why, and whether other guests are likely to want one at that very time."""
    schedule = policy.schedule
    refused = [item for item in failures if item.exit_code == ExitCode.SAFETY]
    since = newest
    what = "the newest snapshot" if newest is not None else ""
    if refused:
        # Its period is spent. The failure stands where a snapshot would.
        since, what = refused[-1].began, "an attempt that was not safe"
    if since is None:
        return _LONG_AGO, "there is no snapshot yet", False
    told = f"{what} ({_minute(since)})"
    if schedule.interval is not None:
        return since + schedule.interval, f"{format_duration(schedule.interval)} after {told}", False
    zone = _zone(policy.time_zone)
    known = [(_next_time_of_day(text, since, zone=zone), text) for text in schedule.at]
    for text in schedule.calendar:
        following = _calendar(text, since, zone=zone)
        if following is not None:
            known.append((following, text))
    if not known:
        return None, f"no time of the calendar comes after {told}", True
    moment, text = min(known)
    return moment, f"'{text}' comes after {told}", True


def _next_time_of_day(text: str, after: datetime, *, zone: tzinfo) -> datetime:
    """Return the first such time of day after a moment. Each day has exactly one, whatever the clocks do (PEP 495)."""
    clock = time.fromisoformat(text)
    day = after.astimezone(zone).date() - _DAY
    while True:
        moment = datetime.combine(day, clock, tzinfo=zone).astimezone(UTC)
        if moment > after:
            return moment
        day += _DAY


@lru_cache(maxsize=4096)
def _calendar(text: str, after: datetime, *, zone: tzinfo) -> datetime | None:
    return parse_calendar(text).next_after(after, zone=zone)


def _place(wanted: datetime, *, policy: Policy, shared: bool, now: datetime) -> tuple[datetime | None, str]:
    """Return the start in the first opening from ``wanted`` on that is not over, and how it differs from ``wanted``."""
    schedule = policy.schedule
    # By the day, so that looks of one day ask the same and are answered from the cache.
    horizon = (now - _LOOK_BACK).replace(hour=0, minute=0, second=0, microsecond=0)
    moment = max(wanted, horizon)
    while (stretch := _stretch(schedule.windows, schedule.blackouts, policy.time_zone, moment)) is not None:
        opening, closing = stretch
        if closing > now:
            break
        moment = closing
    else:
        return None, ""
    if opening == horizon:
        # Open, and wanted, for long: there is nothing to spread.
        return now, ""
    moved = opening > wanted
    start = opening
    if shared or moved:
        start += min(schedule.jitter, closing - opening) * _fraction(policy.guest)
    return start, f"the next opening is {_minute(opening)}" if moved else ""


def _end_of(attempt: FailedAttempt, *, now: datetime) -> datetime:
    """Return when an attempt ended, as far as that can be believed: the clock may have been wrong in its middle."""
    if attempt.ended is not None and attempt.began <= attempt.ended <= now + FUTURE_SLACK:
        return attempt.ended
    return attempt.began


def _retry_at(schedule: SchedulePolicy, *, failures: Sequence[FailedAttempt], now: datetime) -> datetime | None:
    if not failures:
        return None
    doublings = min(len(failures) - 1, _MOST_DOUBLINGS)
    last = _end_of(failures[-1], now=now)
    return last + schedule.retry_after * min(1 << doublings, schedule.retry_at_most / schedule.retry_after)


def _attempts(failures: Sequence[FailedAttempt]) -> str:
    last = failures[-1]
    how_many = "an attempt" if len(failures) == 1 else f"{len(failures)} attempts"
    end = last.brief if last.ended is not None else "it did not end in order"
    return f"{how_many} failed (the last began {_minute(last.began)}: {end})"


def _fraction(guest: str) -> float:
    """Return a number from 0 to below 1 that is the guest's own, evenly spread over guests."""
    digest = hashlib.sha256(guest.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / (1 << 48)


@lru_cache(maxsize=4096)
def _stretch(
    windows: tuple[str, ...], blackouts: tuple[str, ...], time_zone: str, moment: datetime
) -> tuple[datetime, datetime] | None:
    """Return when the first opening from ``moment`` on begins, and when it ends, or a time more than a day ahead of now."""
    openings = _openings(windows, blackouts, time_zone)
    opening = openings.next_open(moment)
    if opening is None:
        return None
    return opening, openings.closes(opening, limit=opening + _LOOK_BACK + 3 * _DAY)


@lru_cache(maxsize=256)
def _openings(windows: tuple[str, ...], blackouts: tuple[str, ...], time_zone: str) -> Openings:
    return Openings(
        windows=tuple(parse_span(text) for text in windows),
        blackouts=tuple(parse_span(text) for text in blackouts),
        zone=_zone(time_zone),
    )


def _zone(name: str) -> tzinfo:
    return UTC if name == "UTC" else ZoneInfo(name)


def _minute(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%MZ}"
