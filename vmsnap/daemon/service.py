"""The daemon's life: one at a time, ready when its configuration is read, reloading on SIGHUP, undone on SIGTERM."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

from vmsnap.config.settings import Settings
from vmsnap.daemon.configuration import Loaded, load, reload
from vmsnap.daemon.duties import Duties
from vmsnap.daemon.notify import Systemd
from vmsnap.daemon.signals import Alarm, handled
from vmsnap.daemon.ticker import Ticker
from vmsnap.daemon.workers import ThreadWorkers, Workers
from vmsnap.errors import CleanupError, DriverError, VmsnapError
from vmsnap.model.report import DaemonReport
from vmsnap.ports.observer import Observer
from vmsnap.workflow.world import World

_LOG = logging.getLogger(__name__)
_LONGEST_WAIT = timedelta(seconds=5)
"""The longest wait of the loop, so that systemd hears of it in time and the status is never old."""
_MISSED_TICKS = 3
_SHORTEST_HEALTH = timedelta(minutes=1)


class Daemon:
    """``vmsnap daemon``. Use once, in the main thread.

    ``open_observers`` makes who hears of it. Its ``wish`` methods are called by signals; ``run`` does the work.
    """

    def __init__(
        self,
        config: Path | None,
        *,
        open_world: Callable[[Settings], World],
        open_observers: Callable[[Settings, World], Sequence[Observer]],
        systemd: Systemd,
        workers: Workers | None = None,
    ) -> None:
        self._config = config
        self._open_world = open_world
        self._open_observers = open_observers
        self._systemd = systemd
        self._workers = workers or ThreadWorkers()
        self._observers: tuple[Observer, ...] = ()
        self._ticker = Ticker()
        self._stop = self._reload = False

    def wish_stop(self) -> None:
        """Ask it to stop."""
        self._stop = True

    def wish_reload(self) -> None:
        """Ask it to read its configuration again."""
        self._reload = True

    def run(self) -> DaemonReport:
        """Work until a signal says stop.

        Raises ConfigError for settings that cannot be used, BusyError where another daemon has this state directory, what an
        observer raises at its start, and CleanupError where something did not end in time after a stop.
        """
        loaded = load(self._config)
        world = self._open_world(loaded.settings)
        alarm = Alarm()
        handlers = {
            signal.SIGTERM: self.wish_stop,
            signal.SIGINT: self.wish_stop,
            signal.SIGHUP: self.wish_reload,
        }
        with world.locks.daemon(), handled(handlers, alarm=alarm), ExitStack() as stack:
            stack.callback(self._close_observers)
            self._start_observers(loaded.settings, world)
            duties = Duties(
                loaded,
                open_world=self._open_world,
                observers=self._observers,
                workers=self._workers,
                wake=alarm.ring,
            )
            stack.callback(duties.close)
            _say_refused(loaded)
            self._set_ticker(duties)
            self._systemd.ready()
            _LOG.info("the daemon is up (process %d, %d policies)", os.getpid(), len(loaded.policies))
            try:
                self._loop(duties, alarm=alarm)
            finally:
                self._wind_down(duties, alarm=alarm)
        _LOG.info("the daemon has ended in order")
        return duties.report()

    def _loop(self, duties: Duties, *, alarm: Alarm) -> None:
        while not self._stop:
            try:
                if self._reload:
                    self._reload = False
                    self._read_again(duties)
                if duties.take_news():
                    duties.tick()
                self._ticker.run_pending()
            except Exception:  # noqa: BLE001 - the loop goes on; where that does not help, the watchdog ends it
                _LOG.exception("a look at what is to be done failed")
            self._systemd.status(duties.status())
            if self._is_healthy(duties):
                self._systemd.alive()
            wait = min(self._ticker.idle(), _LONGEST_WAIT)
            if self._systemd.watchdog is not None:
                wait = min(wait, self._systemd.watchdog / 4)
            alarm.wait(wait)

    def _is_healthy(self, duties: Duties) -> bool:
        """Tell whether looks at what is due come to their end. Only then systemd hears that the daemon is alive."""
        allowed = max(duties.loaded.settings.daemon.tick * _MISSED_TICKS, _SHORTEST_HEALTH)
        return time.monotonic() - duties.last_tick < allowed.total_seconds()

    def _set_ticker(self, duties: Duties) -> None:
        settings = duties.loaded.settings.daemon
        self._ticker.set(
            (settings.reconcile_every, duties.reconcile),
            (settings.tick, duties.tick),
            (settings.prune_every, duties.prune),
            # Reads every manifest, for what comes up once in days.
            (settings.prune_every, duties.verify),
            (settings.collect_every, duties.collect),
        )

    def _read_again(self, duties: Duties) -> None:
        self._systemd.reloading()
        try:
            before = duties.loaded
            loaded = reload(self._config, before=before)
            _say_refused(loaded)
            if loaded.settings != before.settings:
                self._exchange_observers(loaded.settings)
            duties.use(loaded, observers=self._observers)
            self._set_ticker(duties)
            known, refused = len(loaded.policies), len(loaded.refused)
            _LOG.info("the configuration was read again: %d policies, %d refused", known, refused)
            self._systemd.status(duties.status())
        finally:
            self._systemd.ready()

    def _exchange_observers(self, settings: Settings) -> None:
        # First closed: the new ones may listen where the old ones do.
        self._close_observers()
        try:
            self._start_observers(settings, self._open_world(settings))
        except VmsnapError as error:
            self._close_observers()
            _LOG.error("after the reload: %s%s", error.brief, f" {error.remedy}" if error.remedy else "")

    def _wind_down(self, duties: Duties, *, alarm: Alarm) -> None:
        """Let what goes on finish or undo itself. Raises CleanupError where that takes longer than the settings allow."""
        self._systemd.stopping()
        duties.stop()
        deadline = time.monotonic() + duties.loaded.settings.daemon.stop_deadline.total_seconds()
        said = ""
        while duties.going:
            status = f"stopping: waiting for {', '.join(duties.going)}"
            if status != said:
                _LOG.info("%s", status)
                said = status
            self._systemd.status(status)
            self._systemd.alive()
            if time.monotonic() > deadline:
                causes = [DriverError(f"{name} did not end") for name in duties.going]
                raise CleanupError("the daemon stopped before everything had ended", causes=causes)
            alarm.wait(timedelta(seconds=1))
            duties.take_news()

    def _start_observers(self, settings: Settings, world: World) -> None:
        self._observers = tuple(self._open_observers(settings, world))
        for observer in self._observers:
            observer.start()

    def _close_observers(self) -> None:
        observers, self._observers = self._observers, ()
        for observer in observers:
            try:
                observer.close()
            except Exception:  # noqa: BLE001 - the others are to be closed too
                _LOG.exception("%s did not end in order", type(observer).__name__)


def _say_refused(loaded: Loaded) -> None:
    for refused in loaded.refused:
        kept = "; what it said before stays" if refused.kept else ""
        remedy = f" What to do: {refused.error.remedy}" if refused.error.remedy else ""
        _LOG.error("refused %s: %s%s.%s", refused.path, refused.error.brief, kept, remedy)
