"""Letting QEMU watch its guests' memory (userfaultfd), which background snapshots need.

QEMU before 8.0 needs the host's setting `vm.unprivileged_userfaultfd`, of which there is one for the whole host, labs beside this
one included. So whoever comes first notes what it was, and whoever leaves last gives it back. Who was killed is not counted: who
is there is known by locks, which end with their processes.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SETTING = Path("/proc/sys/vm/unprivileged_userfaultfd")
_NOTE = Path("/var/tmp/vmsnap-userfaultfd.note")
_DOOR = Path("/var/tmp/vmsnap-userfaultfd.lock")


@contextmanager
def allowed() -> Iterator[None]:
    """Allow it while the block runs."""
    with _opened(_NOTE) as note:
        with _door():
            # A note that is there already is of somebody who was killed: the setting may still be theirs.
            if _is_alone(note) and not os.pread(note, 8, 0):
                os.pwrite(note, SETTING.read_bytes(), 0)
            fcntl.flock(note, fcntl.LOCK_SH)
            SETTING.write_text("1")
        try:
            yield
        finally:
            with _door():
                if _is_alone(note):
                    SETTING.write_bytes(os.pread(note, 8, 0))
                    os.ftruncate(note, 0)


@contextmanager
def _door() -> Iterator[None]:
    """Let one at a time come or go: a lock that changes its kind is let go of in between (flock(2))."""
    with _opened(_DOOR) as door:
        fcntl.flock(door, fcntl.LOCK_EX)
        yield


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _is_alone(note: int) -> bool:
    try:
        fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
