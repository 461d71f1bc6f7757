"""What a run takes of the host's memory beside the guest, looked at all the while: its memory images and its clones.

    with MemoryUse() as use:
        ... back up ...
    print(use.peak.total_bytes, use.peak.images_bytes, use.peak.clones_bytes)

Images are what the run's tmpfs occupies; clones are the resident sets of the QEMU processes whose names are clones'. The
pipe between them holds a megabyte more.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

RUNTIME = Path("/run/vmsnap")
PID_FILES = Path("/run/libvirt/qemu")
CLONES = "vmsnap-clone-*.pid"
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Use:
    """One look. ``at_s`` counts from the beginning of the block."""

    at_s: float
    images_bytes: int
    clones_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.images_bytes + self.clones_bytes


class MemoryUse:
    """Looks every ``interval_s`` while the block runs. ``runtime`` is the folder of vmsnap's memory images."""

    def __init__(self, *, runtime: Path = RUNTIME, interval_s: float = 0.01) -> None:
        self._runtime = runtime
        self._interval_s = interval_s
        self._began = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-use", daemon=True)
        self.seen: list[Use] = []

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def peak(self) -> Use:
        """The look at which images and clones together were largest."""
        return max(self.seen, key=lambda use: use.total_bytes)

    def _watch(self) -> None:
        while True:
            at_s = time.monotonic() - self._began
            images = sum(_used_bytes(folder) for folder in self._runtime.glob("*/memory"))
            clones = sum(resident_bytes(pid) for pid in clone_pids())
            self.seen.append(Use(at_s=at_s, images_bytes=images, clones_bytes=clones))
            if self._stop.wait(self._interval_s):
                return


def clone_pids() -> Iterator[int]:
    """The QEMU processes of all clones, by the files in which libvirt keeps their ids."""
    for path in PID_FILES.glob(CLONES):
        try:
            yield int(path.read_text())
        except (OSError, ValueError):
            continue  # it ended, or is just beginning


def resident_bytes(pid: int) -> int:
    """The resident set of a process (proc(5), statm); 0 once it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError):
        return 0


def _used_bytes(folder: Path) -> int:
    """What a tmpfs holds; 0 where the folder is none (yet), or gone."""
    try:
        if not os.path.ismount(folder):
            return 0
        status = os.statvfs(folder)
    except OSError:
        return 0
    return (status.f_blocks - status.f_bfree) * status.f_frsize
