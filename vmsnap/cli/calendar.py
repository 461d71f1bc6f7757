"""A forecast as a calendar: a line a month, a cell a day, and in it the letter of what keeps a snapshot of that day.

The letters are the same with and without colours, so nothing is said by colour alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import date, timedelta
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

from rich.text import Text

from vmsnap.cli.text import count, printable

if TYPE_CHECKING:
    from vmsnap.model.forecast import Forecast
    from vmsnap.model.retention import Verdict

# What is named first is drawn where several keep a snapshot, or several snapshots of a day are kept.
_SIGNS = (
    ("pinned", "P", "bold white on red", "pinned"),
    ("in-use", "U", "bold white on red", "in use by an environment"),
    ("keep_yearly", "Y", "bold black on magenta", "keep_yearly"),
    ("keep_monthly", "M", "bold black on blue", "keep_monthly"),
    ("keep_weekly", "W", "bold black on cyan", "keep_weekly"),
    ("keep_daily", "D", "bold black on green", "keep_daily"),
    ("keep_hourly", "H", "bold black on yellow", "keep_hourly"),
    ("keep_last", "L", "bold black on white", "keep_last"),
    ("min_age", "A", "bold black on white", "min_age"),
)
_OTHER = ("", "N", "bold black on white", "newest, or kept for safety")
_GONE, _SEVERAL = "·", "2-9+"
_LEGEND_WIDTH = 96


def calendar_lines(forecast: Forecast) -> Iterator[Text]:
    """Yield the lines of a forecast's calendar, its heading and its legend."""
    zone = ZoneInfo(forecast.time_zone)
    kept: dict[date, list[Verdict]] = {}
    for verdict in forecast.kept:
        kept.setdefault(verdict.candidate.captured.astimezone(zone).date(), []).append(verdict)
    first, last = forecast.start.astimezone(zone).date(), forecast.end.astimezone(zone).date()
    days = Counter(moment.astimezone(zone).date() for moment in forecast.backups)
    yield Text.assemble((printable(forecast.guest), "bold"), f", {first} to {last} ({forecast.time_zone})")
    yield Text(
        f"{count(len(forecast.backups), thing='backup')}, {_rhythm(forecast.every)}; "
        f"{len(forecast.kept)} kept at the end, {forecast.most} at most"
    )
    yield Text()
    marks = "".join(f"{number:<2}" if number == 1 or number % 5 == 0 else "  " for number in range(1, 32))
    yield Text(f"{'':9}{marks}".rstrip())
    earliest = min(kept, default=first)
    drawn: set[str] = set()
    for month in _months(min(earliest, first), last):
        if month.replace(day=1) < first.replace(day=1) and not any(_same_month(one, month) for one in kept):
            continue  # years before the forecast, of which a few snapshots are left
        yield _month_line(month, kept=kept, backups=days, drawn=drawn)
    yield Text()
    yield from _legend(drawn)


def _rhythm(every: timedelta | None) -> str:
    from vmsnap.model.durations import format_duration  # noqa: PLC0415 - pydantic is slow to load, and --help needs none

    return "as scheduled" if every is None else f"one each {format_duration(every)}"


def _months(first: date, last: date) -> Iterator[date]:
    month = first.replace(day=1)
    while month <= last:
        yield month
        month = (month + timedelta(days=31)).replace(day=1)


def _same_month(one: date, month: date) -> bool:
    return (one.year, one.month) == (month.year, month.month)


def _month_line(month: date, *, kept: dict[date, list[Verdict]], backups: Counter[date], drawn: set[str]) -> Text:
    line = Text(f"{month:%Y-%m}  ")
    stay = there = 0
    for offset in range(31):
        day = month + timedelta(days=offset)
        mine = kept.get(day, []) if _same_month(day, month) else []
        made = backups[day] if _same_month(day, month) else 0
        stay += len(mine)
        there += max(made, len(mine))
        if mine:
            rules = [reason.rule for verdict in mine for reason in verdict.reasons]
            letter, style = _sign(rules)
            drawn.add(letter)
            line.append(letter, style=style)
        elif made:
            drawn.add(_GONE)
            line.append(_GONE, style="dim")
        else:
            line.append(" ")
        line.append(_more(len(mine), drawn=drawn))
    line.append(f" {stay:>3} of {there}")
    line.rstrip()
    return line


def _more(number: int, *, drawn: set[str]) -> str:
    """Return what stands behind a day's letter: how many are kept, where there are several."""
    if number < 2:
        return " "
    drawn.add(_SEVERAL)
    return str(number) if number < 10 else "+"


def _sign(rules: Sequence[str]) -> tuple[str, str]:
    for rule, letter, style, _ in _SIGNS:
        if rule in rules:
            return letter, style
    return _OTHER[1], _OTHER[2]


def _legend(drawn: set[str]) -> Iterator[Text]:
    """Yield the lines that explain the signs in use."""
    signs = [(letter, style, meaning) for _, letter, style, meaning in (*_SIGNS, _OTHER)]
    signs += [(_GONE, "dim", "removed by then"), (_SEVERAL, "", "so many of that day")]
    line = Text()
    for sign, style, meaning in signs:
        if sign not in drawn:
            continue
        if line and len(line) + len(sign) + len(meaning) + 4 > _LEGEND_WIDTH:
            yield line
            line = Text()
        line.append("   " if line else "")
        line.append(sign, style=style)
        line.append(f" {meaning}")
    yield line
