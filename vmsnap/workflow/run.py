"""One run: its journal, the stack of what it made, its steps and its state.

Every outside thing goes through ``acquire``: intent to the journal, release pushed, then made. Whatever happens,
``release_all`` undoes it, last in first out, each with its own deadline.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from vmsnap.errors import BugError, VmsnapError
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


def release_resource(world: World, resource: Resource) -> VmsnapError | None:
    """Release one resource; return the error instead of raising it, so that the others are released too."""
    deadline = RELEASE_DEADLINES.get(resource.kind, _RELEASE_DEADLINE)
    try:
        world.owner_of(resource.kind).release(resource, deadline=deadline)
    except VmsnapError as error:
        _LOG.warning("%s %s was not removed: %s", resource.kind, resource.name, error.brief)
        return error
    except Exception as error:  # noqa: BLE001
        # A driver's bug must not keep the other resources, the source's overlay among them, from being released.
        _LOG.exception("%s %s was not removed", resource.kind, resource.name)
        bug = BugError(f"removing {resource.kind} {resource.name} failed: {error!r}")
        bug.__cause__ = error
        return bug
    return None


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
        self._journal.intend(resource)
        self._stack.append(resource)
        return make()

    def release(self, resource: Resource) -> None:
        """Undo one thing before its turn. Raises what its owner raises; it then stays on the stack."""
        error = release_resource(self._world, resource)
        if error is not None:
            raise error
        self._stack.remove(resource)
        self._journal.released(resource)

    def release_all(self) -> tuple[VmsnapError, ...]:
        """Undo everything, last in first out. Returns what went wrong; nothing is raised."""
        errors = []
        while self._stack:
            resource = self._stack.pop()
            error = release_resource(self._world, resource)
            if error is None:
                try:
                    self._journal.released(resource)
                except VmsnapError as journal_error:
                    # The thing is gone; reconcile will find that too.
                    error = journal_error
            if error is not None:
                errors.append(error)
        return tuple(errors)

    def keep_all(self) -> None:
        """Forget the stack without undoing it: the resources now belong to an environment."""
        self._stack.clear()
