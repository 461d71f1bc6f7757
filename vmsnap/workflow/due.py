"""Backing up every guest that is due, as many at a time as the limits allow.

What is due follows from the store and the book of attempts. By default guests go one after another, in this thread.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from datetime import UTC, datetime
from itertools import islice

from vmsnap.errors import BusyError, CancelledError, VmsnapError
from vmsnap.model.due import DueEntry, DueReport, Limits, Outcome
from vmsnap.model.journal import RunKind
from vmsnap.model.policy import Policy
from vmsnap.model.report import BackupReport
from vmsnap.model.schedule import Due, FailedAttempt, Load, newest_before, next_due, over_limit, upcoming
from vmsnap.ports.clock import Cancel
from vmsnap.ports.progress import Progress
from vmsnap.workflow.run import as_vmsnap_error
from vmsnap.workflow.world import World

_LOG = logging.getLogger(__name__)
_MOST_REMEMBERED = 20
"""Attempts kept for a guest. Their waits have long reached any limit by then."""


class DueRuns:
    """One round over all guests. ``back_up`` makes one backup, as the workflow ``Backup`` does, and raises as that does.

    Where the limits allow several runs at a time, ``back_up`` and ``progress`` are called from several threads.
    ``reread`` returns a guest's policy as it is when its turn comes, which may be hours later; None where there is none any
    more. Without it they stay as they were.
    """

    def __init__(
        self,
        world: World,
        *,
        policies: Sequence[Policy],
        limits: Limits,
        back_up: Callable[[Policy], BackupReport],
        progress: Progress,
        cancel: Cancel,
        reread: Callable[[str], Policy | None] | None = None,
    ) -> None:
        self._world = world
        self._policies = policies
        self._limits = limits
        self._back_up = back_up
        self._progress = progress
        self._cancel = cancel
        self._reread = reread

    def run(self, *, dry_run: bool) -> DueReport:
        """Back up what is due; with ``dry_run`` say only what would be.

        A guest that fails is in the report and stops no other. Raises BusyError where another process does the same.
        """
        with contextlib.nullcontext() if dry_run else self._world.locks.schedule():
            started = self._world.clock.now()
            waiting, entries = self.look()
            if dry_run:
                taken = [self._plan(policy, due) for policy, due in waiting]
            elif self._limits.per_host == 1:
                taken = [self.refuse(policy, due, own=()) or self.take(policy) for policy, due in waiting]
            else:
                taken = self._take_beside_each_other(waiting)
            return DueReport(
                started=started,
                finished=self._world.clock.now(),
                dry_run=dry_run,
                entries=(*taken, *entries),
            )

    def look(self) -> tuple[list[tuple[Policy, Due]], list[DueEntry]]:
        """Return what is due, the one with the oldest newest snapshot first, and the entries of all other guests, by name."""
        waiting: list[tuple[datetime, str, Policy, Due]] = []
        never = datetime.min.replace(tzinfo=UTC)
        entries = []
        for policy in sorted(self._policies, key=lambda policy: policy.guest):
            if not policy.enabled:
                entries.append(DueEntry(guest=policy.guest, outcome=Outcome.DISABLED))
                continue
            try:
                now = self._world.clock.now()
                newest = _newest(self._world, policy, now=now)
                due = next_due(policy, newest=newest, failures=self._world.attempts.failures(policy.guest), now=now)
            except Exception as error:  # noqa: BLE001 - a guest that cannot be judged must not keep the others from it
                entries.append(_failed(policy, as_vmsnap_error(error, doing="looking whether it is due")))
                continue
            if due.at is not None and due.is_due(self._world.clock.now()):
                # By the newest snapshot, not by the time of this run: that is tonight's for all who wait for a window, and
                # where not all find room in it, the same ones would be left out every night.
                waiting.append((newest or never, policy.guest, policy, due))
            else:
                entries.append(DueEntry(guest=policy.guest, outcome=Outcome.NOT_DUE, following=due))
        waiting.sort(key=lambda item: item[:2])
        return [(policy, due) for _, _, policy, due in waiting], entries

    def _plan(self, policy: Policy, due: Due) -> DueEntry:
        return DueEntry(guest=policy.guest, outcome=Outcome.DUE, due=due, note=self._over_limit(policy, own=()))

    def _take_beside_each_other(self, waiting: Sequence[tuple[Policy, Due]]) -> list[DueEntry]:
        """Take all, each in a thread of its own, so that limits hold. Returns entries in the order of ``waiting``."""
        entries: dict[str, DueEntry] = {}
        running: dict[Future[DueEntry], Load] = {}
        pending = list(waiting)
        with ThreadPoolExecutor(max_workers=self._limits.per_host) as pool:
            while pending or running:
                for policy, due in tuple(pending):
                    own = tuple(running.values())
                    refused = self.refuse(policy, due, own=own)
                    if refused is not None and refused.error is None and not self._is_held_by_others(policy, own=own):
                        continue  # it waits for a run of ours, which will end
                    pending.remove((policy, due))
                    if refused is not None:
                        entries[policy.guest] = refused
                    else:
                        running[pool.submit(self.take, policy)] = load_of(policy)
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    entries[running.pop(future).guest] = future.result()
        return [entries[policy.guest] for policy, _ in waiting]

    def refuse(self, policy: Policy, due: Due, *, own: Sequence[Load]) -> DueEntry | None:
        """Return the entry of a guest that limits hold back; None where it may start. ``own``: runs of this round."""
        try:
            reason = self._over_limit(policy, own=own)
        except Exception as error:  # noqa: BLE001 - one guest's failure stops no other
            return _failed(policy, as_vmsnap_error(error, doing="looking what else goes on"))
        if reason is None:
            return None
        return DueEntry(guest=policy.guest, outcome=Outcome.SKIPPED, due=due, note=reason)

    def take(self, policy: Policy) -> DueEntry:
        """Back up one guest, unless that is no longer possible; then say what comes after."""
        guest = policy.guest
        if self._cancel.is_set():
            return DueEntry(guest=guest, outcome=Outcome.STOPPED, note="not begun")
        try:
            current = policy if self._reread is None else self._reread(guest)
            if current is None or not current.enabled:
                note = "its policy was removed meanwhile" if current is None else None
                return DueEntry(guest=guest, outcome=Outcome.DISABLED, note=note)
            policy = current
            due = due_of(self._world, policy)
            if not due.is_due(self._world.clock.now()):
                # The runs before it took their time, and its window has closed.
                return DueEntry(guest=guest, outcome=Outcome.NOT_DUE, following=due, note="no longer")
            entry = self._attempt(policy, due)
        except Exception as error:  # noqa: BLE001 - as above
            return _failed(policy, as_vmsnap_error(error, doing="starting its run"))
        return replace(entry, following=self._following(policy))

    def _following(self, policy: Policy) -> Due | None:
        """Return what comes after a run; None where that cannot be told: what the run did is told in any case."""
        try:
            return due_of(self._world, policy)
        except Exception as error:  # noqa: BLE001 - as above
            told = as_vmsnap_error(error, doing="looking when it is due next")
            _LOG.warning("when guest %r is due next cannot be told: %s", policy.guest, told.brief)
            return None

    def _attempt(self, policy: Policy, due: Due) -> DueEntry:
        """Run it, recorded as an attempt from before its beginning, so that a death in it counts as a failure."""
        world, guest = self._world, policy.guest
        self._progress.note(f"guest {guest} is due: {due.reason}")
        before = world.attempts.failures(guest)[-_MOST_REMEMBERED + 1 :]
        began = world.clock.now()
        world.attempts.replace(guest, failures=(*before, FailedAttempt(began=began)))
        try:
            report = self._back_up(policy)
        except CancelledError as error:
            self._record(guest, before)
            return DueEntry(guest=guest, outcome=Outcome.STOPPED, due=due, error=error)
        except BusyError as error:
            if not self._has_begun(guest, since=began):
                self._record(guest, before)
                return DueEntry(guest=guest, outcome=Outcome.SKIPPED, due=due, note=error.brief)
            return self._fail(policy, due, error, failures=(*before, _failure(error, began=began, world=world)))
        except Exception as error:  # noqa: BLE001 - one guest's failure stops no other
            told = as_vmsnap_error(error, doing="the backup")
            return self._fail(policy, due, told, failures=(*before, _failure(told, began=began, world=world)))
        self._record(guest, ())
        return DueEntry(guest=guest, outcome=Outcome.DONE, due=due, report=report)

    def _fail(self, policy: Policy, due: Due, error: VmsnapError, *, failures: Sequence[FailedAttempt]) -> DueEntry:
        self._record(policy.guest, failures)
        self._progress.note(f"guest {policy.guest} failed: {error.brief}")
        return DueEntry(guest=policy.guest, outcome=Outcome.FAILED, due=due, error=error)

    def _record(self, guest: str, failures: Sequence[FailedAttempt]) -> None:
        """Record how an attempt ended. Where that fails, it counts as one that did not end, which is safe."""
        try:
            self._world.attempts.replace(guest, failures=failures)
        except Exception as error:  # noqa: BLE001 - what the run did is told in any case
            _LOG.warning("how the attempt for guest %r ended could not be recorded: %s", guest, error)

    def _has_begun(self, guest: str, *, since: datetime) -> bool:
        """Tell whether a run got as far as touching the guest. One that did not find it free left no journal."""
        records = self._world.journals.records()
        return any(record.guest == guest and record.started >= since for record in records)

    def _over_limit(self, policy: Policy, *, own: Sequence[Load]) -> str | None:
        loads = {item.guest: load_of(item) for item in self._policies}
        return over_limit(
            load_of(policy),
            running=(*own, *self._others(loads, own=own)),
            per_host=self._limits.per_host,
            per_storage=self._limits.per_storage,
        )

    def _is_held_by_others(self, policy: Policy, *, own: Sequence[Load]) -> bool:
        """Tell whether runs of other processes alone are over the limits."""
        loads = {item.guest: load_of(item) for item in self._policies}
        others = tuple(self._others(loads, own=own))
        limits = self._limits
        return (
            over_limit(load_of(policy), running=others, per_host=limits.per_host, per_storage=limits.per_storage)
            is not None
        )

    def _others(self, loads: Mapping[str, Load], *, own: Sequence[Load]) -> Iterator[Load]:
        """Return backups that go on and are not of this round: those of other processes."""
        mine = {load.guest for load in own}
        for record in self._world.journals.records():
            if record.alive and record.kind is RunKind.BACKUP and record.guest not in mine:
                yield loads.get(record.guest, Load(guest=record.guest, storage=None))


class NamedProgress:
    """The port ``Progress`` for a run among others: its steps are lines with its guest's name."""

    def __init__(self, guest: str, *, progress: Progress) -> None:
        self._guest = guest
        self._progress = progress

    def step(self, name: str) -> None:
        """A step began."""
        self._progress.note(f"{self._guest}: {name}")

    def bytes_done(self, done: int, total: int) -> None:
        """Say nothing: there is one bar, and several runs."""

    def waiting(self, what: str, *, deadline_seconds: float) -> None:
        """Say nothing, as above."""

    def note(self, text: str) -> None:
        """Say it, with the guest's name."""
        self._progress.note(f"{self._guest}: {text}")


def due_of(world: World, policy: Policy) -> Due:
    """Return when a guest is due next, from what is stored. Raises DriverError."""
    now = world.clock.now()
    return next_due(
        policy, newest=_newest(world, policy, now=now), failures=world.attempts.failures(policy.guest), now=now
    )


def upcoming_of(world: World, policy: Policy, *, count: int) -> tuple[Due, ...]:
    """Return a guest's next runs: ``count``, or fewer where no more come, or one that says why there is none."""
    now = world.clock.now()
    newest, failures = _newest(world, policy, now=now), world.attempts.failures(policy.guest)
    runs = tuple(islice(upcoming(policy, newest=newest, failures=failures, now=now), count))
    return runs or (next_due(policy, newest=newest, failures=failures, now=now),)


def _newest(world: World, policy: Policy, *, now: datetime) -> datetime | None:
    return newest_before(world.store.captured(policy.guest), now=now)


def load_of(policy: Policy) -> Load:
    """Return what a run of a guest weighs against the limits."""
    return Load(guest=policy.guest, storage=policy.schedule.storage)


def _failure(error: VmsnapError, *, began: datetime, world: World) -> FailedAttempt:
    return FailedAttempt(began=began, ended=world.clock.now(), exit_code=int(error.exit_code), brief=error.brief)


def _failed(policy: Policy, error: VmsnapError) -> DueEntry:
    return DueEntry(guest=policy.guest, outcome=Outcome.FAILED, error=error)
