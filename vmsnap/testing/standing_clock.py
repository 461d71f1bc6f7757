"""A clock that stands still, for what must not wait."""

from __future__ import annotations

from datetime import datetime, timedelta


class StandingClock:
    """Shows one moment for ever. To sleep by it is an error of the test's subject."""

    def __init__(self, at: datetime) -> None:
        self._at = at

    def now(self) -> datetime:
        """Return the moment."""
        return self._at

    def monotonic(self) -> float:
        """Return no time at all."""
        return 0.0

    def sleep(self, duration: timedelta) -> None:
        """Raise AssertionError."""
        raise AssertionError(f"somebody sleeps for {duration}")
