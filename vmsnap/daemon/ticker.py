"""Doing things every so often, by the library ``schedule``, whatever the wall clock does.

``schedule`` reckons with the local wall clock. Where that is set, or daylight-saving time begins or ends, its next times
mean nothing any more: everything is then done at once, and counted anew.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import datetime, timedelta

import schedule

_LOG = logging.getLogger(__name__)
_SLACK = timedelta(seconds=5)
"""How far wall clock and monotonic clock may drift apart between two looks without a jump: NTP slews less."""


def _local_time() -> datetime:
    return datetime.now()  # noqa: DTZ005 - the clock that schedule uses


class Ticker:
    """Calls what is to be done every so often, in the thread that calls ``run_pending``."""

    def __init__(
        self, *, wall: Callable[[], datetime] = _local_time, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._wall = wall
        self._monotonic = monotonic
        self._jobs: list[tuple[timedelta, Callable[[], None]]] = []
        self._scheduler = schedule.Scheduler()
        self._offset = self._measure()

    def set(self, *jobs: tuple[timedelta, Callable[[], None]]) -> None:
        """Do these, each as often as it says, and nothing else; all of them for the first time at the next look."""
        self._jobs = list(jobs)
        self._begin_anew()

    def run_pending(self) -> None:
        """Do what is due. What was missed is done once. Raises what a job raises; the job stays."""
        offset = self._measure()
        if abs(offset - self._offset) > _SLACK:
            _LOG.warning("the clock was set by %s; everything is looked at again", offset - self._offset)
            self._begin_anew()
        self._offset = offset
        self._scheduler.run_pending()

    def idle(self) -> timedelta:
        """Return how long there is nothing to do: zero where something is due."""
        seconds = self._scheduler.idle_seconds
        return max(timedelta(0), timedelta(seconds=seconds)) if seconds is not None else timedelta.max

    def _begin_anew(self) -> None:
        self._scheduler.clear()
        self._offset = self._measure()
        for every, call in self._jobs:
            job = self._scheduler.every(max(1, round(every.total_seconds()))).seconds.do(call)
            job.next_run = self._wall()

    def _measure(self) -> timedelta:
        """Return by how much the wall clock is ahead of the monotonic one."""
        return self._wall() - datetime.min - timedelta(seconds=self._monotonic())  # noqa: DTZ901 - as above
