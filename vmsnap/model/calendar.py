"""Calendar expressions as systemd.time(7) defines them for ``OnCalendar``: ``Mon..Fri *-*-* 02:00 Europe/Berlin``.

What differs from it: ``@SECONDS`` is refused (write the date), blanks at the ends are ignored, and an expression without
a time zone is in the zone that its user gives. As there, a local time that a change to summer time leaves out does not
happen, and one that comes twice happens the first time only. A test compares this module with systemd itself.

No library is used: those for cron know another syntax, and the one for this syntax knows neither fractions of seconds nor
all names, and walks from second to second.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from functools import lru_cache
from zoneinfo import ZoneInfo

_WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_SHORTHANDS = {
    "minutely": "*-*-* *:*:00",
    "hourly": "*-*-* *:00:00",
    "daily": "*-*-* 00:00:00",
    "weekly": "Mon *-*-* 00:00:00",
    "monthly": "*-*-01 00:00:00",
    "quarterly": "*-01,04,07,10-01 00:00:00",
    "semiannually": "*-01,07-01 00:00:00",
    "semi-annually": "*-01,07-01 00:00:00",
    "biannually": "*-01,07-01 00:00:00",
    "bi-annually": "*-01,07-01 00:00:00",
    "yearly": "*-01-01 00:00:00",
    "annually": "*-01-01 00:00:00",
    "anually": "*-01-01 00:00:00",
}
_FIRST_YEAR, _LAST_YEAR = 1970, 2199
_LONGEST_LIST = 240
_MICROSECONDS = 1_000_000
_LAST_COUNTED_FROM_END = 28
_TERM = re.compile(r"(\d+(?:\.\d+)?)(?:\.\.(\d+(?:\.\d+)?))?(?:/(\d+(?:\.\d+)?))?\Z")
_TICK = timedelta(microseconds=1)
_MINUTE = timedelta(minutes=1)
_DAY = timedelta(days=1)


@dataclass(frozen=True)
class _Term:
    """One term of a list: a value, a range or a series. ``step`` 0: the value alone; ``stop`` None: to the field's end."""

    start: int
    stop: int | None
    step: int

    def values(self, last: int) -> range:
        """Return its values in a field that ends at ``last``."""
        if not self.step:
            return range(self.start, min(self.start, last) + 1)
        return range(self.start, min(last, last if self.stop is None else self.stop) + 1, self.step)

    def values_from_end(self, days_in_month: int) -> Iterator[int]:
        """Return its days of a month where 1 is the last one."""
        if not self.step:
            counted = range(self.start, self.start + 1)
        elif self.stop is None:
            counted = range(self.start, 0, -self.step)
        else:
            counted = range(self.start, self.stop + 1, self.step)
        return (days_in_month - value + 1 for value in counted)

    def next_from(self, value: int, *, last: int) -> int | None:
        """Return its first value that is not less than ``value``."""
        values = self.values(last)
        if not values or value > values[-1]:
            return None
        return values[0] if value <= values[0] else values[-(-(value - values[0]) // values.step)]


@dataclass(frozen=True)
class Days:
    """A pattern of days. ``weekdays`` counts from Monday, 0."""

    weekdays: frozenset[int]
    years: tuple[int, ...]
    months: tuple[int, ...]
    terms: tuple[_Term, ...]
    from_end: bool

    def next_day(self, first: date) -> date | None:
        """Return the first day of the pattern that is not before ``first``; None where there is none until 2199."""
        for year in self.years[bisect_left(self.years, first.year) :]:
            for month in self.months:
                if (year, month) < (first.year, first.month):
                    continue
                least = first.day if (year, month) == (first.year, first.month) else 1
                for day in _days_of_month(self, year, month):
                    if day >= least:
                        return date(year, month, day)
        return None


@lru_cache(maxsize=4096)
def _days_of_month(days: Days, year: int, month: int) -> tuple[int, ...]:
    following = date(year + month // 12, month % 12 + 1, 1)
    last = (following - _DAY).day
    chosen = {
        day for term in days.terms for day in (term.values_from_end(last) if days.from_end else term.values(last))
    }
    weekday = date(year, month, 1).weekday()
    return tuple(sorted(day for day in chosen if 1 <= day <= last and (weekday + day - 1) % 7 in days.weekdays))


@dataclass(frozen=True)
class Calendar:
    """A parsed expression. ``zone`` None: the expression names none."""

    text: str
    days: Days
    hours: tuple[int, ...]
    minutes: tuple[int, ...]
    microseconds: tuple[_Term, ...]
    zone: tzinfo | None

    def next_after(self, moment: datetime, *, zone: tzinfo) -> datetime | None:
        """Return the first time after ``moment``, in UTC; None where there is none until 2199.

        ``zone`` is that of an expression which names none.
        """
        zone = self.zone or zone
        local = (moment + _TICK).astimezone(zone)
        wall = local.replace(tzinfo=None, fold=0)
        if local.fold:
            # Times that come twice happened the first time.
            wall = _skip(wall, zone, while_=_is_ambiguous)
        while (found := self._next_wall(wall)) is not None:
            if not _is_missing(found, zone):
                return found.replace(tzinfo=zone).astimezone(UTC)
            wall = _skip(found, zone, while_=_is_missing)
        return None

    def _next_wall(self, wall: datetime) -> datetime | None:
        """Return the first match not before ``wall``, by the clock on the wall."""
        day = self.days.next_day(wall.date())
        if day == wall.date():
            at = self._next_time(wall.time())
            if at is not None:
                return datetime.combine(day, at)
            day = self.days.next_day(day + _DAY)
        first = self._next_time(time())
        return None if day is None or first is None else datetime.combine(day, first)

    def _next_time(self, least: time) -> time | None:
        for hour in self.hours:
            for minute in self.minutes:
                if (hour, minute) < (least.hour, least.minute):
                    continue
                same = (hour, minute) == (least.hour, least.minute)
                value = self._next_microsecond(least.second * _MICROSECONDS + least.microsecond if same else 0)
                if value is not None:
                    return time(hour, minute, *divmod(value, _MICROSECONDS))
        return None

    def _next_microsecond(self, least: int) -> int | None:
        found = (term.next_from(least, last=60 * _MICROSECONDS - 1) for term in self.microseconds)
        return min((value for value in found if value is not None), default=None)


def parse_calendar(text: str) -> Calendar:
    """Return the calendar expression that a text is. Raises ValueError that says what is wrong with it."""
    rest, zone = _split_zone(text.strip())
    words = _SHORTHANDS.get(rest.lower(), rest).split()
    if not words:
        raise ValueError('it names no time; write it as in OnCalendar of systemd, such as "Mon..Fri 02:00"')
    clock = words.pop() if ":" in words[-1] else "00:00:00"
    days = parse_days(" ".join(words))
    hours, minutes, microseconds = _clock(clock)
    return Calendar(text=text, days=days, hours=hours, minutes=minutes, microseconds=microseconds, zone=zone)


def parse_days(text: str) -> Days:
    """Return the days that weekdays and a date name: ``Sat,Sun``, ``*-12-24..26``, ``Mon *-*-1..7``; all for no text.

    Raises ValueError.
    """
    words = text.split()
    weekdays = _weekdays(words.pop(0)) if words and words[0][0].isalpha() else frozenset(range(7))
    if len(words) > 1:
        raise ValueError(f"'{words[1]}' is one word too many; weekdays, date and time go in this order")
    years, months, terms, from_end = _date(words[0] if words else "*-*-*")
    return Days(weekdays=weekdays, years=years, months=months, terms=terms, from_end=from_end)


def find_zone(name: str) -> ZoneInfo | None:
    """Return the time zone of a name from the IANA database of this host; None where it is not there."""
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # OSError: the name of a folder of zones, or too long a name
        return None


def _split_zone(text: str) -> tuple[str, tzinfo | None]:
    head, blank, last = text.rpartition(" ")
    if not blank or not last[:1].isalpha():
        return text, None
    if last.upper() == "UTC":
        return head.strip(), UTC
    zone = find_zone(last)
    if zone is None:
        raise ValueError(f"this host knows no time zone '{last}'; write one such as Europe/Berlin")
    return head.strip(), zone


def _weekdays(text: str) -> frozenset[int]:
    days: set[int] = set()
    for term in text.removesuffix(",").split(","):
        first, dots, last = term.replace("-", "..").partition("..")
        start = _weekday(first)
        stop = _weekday(last) if dots else start
        if stop < start:
            raise ValueError(f"'{term}' goes beyond Sunday; write two ranges, such as Fri..Sun,Mon")
        days.update(range(start, stop + 1))
    return frozenset(days)


def _weekday(text: str) -> int:
    for number, name in enumerate(_WEEKDAYS):
        if text.lower() in {name, name[:3]}:
            return number
    raise ValueError(f"'{text}' is no weekday (Mon, Tue, Wed, Thu, Fri, Sat, Sun), no date and no shorthand")


def _date(text: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[_Term, ...], bool]:
    parts = re.split("([-~])", text)
    if len(parts) == 3:
        parts = ["*", "-", *parts]
    if len(parts) != 5 or parts[1] != "-":
        raise ValueError(f"'{text}' is no date; write it like *-*-01, 2026-12-24 or *-02~01 (the last day of February)")
    from_end = parts[3] == "~"
    years = _field(parts[0], first=_FIRST_YEAR, last=_LAST_YEAR, name="year")
    months = _field(parts[2], first=1, last=12, name="month")
    if parts[4] == "*":
        return years, months, (_Term(1, None, 1),), False
    last = _LAST_COUNTED_FROM_END if from_end else 31
    return years, months, _terms(parts[4], first=1, last=last, name="day", downwards=from_end), from_end


def _clock(text: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[_Term, ...]]:
    parts = text.split(":")
    if len(parts) > 3:
        raise ValueError(f"'{text}' is no time; write it like 02:00 or 02:00:00")
    seconds = parts[2] if len(parts) == 3 else "0"
    return (
        _field(parts[0], first=0, last=23, name="hour"),
        _field(parts[1], first=0, last=59, name="minute"),
        (_Term(0, None, _MICROSECONDS),)
        if seconds == "*"
        else _terms(seconds, first=0, last=60 * _MICROSECONDS - 1, name="second", unit=_MICROSECONDS),
    )


def _field(text: str, *, first: int, last: int, name: str) -> tuple[int, ...]:
    if text == "*":
        return tuple(range(first, last + 1))
    return tuple(
        sorted({value for term in _terms(text, first=first, last=last, name=name) for value in term.values(last)})
    )


def _terms(text: str, *, first: int, last: int, name: str, unit: int = 1, downwards: bool = False) -> tuple[_Term, ...]:
    terms = text.split(",")
    if len(terms) > _LONGEST_LIST:
        raise ValueError(f"a list of more than {_LONGEST_LIST} {name}s")
    return tuple(_term(term, first=first, last=last, name=name, unit=unit, downwards=downwards) for term in terms)


def _term(text: str, *, first: int, last: int, name: str, unit: int, downwards: bool) -> _Term:
    """Return one term of a list. ``downwards``: a series goes towards ``first``, as days counted from the end do."""
    match = _TERM.match(text)
    if not match or (unit == 1 and "." in text.replace("..", "")):
        raise ValueError(f"'{text}' is no {name}; allowed: a number, *, a range 1..5, a step 1/2, or a list of those")
    is_year = name == "year"
    start = _number(match[1], unit=unit, is_year=is_year)
    stop = None if match[2] is None else _number(match[2], unit=unit, is_year=is_year)
    step = 0 if stop is None else unit
    if match[3] is not None:
        step = _number(match[3], unit=unit, is_year=False)
        if not step:
            raise ValueError(f"'{text}': a step of 0 leads nowhere")
    elif stop is not None and unit > 1 and start + step > stop:
        raise ValueError(f"'{text}': a range of less than a second needs a step")
    if stop is not None and stop < start:
        raise ValueError(f"'{text}': the range ends before it begins")
    if stop is not None:
        # The last value counts, not the number written: 1..32/2 ends at 31.
        stop -= (stop - start) % step
        if stop == start:
            stop, step = None, 0
    if not first <= start <= last or (stop or 0) > last or step > last - first:
        raise ValueError(f"'{text}': {name}s are from {first // unit} to {last // unit}")
    if stop is not None:
        return _Term(start, stop, step)
    if step and (start - step < first if downwards else start + step > last):
        raise ValueError(f"'{text}': the step leads out of the {name}s at once")
    return _Term(start, None, step)


def _number(text: str, *, unit: int, is_year: bool) -> int:
    whole, _, fraction = text.partition(".")
    value = int(whole[:10]) * unit
    if fraction:
        value += int(fraction[:6].ljust(6, "0")) + (len(fraction) > 6 and fraction[6] >= "5")
    if is_year and value < 100:
        value += 2000 if value < 70 else 1900
    return value


def _is_missing(wall: datetime, zone: tzinfo) -> bool:
    """Tell whether the clocks of a zone jump over this time."""
    return wall.replace(tzinfo=zone).astimezone(UTC).astimezone(zone).replace(tzinfo=None, fold=0) != wall


def _is_ambiguous(wall: datetime, zone: tzinfo) -> bool:
    """Tell whether the clocks of a zone show this time twice."""
    first, second = wall.replace(tzinfo=zone), wall.replace(tzinfo=zone, fold=1)
    return first.utcoffset() != second.utcoffset() and not _is_missing(wall, zone)


def _skip(wall: datetime, zone: tzinfo, *, while_: Callable[[datetime, tzinfo], bool]) -> datetime:
    """Return the first full minute from ``wall`` on that is not such a time. Clocks change at full minutes."""
    while while_(wall, zone):
        wall = wall.replace(second=0, microsecond=0) + _MINUTE
    return wall
