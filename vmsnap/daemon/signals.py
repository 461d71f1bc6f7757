"""Signals and the ends of work as something the loop can wait for."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from types import FrameType


class Alarm:
    """Wakes the loop. ``ring`` may be called from any thread and from signal handlers."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def ring(self) -> None:
        """Wake the loop, or let its next wait end at once."""
        with contextlib.suppress(BlockingIOError):  # full: it is awake already
            os.write(self._write, b"!")

    def wait(self, limit: timedelta) -> None:
        """Wait until somebody rings, at most that long."""
        if select.select([self._read], [], [], max(0.0, limit.total_seconds()))[0]:
            with contextlib.suppress(BlockingIOError):
                while os.read(self._read, 4096):
                    pass

    def close(self) -> None:
        """Give back what it holds. Nobody may ring any more."""
        os.close(self._read)
        os.close(self._write)


@contextlib.contextmanager
def handled(handlers: Mapping[signal.Signals, Callable[[], None]], *, alarm: Alarm) -> Iterator[None]:
    """Call a handler at each of its signals, then ring. The old handlers are back afterwards. Main thread only."""

    def handle(number: int, _frame: FrameType | None) -> None:
        handlers[signal.Signals(number)]()
        alarm.ring()

    before = {number: signal.signal(number, handle) for number in handlers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
