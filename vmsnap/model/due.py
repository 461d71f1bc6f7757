"""What ``vmsnap run --due`` did, guest by guest."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from vmsnap.errors import ExitCode, VmsnapError, worst_of
from vmsnap.model.forecast import Forecast
from vmsnap.model.ids import SnapshotId
from vmsnap.model.report import BackupReport, PruneDecision, ReplicateReport
from vmsnap.model.schedule import Due


class Outcome(StrEnum):
    """What became of a guest. ``DUE`` only in a dry run; ``STOPPED``: a signal came in its run, or before it."""

    DONE = "done"
    FAILED = "failed"
    SKIPPED = "skipped"
    STOPPED = "stopped"
    DUE = "due"
    NOT_DUE = "not-due"
    DISABLED = "disabled"


@dataclass(frozen=True, kw_only=True)
class DueEntry:
    """One guest. ``due``: when it was due, and why; None where that is not known. ``following``: what comes after."""

    guest: str
    outcome: Outcome
    due: Due | None = None
    note: str | None = None
    report: BackupReport | None = None
    error: VmsnapError | None = None
    following: Due | None = None


@dataclass(frozen=True, kw_only=True)
class ReplicateEntry:
    """A snapshot that was not at the replica yet. ``snapshot`` None: it could not be found out what is lacking there."""

    guest: str
    snapshot: SnapshotId | None = None
    report: ReplicateReport | None = None
    error: VmsnapError | None = None


@dataclass(frozen=True, kw_only=True)
class DueReport:
    """All guests: first those that were due, in the order in which they were taken, then the others by name.

    ``replicated``: snapshots that runs before had not sent to the replica.
    """

    started: datetime
    finished: datetime
    dry_run: bool
    entries: tuple[DueEntry, ...]
    replicated: tuple[ReplicateEntry, ...] = ()

    @property
    def exit_code(self) -> ExitCode:
        """Return the worst failure's exit code; a guest that was skipped did not fail."""
        errors = (*(entry.error for entry in self.entries), *(entry.error for entry in self.replicated))
        codes = {error.exit_code for error in errors if error is not None}
        if any(entry.outcome is Outcome.STOPPED for entry in self.entries):
            codes.add(ExitCode.DEADLINE)
        return worst_of(codes)


@dataclass(frozen=True, kw_only=True)
class PruneFailure:
    """A guest whose snapshots could not be pruned, or a policy file that is wrong."""

    guest: str
    error: VmsnapError


@dataclass(frozen=True, kw_only=True)
class PruneReport:
    """What retention said and did, guest by guest, and of whom it could not."""

    decisions: tuple[PruneDecision, ...]
    failures: tuple[PruneFailure, ...] = ()

    @property
    def exit_code(self) -> ExitCode:
        """Return the worst failure's exit code."""
        return worst_of({failure.error.exit_code for failure in self.failures})


@dataclass(frozen=True, kw_only=True)
class ForecastReport:
    """What retention will have kept, guest by guest, and policy files that are wrong."""

    forecasts: tuple[Forecast, ...] = ()
    failures: tuple[PruneFailure, ...] = ()

    @property
    def exit_code(self) -> ExitCode:
        """Return the worst failure's exit code."""
        return worst_of({failure.error.exit_code for failure in self.failures})


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How many runs may go on at a time."""

    per_host: int = 1
    per_storage: int = 1
