"""What the daemon does beside backups: put in order, prune, let environments expire, verify. One of a kind at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

from vmsnap.daemon.workers import Workers
from vmsnap.errors import BusyError, CleanupError, DriverError, StoreUnreachableError, VmsnapError
from vmsnap.model.environment import Environment
from vmsnap.model.ids import SnapshotId
from vmsnap.model.policy import Policy
from vmsnap.monitoring.standing import unreachable
from vmsnap.ports.clock import Cancel
from vmsnap.ports.observer import ChoreDone
from vmsnap.ports.progress import Progress
from vmsnap.ports.upkeep import CollectWishes
from vmsnap.workflow.collect import collect
from vmsnap.workflow.damage import damage_there
from vmsnap.workflow.expire import expire
from vmsnap.workflow.lazily import complaint, tend
from vmsnap.workflow.prune import prune
from vmsnap.workflow.reconcile import reconcile
from vmsnap.workflow.replicate import is_replicated, replicate_due
from vmsnap.workflow.run import as_vmsnap_error
from vmsnap.workflow.verify import verify_due
from vmsnap.workflow.world import World

RECONCILE, PRUNE, EXPIRE, VERIFY = "reconcile", "prune", "expire", "verify"
REPLICATE, COLLECT, TEND = "replicate", "collect", "tend"
_LOG = logging.getLogger(__name__)
_VERIFY_AGAIN = timedelta(hours=6)
"""Until a snapshot that could not be read is tried again."""


@dataclass(frozen=True, kw_only=True)
class _Unreadable:
    """A snapshot that could not be read, until when (monotonic, in seconds) it is not tried again, and why."""

    guest: str
    until: float
    error: VmsnapError


class Chores:
    """The chores of this process. ``begin_*`` are called by the loop's thread; ``done`` is called by those of the chores.

    Each pass of a chore tells all that is wrong then, also what was told before: what it does not tell any more is over. Where
    the replica does not answer, that is told once a pass, with the guests it concerns.
    """

    def __init__(
        self, *, workers: Workers, progress: Progress, cancel: Cancel, done: Callable[[ChoreDone], None]
    ) -> None:
        self._workers = workers
        self._progress = progress
        self._cancel = cancel
        self._done = done
        self._going: set[str] = set()
        self._unreadable: dict[SnapshotId, _Unreadable] = {}

    @property
    def going(self) -> frozenset[str]:
        """Return the names of the chores that go on."""
        return frozenset(self._going)

    def forget(self, name: str) -> None:
        """Take note that a chore is over."""
        self._going.discard(name)

    def begin_reconcile(self, world: World) -> None:
        """Undo what dead runs left."""
        self._begin(RECONCILE, world, work=lambda: self._reconcile(world))

    def begin_prune(self, world: World, *, policies: Sequence[Policy]) -> None:
        """Apply retention to every guest."""
        self._begin(PRUNE, world, work=lambda: self._prune(world, policies=policies))

    def begin_expire(self, world: World) -> None:
        """Remove the environments whose time has come."""
        self._begin(EXPIRE, world, work=lambda: self._expire(world))

    def begin_tend(self, world: World) -> None:
        """Look after the environments that are straight from the replica."""
        self._begin(TEND, world, work=lambda: self._tend(world))

    def begin_verify(self, world: World, *, policies: Sequence[Policy]) -> None:
        """Read again what has not been read for as long as the policies say."""
        self._begin(VERIFY, world, work=lambda: self._verify(world, policies=policies))

    def begin_replicate(self, world: World, *, policies: Sequence[Policy]) -> None:
        """Send to the replica what policies want there and is not there yet."""
        if any(is_replicated(policy) for policy in policies):
            self._begin(REPLICATE, world, work=lambda: self._replicate(world, policies=policies))
        else:
            self._has_nothing(REPLICATE, world)

    def begin_collect(self, world: World, *, policies: Sequence[Policy]) -> None:
        """Remove what nobody needs at the replica."""
        if world.upkeep is not None:
            self._begin(COLLECT, world, work=lambda: self._collect(world, policies=policies))
        else:
            self._has_nothing(COLLECT, world)

    def _has_nothing(self, name: str, world: World) -> None:
        """Say that there is nothing to do by the present configuration, so that nothing of it is wrong any more."""
        if name not in self._going:
            self._done(ChoreDone(name=name, at=world.clock.now()))

    def _begin(self, name: str, world: World, *, work: Callable[[], Iterator[ChoreDone]]) -> None:
        if name in self._going or self._cancel.is_set():
            return
        self._going.add(name)

        def do() -> None:
            error: VmsnapError | None = None
            whole = False
            away: dict[str, VmsnapError] = {}
            try:
                for done in work():
                    if done.guest is not None and isinstance(done.error, StoreUnreachableError):
                        away.setdefault(done.guest, done.error)
                    else:
                        self._done(done)
                whole = not self._cancel.is_set()
            except BusyError as busy:
                _LOG.info("%s", busy.brief)
            except Exception as caught:  # noqa: BLE001 - it is told, and stops nothing else
                error = as_vmsnap_error(caught, doing=name)
            finally:
                if error is None and away:
                    error = unreachable(away)
                self._done(ChoreDone(name=name, at=world.clock.now(), error=error, whole=whole))

        self._workers.start(do, name=name)

    def _reconcile(self, world: World) -> Iterator[ChoreDone]:
        report = reconcile(world)
        for item in report.undone:
            said = item.failure or "removed"
            _LOG.warning("left by dead run %s of %s: %s %s: %s", item.run, item.guest, item.kind, item.name, said)
        left = [item for item in report.undone if item.failure is not None]
        for guest in sorted({item.guest for item in left}):
            causes = [DriverError(f"{item.kind} {item.name}: {item.failure}") for item in left if item.guest == guest]
            error_left = CleanupError(f"what a dead run of '{guest}' left could not be removed", causes=causes)
            yield ChoreDone(name=RECONCILE, at=world.clock.now(), guest=guest, error=error_left)

    def _prune(self, world: World, *, policies: Sequence[Policy]) -> Iterator[ChoreDone]:
        for policy in policies:
            if self._cancel.is_set():
                return
            error: VmsnapError | None = None
            try:
                decisions = prune(world, policy=policy, dry_run=False)
            except Exception as caught:  # noqa: BLE001 - one guest's failure stops no other
                error = as_vmsnap_error(caught, doing="pruning")
            else:
                for decision in decisions:
                    if decision.removed_bytes is not None:
                        _LOG.info("snapshot %s of %s was pruned", decision.snapshot.id, policy.guest)
            yield ChoreDone(name=PRUNE, at=world.clock.now(), guest=policy.guest, error=error)

    def _expire(self, world: World) -> Iterator[ChoreDone]:
        for entry in expire(world, dry_run=False):
            if entry.error is None:
                _LOG.info("environment %s has expired and was removed", entry.environment.name)
            yield ChoreDone(name=EXPIRE, at=world.clock.now(), guest=entry.environment.guest, error=entry.error)

    def _replicate(self, world: World, *, policies: Sequence[Policy]) -> Iterator[ChoreDone]:
        for entry in replicate_due(world, policies=policies, progress=self._progress, cancel=self._cancel):
            if entry.report is not None:
                _LOG.info("snapshot %s of %s is at the replica", entry.report.snapshot, entry.guest)
            yield ChoreDone(name=REPLICATE, at=world.clock.now(), guest=entry.guest, error=entry.error)

    def _collect(self, world: World, *, policies: Sequence[Policy]) -> Iterator[ChoreDone]:
        # A collector that died holds the lease: it is watched, and taken over from.
        wishes = CollectWishes(waits=True)
        report = collect(world, policies=policies, wishes=wishes, progress=self._progress, cancel=self._cancel)
        freed, found = report.removed, report.found
        _LOG.info(
            "the replica's garbage: %d objects of %d bytes removed, %d more of %d bytes found",
            freed.objects, freed.size_bytes, found.objects, found.size_bytes,
        )  # fmt: skip
        for one in report.ended:
            _LOG.warning(
                "upload %s of snapshot %s from %s was called over: %s", one.upload, one.snapshot, one.host, one.reason
            )
        yield from ()

    def _tend(self, world: World) -> Iterator[ChoreDone]:
        failures: dict[str, VmsnapError] = {}

        def failed(environment: Environment, error: VmsnapError) -> None:
            failures[environment.guest] = error

        for name in tend(world, failed=failed):
            _LOG.info("environment %s needs the replica no more", name)
        for environment in world.book.all():
            status = world.exports.status(environment.run)
            error = None if status is None else complaint(environment, status, now=world.clock.now())
            if error is not None:
                failures.setdefault(environment.guest, error)
        for guest, error in sorted(failures.items()):
            yield ChoreDone(name=TEND, at=world.clock.now(), guest=guest, error=error)

    def _verify(self, world: World, *, policies: Sequence[Policy]) -> Iterator[ChoreDone]:
        now = world.clock.monotonic()
        self._unreadable = {one: known for one, known in self._unreadable.items() if known.until > now}
        for known in self._unreadable.values():
            yield ChoreDone(name=VERIFY, at=world.clock.now(), guest=known.guest, error=known.error)
        entries = verify_due(
            world,
            policies=policies,
            progress=self._progress,
            cancel=self._cancel,
            leave_out=frozenset(self._unreadable),
        )
        for entry in entries:
            error = entry.error
            if entry.snapshot is not None and entry.report is None and error is not None and not error.transient:
                until = world.clock.monotonic() + _VERIFY_AGAIN.total_seconds()
                self._unreadable[entry.snapshot] = _Unreadable(guest=entry.guest, until=until, error=error)
            if entry.report is not None and error is None:
                _LOG.info("snapshot %s of %s is intact", entry.report.snapshot, entry.guest)
            elif entry.report is not None and error is not None:
                # It is written down, and wrong until it is repaired: here by the snapshot's marks, which make an alarm of
                # their own, at the replica by what is told below.
                _LOG.error("%s. What to do: %s", error.brief, error.remedy)
                error = None
            yield ChoreDone(name=VERIFY, at=world.clock.now(), guest=entry.guest, error=error)
        for policy in policies:
            for damaged in self._damage_there(world, policy):
                yield ChoreDone(name=VERIFY, at=world.clock.now(), guest=policy.guest, error=damaged)

    def _damage_there(self, world: World, policy: Policy) -> Iterator[VmsnapError]:
        try:
            yield from damage_there(world, guest=policy.guest, cancel=self._cancel)
        except Exception as caught:  # noqa: BLE001 - one guest's failure stops no other
            yield as_vmsnap_error(caught, doing="looking what is damaged at the replica")
