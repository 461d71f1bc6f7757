"""Journals, locks and environments in memory, with a process that can die.

``MemoryState`` is the disk: it outlives processes. ``die()`` ends the present process as kill -9 would: its locks are
free, its runs are dead, and nothing its code still does while it unwinds reaches the disk: every call raises
``ProcessDied`` until ``restart()`` begins another process. Journals opened before stay dead for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, datetime

from vmsnap.errors import BugError, BusyError, PreconditionError
from vmsnap.model.admission import HostMemory, Place, refusal
from vmsnap.model.alarms import Ledger
from vmsnap.model.environment import Environment
from vmsnap.model.ids import RunId, SnapshotId, is_run_id
from vmsnap.model.isolation import Exchange, Rung
from vmsnap.model.journal import Resource, RunKind, RunRecord
from vmsnap.model.schedule import FailedAttempt
from vmsnap.state.environments import name_taken, no_such_environment
from vmsnap.state.exchanges import mac_bytes
from vmsnap.testing.memory_history import MemoryHistory


class ProcessDied(BaseException):
    """Raised in code of a process that has died, where it would change the disk. No ``except Exception`` stops it."""


@dataclass
class _Run:
    kind: RunKind
    guest: str
    started: datetime
    unreleased: dict[tuple[str, str], Resource] = field(default_factory=dict)
    state: str = ""
    kept_for: str | None = None
    closed: bool = False
    owner: int | None = None
    notes: list[str] = field(default_factory=list)


class MemoryState:
    """The state directory and the processes that use it, one at a time."""

    def __init__(self) -> None:
        self.process = 1
        self.alive = True
        self.runs: dict[RunId, _Run] = {}
        self.held: dict[str, str] = {}
        self.book: dict[str, Environment] = {}
        self.journals = MemoryJournals(self)
        self.locks = MemoryLocks(self)
        self.places: dict[RunId, Place] = {}
        self.admissions = MemoryAdmissions(self)
        self.environments = MemoryEnvironmentBook(self)
        self.exchanges = MemoryExchanges(self)
        self.rungs = MemoryRungs(self)
        self.attempts = MemoryAttemptBook(self)
        self.samples = MemorySampleBook(self)
        self.history = MemoryHistory(self)
        self.alarms = MemoryAlarmBook(self)

    def die(self) -> None:
        """End the present process at once. Every call raises ProcessDied until ``restart``."""
        self.alive = False
        self.held.clear()
        self.places.clear()
        for run in self.runs.values():
            run.owner = None

    def restart(self) -> None:
        """Begin another process, where the present one died."""
        if not self.alive:
            self.alive = True
            self.process += 1

    def check_alive(self) -> None:
        """Raise ProcessDied where the present process has died."""
        if not self.alive:
            raise ProcessDied


class MemoryRunJournal:
    """The port ``RunJournal`` in memory."""

    def __init__(self, run: RunId, *, state: MemoryState) -> None:
        self._id = run
        self._state = state
        self._process = state.process
        self._open = True

    @property
    def run(self) -> RunId:
        """Return the run's id."""
        return self._id

    def intend(self, resource: Resource) -> None:
        """Record that the resource is about to be made."""
        run = self._writable()
        run.closed = False
        run.unreleased[resource.kind.value, resource.name] = resource

    def released(self, resource: Resource) -> None:
        """Record that the resource is gone."""
        self._writable().unreleased.pop((resource.kind.value, resource.name), None)

    def state(self, state: str) -> None:
        """Record the run's state."""
        self._writable().state = state

    def note(self, text: str) -> None:
        """Record something that happened."""
        self._writable().notes.append(text)

    def keep(self, environment: str) -> None:
        """Record that the run's resources stay on purpose, for an environment."""
        self._writable().kept_for = environment

    def unkeep(self) -> None:
        """Record that they no longer do: from now on reconcile removes them."""
        self._writable().kept_for = None

    def finish(self) -> None:
        """Record that the run is over and left nothing. Raises BugError where something is not released."""
        run = self._writable()
        if run.unreleased:
            raise BugError(f"run {self._id} cannot finish: not released: {', '.join(n for _, n in run.unreleased)}")
        run.closed = True
        run.kept_for = None

    def close(self) -> None:
        """Let go of the journal. May be repeated. A run that is neither kept nor finished then counts as dead."""
        if self._open and self._state.alive and self._process == self._state.process:
            self._state.runs[self._id].owner = None
        self._open = False

    def _writable(self) -> _Run:
        self._state.check_alive()
        if self._process != self._state.process:
            raise ProcessDied
        if not self._open:
            raise BugError(f"the journal of run {self._id} is closed")
        return self._state.runs[self._id]


class MemoryJournals:
    """The port ``Journals`` in memory."""

    def __init__(self, state: MemoryState) -> None:
        self._state = state

    def begin(self, run: RunId, *, kind: RunKind, guest: str, at: datetime) -> MemoryRunJournal:
        """Start a journal. It is locked until closed or until the process dies.

        Raises BugError for a run that has one already.
        """
        self._state.check_alive()
        _check(run)
        if run in self._state.runs:
            raise BugError(f"run {run} has a journal already")
        self._state.runs[run] = _Run(kind=kind, guest=guest, started=at, owner=self._state.process)
        return MemoryRunJournal(run, state=self._state)

    def reopen(self, run: RunId) -> MemoryRunJournal:
        """Take over the journal of a run that is not alive.

        Raises BusyError where it is, PreconditionError where there is none.
        """
        self._state.check_alive()
        _check(run)
        known = self._state.runs.get(run)
        if known is None:
            raise PreconditionError(f"run {run} has no journal", remedy="it may be over and forgotten")
        if known.owner is not None:
            raise BusyError(f"run {run} is still at work", remedy="wait until it is done and try again")
        known.owner = self._state.process
        return MemoryRunJournal(run, state=self._state)

    def records(self) -> tuple[RunRecord, ...]:
        """Return what is known of every run that left a journal, oldest first."""
        self._state.check_alive()
        records = (
            RunRecord(
                run=run,
                kind=known.kind,
                guest=known.guest,
                started=known.started,
                alive=known.owner is not None,
                kept_for=known.kept_for,
                closed=known.closed,
                unreleased=tuple(known.unreleased.values()),
                state=known.state,
            )
            for run, known in self._state.runs.items()
        )
        return tuple(sorted(records, key=lambda record: (record.started, record.run)))


class MemoryLocks:
    """The port ``Locks`` in memory."""

    def __init__(self, state: MemoryState) -> None:
        self._state = state

    @contextmanager
    def guest(self, guest: str, *, purpose: str) -> Iterator[None]:
        """Hold a guest. Raises BusyError that names who holds it and what for."""
        with self._held(f"guest '{guest}'", purpose=purpose):
            yield

    @contextmanager
    def reconcile(self) -> Iterator[None]:
        """Hold reconciling, one process at a time. Raises BusyError."""
        with self._held("reconciling", purpose="reconcile"):
            yield

    @contextmanager
    def schedule(self, *, purpose: str = "run --due") -> Iterator[None]:
        """Hold the starting of due runs, one process at a time. Raises BusyError that names who holds it."""
        with self._held("the starting of due runs", purpose=purpose):
            yield

    @contextmanager
    def daemon(self) -> Iterator[None]:
        """Hold being the daemon of this state directory. Raises BusyError that names who holds it."""
        with self._held("the place of the daemon", purpose="daemon"):
            yield

    @contextmanager
    def alarms(self) -> Iterator[None]:
        """Hold the ledger of alarms, one process at a time. Raises BusyError that names who holds it."""
        with self._held("the ledger of alarms", purpose="alarms"):
            yield

    @contextmanager
    def _held(self, what: str, *, purpose: str) -> Iterator[None]:
        state = self._state
        state.check_alive()
        if what in state.held:
            raise BusyError(
                f"{what} is held by process {state.process} for {state.held[what]}",
                remedy="wait until it is done and try again",
            )
        process = state.process
        state.held[what] = purpose
        try:
            yield
        finally:
            if state.alive and state.process == process:
                del state.held[what]


class MemoryAdmissions:
    """The port ``Admissions`` in memory. ``most`` clones may be there at a time."""

    def __init__(self, state: MemoryState) -> None:
        self._state = state
        self.most = 4

    @contextmanager
    def admitted(self, place: Place, *, look: Callable[[], HostMemory]) -> Iterator[None]:
        """Hold a place for a clone. Raises BusyError where there is none now."""
        state = self._state
        state.check_alive()
        refused = refusal(place, held=tuple(state.places.values()), memory=look(), most=self.most)
        if refused is not None:
            raise BusyError(
                f"there is no room for another clone on this host: {refused}", remedy="wait until one has ended"
            )
        process = state.process
        state.places[place.run] = place
        try:
            yield
        finally:
            if state.alive and state.process == process:
                del state.places[place.run]


class MemoryEnvironmentBook:
    """The port ``EnvironmentBook`` in memory."""

    def __init__(self, state: MemoryState) -> None:
        self._state = state

    def add(self, environment: Environment) -> None:
        """Record an environment. Raises PreconditionError where the name is taken."""
        self._state.check_alive()
        if environment.name in self._state.book:
            raise name_taken(environment.name)
        self._state.book[environment.name] = environment

    def replace(self, environment: Environment) -> None:
        """Record a change of an environment. Raises EnvironmentNotFoundError where there is none of that name."""
        self.get(environment.name)
        self._state.book[environment.name] = environment

    def remove(self, name: str) -> None:
        """Forget an environment. Content where it is not there."""
        self._state.check_alive()
        self._state.book.pop(name, None)

    def get(self, name: str) -> Environment:
        """Return an environment. Raises EnvironmentNotFoundError, which lists those that exist."""
        self._state.check_alive()
        try:
            return self._state.book[name]
        except KeyError:
            raise no_such_environment(name, existing=self.all()) from None

    def all(self) -> tuple[Environment, ...]:
        """Return all environments, by name."""
        self._state.check_alive()
        return tuple(self._state.book[name] for name in sorted(self._state.book))


class MemoryExchanges:
    """The port ``Exchanges`` in memory."""

    def __init__(self, state: MemoryState) -> None:
        self._state = state
        self._known: dict[bytes, Exchange] = {}

    def put(self, exchange: Exchange) -> None:
        """Record an exchange."""
        self._state.check_alive()
        self._known[mac_bytes(exchange.mac)] = exchange

    def get(self, mac: str) -> Exchange | None:
        """Return the last exchange of a NIC."""
        self._state.check_alive()
        return self._known.get(mac_bytes(mac))

    def forget(self, mac: str) -> None:
        """Forget a NIC's exchange."""
        self._state.check_alive()
        self._known.pop(mac_bytes(mac), None)


class MemorySampleBook:
    """The port ``SampleBook`` in memory."""

    def __init__(self, state: MemoryState) -> None:
        self._state = state
        self._days: dict[tuple[str, bool], date] = {}
        self._damaged: dict[str, dict[SnapshotId, str]] = {}

    def last(self, guest: str, *, replica: bool) -> date | None:
        """Return the day on which a share was last read."""
        self._state.check_alive()
        return self._days.get((guest, replica))

    def note(self, guest: str, *, replica: bool, day: date) -> None:
        """Record the day."""
        self._state.check_alive()
        self._days[guest, replica] = day

    def damaged(self, guest: str) -> Mapping[SnapshotId, str]:
        """Return the snapshots whose copies at the replica were found damaged."""
        self._state.check_alive()
        return dict(self._damaged.get(guest, {}))

    def mark(self, guest: str, *, snapshot: SnapshotId, damage: str | None) -> None:
        """Record that a copy is damaged, or is not."""
        self._state.check_alive()
        known = self._damaged.setdefault(guest, {})
        known.pop(snapshot, None)
        if damage is not None:
            known[snapshot] = damage


class MemoryAttemptBook:
    """The port ``AttemptBook`` in memory."""

    def __init__(self, state: MemoryState) -> None:
        self._state = state
        self._known: dict[str, tuple[FailedAttempt, ...]] = {}

    def failures(self, guest: str) -> tuple[FailedAttempt, ...]:
        """Return a guest's failed attempts, oldest first."""
        self._state.check_alive()
        return self._known.get(guest, ())

    def replace(self, guest: str, *, failures: Sequence[FailedAttempt]) -> None:
        """Record a guest's failed attempts instead of those before. None: forget the guest."""
        self._state.check_alive()
        self._known[guest] = tuple(failures)


class MemoryAlarmBook:
    """The port ``AlarmBook``."""

    def __init__(self, state: MemoryState) -> None:
        self._state = state
        self._ledger = Ledger()

    def load(self) -> Ledger:
        """Return the ledger."""
        return self._ledger

    def replace(self, ledger: Ledger) -> None:
        """Write the ledger."""
        self._state.check_alive()
        self._ledger = ledger


class MemoryRungs:
    """The port ``RungMemory`` in memory."""

    def __init__(self, state: MemoryState) -> None:
        self._state = state
        self._known: dict[str, Rung] = {}

    def recall(self, guest: str) -> Rung | None:
        """Return the rung that worked last."""
        self._state.check_alive()
        return self._known.get(guest)

    def remember(self, guest: str, *, rung: Rung) -> None:
        """Record the rung that worked."""
        self._state.check_alive()
        self._known[guest] = rung


def _check(run: RunId) -> None:
    if not is_run_id(run):
        raise BugError(f"{run!r} is no run id")
