"""Starting due runs, each in a thread of its own, so that one that hangs keeps nobody from looking at the others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime

from vmsnap.daemon.workers import Workers
from vmsnap.errors import BugError, BusyError, VmsnapError
from vmsnap.model.due import DueEntry, Limits, Outcome
from vmsnap.model.policy import Policy
from vmsnap.model.report import BackupReport
from vmsnap.model.schedule import Due, Load, over_limit
from vmsnap.ports.clock import Cancel
from vmsnap.ports.progress import Progress
from vmsnap.workflow.due import DueRuns, load_of
from vmsnap.workflow.run import as_vmsnap_error
from vmsnap.workflow.world import World

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Going:
    """A run that goes on."""

    load: Load
    since: datetime


class Dispatcher:
    """Due runs of this process. Its methods are called by the loop's thread; ``ended`` is called by those of the runs."""

    def __init__(
        self,
        *,
        back_up: Callable[[Policy], BackupReport],
        workers: Workers,
        progress: Progress,
        cancel: Cancel,
        ended: Callable[[DueEntry], None],
    ) -> None:
        self._back_up = back_up
        self._workers = workers
        self._progress = progress
        self._cancel = cancel
        self._ended = ended
        self._going: dict[str, Going] = {}
        self._lock = ExitStack()
        self._may_start = False

    @property
    def going(self) -> dict[str, Going]:
        """Return the runs that go on, by guest."""
        return dict(self._going)

    def look(self, world: World, *, policies: Sequence[Policy], limits: Limits, start: bool) -> list[DueEntry]:
        """Judge every guest, and start what is due and within the limits. Returns the entries of all that do not run.

        ``start`` False: start nothing yet. Guests that cannot be judged are in the entries; nothing is raised.
        """
        runs = DueRuns(
            world,
            policies=[policy for policy in policies if policy.guest not in self._going],
            limits=limits,
            back_up=self._back_up,
            progress=self._progress,
            cancel=self._cancel,
        )
        waiting, entries = runs.look()
        held = self._held(world) if waiting and start else "the daemon puts in order what dead runs left"
        left = [self._begin(world, runs, policy=policy, due=due, limits=limits, held=held) for policy, due in waiting]
        return [*(entry for entry in left if entry is not None), *entries]

    def _begin(
        self, world: World, runs: DueRuns, *, policy: Policy, due: Due, limits: Limits, held: str | None
    ) -> DueEntry | None:
        """Start a run, or return why it is not started."""
        guest = policy.guest
        own = tuple(going.load for going in self._going.values())
        # First by what is known here: others' runs are looked for on the disk.
        reason = held or over_limit(
            load_of(policy), running=own, per_host=limits.per_host, per_storage=limits.per_storage
        )
        if self._cancel.is_set():
            return DueEntry(guest=guest, outcome=Outcome.STOPPED, due=due, note="not begun")
        if reason is not None:
            return DueEntry(guest=guest, outcome=Outcome.SKIPPED, due=due, note=reason)
        refused = runs.refuse(policy, due, own=own)
        if refused is not None:
            return refused
        self._going[guest] = Going(load=load_of(policy), since=world.clock.now())
        self._workers.start(lambda: self._run(runs, policy), name=f"backup of {guest}")
        return None

    def _run(self, runs: DueRuns, policy: Policy) -> None:
        entry = DueEntry(
            guest=policy.guest, outcome=Outcome.FAILED, error=BugError("the thread of its run ended early")
        )
        try:
            entry = runs.take(policy)
        except Exception as error:  # noqa: BLE001 - it is told, and stops nobody else
            told = as_vmsnap_error(error, doing="its run")
            entry = DueEntry(guest=policy.guest, outcome=Outcome.FAILED, error=told)
        finally:
            self._ended(entry)

    def forget(self, guest: str) -> None:
        """Take note that a guest's run is over."""
        self._going.pop(guest, None)

    def _held(self, world: World) -> str | None:
        """Return who else starts due runs; None where this process does: from then on as long as it lives."""
        if self._may_start:
            return None
        try:
            self._lock.enter_context(world.locks.schedule(purpose="daemon"))
        except BusyError as error:
            return error.brief
        except VmsnapError as error:
            _LOG.error("no run can be started: %s", error.brief)
            return error.brief
        self._may_start = True
        return None

    def close(self) -> None:
        """Let others start due runs."""
        self._may_start = False
        self._lock.close()
