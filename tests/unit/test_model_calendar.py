"""Calendar expressions: by hand, and compared with systemd itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vmsnap.model.calendar import Calendar, find_zone, parse_calendar, parse_days

START = datetime(2026, 11, 21, 2, 0, tzinfo=UTC)


def times(text: str, count: int, *, after: datetime = START, zone: str = "UTC") -> list[datetime]:
    """Return the next times of an expression."""
    calendar = parse_calendar(text)
    found: list[datetime] = []
    while len(found) < count:
        moment = calendar.next_after(found[-1] if found else after, zone=ZoneInfo(zone))
        if moment is None:
            break
        found.append(moment)
    return found


def iso(moments: list[datetime]) -> list[str]:
    return [moment.strftime("%Y-%m-%d %H:%M:%S") for moment in moments]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("daily", ["2026-11-22 00:00:00", "2026-11-23 00:00:00"]),
        ("Mon..Fri 02:00", ["2026-11-23 02:00:00", "2026-11-24 02:00:00"]),
        ("*-*-01 03:00", ["2026-12-01 03:00:00", "2027-01-01 03:00:00"]),
        ("*-02~01", ["2027-02-28 00:00:00", "2028-02-29 00:00:00"]),
        ("*-02-29", ["2028-02-29 00:00:00", "2032-02-29 00:00:00"]),
        ("Mon *-05~07/1", ["2027-05-31 00:00:00", "2028-05-29 00:00:00"]),
        ("2027-*-1..32/15 00:00", ["2027-01-01 00:00:00", "2027-01-16 00:00:00"]),
        ("0..3/500:00", ["2026-11-22 00:00:00", "2026-11-23 00:00:00"]),
        ("0/6:30", ["2026-11-21 06:30:00", "2026-11-21 12:30:00"]),
        ("2026-11-21 02:00", []),
        ("*-02-30", []),
    ],
)
def test_times_that_expressions_name(text: str, expected: list[str]) -> None:
    assert iso(times(text, 2)) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no time"),
        ("   ", "names no time"),
        ("Foo", "'Foo' is no weekday"),
        ("fortnightly", "'fortnightly' is no weekday"),
        ("Fri..Mon 02:00", "goes beyond Sunday; write two ranges"),
        ("25:00", "hours are from 0 to 23"),
        ("02:60", "minutes are from 0 to 59"),
        ("*-13-01", "months are from 1 to 12"),
        ("*-*-32", "days are from 1 to 31"),
        ("*-*~29", "days are from 1 to 28"),
        ("5..1:00", "ends before it begins"),
        ("0:0/0", "a step of 0"),
        ("0:30/50", "leads out of"),
        ("02:00 Europe/Berln", "no time zone 'Europe/Berln'"),
        ("02:00 Europe", "no time zone 'Europe'"),
        ("Mon Tue 02:00", "'Tue' is no date"),
        ("Mon *-*-1 *-*-2 02:00", "one word too many"),
        ("02:00:59.9999999", "seconds are from 0 to 59"),
        ("@1234", "'@1234' is no date"),
        ("1.5:00", "'1.5' is no hour"),
        ("0:0:1..1.5", "needs a step"),
        (f"*:{','.join(['1'] * 300)}", "a list of more than"),
        (f"{'9' * 5000}:00", "hours are from 0 to 23"),
    ],
)
def test_what_is_wrong_is_said(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        parse_calendar(text)


def test_a_time_left_out_in_spring_does_not_happen() -> None:
    found = times("02:30", 2, after=datetime(2026, 3, 28, 12, tzinfo=UTC), zone="Europe/Berlin")
    assert iso(found) == ["2026-03-30 00:30:00", "2026-03-31 00:30:00"]


def test_a_time_that_comes_twice_in_autumn_happens_the_first_time() -> None:
    found = times("02:30", 2, after=datetime(2026, 10, 24, 12, tzinfo=UTC), zone="Europe/Berlin")
    assert iso(found) == ["2026-10-25 00:30:00", "2026-10-26 01:30:00"]
    again = times("*:*:0/0.000001", 1, after=datetime(2026, 10, 25, 1, 15, tzinfo=UTC), zone="Europe/Berlin")
    assert iso(again) == ["2026-10-25 02:00:00"]


def test_the_finest_series_over_a_gap_takes_no_time() -> None:
    found = times("*:*:0/0.000001", 1, after=datetime(2026, 3, 29, 0, 59, 59, 999999, tzinfo=UTC), zone="Europe/Berlin")
    assert iso(found) == ["2026-03-29 01:00:00"]


def test_the_zone_of_an_expression_wins() -> None:
    assert times("02:00 UTC", 1, zone="Asia/Tokyo") == [datetime(2026, 11, 22, 2, tzinfo=UTC)]
    assert times("02:00", 1, zone="Asia/Tokyo") == [datetime(2026, 11, 21, 17, tzinfo=UTC)]
    assert times("02:00 Asia/Tokyo", 1) == [datetime(2026, 11, 21, 17, tzinfo=UTC)]


def test_days_alone() -> None:
    assert parse_days("Sat,Sun").next_day(date(2026, 11, 23)) == date(2026, 11, 28)
    assert parse_days("").next_day(date(2026, 11, 23)) == date(2026, 11, 23)
    assert parse_days("*-12-24..26").next_day(date(2026, 12, 27)) == date(2027, 12, 24)
    assert parse_days("2020-01-01").next_day(date(2026, 12, 27)) is None


@pytest.mark.parametrize("name", ["", "Europe", "../../etc/passwd", "/etc/localtime", "x" * 5000, "a\0b"])
def test_a_name_that_is_no_zone(name: str) -> None:
    assert find_zone(name) is None


# Expressions made up, for the comparison with systemd and for what holds for all of them.


def numbers(least: int, most: int) -> st.SearchStrategy[str]:
    value = st.integers(least, most)
    step = st.integers(0, (most - least) // 2 + 2)
    term = st.one_of(
        value.map(str),
        st.tuples(value, value).map(lambda pair: f"{pair[0]:02}..{pair[1]:02}"),
        st.tuples(value, step).map(lambda pair: f"{pair[0]}/{pair[1]}"),
        st.tuples(value, value, step).map(lambda three: f"{three[0]}..{three[1]}/{three[2]}"),
    )
    return st.just("*") | st.lists(term, min_size=1, max_size=3).map(",".join)


weekday = st.sampled_from(["Mon", "tue", "Wednesday", "THU", "Fri", "sat", "Sunday"])
weekdays = st.lists(
    weekday | st.tuples(weekday, st.sampled_from(["..", "-"]), weekday).map("".join), min_size=1, max_size=2
).map(",".join)
years = st.just("*") | numbers(2025, 2031) | st.sampled_from(["26", "99", "69", "2199", "1969"])
dates = st.one_of(
    st.tuples(years, numbers(1, 12), numbers(1, 31)).map("-".join),
    st.tuples(numbers(0, 13), numbers(0, 32)).map("-".join),
    # systemd lowers the limit of 28 by three with each further term of such a list; this module does not.
    st.tuples(years, numbers(1, 12), numbers(1, 19)).map(lambda parts: f"{parts[0]}-{parts[1]}~{parts[2]}"),
    st.tuples(numbers(1, 12), st.integers(0, 30).map(str)).map("~".join),
)
clocks = st.one_of(
    st.tuples(numbers(0, 24), numbers(0, 60)).map(":".join),
    st.tuples(numbers(0, 23), numbers(0, 59), numbers(0, 59)).map(":".join),
)
ZONES = (
    "UTC",
    "Europe/Berlin",
    "America/New_York",
    "Australia/Lord_Howe",  # changes by half an hour
    "America/Havana",  # changes at midnight
    "Africa/Cairo",
    "Asia/Kathmandu",
    "Pacific/Chatham",
    "Africa/Casablanca",  # goes back for Ramadan
)
expressions = (
    st.tuples(st.just("") | weekdays, st.just("") | dates, st.just("") | clocks, st.just("") | st.sampled_from(ZONES))
    .map(lambda parts: " ".join(part for part in parts if part))
    .filter(lambda text: text and text not in ZONES)
)
shorthands = st.sampled_from(
    ["minutely", "hourly", "Daily", "weekly", "monthly", "quarterly", "semiannually", "yearly"]
)
moments = st.integers(0, 3 * 365 * 24 * 3600).map(
    lambda seconds: datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
)


def parsed(text: str) -> Calendar | None:
    try:
        return parse_calendar(text)
    except ValueError:
        return None


@given(expressions, moments, st.sampled_from(ZONES))
def test_times_go_on_and_on(text: str, after: datetime, zone: str) -> None:
    assume(parsed(text))
    found = [after, *times(text, 5, after=after, zone=zone)]
    assert all(one < other for one, other in pairwise(found))


@given(expressions, moments, st.sampled_from(ZONES), st.floats(0, 1))
def test_no_time_is_passed_over(text: str, after: datetime, zone: str, where: float) -> None:
    calendar = parsed(text)
    assume(calendar)
    assert calendar is not None
    following = calendar.next_after(after, zone=ZoneInfo(zone))
    assume(following)
    assert following is not None
    between = after + (following - after) * where
    expected = following if between < following else calendar.next_after(following, zone=ZoneInfo(zone))
    assert calendar.next_after(between, zone=ZoneInfo(zone)) == expected


needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")


def systemd(text: str, *, after: datetime, count: int) -> list[str] | None:
    """Return the next times by systemd's own reckoning, to the second; None where it refuses the expression."""
    done = subprocess.run(
        [
            "systemd-analyze",
            "calendar",
            f"--base-time={after:%Y-%m-%d %H:%M:%S} UTC",
            f"--iterations={count}",
            "--",
            text,
        ],
        env={**os.environ, "TZ": "UTC", "LC_ALL": "C", "SYSTEMD_LOG_LEVEL": "err"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    if done.returncode != 0:
        return None
    return re.findall(r"(?:Next elapse|Iter\. #\d+): \w{3} (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) UTC", done.stdout)


@needs_systemd
@settings(max_examples=100, deadline=None)
@given(expressions | shorthands, moments)
def test_systemd_says_the_same(text: str, after: datetime) -> None:
    whole = after.replace(microsecond=0)
    if _is_repeated(text, whole):
        return  # systemd's answer there depends on what was asked before
    theirs = systemd(text, after=whole, count=4)
    ours = None if parsed(text) is None else iso(times(text, 4, after=whole))
    assert ours == theirs


@needs_systemd
@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize(("text", "count"), [("00:30", 2), ("02:30", 2), ("daily", 2), ("*:0/20", 18)])
def test_systemd_says_the_same_where_clocks_change(text: str, count: int, zone: str) -> None:
    for change in _changes(zone, year=2027):
        after = change - timedelta(hours=3)
        theirs = systemd(f"{text} {zone}", after=after, count=count)
        assert iso(times(f"{text} {zone}", count, after=after)) == theirs, change


def _changes(zone: str, *, year: int) -> list[datetime]:
    """Return the moments of a year, to the hour, at which the clocks of a zone change."""
    hours = [datetime(year, 1, 1, tzinfo=UTC) + timedelta(hours=hour) for hour in range(365 * 24)]
    offsets = [hour.astimezone(ZoneInfo(zone)).utcoffset() for hour in hours]
    return [hours[place] for place in range(1, len(hours)) if offsets[place] != offsets[place - 1]]


def _is_repeated(text: str, moment: datetime) -> bool:
    calendar = parsed(text)
    zone = calendar.zone if calendar is not None and calendar.zone is not None else UTC
    wall = moment.astimezone(zone).replace(fold=0)
    return wall.utcoffset() != wall.replace(fold=1).utcoffset()
