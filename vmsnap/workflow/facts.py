"""Gathering what is known of all guests, for metrics and alarms. Changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from vmsnap.errors import VmsnapError
from vmsnap.model.alarms import Ledger
from vmsnap.model.capture import CapturePlan
from vmsnap.model.facts import Facts, GuestFacts, Problem, Room
from vmsnap.model.freshness import expected_of
from vmsnap.model.history import RunEntry
from vmsnap.model.ids import RunId, SnapshotId
from vmsnap.model.journal import RunKind
from vmsnap.model.manifest import Snapshot
from vmsnap.model.policy import Policy
from vmsnap.model.schedule import newest_before, next_due
from vmsnap.workflow.replicate import is_replicated
from vmsnap.workflow.run import as_vmsnap_error
from vmsnap.workflow.wishes import settings_of
from vmsnap.workflow.world import World

_NO_RUN = RunId("0" * 10)
_PRUNE_STEP = "prune"


@dataclass(frozen=True, kw_only=True)
class _Shelf:
    """What the store has of one guest. ``read``: when it was read, by the monotonic clock."""

    captured: tuple[datetime, ...]
    ids: frozenset[SnapshotId]
    read: float
    newest: Snapshot | None
    verified: datetime | None
    damaged: int


class Stock:
    """What the store has, for who asks often: a guest's manifests are read again only where snapshots came or went.

    Marks change without that, so they are read again after ``every`` too. For one thread.
    """

    def __init__(self, world: World, *, every: timedelta = timedelta(minutes=5)) -> None:
        self._world = world
        self._every = every.total_seconds()
        self._shelves: dict[str, _Shelf] = {}
        self._guests: frozenset[str] = frozenset()
        self._guests_read: float | None = None

    def guests(self) -> frozenset[str]:
        """Return the guests that have snapshots, as of lately. Raises DriverError."""
        now = self._world.clock.monotonic()
        if self._guests_read is None or now - self._guests_read >= self._every:
            self._guests = frozenset(self._world.store.guests())
            self._guests_read = now
            self._shelves = {guest: shelf for guest, shelf in self._shelves.items() if guest in self._guests}
        return self._guests

    def of(self, guest: str) -> _Shelf:
        """Return what there is of a guest. Raises DriverError."""
        now = self._world.clock.monotonic()
        captured = self._world.store.captured(guest)
        shelf = self._shelves.get(guest)
        if shelf is None or shelf.captured != captured or now - shelf.read >= self._every:
            shelf = self._shelves[guest] = self._read(guest, captured=captured, read=now)
        return shelf

    def _read(self, guest: str, *, captured: tuple[datetime, ...], read: float) -> _Shelf:
        snapshots = self._world.store.snapshots(guest) if captured else ()
        # One dated far ahead was made by a clock that was wrong.
        believed = newest_before(captured, now=self._world.clock.now())
        checks = [mark for snapshot in snapshots if (mark := snapshot.marks.verification) is not None]
        return _Shelf(
            captured=captured,
            ids=frozenset(snapshot.id for snapshot in snapshots),
            read=read,
            newest=next((item for item in reversed(snapshots) if item.manifest.captured == believed), None),
            verified=max((check.at for check in checks if not check.bad_blocks), default=None),
            damaged=sum(bool(check.bad_blocks) for check in checks),
        )


def gather(
    world: World, *, policies: Sequence[Policy], ledger: Ledger, stock: Stock, room: Callable[[], Room | None]
) -> Facts:
    """Return what is known of the guests that have a policy or a snapshot.

    ``ledger`` says since when guests are known, and when they were pruned. ``room``: that of the store; None where it
    cannot be told. Raises nothing: what cannot be looked at is in the answer, as a problem.
    """
    now = world.clock.now()
    try:
        gathering = _Gathering(world, ledger=ledger, stock=stock, now=now)
    except Exception as error:  # noqa: BLE001 - what keeps us from looking is what somebody has to be told
        problem = Problem(about="store", error=as_vmsnap_error(error, doing="looking at all guests"))
        return Facts(at=now, guests=(), unseen=None, problems=(problem,), store=room())
    by_guest = {policy.guest: policy for policy in policies}
    guests: list[GuestFacts] = []
    problems: list[Problem] = list(gathering.problems)
    for guest in sorted({*by_guest, *gathering.guests}):
        try:
            guests.append(gathering.facts_of(guest, policy=by_guest.get(guest)))
        except Exception as error:  # noqa: BLE001 - one guest's trouble must not hide the others
            told = as_vmsnap_error(error, doing=f"looking at guest {guest!r}")
            problems.append(Problem(about="guest", guest=guest, error=told))
    unseen = frozenset(problem.guest for problem in problems if problem.guest)
    return Facts(at=now, guests=tuple(guests), unseen=unseen, problems=tuple(problems), store=room())


def overlay_room(world: World, *, policies: Sequence[Policy]) -> Mapping[str, int]:
    """Return the free space where each guest's overlays would grow; of guests that can be described now.

    It asks the hypervisor, and so may take as long as that does.
    """
    found: dict[str, int] = {}
    for policy in policies:
        try:
            guest = world.hypervisor.inspect(policy.guest)
            plan = CapturePlan(run=_NO_RUN, guest=guest, settings=settings_of(policy))
            found[policy.guest] = world.hypervisor.overlay_free_bytes(plan)
        except VmsnapError:
            continue  # 'doctor' and the next run say why
    return found


class _Gathering:
    """What is read once for all guests."""

    def __init__(self, world: World, *, ledger: Ledger, stock: Stock, now: datetime) -> None:
        self._world = world
        self._ledger = ledger
        self._stock = stock
        self._now = now
        self.guests = stock.guests()
        self.problems: tuple[Problem, ...] = ()
        self._last: Mapping[str, RunEntry] = {}
        self._done: Mapping[str, RunEntry] = {}
        try:
            self._last = world.history.last_ended(kind=RunKind.BACKUP)
            self._done = world.history.last_done(kind=RunKind.BACKUP)
        except Exception as error:  # noqa: BLE001 - what is overdue is seen without it
            told = as_vmsnap_error(error, doing="reading the history")
            self.problems = (Problem(about="history", error=told),)
        records = world.journals.records()
        self._running = {record.guest for record in records if record.alive and record.kind is RunKind.BACKUP}
        environments = world.book.all()
        self._environments = Counter(environment.guest for environment in environments)
        self._expired = Counter(
            environment.guest
            for environment in environments
            if environment.expires is not None and environment.expires <= now
        )

    def facts_of(self, guest: str, *, policy: Policy | None) -> GuestFacts:
        """Return what is known of one guest. Raises DriverError."""
        now = self._now
        shelf = self._stock.of(guest)
        captured = newest_before(shelf.captured, now=now)
        facts = GuestFacts(
            guest=guest,
            policy=policy,
            snapshots=len(shelf.captured),
            newest=shelf.newest,
            verified=shelf.verified,
            damaged=shelf.damaged,
            running=guest in self._running,
            last=self._last.get(guest),
            pruned=self._pruned(guest),
            environments=self._environments[guest],
            environments_expired=self._expired[guest],
        )
        if policy is None:
            return facts
        facts = self._with_copies(facts, policy=policy, ids=shelf.ids)
        if not policy.enabled:
            return facts
        failures = self._world.attempts.failures(guest)
        since = min([self._ledger.known.get(guest, now), *(failure.began for failure in failures), now])
        return replace(
            facts,
            failures=tuple(failure for failure in failures if captured is None or failure.began > captured),
            due=next_due(policy, newest=captured, failures=failures, now=now),
            expected=expected_of(policy, newest=captured, since=since),
        )

    def _with_copies(self, facts: GuestFacts, *, policy: Policy, ids: frozenset[SnapshotId]) -> GuestFacts:
        """Return the facts with what is known here of the guest's copies; the replica itself is not asked."""
        if self._world.replica is None or not policy.replica.enabled:
            return facts
        known = self._world.replica.remembered(facts.guest)
        # Where nothing is sent by itself, nobody knows which copies are wanted.
        lacking = len(ids - known.settled) if is_replicated(policy) else None
        return replace(facts, newest_copy=known.newest, copies_lacking=lacking)

    def _pruned(self, guest: str) -> datetime | None:
        """Return when retention was last applied: by the daemon, or at the end of a backup."""
        known = [self._ledger.pruned.get(guest), self._ledger.pruned.get("")]
        done = self._done.get(guest)
        if done is not None and any(step.name == _PRUNE_STEP for step in done.steps):
            known.append(done.ended)
        return max((moment for moment in known if moment is not None), default=None)
