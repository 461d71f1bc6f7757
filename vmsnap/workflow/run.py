"""One run: its journal, the stack of what it made, its steps and its state.

Every outside thing goes through ``acquire``: intent to the journal, release pushed, then made. Whatever happens,
``release_all`` undoes it, last in first out, each with its own deadline.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol, TypeVar

from vmsnap.errors import BugError, DriverError, VmsnapError
from vmsnap.model.ids import RunId
from vmsnap.model.journal import Resource, ResourceKind
from vmsnap.model.manifest import StepRecord
from vmsnap.ports.progress import Progress
from vmsnap.ports.state import RunJournal
from vmsnap.workflow.world import World

T = TypeVar("T")
_LOG = logging.getLogger(__name__)

RELEASE_DEADLINES = {
    # The commit has to copy what production wrote during the run.
    ResourceKind.SOURCE_OVERLAYS: timedelta(minutes=15),
    ResourceKind.STAGING: timedelta(minutes=2),
}
_RELEASE_DEADLINE = timedelta(seconds=60)

# What may still be used by a VM stays while that VM could not be removed. The source's overlays are not among them: the
# clone is only a copy, and production comes home whatever becomes of it.
_USED_BY = {
    ResourceKind.FENCE: (ResourceKind.CLONE, ResourceKind.ENVIRONMENT),
    ResourceKind.CLONE_OVERLAYS: (ResourceKind.CLONE,),
    ResourceKind.DISK_COPIES: (ResourceKind.CLONE,),
    ResourceKind.ENVIRONMENT_DISKS: (ResourceKind.ENVIRONMENT,),
    ResourceKind.REPLICA_EXPORT: (ResourceKind.ENVIRONMENT,),
    ResourceKind.HOLD: (ResourceKind.ENVIRONMENT,),
}


def as_vmsnap_error(error: Exception, *, doing: str) -> VmsnapError:
    """Return the error itself, or a bug that stands for what no driver should raise."""
    if isinstance(error, VmsnapError):
        return error
    bug = BugError(f"{doing} failed: {error!r}")
    bug.__cause__ = error
    return bug


@contextmanager
def undone_on_failure(undo: Callable[[], tuple[VmsnapError, ...]], *, doing: str) -> Iterator[None]:
    """Call ``undo`` where the body fails. The body's error is raised, with what ``undo`` returns beside it."""
    try:
        yield
    except BaseException as error:
        errors = undo()
        if not isinstance(error, Exception):
            raise
        told = as_vmsnap_error(error, doing=doing)
        told.also.extend(errors)
        if told is error:
            raise
        raise told from error


class _Closable(Protocol):
    def close(self) -> None:
        """Let go."""


_C = TypeVar("_C", bound=_Closable)


@contextmanager
def closing(thing: _C) -> Iterator[_C]:
    """Close a journal or a control after the body. A failure of that is logged: it ends with the process anyway."""
    try:
        yield thing
    finally:
        try:
            thing.close()
        except Exception as error:  # noqa: BLE001 - as the docstring says
            _LOG.warning("%s could not be closed: %r", type(thing).__name__, error)


def release_resource(world: World, resource: Resource) -> VmsnapError | None:
    """Release one resource; return the error instead of raising it, so that the others are released too."""
    deadline = RELEASE_DEADLINES.get(resource.kind, _RELEASE_DEADLINE)
    try:
        world.owner_of(resource.kind).release(resource, deadline=deadline)
    except Exception as error:  # noqa: BLE001
        # A driver's bug must not keep the other resources, the source's overlay among them, from being released.
        told = as_vmsnap_error(error, doing=f"removing {resource.kind} {resource.name}")
        _LOG.warning("%s %s was not removed: %s", resource.kind, resource.name, told.brief, exc_info=told is not error)
        return told
    return None


def release_each(
    world: World, resources: Iterable[Resource], *, journal: RunJournal | None
) -> Iterator[tuple[Resource, VmsnapError | None]]:
    """Release resources in the given order, and record it; yield each with what went wrong. Never stops at an error.

    What a VM uses stays where that VM could not be removed: a clone never runs on without its fence.
    """
    stuck: set[tuple[RunId, ResourceKind]] = set()
    for resource in resources:
        users = [kind for kind in _USED_BY.get(resource.kind, ()) if (resource.run, kind) in stuck]
        if users:
            yield resource, DriverError(f"{resource.kind} {resource.name} stays: the {users[0]} that uses it is there")
            continue
        error = release_resource(world, resource)
        if error is not None:
            stuck.add((resource.run, resource.kind))
        elif journal is not None:
            error = _record_release(journal, resource)
        yield resource, error


def _record_release(journal: RunJournal, resource: Resource) -> VmsnapError | None:
    """Record a release; return the error instead of raising it. The thing is gone; reconcile will find that too."""
    try:
        journal.released(resource)
    except Exception as error:  # noqa: BLE001 - as for the release itself
        return as_vmsnap_error(error, doing=f"recording that {resource.kind} {resource.name} is gone")
    return None


class _JournalledProgress:
    """A Progress whose notes go to the journal too."""

    def __init__(self, progress: Progress, *, journal: RunJournal) -> None:
        self._journal = journal
        self._progress = progress
        self.step = progress.step
        self.bytes_done = progress.bytes_done
        self.waiting = progress.waiting

    def note(self, text: str) -> None:
        """Tell the journal and the operator."""
        try:
            self._journal.note(text)
        except VmsnapError as error:
            _LOG.warning("the journal of run %s lacks a note (%s): %s", self._journal.run, error.brief, text)
        self._progress.note(text)


class Run:
    """One run in progress. Not thread-safe."""

    def __init__(self, world: World, *, journal: RunJournal, progress: Progress) -> None:
        self.id: RunId = journal.run
        self._world = world
        self._journal = journal
        self._progress = progress
        self._stack: list[Resource] = []
        self._steps: list[StepRecord] = []

    @property
    def steps(self) -> tuple[StepRecord, ...]:
        """Return the steps that ended, in order."""
        return tuple(self._steps)

    @property
    def progress(self) -> Progress:
        """Return the operator's progress; what it is told to note is noted in the journal as well."""
        return _JournalledProgress(self._progress, journal=self._journal)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a step and tell the operator."""
        self._progress.step(name)
        _LOG.info("%s", name, extra={"run": self.id, "step": name})
        started = self._world.clock.monotonic()
        try:
            yield
        finally:
            self._steps.append(StepRecord(name=name, seconds=round(self._world.clock.monotonic() - started, 3)))

    def acquire(self, resource: Resource, make: Callable[[], T]) -> T:
        """Make an outside thing, so that it is undone whatever happens from here on."""
        if resource.run != self.id:
            raise BugError(f"a resource of run {resource.run} was given to run {self.id}")
        # On the stack first: an intent may be on disk although writing it failed.
        self._stack.append(resource)
        self._journal.intend(resource)
        return make()

    def release(self, resource: Resource) -> None:
        """Undo one thing before its turn. Raises what its owner raises; it then stays on the stack."""
        error = release_resource(self._world, resource)
        if error is not None:
            raise error
        self._journal.released(resource)
        self._stack.remove(resource)

    def hand_over(self, resource: Resource) -> None:
        """Let a thing be from here on: it belongs to what the run made, and outlives the run."""
        self._journal.released(resource)
        self._stack.remove(resource)

    def release_all(self) -> tuple[VmsnapError, ...]:
        """Undo everything, last in first out. Returns what went wrong; nothing is raised."""
        resources = tuple(reversed(self._stack))
        self._stack.clear()
        released = release_each(self._world, resources, journal=self._journal)
        return tuple(error for _, error in released if error is not None)

    def end(self) -> tuple[VmsnapError, ...]:
        """Undo everything, and finish the journal where nothing is left. Returns what went wrong; nothing is raised."""
        errors = self.release_all()
        if errors:
            return errors
        try:
            self._journal.finish()
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not hide how the run ended
            return (as_vmsnap_error(error, doing="the end of the run"),)
        return ()

    def keep_all(self) -> None:
        """Forget the stack without undoing it: the resources now belong to an environment."""
        self._stack.clear()
