"""The history of runs and the audit trail: for people, metrics and alarms. Nothing decides by it what to remove."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Protocol

from vmsnap.model.history import AuditEntry, RunEntry, RunResult, Starter
from vmsnap.model.ids import RunId
from vmsnap.model.journal import RunKind


class HistoryBook(Protocol):
    """Every run and every audited action, in the order in which they were recorded, whatever the clock did meanwhile.

    What a method recorded is on disk when it returns, whole; a death in it leaves all of it or nothing. Several processes
    and threads may use it at once. A damaged book is moved aside and a new one begun, with a warning in the log.
    Methods raise BusyError, NoSpaceError, PreconditionError and DriverError: no run may fail by them, so workflows go
    through ``workflow.chronicle``.
    """

    def begin(self, run: RunId, *, kind: RunKind, guest: str, at: datetime, starter: Starter) -> None:
        """Record that a run began, in this process. May be repeated: the first one stands."""

    def step(self, run: RunId, *, name: str, after: timedelta) -> None:
        """Record that a step began, ``after`` the run did; the one before it is over.

        Content with a run that is unknown or has ended.
        """

    def end(self, run: RunId, *, at: datetime, after: timedelta | None, result: RunResult) -> None:
        """Record how a run ended, ``after`` it began (None: not known). The first end stands.

        Content with an unknown run.
        """

    def audit(self, entry: AuditEntry) -> None:
        """Record what was done, or tried."""

    def runs(
        self,
        *,
        guest: str | None = None,
        kind: RunKind | None = None,
        failures_only: bool = False,
        limit: int | None = None,
    ) -> tuple[RunEntry, ...]:
        """Return runs, the newest first; all of them without ``limit``. Failures: those that failed or died."""

    def unended(self) -> tuple[RunEntry, ...]:
        """Return the runs whose end is not recorded, the oldest first. Their processes may be dead."""

    def dead(self) -> tuple[RunEntry, ...]:
        """Return those of them whose process is gone."""

    def last_ended(self, *, kind: RunKind) -> Mapping[str, RunEntry]:
        """Return by guest the newest run whose end is recorded, whatever that is."""

    def last_done(self, *, kind: RunKind) -> Mapping[str, RunEntry]:
        """Return by guest the newest run that succeeded."""

    def trail(self, *, guest: str | None = None, limit: int | None = None) -> tuple[AuditEntry, ...]:
        """Return audited actions, the newest first; all of them without ``limit``."""
