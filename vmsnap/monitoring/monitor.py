"""Hears of runs and ticks, and looks at all guests after each: the daemon's observer, and that of single commands.

Looks are made in a thread of their own, and what they start (notifications, pings, looks at a hypervisor) in others. Whatever
hangs there, no run waits for it, and no tick.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import datetime, timedelta

from vmsnap.errors import IsolationError, VmsnapError
from vmsnap.model.alarms import Breach
from vmsnap.model.due import DueEntry
from vmsnap.model.facts import Problem
from vmsnap.monitoring.exposition import Endpoint, Shelf
from vmsnap.monitoring.lookout import Lookout, News, Subject
from vmsnap.ports.clock import Clock
from vmsnap.ports.observer import ChoreDone, Tick

_LOG = logging.getLogger(__name__)
_CLOSING_SECONDS = 0.9


class Monitor:
    """The port ``Observer``. Single commands, which have no ticks, end it with ``conclude`` instead of ``close``.

    ``subject``: whom to look at as long as no tick has said so. ``listen``: opens the endpoint for Prometheus.
    """

    def __init__(
        self,
        lookout: Lookout,
        *,
        subject: Callable[[], Subject],
        clock: Clock,
        listen: Callable[[Shelf], Endpoint] | None = None,
    ) -> None:
        self._lookout = lookout
        self._subject = subject
        self._clock = clock
        self._listen = listen
        self._endpoint: Endpoint | None = None
        self._deaf = False
        self._lock = threading.Lock()
        self._ticked: Subject | None = None
        self._breaches: tuple[tuple[str, Breach], ...] = ()
        self._pruned: dict[str, datetime] = {}
        self._chores: tuple[Problem, ...] = ()
        # Without a daemon nothing is known of its chores, and what is wrong by them stays.
        self._heard: frozenset[str] | None = frozenset()
        self._ping = False
        self._last = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._work, name="vmsnap-monitor", daemon=True)

    def start(self) -> None:
        """Begin. Where Prometheus cannot be listened for, that is logged and tried again: backups go on without."""
        self._open_endpoint()
        self._thread.start()

    def ticked(self, tick: Tick) -> None:
        """Look, with the policies that the daemon has."""
        guests = {policy.guest for policy in tick.policies}
        refused = {
            entry.error.brief: entry.guest for entry in tick.entries if entry.error and entry.guest not in guests
        }
        problems = tuple(
            Problem(about=f"policy: {error.brief}", guest=refused.get(error.brief, ""), error=error)
            for error in tick.problems
        )
        self._open_endpoint()
        self.stands(tick.chores, heard=tick.heard)
        with self._lock:
            self._ticked = Subject(policies=tick.policies, problems=problems)
            self._ping = True
        self._wake.set()

    def stands(self, problems: tuple[Problem, ...], *, heard: frozenset[str]) -> None:
        """Remember what is wrong by chores until the next look. ``heard``: the chores of which that is all."""
        with self._lock:
            self._chores, self._heard = problems, heard

    def run_ended(self, entry: DueEntry) -> None:
        """Look at once."""
        self.heard(entry.guest, error=entry.error)

    def heard(self, guest: str, *, error: VmsnapError | None) -> None:
        """Hear how a run of a guest ended; look at once."""
        if isinstance(error, IsolationError):
            breach = Breach(at=self._clock.now(), text=error.brief, remedy=error.remedy)
            with self._lock:
                self._breaches += ((guest, breach),)
        self._wake.set()

    def chore_done(self, done: ChoreDone) -> None:
        """Remember when retention was applied. Which chores fail is said by the ticks."""
        if done.name == "prune" and done.error is None and done.whole:
            with self._lock:
                self._pruned[done.guest or ""] = done.at

    def close(self) -> None:
        """End, within a second. What somebody was not told by then is told by the next process."""
        self._end(ping=False, patience_seconds=_CLOSING_SECONDS)

    def conclude(self, *, healthy: bool, patience: timedelta) -> None:
        """Make a last look, and wait for it no longer than ``patience``. ``healthy``: the dead-man's ping may be sent.

        It is the end of a round over all guests then, which there is only without a daemon: what was wrong by chores is over.
        """
        if healthy:
            with self._lock:
                self._heard = None
        self._end(ping=healthy, patience_seconds=patience.total_seconds())

    def _end(self, *, ping: bool, patience_seconds: float) -> None:
        with self._lock:
            self._ping, self._last = ping, True
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(patience_seconds)
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None

    def _open_endpoint(self) -> None:
        if self._listen is None or self._endpoint is not None:
            return
        try:
            self._endpoint = self._listen(self._lookout.shelf)
        except VmsnapError as error:
            if not self._deaf:
                _LOG.error("%s; it is tried again", error.brief)
            self._deaf = True

    def _work(self) -> None:
        last = False
        while not last:
            self._wake.wait()
            self._wake.clear()
            with self._lock:
                last, ping, ticked = self._last, self._ping, self._ticked
                news = News(
                    breaches=self._breaches, pruned=dict(self._pruned), problems=self._chores, heard=self._heard
                )
                self._ping = False
            try:
                subject = ticked if ticked is not None else self._subject()
                looked = self._lookout.look(subject, news=news, ping=ping)
            except VmsnapError as error:
                # The next look may work. The dead-man's ping is not sent meanwhile.
                _LOG.error("alarms could not be looked at: %s", error.brief)
                continue
            except Exception as error:  # noqa: BLE001 - as above
                _LOG.error("alarms could not be looked at: %r", error, exc_info=error)
                continue
            if looked:
                with self._lock:
                    self._breaches = self._breaches[len(news.breaches) :]
