"""What every rung of the ladder shares: waiting with a deadline and a cancel, and reading the request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from vmsnap.errors import DeadlineError
from vmsnap.model.ids import RunId
from vmsnap.model.isolation import FencePort
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


class Listener(Protocol):
    """Something that listens in a fence until it is stopped, or its link is gone."""

    @property
    def is_running(self) -> bool:
        """Tell whether it still listens."""

    def stop(self) -> None:
        """End it. May be repeated."""


class Keeper(Protocol):
    """Keeps what a rung that worked set up, as long as the clone needs it."""

    def keep(self, run: RunId, *, listeners: tuple[Listener, ...]) -> None:
        """Keep these running, beside those of the run kept before, until the fence is gone or all is closed."""


class Dhcp(Listener, Protocol):
    """The DHCP service of one fence; see ``vmsnap.network.leasing``."""

    @property
    def messages(self) -> int:
        """Return how many DHCP messages the clone has sent to those that listen now."""

    def start(self, ports: Sequence[FencePort] | None = None) -> None:
        """Listen on these NICs, or all, beside those that are listened to. Raises DriverError, PreconditionError."""

    def withdraw(self) -> None:
        """Take our addresses away, so that the fence is as it was built. May be repeated."""

    def answering(self) -> str | None:
        """Return an address leased here at which the clone answers, or None. Takes up to a second a lease."""

    def missing(self) -> str:
        """Say what keeps the clone from being reached here."""


class RungDriver(Protocol):
    """One way to reach a clone."""

    def climb(self, request: AddressRequest, *, links: LinkControl, timer: Timer, dhcp: Dhcp) -> str:
        """Return the address at which the clone answers.

        For a rung of ``DHCP_RUNGS`` ``dhcp`` listens on all NICs when it begins, and nobody has been given an address
        yet that answers. Leaves nothing behind where it raises. Raises DeadlineError or DriverError where this rung
        does not work, CancelledError.
        """


def wait_for_answer(dhcp: Dhcp, *, timer: Timer, silence: float | None = None) -> str | None:
    """Return the address, leased by us, at which the clone answers.

    None where ``silence`` seconds passed and it has sent no DHCP message since this began. Raises DeadlineError, which
    says what is missing, when the timer's time is over; CancelledError.
    """
    before, quiet_until = dhcp.messages, timer.clock.monotonic() + (silence or 0.0)
    while True:
        address = dhcp.answering()
        if address is not None:
            return address
        if silence is not None and dhcp.messages == before and timer.clock.monotonic() > quiet_until:
            return None
        timer.tick(missing=dhcp.missing())
