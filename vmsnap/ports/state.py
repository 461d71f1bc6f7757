"""What outlives a process: the journal of runs, locks, and the book of environments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import date, datetime
from typing import Protocol

from vmsnap.model.admission import HostMemory, Place
from vmsnap.model.environment import Environment
from vmsnap.model.ids import RunId, SnapshotId
from vmsnap.model.isolation import Exchange, Rung
from vmsnap.model.journal import Resource, RunKind, RunRecord
from vmsnap.model.schedule import FailedAttempt


class RunJournal(Protocol):
    """The journal of one run, open for writing by one process. Every method is on disk when it returns."""

    @property
    def run(self) -> RunId:
        """Return the run's id."""

    def intend(self, resource: Resource) -> None:
        """Record that the resource is about to be made."""

    def released(self, resource: Resource) -> None:
        """Record that the resource is gone."""

    def state(self, state: str) -> None:
        """Record the run's state."""

    def note(self, text: str) -> None:
        """Record something that happened, for a person who reads the journal."""

    def keep(self, environment: str) -> None:
        """Record that the run's resources stay on purpose, for an environment."""

    def unkeep(self) -> None:
        """Record that they no longer do: from now on reconcile removes them."""

    def finish(self) -> None:
        """Record that the run is over and left nothing. Raises BugError where something is unreleased."""

    def close(self) -> None:
        """Let go of the journal. A run that is neither kept nor finished then counts as dead."""


class Journals(Protocol):
    """All journals."""

    def begin(self, run: RunId, *, kind: RunKind, guest: str, at: datetime) -> RunJournal:
        """Start a journal. It is locked until closed or until the process dies."""

    def reopen(self, run: RunId) -> RunJournal:
        """Take over the journal of a run that is not alive.

        Raises BusyError where it is, PreconditionError for an unknown run.
        """

    def records(self) -> tuple[RunRecord, ...]:
        """Return what is known of every run that left a journal, oldest first. A torn last line is ignored."""


class Locks(Protocol):
    """Locks that end with their process."""

    def guest(self, guest: str, *, purpose: str) -> AbstractContextManager[None]:
        """Hold a guest. Raises BusyError that names who holds it and what for."""

    def reconcile(self) -> AbstractContextManager[None]:
        """Hold reconciling, one process at a time. Raises BusyError."""

    def schedule(self, *, purpose: str = "run --due") -> AbstractContextManager[None]:
        """Hold the starting of due runs, one process at a time. Raises BusyError that names who holds it."""

    def daemon(self) -> AbstractContextManager[None]:
        """Hold being the daemon of this state directory. Raises BusyError that names who holds it."""

    def alarms(self) -> AbstractContextManager[None]:
        """Hold the ledger of alarms, one process at a time. Raises BusyError that names who holds it."""


class AttemptBook(Protocol):
    """What the schedule began for each guest without a snapshot to show for it."""

    def failures(self, guest: str) -> tuple[FailedAttempt, ...]:
        """Return a guest's failed attempts, oldest first; none where the record is damaged."""

    def replace(self, guest: str, *, failures: Sequence[FailedAttempt]) -> None:
        """Record a guest's failed attempts instead of those before, atomically. None: forget the guest."""


class SampleBook(Protocol):
    """On which day a share of a guest's snapshots was last read again, here and at the replica, and what was damaged there."""

    def last(self, guest: str, *, replica: bool) -> date | None:
        """Return the day; None where it never was, or the record is damaged."""

    def note(self, guest: str, *, replica: bool, day: date) -> None:
        """Record the day, atomically."""

    def damaged(self, guest: str) -> Mapping[SnapshotId, str]:
        """Return the snapshots whose copies at the replica were found damaged, and in which words."""

    def mark(self, guest: str, *, snapshot: SnapshotId, damage: str | None) -> None:
        """Record that a snapshot's copy at the replica is damaged, or (None) is not, atomically. May be repeated."""


class EnvironmentBook(Protocol):
    """The environments that exist."""

    def add(self, environment: Environment) -> None:
        """Record an environment. Raises PreconditionError where the name is taken."""

    def replace(self, environment: Environment) -> None:
        """Record an environment anew, atomically. Raises EnvironmentNotFoundError."""

    def remove(self, name: str) -> None:
        """Forget an environment. Content where it is not there."""

    def get(self, name: str) -> Environment:
        """Return an environment. Raises EnvironmentNotFoundError, which lists those that exist."""

    def all(self) -> tuple[Environment, ...]:
        """Return all environments, by name."""


class Exchanges(Protocol):
    """The last DHCP exchange of each NIC that somebody watches, by MAC in any spelling.

    It holds keys (nonces) and is for its owner's eyes.
    """

    def put(self, exchange: Exchange) -> None:
        """Record an exchange instead of the one before it, atomically."""

    def get(self, mac: str) -> Exchange | None:
        """Return the last exchange of a NIC. Raises DriverError for a damaged record."""

    def forget(self, mac: str) -> None:
        """Forget a NIC's exchange. Content where there is none."""


class RungMemory(Protocol):
    """Which rung worked last for each guest. Losing it costs time and nothing else."""

    def recall(self, guest: str) -> Rung | None:
        """Return the rung that worked last; None where none is known, or the record is damaged."""

    def remember(self, guest: str, *, rung: Rung) -> None:
        """Record the rung that worked, instead of the one before it, atomically."""


class Admissions(Protocol):
    """Places for clones on this host, shared by all processes. A place ends with its process."""

    def admitted(self, place: Place, *, look: Callable[[], HostMemory]) -> AbstractContextManager[None]:
        """Hold a place for a clone while the block runs. ``look`` is called while nobody else decides.

        Raises BusyError where no place is free, or too little memory that is not promised to others.
        """
