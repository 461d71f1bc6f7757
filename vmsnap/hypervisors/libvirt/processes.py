"""QEMU processes on this host: which they are, what memory they take, and which goes first when the host runs short."""

from __future__ import annotations

import logging
import os
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from vmsnap.errors import DriverError
from vmsnap.model.ids import RunId

_LOG = logging.getLogger(__name__)
PID_FILES = Path("/run/libvirt/qemu")
CLONE_OOM_SCORE = 900
"""Of a thousand that the kernel adds to a process' share of memory, in percent times ten (proc(5), oom_score_adj)."""
_PATROL_SECONDS = 0.02


def pid_of(domain: str, *, pid_files: Path = PID_FILES) -> int | None:
    """Return the process of a domain, which libvirt writes down before QEMU is begun; None where there is none."""
    try:
        return int((pid_files / f"{domain}.pid").read_text())
    except (OSError, ValueError):
        return None


def resident_bytes(pid: int) -> int:
    """Return what a process holds of memory; 0 once it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def started_at(pid: int, *, proc: Path = Path("/proc")) -> float | None:
    """Return when a process was started, in seconds since the epoch, to a second (proc(5)); None once it is gone."""
    try:
        ticks = int((proc / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()[19])
        booted = next(line for line in (proc / "stat").read_text().splitlines() if line.startswith("btime "))
    except (OSError, IndexError, ValueError, StopIteration):
        return None
    return int(booted.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")


def is_written_for(run: RunId, *, proc: Path = Path("/proc")) -> bool:
    """Tell whether libvirt is writing a memory image of a run: its helper program is told the image's path."""
    wanted = f"/{run}/memory/".encode()
    for folder in proc.iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                program, *arguments = (folder / "cmdline").read_bytes().split(b"\0")
                if program.endswith(b"iohelper") and any(wanted in argument for argument in arguments):
                    return True
    return False


class FirstToDie:
    """Makes a clone's QEMU, from its beginning, what the kernel ends first when memory runs short.

    The clone is started by libvirtd while the block runs, and takes its memory meanwhile; so its process is looked for
    beside the caller. No other process is touched.
    """

    def __init__(self, domain: str, *, pid_files: Path = PID_FILES) -> None:
        self._domain = domain
        self._pid_files = pid_files
        self._over = threading.Event()
        self._done = False
        self._thread = threading.Thread(target=self._run, name="vmsnap-oom", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def require_done(self) -> None:
        """Raise DriverError where it could not be done: such a clone could outlive its guest. Call it when there is a clone."""
        if not self._done and not self._mark():
            raise DriverError(
                f"the process of {self._domain!r} could not be made the first to end when memory runs short",
                remedy="is libvirtd on this host, and does vmsnap run as root?",
            )

    def _run(self) -> None:
        while not self._mark() and not self._over.wait(_PATROL_SECONDS):
            pass

    def _mark(self) -> bool:
        pid = pid_of(self._domain, pid_files=self._pid_files)
        if pid is None:
            return False
        try:
            # An old file may name a process that is somebody else's by now.
            if os.fsencode(f"guest={self._domain},") not in Path(f"/proc/{pid}/cmdline").read_bytes():
                return False
            Path(f"/proc/{pid}/oom_score_adj").write_text(str(CLONE_OOM_SCORE))
        except OSError as error:
            _LOG.debug("oom_score_adj of %s: %s", self._domain, error)
            return False
        self._done = True
        return True
