"""Scripts whose client dies while they run: the host knows nothing of that, and does the rest of them some time later."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from datetime import timedelta

from vmsnap.hypervisors.hyperv.connection import Parameter, Row
from vmsnap.ports.clock import Cancel
from vmsnap.testing.hyperv.failures import CmdletError
from vmsnap.testing.hyperv.machine import HyperVHost
from vmsnap.testing.hyperv.running import TwinRunner, run_twin

_PATIENCE_SECONDS = 20.0


class Orphanage:
    """Stops the script that comes to a place, counted from 0, until ``let_go``. Install it once on a host.

    ``place`` is the name of that place, once it was come to. A place is where a cmdlet that changes something begins, or one
    within an operation of the host.
    """

    def __init__(self, machine: HyperVHost, *, number: int) -> None:
        self._machine = machine
        self._number = number
        self._passed = 0
        self._free = False
        self._thread: threading.Thread | None = None
        self.place = ""
        machine.entering = machine.between = self.pass_by

    def pass_by(self, place: str) -> None:
        """Pass a place of a script that runs in a thread of its own."""
        if not isinstance(threading.current_thread(), _ScriptThread):
            return
        self._passed += 1
        if self._passed == self._number + 1:
            self.place, self._thread = place, threading.current_thread()
            self._machine.turn.wait_for(lambda: self._free, timeout=_PATIENCE_SECONDS)

    def has(self, thread: threading.Thread) -> bool:
        """Tell whether a script's thread waits here."""
        return self._thread is thread and not self._free

    def let_go(self) -> None:
        """Let the script go on, and wait for its end."""
        with self._machine.turn:
            self._free = True
            self._machine.turn.notify_all()
        if self._thread is not None:
            self._thread.join(_PATIENCE_SECONDS)


class _ScriptThread(threading.Thread):
    """A script in the host."""

    def __init__(self, work: Callable[[], list[Row]]) -> None:
        super().__init__(name="script", daemon=True)
        self._work = work
        self.rows: list[Row] = []
        self.error: CmdletError | None = None

    def run(self) -> None:
        """Run the script to its end."""
        try:
            self.rows = self._work()
        except CmdletError as error:
            self.error = error


class OrphaningRunner(TwinRunner):
    """``TwinRunner`` whose scripts run in threads of the host. ``died`` is called where a script was left alone."""

    def __init__(self, host: HyperVHost, *, orphanage: Orphanage, died: Callable[[], None]) -> None:
        super().__init__(host)
        self._orphanage = orphanage
        self._died = died

    def run(
        self,
        name: str,
        *,
        doing: str,
        parameters: Mapping[str, Parameter] | None = None,
        timeout: timedelta = timedelta(minutes=2),
        cancel: Cancel | None = None,
    ) -> tuple[Row, ...]:
        """Run a script; see ``TwinRunner.run``."""
        del timeout, cancel
        thread = _ScriptThread(lambda: list(run_twin(self.host, name, values=dict(parameters or {}))))
        thread.start()
        while thread.is_alive() and not self._orphanage.has(thread):
            thread.join(0.001)
        if thread.is_alive() and self._orphanage.has(thread):
            self._died()
        thread.join()
        if thread.error is not None:
            raise self.translated(thread.error, doing=doing)
        return tuple(thread.rows)
