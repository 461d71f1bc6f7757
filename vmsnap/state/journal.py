"""The journal of runs: ``STATE/runs/RUN.jsonl``, one line an event, each on disk before the call returns.

A run is alive while its journal is locked with flock(2), which the kernel frees with the process. A journal appears
under its name only with its first line in it and locked (made as a draft, then linked): nobody sees it half begun.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from datetime import datetime, timedelta
from pathlib import Path

from vmsnap.errors import BugError, BusyError, PreconditionError, VmsnapError
from vmsnap.model.ids import RunId, is_run_id
from vmsnap.model.journal import Resource, RunKind, RunRecord
from vmsnap.state.events import (
    Beginning,
    History,
    begin_line,
    finish_line,
    keep_line,
    note_line,
    resource_line,
    state_line,
)
from vmsnap.state.files import (
    FILE_MODE,
    draft_name,
    make_private_folder,
    read_if_there,
    sync_folder,
    translate,
    translated,
    write_all,
)

KEEP_FINISHED = timedelta(days=30)
KEEP_FINISHED_COUNT = 1000
_DRAFT_AGE_SECONDS = 3600
# A reader holds a shared lock for the moment of its look; taking over waits longer than that.
_TAKE_OVER_SECONDS = 1.0
_log = logging.getLogger(__name__)


class FileRunJournal:
    """The port ``RunJournal`` over one open, locked file."""

    def __init__(self, run: RunId, *, path: Path, descriptor: int, history: History) -> None:
        self._run = run
        self._path = path
        self._descriptor: int | None = descriptor
        self._history = history

    @property
    def run(self) -> RunId:
        """Return the run's id."""
        return self._run

    def intend(self, resource: Resource) -> None:
        """Record that the resource is about to be made."""
        self._append(resource_line("intend", resource))
        self._history.intend(resource)

    def released(self, resource: Resource) -> None:
        """Record that the resource is gone."""
        self._append(resource_line("released", resource))
        self._history.released(resource)

    def state(self, state: str) -> None:
        """Record the run's state."""
        self._append(state_line(state))
        self._history.state(state)

    def note(self, text: str) -> None:
        """Record something that happened, for a person who reads the journal."""
        self._append(note_line(text))

    def keep(self, environment: str) -> None:
        """Record that the run's resources stay on purpose, for an environment."""
        self._append(keep_line(environment))
        self._history.keep(environment)

    def unkeep(self) -> None:
        """Record that they no longer do: from now on reconcile removes them."""
        self._append(keep_line(None))
        self._history.keep(None)

    def finish(self) -> None:
        """Record that the run is over and left nothing. Raises BugError where something is not released."""
        left = self._history.unreleased
        if left:
            names = ", ".join(f"{item.kind.value} {item.name}" for item in left)
            raise BugError(f"run {self._run} cannot finish: not released: {names}")
        self._append(finish_line())
        self._history.finish()

    def close(self) -> None:
        """Let go of the journal. May be repeated. A run that is neither kept nor finished then counts as dead."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _append(self, line: bytes) -> None:
        if self._descriptor is None:
            raise BugError(f"the journal of run {self._run} is closed")
        before = None
        try:
            before = os.fstat(self._descriptor).st_size
            write_all(self._descriptor, line)
            os.fsync(self._descriptor)
        except OSError as error:
            if before is not None:
                # Half a line must not swallow the next one.
                with contextlib.suppress(OSError):
                    os.ftruncate(self._descriptor, before)
            raise translate(error, doing="write the journal", path=self._path) from error


class FileJournals:
    """The port ``Journals`` over ``STATE/runs``. Finished journals stay for 30 days, at most 1000 of them."""

    def __init__(self, state: Path) -> None:
        self._folder = state / "runs"

    def begin(self, run: RunId, *, kind: RunKind, guest: str, at: datetime) -> FileRunJournal:
        """Start a journal. It is locked until closed or until the process dies.

        Raises BugError for a run that has one already, PreconditionError where that is damaged, NoSpaceError and
        PreconditionError for a state directory that cannot be written.
        """
        path = self._path(run)
        make_private_folder(self._folder)
        self._forget_old(at)
        beginning = Beginning(run=run, kind=kind, guest=guest, started=at)
        draft = self._folder / draft_name()
        with translated(doing="write the journal", path=path):
            descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, FILE_MODE)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            write_all(descriptor, begin_line(beginning))
            os.fsync(descriptor)
            path.hardlink_to(draft)
            draft.unlink()
            sync_folder(self._folder)
        except OSError as error:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
            if isinstance(error, FileExistsError):
                raise _taken(run, path) from error
            raise translate(error, doing="write the journal", path=path) from error
        return FileRunJournal(run, path=path, descriptor=descriptor, history=History(beginning))

    def reopen(self, run: RunId) -> FileRunJournal:
        """Take over the journal of a run that is not alive. Raises BusyError where it is.

        Raises PreconditionError where there is no such journal. A torn last line is cut off.
        """
        path = self._path(run)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise PreconditionError(f"run {run} has no journal", remedy="it may be over and forgotten") from error
        except OSError as error:
            raise translate(error, doing="open the journal", path=path) from error
        try:
            _take_over(descriptor, run=run)
            with translated(doing="read the journal", path=path):
                data = path.read_bytes()
                os.ftruncate(descriptor, data.rfind(b"\n") + 1)
            history = History.read(data, source=path.name)
        except BaseException:
            os.close(descriptor)
            raise
        if history is None:
            os.close(descriptor)
            raise _damaged(run, path)
        return FileRunJournal(run, path=path, descriptor=descriptor, history=history)

    def records(self) -> tuple[RunRecord, ...]:
        """Return what is known of every run that left a journal, oldest first. A torn last line is ignored."""
        records = []
        for path in self._paths():
            with translated(doing="read the journal", path=path):
                try:
                    alive, data = _look(path)
                except FileNotFoundError:
                    continue  # forgotten by another process meanwhile
            history = History.read(data, source=path.name)
            if history is not None:
                records.append(history.record(alive=alive))
        return tuple(sorted(records, key=lambda record: (record.started, record.run)))

    def _path(self, run: RunId) -> Path:
        if not is_run_id(run):
            raise BugError(f"{run!r} is no run id")
        return self._folder / f"{run}.jsonl"

    def _paths(self) -> list[Path]:
        with translated(doing="read", path=self._folder):
            try:
                return [path for path in self._folder.iterdir() if path.suffix == ".jsonl" and is_run_id(path.stem)]
            except FileNotFoundError:
                return []

    def _forget_old(self, now: datetime) -> None:
        """Remove finished journals beyond age and count, and drafts that a crash left. Failures wait for next time."""
        finished = []
        for path in self._paths():
            with contextlib.suppress(OSError):
                alive, data = _look(path)
                history = History.read(data, source=path.name)
                if history is not None and history.closed and not alive:
                    finished.append((history.started, path))
        finished.sort(reverse=True)
        for position, (started, path) in enumerate(finished):
            if position >= KEEP_FINISHED_COUNT or now - started > KEEP_FINISHED:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
        for draft in self._folder.glob(".draft-*"):
            with contextlib.suppress(OSError):
                if time.time() - draft.stat().st_mtime > _DRAFT_AGE_SECONDS:
                    draft.unlink(missing_ok=True)


def _taken(run: RunId, path: Path) -> VmsnapError:
    """Return the error for a run that is to have a journal, and has one."""
    data = read_if_there(path)
    if data is not None and History.read(data, source=path.name) is None:
        return _damaged(run, path)
    return BugError(f"run {run} has a journal already")


def _damaged(run: RunId, path: Path) -> PreconditionError:
    return PreconditionError(
        f"the journal of run {run} is damaged: '{path}'",
        remedy=f"move it away, then run 'vmsnap reconcile --adopt {run}', which finds what is left by its tags",
    )


def _take_over(descriptor: int, *, run: RunId) -> None:
    deadline = time.monotonic() + _TAKE_OVER_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                raise BusyError(f"run {run} is still at work", remedy="wait until it is done and try again") from error
            time.sleep(0.02)
        else:
            return


def _look(path: Path) -> tuple[bool, bytes]:
    """Return whether a process holds the journal, and its content. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            alive = True
        else:
            alive = False
        with os.fdopen(os.dup(descriptor), "rb") as stream:
            return alive, stream.read()
    finally:
        os.close(descriptor)
