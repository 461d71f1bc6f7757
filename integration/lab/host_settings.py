"""Settings of the host that a lab changes while it runs, and gives back.

There is one of each for the whole host, labs beside this one included. So whoever comes first notes what it was, and whoever
leaves last gives it back. Who was killed is not counted: who is there is known by locks, which end with their processes.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

_FOLDER = Path("/var/tmp")


@dataclass(frozen=True)
class Setting:
    """One setting: a name for the notes, the kernel's file, and what a lab needs in it, or would like to have."""

    name: str
    path: Path
    value: str
    is_needed: bool = True

    @property
    def note(self) -> Path:
        return _FOLDER / f"vmsnap-{self.name}.note"

    @property
    def door(self) -> Path:
        return _FOLDER / f"vmsnap-{self.name}.lock"


# QEMU before 8.0 needs it to watch its guests' memory, which background snapshots do.
USERFAULTFD = Setting("userfaultfd", Path("/proc/sys/vm/unprivileged_userfaultfd"), "1")
# On a host that is a VM itself: a host that gives each freed page back to its own host, and has to ask for it again, copies
# guests several times slower. No order is this large, so nothing is given back meanwhile.
MEMORY_KEPT = Setting("page-reporting", Path("/sys/module/page_reporting/parameters/page_reporting_order"), "11", False)
# Pages of 2 MiB that are set aside for guests.
HUGE_PAGES = Setting("huge-pages", Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"), "0")


def more_huge_pages(count: int) -> Setting:
    """Return the setting with so many more than there are now."""
    return replace(HUGE_PAGES, value=str(int(HUGE_PAGES.path.read_text()) + count))


@contextmanager
def lent(setting: Setting) -> Iterator[None]:
    """Have the setting while the block runs. Where the kernel does not have it, nothing is done."""
    if not setting.path.exists():
        yield
        return
    with _opened(setting.note) as note:
        with _door(setting):
            # A note that is there already is of somebody who was killed: the setting may still be theirs.
            if _is_alone(note) and not os.pread(note, 8, 0):
                os.pwrite(note, setting.path.read_bytes(), 0)
            fcntl.flock(note, fcntl.LOCK_SH)
            with nullcontext() if setting.is_needed else suppress(OSError):
                setting.path.write_text(setting.value)
        try:
            yield
        finally:
            with _door(setting):
                _give_back(setting, note)


def value_of(setting: Setting) -> str | None:
    """Return what the setting is now; None where the kernel does not have it."""
    return setting.path.read_text().strip() if setting.path.exists() else None


def give_back_all() -> None:
    """Give back what the killed left changed, where nobody else needs it. Repeatable."""
    for setting in (USERFAULTFD, MEMORY_KEPT, HUGE_PAGES):
        if setting.note.exists():
            with _opened(setting.note) as note, _door(setting):
                _give_back(setting, note)


def _give_back(setting: Setting, note: int) -> None:
    if _is_alone(note) and (before := os.pread(note, 8, 0)):
        setting.path.write_bytes(before)
        os.ftruncate(note, 0)


@contextmanager
def _door(setting: Setting) -> Iterator[None]:
    """Let one at a time come or go: a lock that changes its kind is let go of in between (flock(2))."""
    with _opened(setting.door) as door:
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
