"""Everything the daemon does, apart from waiting and from its words with systemd."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from queue import Empty, SimpleQueue

from vmsnap.config.settings import Settings
from vmsnap.daemon.cancel import StopCancel
from vmsnap.daemon.chores import COLLECT, RECONCILE, Chores
from vmsnap.daemon.configuration import Loaded, Refused
from vmsnap.daemon.dispatch import Dispatcher
from vmsnap.daemon.workers import Workers
from vmsnap.errors import VmsnapError
from vmsnap.model.due import DueEntry, Limits, Outcome
from vmsnap.model.policy import Policy
from vmsnap.model.report import BackupReport, DaemonReport
from vmsnap.monitoring.standing import Standing
from vmsnap.ports.observer import ChoreDone, Observer, Tick
from vmsnap.workflow.backup import Backup
from vmsnap.workflow.due import NamedProgress
from vmsnap.workflow.world import World

_LOG = logging.getLogger(__name__)
_REPLICATE_EVERY = timedelta(minutes=5)
_COLLECT_AGAIN = timedelta(hours=1)
"""Until a collection is tried again that the replica did not answer to: the regular one may be a day away."""
_LONGEST_ORDER = timedelta(minutes=15)
"""How long runs wait for the first reconcile. Each undoes what is left of its own guest anyway."""
_MOST_NAMES = 3


class _LogProgress:
    """The port ``Progress`` as lines of the log. The daemon's runs are several, so only their notes come here."""

    def step(self, name: str) -> None:
        """A step began."""
        _LOG.info("%s", name)

    def bytes_done(self, done: int, total: int) -> None:
        """Say nothing."""

    def waiting(self, what: str, *, deadline_seconds: float) -> None:
        """Say nothing."""

    def note(self, text: str) -> None:
        """Log it."""
        _LOG.info("%s", text)


class Duties:
    """What is to be done with one configuration. All methods are for the loop's thread."""

    def __init__(
        self,
        loaded: Loaded,
        *,
        open_world: Callable[[Settings], World],
        observers: Sequence[Observer],
        workers: Workers,
        wake: Callable[[], None],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._loaded = loaded
        self._open_world = open_world
        self._world = open_world(loaded.settings)
        self._observers = tuple(observers)
        self._wake = wake
        self._monotonic = monotonic
        self._began = self.last_tick = monotonic()
        self._in_order = False
        self._replicate_at = 0.0
        self._collect_at: float | None = None
        self._standing = Standing()
        self._news: SimpleQueue[DueEntry | ChoreDone] = SimpleQueue()
        self._cancel = StopCancel()
        self._next = ""
        self._started = self._world.clock.now()
        self._counts: Counter[Outcome] = Counter()
        self._said: dict[str, str] = {}
        progress = _LogProgress()
        self._progress = progress
        self._dispatcher = Dispatcher(
            back_up=self._back_up, workers=workers, progress=progress, cancel=self._cancel, ended=self._tell
        )
        self._chores = Chores(workers=workers, progress=progress, cancel=self._cancel, done=self._tell)

    @property
    def loaded(self) -> Loaded:
        """Return the configuration that is gone by."""
        return self._loaded

    @property
    def going(self) -> tuple[str, ...]:
        """Return what goes on: backups first."""
        return (*(f"backup of {guest}" for guest in sorted(self._dispatcher.going)), *sorted(self._chores.going))

    def use(self, loaded: Loaded, *, observers: Sequence[Observer]) -> None:
        """Go by another configuration from now on. What goes on goes on by the former."""
        self._loaded = loaded
        self._world = self._open_world(loaded.settings)
        self._observers = tuple(observers)

    # What is done every so often

    def tick(self) -> None:
        """Look at every guest, start what is due, and tell the observers. Returns without waiting for any run."""
        self.take_news()
        late = self._monotonic() - self._began > _LONGEST_ORDER.total_seconds()
        entries = self._dispatcher.look(
            self._world, policies=self._loaded.policies, limits=self._limits(), start=self._in_order or late
        )
        entries += [_entry(refused) for refused in self._loaded.refused if refused.guest and not refused.kept]
        self._say(entries)
        tick = Tick(
            at=self._world.clock.now(),
            policies=self._loaded.policies,
            entries=tuple(entries),
            running=tuple(sorted(self._dispatcher.going)),
            problems=tuple(refused.error for refused in self._loaded.refused),
            chores=self._standing.problems,
            heard=self._standing.heard,
        )
        self._for_observers(lambda observer: observer.ticked(tick))
        self._chores.begin_expire(self._world)
        if self._monotonic() >= self._replicate_at:
            self._replicate_at = self._monotonic() + _REPLICATE_EVERY.total_seconds()
            self._chores.begin_replicate(self._world, policies=self._loaded.policies)
        if self._collect_at is not None and self._monotonic() >= self._collect_at:
            self.collect()
        self._chores.begin_tend(self._world)
        self.last_tick = self._monotonic()

    def reconcile(self) -> None:
        """Begin to undo what dead runs left."""
        self._chores.begin_reconcile(self._world)

    def prune(self) -> None:
        """Begin to apply retention."""
        self._chores.begin_prune(self._world, policies=self._loaded.policies)

    def verify(self) -> None:
        """Begin to read again what is due for it."""
        self._chores.begin_verify(self._world, policies=self._loaded.policies)

    def collect(self) -> None:
        """Begin to collect the replica's garbage, where there is one."""
        self._collect_at = None
        self._chores.begin_collect(self._world, policies=self._loaded.policies)

    def take_news(self) -> bool:
        """Hear what has ended since, and tell it. Returns whether there is room now for what waited.

        That is so after the first reconcile, and after a run that stored a snapshot. Any other end waits for the next
        tick: a guest that somebody holds, or whose failure could not be recorded, would be tried again without a pause.
        """
        more = False
        while True:
            try:
                news = self._news.get_nowait()
            except Empty:
                return more
            if isinstance(news, DueEntry):
                more |= news.outcome is Outcome.DONE
                if news.outcome is Outcome.DONE:
                    self._replicate_at = 0.0
                self._dispatcher.forget(news.guest)
                self._counts[news.outcome] += 1
                _log_run(news)
                self._for_observers(partial(_run_ended, entry=news))
            else:
                if news.guest is None:
                    self._chores.forget(news.name)
                    more |= news.name == RECONCILE and not self._in_order
                    self._in_order |= news.name == RECONCILE
                    if news.name == COLLECT and news.error is not None and news.error.transient:
                        self._collect_at = self._monotonic() + _COLLECT_AGAIN.total_seconds()
                # What goes on in the same words is not logged with each pass.
                if self._standing.hear(news) and news.error is not None:
                    _log_failure(f"{news.name} of {news.guest}" if news.guest else news.name, news.error)
                self._for_observers(partial(_chore_done, done=news))

    def stop(self) -> None:
        """Ask everything that goes on to stop; begin nothing more."""
        self._cancel.set()

    def close(self) -> None:
        """Let others start due runs."""
        self._dispatcher.close()

    def report(self) -> DaemonReport:
        """Return what was done so far."""
        return DaemonReport(
            started=self._started,
            finished=self._world.clock.now(),
            backups=self._counts[Outcome.DONE],
            failures=self._counts[Outcome.FAILED],
        )

    def status(self) -> str:
        """Return in a few words what is done, what comes next, and what is wrong with the configuration."""
        guests = len(self._loaded.policies)
        said = [f"{guests} guest{'' if guests == 1 else 's'}"]
        if going := self.going:
            said.append(f"doing {_some(going)}")
        if self._next:
            said.append(f"next {self._next}")
        if self._loaded.refused:
            said.append(f"refused {_some([refused.path.name for refused in self._loaded.refused])}: see the log")
        return "; ".join(said)

    # How

    def _limits(self) -> Limits:
        limits = self._loaded.settings.limits
        return Limits(per_host=limits.runs_per_host, per_storage=limits.runs_per_storage)

    def _back_up(self, policy: Policy) -> BackupReport:
        # Drivers of its own, as each process would have.
        opened = self._open_world(self._loaded.settings)
        world = replace(opened, access=opened.access.cancelled_by(self._cancel))
        named = NamedProgress(policy.guest, progress=self._progress)
        return Backup(world, policy=policy, progress=named, cancel=self._cancel).run()

    def _tell(self, news: DueEntry | ChoreDone) -> None:
        self._news.put(news)
        self._wake()

    def _say(self, entries: Sequence[DueEntry]) -> None:
        """Log what is new among guests that are not taken, and remember who comes next."""
        coming = [(e.following.at, e.guest) for e in entries if e.following is not None and e.following.at is not None]
        self._next = f"{min(coming)[1]} at {min(coming)[0]:%Y-%m-%d %H:%MZ}" if coming else ""
        words = {entry.guest: entry.error.brief if entry.error else entry.note or "" for entry in entries}
        for entry in entries:
            if words[entry.guest] in ("", self._said.get(entry.guest)):
                continue
            if entry.error is not None:
                _log_failure(f"guest {entry.guest}", entry.error)
            else:
                _LOG.info("guest %s is %s: %s", entry.guest, entry.outcome.value, entry.note, extra=_of(entry))
        self._said = {guest: said for guest, said in words.items() if said}

    def _for_observers(self, tell: Callable[[Observer], None]) -> None:
        for observer in self._observers:
            try:
                tell(observer)
            except Exception:  # noqa: BLE001 - one who only listens must not keep guests from their backups
                _LOG.exception("%s failed", type(observer).__name__)


def _run_ended(observer: Observer, *, entry: DueEntry) -> None:
    observer.run_ended(entry)


def _chore_done(observer: Observer, *, done: ChoreDone) -> None:
    observer.chore_done(done)


def _entry(refused: Refused) -> DueEntry:
    return DueEntry(guest=refused.guest or refused.path.name, outcome=Outcome.FAILED, error=refused.error)


def _log_run(entry: DueEntry) -> None:
    if entry.error is not None and entry.outcome is Outcome.FAILED:
        _log_failure(f"the backup of {entry.guest}", entry.error, extra=_of(entry))
    elif entry.report is not None:
        _LOG.info("snapshot %s of %s is stored", entry.report.snapshot, entry.guest, extra=_of(entry))
    else:
        why = entry.note or (entry.error.brief if entry.error else "")
        _LOG.info("the backup of %s: %s: %s", entry.guest, entry.outcome.value, why, extra=_of(entry))


def _log_failure(what: str, error: VmsnapError, *, extra: dict[str, str] | None = None) -> None:
    remedy = f" What to do: {error.remedy}" if error.remedy else ""
    also = "".join(f" Also: {other.brief}" for other in error.also)
    _LOG.error("%s failed (exit code %d): %s%s%s", what, error.exit_code, error.brief, also, remedy, extra=extra)


def _of(entry: DueEntry) -> dict[str, str]:
    return {"guest": entry.guest}


def _some(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
