"""Until when a snapshot must be there."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from vmsnap.model.freshness import Expected, expected_of
from vmsnap.model.policy import Policy
from vmsnap.model.schedule_policy import SchedulePolicy

HOUR = timedelta(hours=1)


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


NEWEST = utc("2026-11-20 02:00")  # a Friday


def expected(newest: datetime | None = NEWEST, *, since: datetime = NEWEST, **schedule: Any) -> Expected:
    found = expected_of(Policy(guest="db", schedule=SchedulePolicy(**schedule)), newest=newest, since=since)
    assert found is not None
    return found


def test_without_windows_it_is_the_time_of_the_run_and_an_hour() -> None:
    found = expected(every=6 * HOUR)
    assert found == Expected(start=utc("2026-11-20 08:00"), deadline=utc("2026-11-20 09:00"))
    assert not found.is_overdue(utc("2026-11-20 08:59"))
    assert found.is_overdue(utc("2026-11-20 09:00"))
    assert not found.missed_window(utc("2036-01-01 00:00"))


def test_a_policy_may_give_more_time_or_less() -> None:
    assert expected(every=6 * HOUR, overdue_after=timedelta(minutes=1)).deadline == utc("2026-11-20 08:01")


def test_the_window_after_the_run_is_wanted_counts_and_its_end() -> None:
    found = expected(at=("02:00",), windows=("22:00-06:00",))
    assert found == Expected(
        start=utc("2026-11-21 02:00"), deadline=utc("2026-11-21 03:00"), closes=utc("2026-11-21 06:00")
    )
    assert not found.missed_window(utc("2026-11-21 05:59"))
    assert found.missed_window(utc("2026-11-21 06:00"))


def test_a_blackout_puts_it_off() -> None:
    found = expected(at=("02:00",), blackouts=("Sat,Sun",))
    assert found.start == utc("2026-11-23 00:00")
    assert found.closes == utc("2026-11-28 00:00")


def test_jitter_is_part_of_the_plan() -> None:
    found = expected(at=("02:00",), jitter=HOUR)
    assert utc("2026-11-21 02:00") <= found.start < utc("2026-11-21 03:00")
    assert found.deadline == found.start + HOUR


def test_a_guest_without_a_snapshot_is_reckoned_with_from_when_it_is_known() -> None:
    known = utc("2026-11-20 15:00")
    assert expected(None, since=known).start == known
    in_window = expected(None, since=known, windows=("22:00-06:00",))
    assert in_window.start == utc("2026-11-20 22:00")
    assert in_window.closes == utc("2026-11-21 06:00")


def test_nothing_is_expected_of_a_schedule_that_is_over() -> None:
    policy = Policy(guest="db", schedule=SchedulePolicy(calendar=("2025-01-01 02:00",)))
    assert expected_of(policy, newest=NEWEST, since=NEWEST) is None


@pytest.mark.parametrize("days", range(1, 15))
def test_time_passing_does_not_move_what_was_expected(days: int) -> None:
    policy = Policy(guest="db", schedule=SchedulePolicy(at=("02:00",), windows=("01:00-05:00",)))
    first = expected_of(policy, newest=NEWEST, since=NEWEST)
    assert expected_of(policy, newest=NEWEST, since=NEWEST + timedelta(days=days)) == first
