"""Passing a guest's memory stream to its clone: a process of its own, between two pipes.

While a background snapshot goes on, QEMU saves each page before the guest may change it, so the guest waits for whoever
reads the stream. Therefore nothing that can be stopped stands in the way: the relay is not in the terminal's process
group, nor in its service's control group, does nothing else, copies nothing (``splice``), and cuts the stream when the clone
takes nothing for a while, or when whoever started the relay is gone. It lets the guest go on then (``unprotect``).

It also holds the stream back until it is told to let it flow. The stream's first eight bytes are the same in every stream
(QEMU's migration/savevm.h: magic and version); the clone was given them before, to see that it reads. So they are only looked
at here, and left out.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Sequence
from contextlib import suppress
from enum import IntEnum

from vmsnap.hypervisors.libvirt import unprotect
from vmsnap.hypervisors.libvirt.outliving import outlive

STREAM_BEGIN = b"QEVM\x00\x00\x00\x03"
READY = b"r"
OPEN = b"o"
PIPE_BYTES = 1 << 20  # what a pipe may hold by default, /proc/sys/fs/pipe-max-size
LET_GO_SECONDS = 15
_URGENCY = -10


class End(IntEnum):
    """How a relay ended, as its exit status."""

    SOURCE_ENDED = 0
    ABANDONED = 10
    NO_READER = 11
    STALLED = 12
    NO_STREAM = 13


class Relay:
    """Moves everything from ``source`` to ``sink`` once it is told to over standard input. They are file descriptors.

    It says on standard output that it is ready. ``held_bytes`` of filling come first from the source and are thrown away:
    they kept its writer waiting. ``stall_ms``: how long the sink may take nothing.
    """

    def __init__(self, *, source: int, sink: int, held_bytes: int, stall_ms: int) -> None:
        self._source = source
        self._sink = sink
        self._control = sys.stdin.fileno()
        self._told = sys.stdout.fileno()
        self._held_bytes = held_bytes
        self._stall_ms = stall_ms

    def run(self) -> End:
        """Wait for the word, then relay to the end."""
        for descriptor in (self._source, self._sink):
            os.set_blocking(descriptor, False)
        os.write(self._told, READY)
        if os.read(self._control, 1) != OPEN:
            return End.ABANDONED
        if self._take(self._held_bytes) is None:
            return End.ABANDONED
        begin = self._take(len(STREAM_BEGIN))
        if begin != STREAM_BEGIN:
            return End.NO_STREAM if begin is not None else End.ABANDONED
        return self._relay()

    def _take(self, size: int) -> bytes | None:
        """Read exactly so much from the source, less at its end; None where the starter is gone meanwhile."""
        taken = b""
        while len(taken) < size:
            if not self._wait(self._source, select.POLLIN, None):
                return None
            piece = os.read(self._source, size - len(taken))
            if not piece:
                break
            taken += piece
        return taken

    def _relay(self) -> End:
        while True:
            if not self._wait(self._source, select.POLLIN, None):
                return End.ABANDONED
            try:
                if os.splice(self._source, self._sink, PIPE_BYTES, flags=os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK) == 0:
                    return End.SOURCE_ENDED
            except BrokenPipeError:
                # splice(2) looks for readers first: a clone that has taken everything may be done before its source says so.
                return End.NO_READER if os.read(self._source, 1) else End.SOURCE_ENDED
            except BlockingIOError:
                # The source has something, so the sink is full.
                ready = self._wait(self._sink, select.POLLOUT, self._stall_ms)
                if ready is not True:
                    return End.STALLED if ready is None else End.ABANDONED

    def _wait(self, descriptor: int, event: int, limit_ms: int | None) -> bool | None:
        """Wait for an event or the end of a pipe. False where the starter is gone, None where the time is up."""
        waiting = select.poll()
        waiting.register(descriptor, event)
        waiting.register(self._control, select.POLLIN)
        seen = dict(waiting.poll(limit_ms))
        if self._control in seen:
            return False
        return True if seen else None


def main(arguments: Sequence[str]) -> int:
    """Run one relay; the arguments are the numbers of ``Relay``, in its order."""
    source, sink, held_bytes, stall_ms, writer_pid = map(int, arguments)
    outlive()
    # For hosts under load: the guest would wait for the relay.
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, _URGENCY)
    end = Relay(source=source, sink=sink, held_bytes=held_bytes, stall_ms=stall_ms).run()
    if end is not End.SOURCE_ENDED:
        os.close(source)
        unprotect.let_go_on(writer_pid, seconds=LET_GO_SECONDS)
    return end


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
