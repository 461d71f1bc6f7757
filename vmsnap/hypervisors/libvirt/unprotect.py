"""Letting a guest go on that waits for a background snapshot which has failed.

QEMU 7.2 leaves the guest's memory protected when its stream is cut, and whoever waits then for a page to be saved, a vCPU or
the main thread, waits for ever. So the protection is taken off from outside, through QEMU's own userfaultfd (Linux,
Documentation/admin-guide/mm/userfaultfd.rst; pidfd_getfd(2)), as long as the snapshot's thread is there, which may protect
more. Then the memory is unregistered: QEMU 7.2 keeps the userfaultfd open, and would refuse every later background snapshot.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_PIDFD_GETFD = 438  # the same number on every architecture
_USERFAULTFD = "anon_inode:[userfaultfd]"
# linux/userfaultfd.h: _IOWR(0xAA, 0x06, struct uffdio_writeprotect). Mode 0 takes protection off, and wakes who waits.
_WRITEPROTECT = 0xC018AA06
_WRITEPROTECT_RANGE = struct.Struct("QQQ")
# _IOR(0xAA, 0x01, struct uffdio_range)
_UNREGISTER = 0x8010AA01
_RANGE = struct.Struct("QQ")
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")
_PROTECTED = "uw"
_POLL_SECONDS = 0.02
# What QEMU calls the snapshot's thread: until 9.0, and since (migration/migration.h).
_THREADS = ("bg_snapshot", "mig/snapshot")
_libc = ctypes.CDLL(None, use_errno=True)


def is_permitted() -> bool:
    """Tell whether this process may use what it takes: a service's filter of system calls may forbid it."""
    process = os.pidfd_open(os.getpid())
    try:
        copy = _libc.syscall(_PIDFD_GETFD, process, process, 0)
        if copy >= 0:
            os.close(copy)
    finally:
        os.close(process)
    return bool(copy >= 0)


def is_left_open(pid: int) -> bool:
    """Tell whether QEMU takes no snapshot and holds a userfaultfd, as it does after one that failed. Raises PermissionError."""
    return not _takes_a_snapshot(pid) and bool(_userfaultfds(pid))


def let_go_on(pid: int, *, seconds: float) -> bool:
    """Take the protection off until no snapshot goes on and none is left. Returns whether it came to that in time.

    One that has not protected anything yet may still do so, and then fail; its thread tells.
    Whatever snapshot of its memory goes on is spoiled by it. May be repeated. Raises OSError where it is not permitted.
    """
    until = time.monotonic() + seconds
    while True:
        busy, descriptors = _takes_a_snapshot(pid), _userfaultfds(pid)
        # The kernel has to walk all of the guest's memory for its ranges, so they are asked for last.
        if not busy and not (descriptors and any(_protected(pid))):
            return True
        _take_off(pid, descriptors, for_good=not busy)
        if time.monotonic() > until:
            return False
        time.sleep(_POLL_SECONDS)


def _userfaultfds(pid: int) -> list[int]:
    found = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                if str(entry.readlink()) == _USERFAULTFD:
                    found.append(int(entry.name))
    return found


def _takes_a_snapshot(pid: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):
                if (task / "comm").read_text(encoding="utf-8", errors="replace").strip() in _THREADS:
                    return True
    return False


def _take_off(pid: int, descriptors: list[int], *, for_good: bool) -> None:
    with suppress(FileNotFoundError, ProcessLookupError):
        process = os.pidfd_open(pid)
        try:
            for descriptor in descriptors:
                copy = _libc.syscall(_PIDFD_GETFD, process, descriptor, 0)
                if copy < 0:
                    if ctypes.get_errno() == errno.EPERM:
                        raise PermissionError(errno.EPERM, "pidfd_getfd is not permitted")
                    # It was closed meanwhile, or the process is gone; the next look will tell.
                    continue
                try:
                    for start, end in _protected(pid):
                        # A range of another userfaultfd, or one that is gone meanwhile, is refused.
                        with suppress(OSError):
                            # First, because unregistering does not wake who waits to write (fs/userfaultfd.c).
                            fcntl.ioctl(copy, _WRITEPROTECT, _WRITEPROTECT_RANGE.pack(start, end - start, 0))
                            if for_good:
                                fcntl.ioctl(copy, _UNREGISTER, _RANGE.pack(start, end - start))
                finally:
                    os.close(copy)
        finally:
            os.close(process)


def _protected(pid: int) -> Iterator[tuple[int, int]]:
    """Return the ranges of a process' memory whose writing is watched (proc(5), smaps); none of one that is gone."""
    start = end = 0
    try:
        text = Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return
    for line in text.splitlines():
        if mapping := _MAPPING.match(line):
            start, end = int(mapping[1], 16), int(mapping[2], 16)
        elif line.startswith("VmFlags:") and _PROTECTED in line.split():
            yield start, end
