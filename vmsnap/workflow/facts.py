"""Gathering what is known of all guests, for metrics and alarms. Changes nothing."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime

from vmsnap.errors import VmsnapError
from vmsnap.model.alarms import Ledger
from vmsnap.model.capture import CapturePlan
from vmsnap.model.facts import Facts, GuestFacts, Problem, Room
from vmsnap.model.freshness import expected_of
from vmsnap.model.history import RunEntry
from vmsnap.model.ids import RunId
from vmsnap.model.journal import RunKind
from vmsnap.model.manifest import Snapshot
from vmsnap.model.policy import Policy
from vmsnap.model.schedule import newest_before, next_due
from vmsnap.workflow.run import as_vmsnap_error
from vmsnap.workflow.wishes import settings_of
from vmsnap.workflow.world import World

_NO_RUN = RunId("0" * 10)
_PRUNE_STEP = "prune"


def gather(world: World, *, policies: Sequence[Policy], ledger: Ledger, room: Callable[[], Room | None]) -> Facts:
    """Return what is known of the guests that have a policy or a snapshot.

    ``ledger`` says since when guests are known, and when they were pruned. ``room``: that of the store; None where it
    cannot be told. Raises nothing: what cannot be looked at is in the answer, as a problem.
    """
    now = world.clock.now()
    try:
        gathering = _Gathering(world, ledger=ledger, now=now)
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

    def __init__(self, world: World, *, ledger: Ledger, now: datetime) -> None:
        self._world = world
        self._ledger = ledger
        self._now = now
        self._snapshots: defaultdict[str, list[Snapshot]] = defaultdict(list)
        for snapshot in world.store.snapshots():
            self._snapshots[snapshot.manifest.guest].append(snapshot)
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

    @property
    def guests(self) -> frozenset[str]:
        """Return the guests that have snapshots."""
        return frozenset(self._snapshots)

    def facts_of(self, guest: str, *, policy: Policy | None) -> GuestFacts:
        """Return what is known of one guest. Raises DriverError."""
        now = self._now
        snapshots = self._snapshots.get(guest, [])
        captured = newest_before((snapshot.manifest.captured for snapshot in snapshots), now=now)
        checks = [mark for snapshot in snapshots if (mark := snapshot.marks.verification) is not None]
        facts = GuestFacts(
            guest=guest,
            policy=policy,
            snapshots=len(snapshots),
            newest=next((item for item in reversed(snapshots) if item.manifest.captured == captured), None),
            verified=max((check.at for check in checks if not check.bad_blocks), default=None),
            damaged=sum(bool(check.bad_blocks) for check in checks),
            running=guest in self._running,
            last=self._last.get(guest),
            pruned=self._pruned(guest),
            environments=self._environments[guest],
            environments_expired=self._expired[guest],
        )
        if policy is None or not policy.enabled:
            return facts
        failures = self._world.attempts.failures(guest)
        since = min([self._ledger.known.get(guest, now), *(failure.began for failure in failures), now])
        return replace(
            facts,
            failures=tuple(failure for failure in failures if captured is None or failure.began > captured),
            due=next_due(policy, newest=captured, failures=failures, now=now),
            expected=expected_of(policy, newest=captured, since=since),
        )

    def _pruned(self, guest: str) -> datetime | None:
        """Return when retention was last applied: by the daemon, or at the end of a backup."""
        known = [self._ledger.pruned.get(guest), self._ledger.pruned.get("")]
        done = self._done.get(guest)
        if done is not None and any(step.name == _PRUNE_STEP for step in done.steps):
            known.append(done.ended)
        return max((moment for moment in known if moment is not None), default=None)
