"""What outlives a process of alarms."""

from __future__ import annotations

from typing import Protocol

from vmsnap.model.alarms import Ledger


class AlarmBook(Protocol):
    """The ledger of alarms. Losing it means that what is wrong is told once more."""

    def load(self) -> Ledger:
        """Return the ledger; an empty one where there is none, or it is damaged. Raises PreconditionError, DriverError."""

    def replace(self, ledger: Ledger) -> None:
        """Write the ledger, atomically. Raises NoSpaceError, PreconditionError, DriverError."""
