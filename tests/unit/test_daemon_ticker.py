"""The ticker does what is to be done every so often, whatever the wall clock does."""

from __future__ import annotations

from datetime import datetime, timedelta
from datetime import time as dt_time
from types import SimpleNamespace
from typing import Any

import pytest
import schedule

from vmsnap.daemon.ticker import Ticker

MINUTE = timedelta(minutes=1)


class Clocks:
    """Two clocks that go on together, until the wall clock is set."""

    def __init__(self) -> None:
        self.wall = datetime(2026, 11, 21, 2, 0)  # noqa: DTZ001 - as schedule reckons
        self.seconds = 1000.0

    def pass_by(self, duration: timedelta) -> None:
        self.wall += duration
        self.seconds += duration.total_seconds()


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    clocks = Clocks()

    class Frozen(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            assert tz is None
            return clocks.wall

    monkeypatch.setattr(schedule, "datetime", SimpleNamespace(datetime=Frozen, timedelta=timedelta, time=dt_time))
    return clocks


class Counted:
    def __init__(self, clocks: Clocks) -> None:
        self.calls: list[str] = []
        self.ticker = Ticker(wall=lambda: clocks.wall, monotonic=lambda: clocks.seconds)
        self.ticker.set((MINUTE, lambda: self.calls.append("tick")), (5 * MINUTE, lambda: self.calls.append("tidy")))

    def look(self) -> list[str]:
        self.calls.clear()
        self.ticker.run_pending()
        return list(self.calls)


def test_everything_is_done_at_once_and_then_in_its_time(clocks: Clocks) -> None:
    counted = Counted(clocks)
    assert counted.ticker.idle() == timedelta(0)
    assert sorted(counted.look()) == ["tick", "tidy"]
    assert counted.look() == []
    assert counted.ticker.idle() == MINUTE
    for minute in range(1, 11):
        clocks.pass_by(MINUTE)
        assert sorted(counted.look()) == (["tick"] if minute % 5 else ["tick", "tidy"])


def test_what_was_missed_is_done_once(clocks: Clocks) -> None:
    counted = Counted(clocks)
    counted.look()
    clocks.pass_by(timedelta(hours=3))
    assert sorted(counted.look()) == ["tick", "tidy"]
    assert counted.look() == []


@pytest.mark.parametrize("jump", [timedelta(days=-400), timedelta(hours=-1), timedelta(hours=1), timedelta(days=400)])
def test_a_clock_that_was_set_stops_nothing(clocks: Clocks, jump: timedelta) -> None:
    counted = Counted(clocks)
    counted.look()
    clocks.pass_by(MINUTE / 2)
    clocks.wall += jump
    assert sorted(counted.look()) == ["tick", "tidy"]
    assert counted.look() == []
    clocks.pass_by(MINUTE)
    assert counted.look() == ["tick"]


def test_a_clock_that_drifts_a_little_is_no_jump(clocks: Clocks) -> None:
    counted = Counted(clocks)
    counted.look()
    for _ in range(4):
        clocks.pass_by(timedelta(seconds=10))
        clocks.wall += timedelta(seconds=4)
        assert counted.look() == []
    clocks.pass_by(timedelta(seconds=10))
    assert counted.look() == ["tick"]


def test_a_job_that_fails_stays(clocks: Clocks) -> None:
    ticker = Ticker(wall=lambda: clocks.wall, monotonic=lambda: clocks.seconds)
    calls = []

    def fail() -> None:
        calls.append("called")
        raise ZeroDivisionError

    ticker.set((MINUTE, fail))
    for _ in range(3):
        clocks.pass_by(2 * MINUTE)
        with pytest.raises(ZeroDivisionError):
            ticker.run_pending()
    assert len(calls) == 3


def test_without_anything_to_do_it_is_idle(clocks: Clocks) -> None:
    assert Ticker(wall=lambda: clocks.wall, monotonic=lambda: clocks.seconds).idle() == timedelta.max
