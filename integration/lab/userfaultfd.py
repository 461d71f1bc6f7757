"""Letting QEMU watch its guests' memory (userfaultfd), which background snapshots need.

QEMU before 8.0 needs the host's setting `vm.unprivileged_userfaultfd`, of which there is one for the whole host, labs beside this
one included. So whoever comes first notes what it was, and whoever leaves last gives it back. Who was killed is not counted: the
notes are kept under a lock that ends with its process.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SETTING = Path("/proc/sys/vm/unprivileged_userfaultfd")
_NOTE = Path("/var/tmp/vmsnap-userfaultfd.note")


@contextmanager
def allowed() -> Iterator[None]:
    """Allow it while the block runs."""
    note = os.open(_NOTE, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    try:
        # A note that is there already is of somebody who was killed: the setting may still be theirs.
        if _is_alone(note) and not os.pread(note, 8, 0):
            os.pwrite(note, SETTING.read_bytes(), 0)
        fcntl.flock(note, fcntl.LOCK_SH)
        SETTING.write_text("1")
        yield
    finally:
        if _is_alone(note):
            SETTING.write_bytes(os.pread(note, 8, 0))
            os.ftruncate(note, 0)
        os.close(note)


def _is_alone(note: int) -> bool:
    try:
        fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
