from __future__ import annotations

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest

from vmsnap.model.openings import Openings, parse_span

BERLIN = ZoneInfo("Europe/Berlin")
EVENING = datetime(2026, 3, 28, 12, tzinfo=UTC)
"""Before the night in which Berlin's clocks go from 02:00 to 03:00, at 01:00 UTC."""


@pytest.mark.parametrize(
    ("times", "opens", "closes"),
    [
        ("01:00-04:00", "00:00", "02:00"),
        ("02:30-03:30", "01:00", "01:30"),
        ("02:45-03:15", "01:00", "01:15"),
        ("02:30-06:00", "01:00", "04:00"),
        ("01:00-02:30", "00:00", "01:00"),
        # All of it is jumped over: it is as long as ever, after the jump.
        ("02:00-03:00", "01:00", "02:00"),
        ("02:10-02:50", "01:10", "01:50"),
        ("22:00-02:30", "21:00", "01:00"),
    ],
)
def test_a_window_in_the_night_without_an_hour_opens_all_the_same(times: str, opens: str, closes: str) -> None:
    window = Openings(windows=(parse_span(times),), blackouts=(), zone=BERLIN)
    opening = window.next_open(EVENING)
    assert opening is not None
    assert f"{opening:%H:%M}" == opens
    assert f"{window.closes(opening, limit=datetime(2026, 4, 1, tzinfo=UTC)):%H:%M}" == closes
    assert (opening - EVENING).days == 0


@pytest.mark.parametrize("times", ["02:00-03:00", "02:30-03:30", "02:45-03:15"])
def test_a_blackout_in_the_night_without_an_hour_holds_all_the_same(times: str) -> None:
    blackout = Openings(windows=(), blackouts=(parse_span(times),), zone=BERLIN)
    jump = datetime(2026, 3, 29, 1, tzinfo=UTC)
    opening = blackout.next_open(jump)
    assert opening is not None
    assert opening > jump


def test_the_clocks_of_a_zone_that_skipped_a_day() -> None:
    # Samoa went from 29 to 31 December 2011.
    apia = ZoneInfo("Pacific/Apia")
    window = Openings(windows=(parse_span("22:00-06:00"),), blackouts=(), zone=apia)
    opening = window.next_open(datetime(2011, 12, 29, 12, tzinfo=UTC))
    assert opening is not None
    assert opening <= datetime(2011, 12, 31, tzinfo=UTC)
