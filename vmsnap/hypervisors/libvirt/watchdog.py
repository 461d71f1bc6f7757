"""A process of its own that lets a guest go on where nobody else does: its agent died, or hangs, while the guest is paused.

It is started before the capture, and told at its end (a line on its standard input) that it is not needed any more. Where
that input ends without the line, the agent is dead. It ends by itself in any case. A pause that libvirt puts down to its
operator is none of its business, but for one that the agent claims beforehand, until the agent says that it is over.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import libvirt

from vmsnap.errors import DriverError, VmsnapError
from vmsnap.hypervisors.libvirt import processes
from vmsnap.hypervisors.libvirt.outliving import outlive, outliving
from vmsnap.hypervisors.libvirt.stopped import StoppedHere
from vmsnap.model.ids import RunId

_DONE = b"done\n"
_CLAIM = b"claim\n"
_OVER = b"over\n"
_ARMED = "armed\n"
_START_SECONDS = 20.0
_POLL_SECONDS = 0.25
_ORPHAN_POLL_SECONDS = 0.05
# How long after the agent's death a request that it sent last may still come into effect.
_LINGER_SECONDS = 15.0
_GIVE_UP_SECONDS = 600.0
_ABORT_SECONDS = 1.0
# Pauses that are a capture's; an operator's has the reason 'user' and is left alone unless it is claimed.
_OURS = (libvirt.VIR_DOMAIN_PAUSED_UNKNOWN, libvirt.VIR_DOMAIN_PAUSED_SNAPSHOT, libvirt.VIR_DOMAIN_PAUSED_SAVE)


class Watchdog:
    """The agent's end: the process watches over one guest while the block runs.

    ``folder`` is the place of the run's memory image, in the run's own. Once it is gone, the run was undone, and the guest is
    what its next run makes of it.
    """

    def __init__(self, uri: str, *, uuid: str, limit_seconds: float, folder: Path) -> None:
        self._argv = (sys.executable, "-m", __name__, uri, uuid, str(limit_seconds), str(folder))
        self._stopped = StoppedHere(folder.parent)
        self._process: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int:
        """Return its process id, 0 where it was not started."""
        return 0 if self._process is None else self._process.pid

    def __enter__(self) -> Self:
        """Start it and wait until it watches. Raises DriverError where it does not come to that."""
        self._process = subprocess.Popen(
            outliving(self._argv, what="watchdog of a guest"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            cwd="/",
        )
        said = ""
        assert self._process.stdout is not None  # noqa: S101 - it is a pipe
        if select.select([self._process.stdout], [], [], _START_SECONDS)[0]:
            said = self._process.stdout.readline()
        if said != _ARMED:
            self._process.kill()
            self._close()
            raise DriverError(
                "the watchdog that lets the guest go on did not start, so the guest is not stopped",
                remedy="try 'python3 -m vmsnap.hypervisors.libvirt.watchdog' by hand",
            )
        return self

    def claim_next_pause(self) -> None:
        """Say, and note, that the next pause with the reason 'user' is this process's. Raises DriverError."""
        try:
            self._say(_CLAIM)
        except OSError as error:
            raise DriverError(
                "the watchdog that lets the guest go on is gone, so the guest is not stopped", remedy="start a new run"
            ) from error
        self._stopped.note()

    def pause_is_over(self) -> None:
        """Say, and note, that the claimed pause is over: from now on the reason 'user' means the operator again.

        May be repeated. Raises DriverError where that cannot be noted.
        """
        self._stopped.over()
        with contextlib.suppress(OSError):
            self._say(_OVER)

    def _say(self, word: bytes) -> None:
        assert self._process is not None  # noqa: S101 - only in the block
        assert self._process.stdin is not None  # noqa: S101 - it is a pipe
        self._process.stdin.write(word.decode("ascii"))
        self._process.stdin.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is None or self._process.stdin is None:
            return
        with contextlib.suppress(OSError):
            self._say(_DONE)
        try:
            self._process.wait(timeout=_START_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._close()

    def _close(self) -> None:
        if self._process is None:
            return
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self._process.wait()


class Finder:
    """Finds one domain by its UUID, over a connection that is opened again where it broke."""

    def __init__(self, uri: str, *, uuid: str) -> None:
        self._uri = uri
        self._uuid = uuid
        self._connection: Any = None

    def __call__(self) -> Any | None:
        """Return the domain, None where there is none. Raises libvirtError where that cannot be told now."""
        try:
            if self._connection is None:
                self._connection = libvirt.open(self._uri)
            return self._connection.lookupByUUIDString(self._uuid)
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return None
            self._connection = None
            raise


class Guardian:
    """The other end. ``look`` is called over and over until it returns False. ``folder`` is as for ``Watchdog``.

    ``is_capturing`` tells whether a snapshot that goes on is the run's: the agent may have died waiting for another's to end.
    """

    def __init__(
        self,
        find: Callable[[], Any | None],
        *,
        limit_seconds: float,
        folder: Path,
        is_capturing: Callable[[], bool] = lambda: True,
    ) -> None:
        self._find = find
        self._is_capturing = is_capturing
        self._limit_seconds = limit_seconds
        self._folder = folder
        self._paused_since: float | None = None
        self._orphaned_at: float | None = None
        self._aborted_at: float | None = None
        self._claimed = False

    def claimed(self, *, now_on: bool) -> None:
        """Note whether a pause with the reason 'user' is the agent's from now on."""
        self._claimed = now_on

    def orphaned(self, *, now: float) -> None:
        """Note that the agent is dead."""
        self._orphaned_at = now

    def look(self, *, now: float) -> bool:
        """Look at the guest once, and let it go on where it must. Returns whether there is anything left to watch."""
        if self._orphaned_at is not None and not self._folder.exists():
            return False
        try:
            domain = self._find()
            if domain is None or not domain.isActive():
                return False
            # What jobs there are is asked QEMU, and only where it matters: a capture goes on beside this.
            busy = self._orphaned_at is not None and self._end_capture(domain, now=now)
            if not busy:
                self._let_go_on(domain, now=now)
        except libvirt.libvirtError:
            # libvirtd may just be starting again.
            busy = self._orphaned_at is None or now - self._orphaned_at < _GIVE_UP_SECONDS
        return busy or self._orphaned_at is None or now - self._orphaned_at < _LINGER_SECONDS

    def _end_capture(self, domain: Any, *, now: float) -> bool:
        """Abort a capture that a dead agent began; tell whether a job still runs."""
        if domain.jobInfo()[0] == libvirt.VIR_DOMAIN_JOB_NONE:
            return False
        if self._aborted_at is None or now - self._aborted_at > _ABORT_SECONDS:
            self._aborted_at = now
            operation = domain.jobStats().get("operation")
            if operation == libvirt.VIR_DOMAIN_JOB_OPERATION_SNAPSHOT and self._is_capturing():
                domain.abortJob()
        return True

    def _let_go_on(self, domain: Any, *, now: float) -> None:
        state, reason = domain.state()
        is_claimed = self._claimed and reason == libvirt.VIR_DOMAIN_PAUSED_USER
        left = state == libvirt.VIR_DOMAIN_PAUSED and (reason in _OURS or is_claimed)
        if not left or domain.jobInfo()[0] != libvirt.VIR_DOMAIN_JOB_NONE:
            self._paused_since = None
            return
        if self._paused_since is None:
            self._paused_since = now
        if self._orphaned_at is not None or now - self._paused_since > self._limit_seconds:
            domain.resume()
            # The next one is somebody else's.
            self._claimed = False
            if is_claimed:
                with contextlib.suppress(VmsnapError):
                    StoppedHere(self._folder.parent).over()


def _watch(uri: str, uuid: str, limit_seconds: float, folder: Path) -> None:
    outlive()
    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    find = Finder(uri, uuid=uuid)
    if find() is None:
        return
    run = RunId(folder.parent.name)
    guardian = Guardian(
        find, limit_seconds=limit_seconds, folder=folder, is_capturing=lambda: processes.is_written_for(run)
    )
    sys.stdout.write(_ARMED)
    sys.stdout.flush()
    standard_input, listening = sys.stdin.fileno(), True
    while True:
        if listening and select.select([standard_input], [], [], _POLL_SECONDS)[0]:
            said = os.read(standard_input, 64)
            if _DONE in said:
                return
            for word in said.splitlines(keepends=True):
                guardian.claimed(now_on=word == _CLAIM)
            if not said:
                listening = False
                guardian.orphaned(now=time.monotonic())
        elif not listening:
            time.sleep(_ORPHAN_POLL_SECONDS)
        if not guardian.look(now=time.monotonic()):
            return


if __name__ == "__main__":
    _watch(sys.argv[1], sys.argv[2], float(sys.argv[3]), Path(sys.argv[4]))
