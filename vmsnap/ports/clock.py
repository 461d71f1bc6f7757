"""Time as a port, so that tests do not wait."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Protocol


class Clock(Protocol):
    """Wall clock, monotonic clock and waiting."""

    def now(self) -> datetime:
        """Return the wall clock as an aware UTC datetime."""

    def monotonic(self) -> float:
        """Return seconds of a clock that never goes back."""

    def sleep(self, duration: timedelta) -> None:
        """Wait. Returns early where the run was cancelled."""


class Cancel(Protocol):
    """Whether somebody asked the run to stop (a signal). Steps poll it; clean-up does not."""

    def is_set(self) -> bool:
        """Tell whether the run shall stop."""

    def check(self) -> None:
        """Raise CancelledError where the run shall stop."""
