"""Signals become an event that steps poll, so that clean-up always runs to its end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from vmsnap.errors import CancelledError

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class SignalCancel:
    """The port ``Cancel``. Set by the first signal; later ones change nothing."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._signal = ""

    def is_set(self) -> bool:
        """Tell whether the run shall stop."""
        return self._event.is_set()

    def check(self) -> None:
        """Raise CancelledError where the run shall stop."""
        if self._event.is_set():
            raise CancelledError(
                f"stopped by {self._signal}; what the run had made was undone", remedy="run the command again"
            )

    def set(self, signal_name: str) -> None:
        """Ask the run to stop."""
        self._signal = self._signal or signal_name
        self._event.set()


@contextmanager
def cancelled_by_signals(*, announce: Callable[[], None]) -> Iterator[SignalCancel]:
    """Give the body a Cancel that SIGINT, SIGTERM and SIGHUP set. ``announce`` is called at the first of them.

    Signals that are ignored (nohup) stay ignored. The old handlers are back afterwards. Main thread only.
    """
    cancel = SignalCancel()

    def handle(number: int, _frame: FrameType | None) -> None:
        first = not cancel.is_set()
        cancel.set(signal.Signals(number).name)
        if first:
            announce()

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    taken = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    for number in taken:
        signal.signal(number, handle)
    try:
        yield cancel
    finally:
        for number in taken:
            signal.signal(number, before[number])
