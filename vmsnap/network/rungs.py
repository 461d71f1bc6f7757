"""What every rung of the ladder shares: waiting with a deadline and a cancel, and reading the request."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from vmsnap.errors import DeadlineError
from vmsnap.model.ids import RunId
from vmsnap.network.responder import FenceResponder
from vmsnap.ports.clock import Cancel, Clock
from vmsnap.ports.network import AddressRequest, LinkControl

_POLL_SECONDS = 0.05
_SHORTEST_SECONDS = 0.001  # never zero, or a clock that only moves when asked would stand still


@dataclass(frozen=True, kw_only=True)
class Timer:
    """Time for one rung: what is left of it, and waiting that a cancelled run breaks off."""

    clock: Clock
    cancel: Cancel
    end: float

    def left(self) -> float:
        """Return the seconds that are left, never less than zero."""
        return max(self.end - self.clock.monotonic(), 0.0)

    def tick(self, *, missing: str) -> None:
        """Wait a moment. Raises DeadlineError, which says what is missing, when the time is over; CancelledError."""
        self.cancel.check()
        if self.left() <= 0:
            raise DeadlineError(missing, remedy="allow the rung more time, or other rungs")
        self.clock.sleep(_poll(self.left()))

    def wait(self, seconds: float) -> None:
        """Wait that long, or as long as there is time. Raises CancelledError."""
        end = self.clock.monotonic() + min(seconds, self.left())
        while (left := end - self.clock.monotonic()) > 0:
            self.cancel.check()
            self.clock.sleep(_poll(left))


def _poll(left: float) -> timedelta:
    return timedelta(seconds=max(min(_POLL_SECONDS, left), _SHORTEST_SECONDS))


class Keeper(Protocol):
    """Keeps what a rung that worked set up, as long as the clone needs it."""

    def keep(self, run: RunId, *, responders: tuple[FenceResponder, ...]) -> None:
        """Keep the responders running until the fence is gone or the addressing is closed."""


class RungDriver(Protocol):
    """One way to reach a clone."""

    def climb(self, request: AddressRequest, *, links: LinkControl, timer: Timer) -> str:
        """Return the address at which the clone answers.

        Leaves nothing behind where it raises. Raises DeadlineError or DriverError where this rung does not work,
        CancelledError.
        """
