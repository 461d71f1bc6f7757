"""A clone that libvirt makes of a stream which has not begun yet: it waits, loaded with nothing, before its source is stopped.

libvirt restores from a FIFO whose header vmsnap writes. The first bytes of every stream of QEMU follow it: when they are
gone from the FIFO, the clone's QEMU is reading.
"""

from __future__ import annotations

import array
import fcntl
import os
import termios
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import libvirt

from vmsnap.errors import DeadlineError, DriverError, VmsnapError
from vmsnap.hypervisors.libvirt import memory
from vmsnap.hypervisors.libvirt.connection import Connection, translate
from vmsnap.hypervisors.libvirt.processes import FirstToDie
from vmsnap.hypervisors.libvirt.relay import PIPE_BYTES, STREAM_BEGIN
from vmsnap.hypervisors.libvirt.tools import translated_os
from vmsnap.ports.clock import Cancel

_POLL_SECONDS = 0.005
_GIVE_UP_SECONDS = 30
_WAKE_SECONDS = 0.1


class CloneReceiver:
    """One clone in the making. Leave the block to give it up, unless it is complete: then it stays, paused."""

    def __init__(self, connection: Connection, *, clone: str, fifo: Path, header: bytes) -> None:
        # libvirt 9.0 answers other threads up to a keepalive interval late while one waits in a long call: a lost wake-up.
        self._connection = Connection(connection.uri)
        self._clone = clone
        self._fifo = fifo
        self._header = header
        self._error: VmsnapError | None = None
        self._reader: int | None = None
        self._sink: int | None = None
        self._thread = threading.Thread(target=self._restore, name="vmsnap-receiver", daemon=True)

    def __enter__(self) -> Self:
        """Let libvirt begin. Raises PreconditionError, DriverError."""
        with translated_os(f"make {self._fifo}"):
            os.mkfifo(self._fifo, 0o600)
            # Until the clone has its end, this is one: a FIFO without a reader takes nothing.
            self._reader = os.open(self._fifo, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            self._sink = os.open(self._fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            fcntl.fcntl(self._sink, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            begin = self._header + STREAM_BEGIN
            if os.write(self._sink, begin) < len(begin):
                raise DriverError(f"the guest's definition does not fit into a pipe of {PIPE_BYTES} bytes")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close_ends()
        if error is not None:
            self._wait_given_up()
        self._fifo.unlink(missing_ok=True)

    def _wait_given_up(self) -> None:
        """Wait until libvirt has given up: the stream has ended for it, early, and it takes the clone away by itself."""
        until = time.monotonic() + _GIVE_UP_SECONDS
        while self._thread.is_alive() and time.monotonic() < until:
            # It may not have opened the FIFO yet, and would wait there.
            memory.wake(self._fifo)
            self._thread.join(timeout=_WAKE_SECONDS)

    @property
    def sink(self) -> int:
        """Return the end that the stream is written to."""
        assert self._sink is not None  # noqa: S101 - only in the block
        return self._sink

    def wait_until_it_reads(self, *, timeout_seconds: float, cancel: Cancel) -> None:
        """Wait until the clone's QEMU reads the stream. Raises DeadlineError, CancelledError, and what libvirt says."""
        until = time.monotonic() + timeout_seconds
        while _unread_bytes(self.sink):
            self.require_alive()
            cancel.check()
            if time.monotonic() > until:
                raise DeadlineError(
                    f"the clone was not ready within {timeout_seconds:.0f} s; the guest was not stopped",
                    remedy="capture at a quieter time, or see the clone's log in /var/log/libvirt/qemu",
                )
            time.sleep(_POLL_SECONDS)
        # From here on only the clone reads: the writer learns at once when it dies.
        self._close_reader()

    def require_alive(self) -> None:
        """Raise what libvirt said, where it gave up on the clone."""
        if not self._thread.is_alive() and self._error is not None:
            raise self._error

    def close_ends(self) -> None:
        """Close both ends of the FIFO that are held here."""
        self._close_reader()
        if self._sink is not None:
            os.close(self._sink)
            self._sink = None

    def wait_complete(self, *, timeout_seconds: float) -> None:
        """Wait until libvirt has the clone complete and paused. Raises DeadlineError, and what libvirt says."""
        self._thread.join(timeout=timeout_seconds)
        if self._thread.is_alive():
            raise DeadlineError(
                f"the clone was not loaded within {timeout_seconds:.0f} s of the end of its stream",
                remedy="see the clone's log in /var/log/libvirt/qemu",
            )
        self.require_alive()

    def _close_reader(self) -> None:
        if self._reader is not None:
            os.close(self._reader)
            self._reader = None

    def _restore(self) -> None:
        try:
            with FirstToDie(self._clone) as doomed:
                self._connection.get().restoreFlags(str(self._fifo), None, libvirt.VIR_DOMAIN_SAVE_PAUSED)
                doomed.require_done()
        except libvirt.libvirtError as error:
            self._error = translate(error, doing="make the clone of the stream")
        except VmsnapError as error:
            self._error = error
        finally:
            self._connection.close()


def _unread_bytes(descriptor: int) -> int:
    """Return how many bytes are in a pipe."""
    count = array.array("i", [0])
    fcntl.ioctl(descriptor, termios.FIONREAD, count)
    return count[0]
