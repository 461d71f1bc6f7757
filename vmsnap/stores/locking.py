"""Locks on a guest's snapshots, which end with their process: flock(2) on STORE/GUEST/.lock."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from vmsnap.errors import BusyError
from vmsnap.stores.layout import disk_failure

_POLL_SECONDS = 0.05


@contextmanager
def locked(path: Path, *, guest: str, timeout: timedelta) -> Iterator[None]:
    """Hold the lock, waiting at most ``timeout`` for it. Raises BusyError that names the process, DriverError."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise disk_failure(error, doing=f"open the lock {path}") from error
    try:
        end = time.monotonic() + timeout.total_seconds()
        while not _take(descriptor):
            if time.monotonic() >= end:
                holder = os.pread(descriptor, 64, 0).decode("ascii", "replace").strip() or "unknown"
                raise BusyError(
                    f"process {holder} publishes or removes snapshots of {guest!r} now",
                    remedy="try again when it is done",
                )
            time.sleep(_POLL_SECONDS)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
