"""Recording runs and actions in the history. Nothing here ever fails: what cannot be recorded is a warning in the log."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

from vmsnap.model.history import Action, AuditEntry, RunEntry, RunOutcome, RunResult, died, done, failed
from vmsnap.model.ids import RunId, SnapshotId
from vmsnap.model.journal import RunKind
from vmsnap.model.manifest import StoreRecord
from vmsnap.ports.progress import Progress
from vmsnap.workflow.run import as_vmsnap_error
from vmsnap.workflow.world import World

_LOG = logging.getLogger(__name__)
_END_UNKNOWN = "its end was not recorded: its process could not write to the history, or ended in the middle"


class Chronicle:
    """The record of one run. Use once."""

    def __init__(self, world: World, *, kind: RunKind, guest: str) -> None:
        self._world = world
        self._kind = kind
        self._guest = guest
        self._learned = done()
        self._run: RunId | None = None
        self._started = world.clock.now()
        self._began = world.clock.monotonic()
        self._recording = False

    @contextmanager
    def of(self, run: RunId) -> Iterator[None]:
        """Record a run from here to the end of the body, and how that ended."""
        self._run = run
        self._started, self._began = self._world.clock.now(), self._world.clock.monotonic()
        self._recording = self._begin(run)
        try:
            yield
        except Exception as error:
            self._end(run, error=error)
            raise
        self._end(run, error=None)

    def telling(self, progress: Progress) -> Progress:
        """Return a Progress whose steps are recorded too."""
        return _ChronicledProgress(progress, record=self._step)

    def learned(
        self,
        *,
        snapshot: SnapshotId | None = None,
        pause_ms: float | None = None,
        store: StoreRecord | None = None,
        environment: str | None = None,
        warnings: tuple[str, ...] = (),
    ) -> None:
        """Take note of what is told when the run ends, however it ends. What is not given stays as it is."""
        known = self._learned
        self._learned = replace(
            known,
            snapshot=snapshot or known.snapshot,
            environment=environment or known.environment,
            pause_ms=known.pause_ms if pause_ms is None else pause_ms,
            new_bytes=known.new_bytes if store is None else store.new_bytes,
            logical_bytes=known.logical_bytes if store is None else store.logical_bytes,
            warnings=warnings or known.warnings,
        )

    def _end(self, run: RunId, *, error: Exception | None) -> None:
        result = self._learned
        if error is not None:
            told = failed(as_vmsnap_error(error, doing="the run"))
            result = replace(
                result, outcome=told.outcome, exit_code=told.exit_code, error=told.error, remedy=told.remedy
            )
        world, after = self._world, self._after()
        # Tried even where recording has failed: the run would count as one that died.
        if self._recording or self._begin(run):
            _quietly(lambda: world.history.end(run, at=world.clock.now(), after=after, result=result))

    def _begin(self, run: RunId) -> bool:
        history, starter = self._world.history, self._world.starter
        return _quietly(
            lambda: history.begin(run, kind=self._kind, guest=self._guest, at=self._started, starter=starter)
        )

    def _step(self, name: str) -> None:
        # After a failure no more of them: each would wait, and a guest's overlays grow meanwhile.
        run = self._run
        if self._recording and run is not None:
            after = self._after()
            self._recording = _quietly(lambda: self._world.history.step(run, name=name, after=after))

    def _after(self) -> timedelta:
        return timedelta(seconds=self._world.clock.monotonic() - self._began)


class _ChronicledProgress:
    """A Progress whose steps are recorded."""

    def __init__(self, progress: Progress, *, record: Callable[[str], None]) -> None:
        self._progress = progress
        self._record = record
        self.bytes_done = progress.bytes_done
        self.waiting = progress.waiting
        self.note = progress.note

    def step(self, name: str) -> None:
        """Record the step and tell the operator."""
        self._record(name)
        self._progress.step(name)


def audit(
    world: World, action: Action, *, guest: str, subject: str, detail: str = "", failure: str | None = None
) -> None:
    """Record what was done, or tried."""
    entry = AuditEntry(
        at=world.clock.now(),
        action=action,
        starter=world.starter,
        guest=guest,
        subject=subject,
        detail=detail,
        failure=failure,
    )
    _quietly(lambda: world.history.audit(entry))


@contextmanager
def audited(world: World, action: Action, *, guest: str, subject: str, detail: str = "") -> Iterator[None]:
    """Record what the body does, once it is done, or that it failed, and why."""
    try:
        yield
    except Exception as error:
        failure = as_vmsnap_error(error, doing=action.value).brief
        audit(world, action, guest=guest, subject=subject, detail=detail, failure=failure)
        raise
    audit(world, action, guest=guest, subject=subject, detail=detail)


def known_runs(world: World, *, guest: str | None, failures_only: bool, limit: int | None) -> tuple[RunEntry, ...]:
    """Return runs, the newest first; one whose process is gone has died, whether or not that is recorded yet.

    Changes nothing. Raises what the history raises.
    """
    dead = {entry.run: _as_dead(entry) for entry in world.history.dead() if guest in (None, entry.guest)}
    found = world.history.runs(guest=guest, failures_only=failures_only, limit=limit)
    if failures_only:
        # Those are no failures yet by the history, and belong among them by their time.
        found = tuple(sorted((*found, *dead.values()), key=lambda entry: entry.started, reverse=True))[:limit]
    return tuple(dead.get(entry.run, entry) for entry in found)


def close_dead_runs(world: World, *, guest: str | None, holder: RunId | None) -> None:
    """Record that runs have died, of one guest or of all.

    ``holder`` is the run that holds the guest: no other backup of that guest lives, even in a process that does.
    """

    def close() -> None:
        now = world.clock.now()
        for entry in world.history.dead():
            if guest in (None, entry.guest):
                world.history.end(entry.run, at=now, after=None, result=_death(entry))
        for entry in world.history.unended() if holder is not None else ():
            if entry.guest == guest and entry.kind is RunKind.BACKUP and entry.run != holder:
                result = RunResult(outcome=RunOutcome.DIED, error=_END_UNKNOWN)
                world.history.end(entry.run, at=now, after=None, result=result)

    _quietly(close)


def _as_dead(entry: RunEntry) -> RunEntry:
    return replace(entry, result=_death(entry))


def _death(entry: RunEntry) -> RunResult:
    return died(entry.steps[-1].name if entry.steps else None)


def _quietly(record: Callable[[], object]) -> bool:
    """Record something; tell whether that was possible."""
    try:
        record()
    except Exception as error:  # noqa: BLE001 - whatever it is, the run and what it does matter more
        told = as_vmsnap_error(error, doing="recording in the history")
        _LOG.warning("the history is not complete: %s", told.brief, exc_info=told is not error)
        return False
    return True
