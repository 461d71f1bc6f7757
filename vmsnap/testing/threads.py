"""Seeing that a thing ends the threads it began."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_PATIENCE_SECONDS = 5.0


@contextmanager
def no_thread_left() -> Iterator[None]:
    """Fail where a thread that began inside the block is alive, a few seconds after it. Threads of others may end meanwhile."""
    before = set(threading.enumerate())
    yield
    until = time.monotonic() + _PATIENCE_SECONDS
    while left := set(threading.enumerate()) - before:
        assert time.monotonic() < until, f"these threads still run: {left}"  # noqa: S101 - part of tests
        time.sleep(0.01)
