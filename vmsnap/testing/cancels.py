"""Cancels for tests."""

from __future__ import annotations

from vmsnap.errors import CancelledError


class NeverCancelled:
    """Nobody asked the run to stop."""

    def is_set(self) -> bool:
        """Return False."""
        return False

    def check(self) -> None:
        """Do nothing."""


class CancelledAtOnce:
    """Somebody asked the run to stop before it began."""

    def is_set(self) -> bool:
        """Return True."""
        return True

    def check(self) -> None:
        """Raise CancelledError."""
        raise CancelledError("cancelled by the test")
