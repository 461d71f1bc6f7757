"""When runs may start: windows, less blackouts.

Both are lists of spans: days, then the time of day, either of which may be missing. ``Mon..Fri 22:00-06:00`` begins on those
days and ends on the next morning; ``Sat,Sun``, ``*-12-24..26`` and ``2026-12-20..2027-01-03`` are whole days. Days are
written as in calendar expressions, or as a range of two dates. Times are by the clocks of the policy's time zone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, tzinfo

from vmsnap.model.calendar import Days, parse_days

_TIMES = re.compile(r"(\d{1,2}):(\d{2})-(\d{1,2}):(\d{2})\Z")
_DATES = re.compile(r"(\d{4}-\d{2}-\d{2})\.\.(\d{4}-\d{2}-\d{2})\Z")
_DAY, _HOUR, _SECOND = timedelta(days=1), timedelta(hours=1), timedelta(seconds=1)
_WHOLE_DAY = 24 * 60
LOOK_AHEAD = timedelta(days=3660)


@dataclass(frozen=True)
class Dates:
    """All days from one to another, both included."""

    first: date
    last: date

    def next_day(self, first: date) -> date | None:
        """Return the first of these days that is not before ``first``."""
        day = max(first, self.first)
        return day if day <= self.last else None


@dataclass(frozen=True)
class Span:
    """One entry of a list. ``start`` and ``stop`` are minutes of the day; ``stop`` may lie on the next day."""

    days: Days | Dates
    start: int
    stop: int

    def intervals(self, moment: datetime, *, zone: tzinfo, late: bool) -> Iterator[tuple[datetime, datetime]]:
        """Return its intervals that end after ``moment``, in UTC and in order.

        ``late``: an end that the clocks show twice is the second one.
        """
        # Two days back: an interval may last a night, and midnight may be a day away by another zone's clock.
        first = moment.astimezone(zone).date() - 2 * _DAY
        while (day := self.days.next_day(first)) is not None:
            start, stop = self._ends(day, zone=zone, late=late)
            if start < stop and stop > moment:
                yield start, stop
            first = day + _DAY

    def _ends(self, day: date, *, zone: tzinfo, late: bool) -> tuple[datetime, datetime]:
        start = _moment(day, self.start, zone=zone)
        stop = _moment(day, self.stop, zone=zone, late=late)
        begins_in_gap, ends_in_gap = (_is_skipped(day, one, zone=zone) for one in (self.start, self.stop))
        if begins_in_gap and not ends_in_gap:
            start = _jump(start, zone=zone)
        if ends_in_gap and not begins_in_gap:
            stop = _jump(stop, zone=zone)
        if start >= stop:
            # Clocks jump over all of it: it is as long as ever, and begins when they have jumped.
            stop = start + timedelta(minutes=self.stop - self.start)
        return start, stop


def parse_span(text: str) -> Span:
    """Return the span that a text is. Raises ValueError that says what is wrong with it."""
    words = text.split()
    if not words:
        raise ValueError('an empty text names no days and no times; write it like "Mon..Fri 22:00-06:00" or "Sat,Sun"')
    start, stop = (0, _WHOLE_DAY) if ":" not in words[-1] else _times(words.pop())
    return Span(days=_days(" ".join(words)), start=start, stop=stop)


def _times(text: str) -> tuple[int, int]:
    match = _TIMES.match(text)
    if not match:
        raise ValueError(f"'{text}' is no span of time; write it like 22:00-06:00")
    hours, minutes = (int(match[1]), int(match[3])), (int(match[2]), int(match[4]))
    start, stop = (hour * 60 + minute for hour, minute in zip(hours, minutes, strict=True))
    if max(minutes) > 59 or start >= _WHOLE_DAY or stop > _WHOLE_DAY:
        raise ValueError(f"'{text}': times go from 00:00 to 24:00")
    if start == stop:
        raise ValueError(f"'{text}' ends when it begins; leave the times out for whole days")
    return start, stop if stop > start else stop + _WHOLE_DAY


def _days(text: str) -> Days | Dates:
    match = _DATES.match(text)
    if not match:
        return parse_days(text)
    first, last = date.fromisoformat(match[1]), date.fromisoformat(match[2])
    if last < first:
        raise ValueError(f"'{text}' ends before it begins")
    return Dates(first, last)


def _moment(day: date, minutes: int, *, zone: tzinfo, late: bool = False) -> datetime:
    """Return a time by a zone's clocks in UTC; of one that they show twice the first, or with ``late`` the second.

    A time that they jump over is read as if they had not (PEP 495), so that a span in the gap is not lost.
    """
    wall = _wall(day, minutes, zone=zone)
    moment = wall.astimezone(UTC)
    return max(moment, wall.replace(fold=1).astimezone(UTC)) if late else moment


def _wall(day: date, minutes: int, *, zone: tzinfo) -> datetime:
    days, minutes = divmod(minutes, _WHOLE_DAY)
    return datetime.combine(day + days * _DAY, time(*divmod(minutes, 60)), tzinfo=zone)


def _is_skipped(day: date, minutes: int, *, zone: tzinfo) -> bool:
    """Tell whether a zone's clocks jump over a time."""
    wall = _wall(day, minutes, zone=zone)
    return wall.astimezone(UTC).astimezone(zone).replace(tzinfo=None) != wall.replace(tzinfo=None)


def _jump(moment: datetime, *, zone: tzinfo) -> datetime:
    """Return when the clocks jumped over a time that was read as if they had not: the last change before it."""
    after = moment.astimezone(zone).utcoffset()
    low, high = moment - _DAY - _HOUR, moment
    while high - low > _SECOND:
        middle = low + (high - low) / 2
        low, high = (low, middle) if middle.astimezone(zone).utcoffset() == after else (middle, high)
    return high.replace(microsecond=0)


@dataclass(frozen=True)
class Openings:
    """When runs may start. No windows: always, less the blackouts."""

    windows: tuple[Span, ...]
    blackouts: tuple[Span, ...]
    zone: tzinfo

    def next_open(self, moment: datetime) -> datetime | None:
        """Return the first time from ``moment`` on at which a run may start; None where there is none in ten years."""
        end = moment + LOOK_AHEAD
        while moment <= end:
            opening = self._window(moment)
            if opening is None:
                return None
            held = max((stop for start, stop in self._blackouts(opening) if start <= opening), default=opening)
            if held == opening:
                return opening
            moment = held
        return None

    def closes(self, moment: datetime, *, limit: datetime) -> datetime:
        """Return when a stretch that is open at ``moment`` ends; ``limit`` where it lasts as long as that."""
        end = limit
        if self.windows:
            end = moment
            while end < limit:
                later = max((stop for start, stop in self._windows(end) if start <= end), default=end)
                if later == end:
                    break
                end = later
        return min([end, limit, *(start for start, _ in self._blackouts(moment))])

    def _window(self, moment: datetime) -> datetime | None:
        if not self.windows:
            return moment
        starts = [start for start, _ in self._windows(moment)]
        return max(moment, min(starts)) if starts else None

    def _windows(self, moment: datetime) -> Iterator[tuple[datetime, datetime]]:
        """Return the next interval of each window that ends after ``moment``."""
        for span in self.windows:
            yield from _first(span.intervals(moment, zone=self.zone, late=False))

    def _blackouts(self, moment: datetime) -> Iterator[tuple[datetime, datetime]]:
        for span in self.blackouts:
            yield from _first(span.intervals(moment, zone=self.zone, late=True))


def _first(intervals: Iterator[tuple[datetime, datetime]]) -> Iterator[tuple[datetime, datetime]]:
    found = next(intervals, None)
    if found is not None:
        yield found
