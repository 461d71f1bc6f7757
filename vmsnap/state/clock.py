"""The machine's clocks."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta


class SystemClock:
    """ports.clock.Clock over the machine's clocks."""

    def now(self) -> datetime:
        """Return the wall clock."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """Return the monotonic clock."""
        return time.monotonic()

    def sleep(self, duration: timedelta) -> None:
        """Wait."""
        time.sleep(duration.total_seconds())
