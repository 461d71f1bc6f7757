"""Durations as texts such as ``"90s"``, ``"10m"``, ``"14d"`` or ``"1h 30m"``, and names of time zones."""

from __future__ import annotations

import difflib
import re
from datetime import timedelta
from typing import Annotated
from zoneinfo import ZoneInfo, available_timezones

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer

_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800, "y": 31_536_000}
_DURATION = re.compile(r"\s*(?:\d+(?:\.\d+)?\s*(?:ms|s|m|h|d|w|y)\s*)+\Z")
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|w|y)")


def parse_duration(value: object) -> timedelta:
    """Return the duration that a text such as ``"90s"`` or ``"1h 30m"`` names; a year has 365 days.

    Raises ValueError for any other text, and for more than can be counted.
    """
    if isinstance(value, timedelta):
        return value
    if not isinstance(value, str) or not _DURATION.match(value):
        msg = 'a duration is a text of numbers with units ms, s, m, h, d, w or y, such as "90s", "10m" or "1h 30m"'
        raise ValueError(msg)
    try:
        return timedelta(seconds=sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(value)))
    except OverflowError as error:
        msg = "a duration may not be longer than some million years"
        raise ValueError(msg) from error


def format_duration(value: timedelta) -> str:
    """Return a duration as a text that ``parse_duration`` reads back to the millisecond."""
    rest = round(value / timedelta(milliseconds=1))
    parts = []
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)):
        count, rest = divmod(rest, size)
        if count:
            parts.append(f"{count}{unit}")
    return " ".join(parts) or "0s"


def check_time_zone(name: str) -> str:
    """Return the name of a time zone of the system's time zone database. Raises ValueError for any other name."""
    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError) as error:
        known = {one.casefold(): one for one in available_timezones()}
        near = difflib.get_close_matches(name.casefold(), list(known), n=1)
        meant = f"; did you mean '{known[near[0]]}'?" if near else ""
        msg = f'this system knows no such time zone; a name such as "UTC" or "Europe/Berlin" is allowed{meant}'
        raise ValueError(msg) from error
    return name


Duration = Annotated[timedelta, BeforeValidator(parse_duration), PlainSerializer(format_duration, return_type=str)]
PositiveDuration = Annotated[Duration, Field(gt=timedelta(0))]
TimeZoneName = Annotated[str, AfterValidator(check_time_zone)]
