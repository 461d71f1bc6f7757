"""Clones that give way: for its first half minute a clone runs only where nobody else wants to.

A low weight says how much a clone gets of a busy host, but not when: since Linux 6.6 a thread that wakes up may wait until
whoever runs has had his slice, however little he weighs (``RUN_TO_PARITY``, kernel/sched/features.h). A database wakes for each
of its requests. With two processors, the vCPU of a guest under pgbench was ready and not running for 24 % of the time in which
its clone ran at a sixteenth of its weight; with ``cpu.idle``, for 10 % (medians of half seconds; 1 to 24 %). An idle group is
left at once when anybody else wakes, and its processors count as free (Documentation/admin-guide/cgroup-v2.rst; Linux 5.15,
also in version 1).

It is for a while only, and shorter than the deadlines that policies have by default: on a host without a free processor such a
clone gets three thousandths of one (``WEIGHT_IDLEPRIO``, kernel/sched/sched.h), and would come to no end. That is also why a
clone that is to be destroyed no longer gives way: its memory is given back by its own threads. Where this process dies, its
clone gives way until ``reconcile`` destroys it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vmsnap.hypervisors.libvirt.controlgroups import cpu_groups, mounts_of
from vmsnap.hypervisors.libvirt.processes import PID_FILES, pid_of
from vmsnap.model.ids import RunId

_LOG = logging.getLogger(__name__)
SECONDS = 30.0
_PATROL_SECONDS = 0.02
_IDLE = "cpu.idle"
_WEIGHTS = ("cpu.weight", "cpu.shares")


class GivingWay:
    """Lets one clone give way, from the moment when it has a control group, for ``seconds``; 0: not at all.

    Nothing is done where the kernel has no idle groups, or libvirt makes no groups for processors. Nothing fails: it costs
    time, not safety.
    """

    def __init__(
        self, name: str, *, run: RunId, seconds: float, pid_files: Path = PID_FILES, proc: Path = Path("/proc")
    ) -> None:
        self._name = name
        self._run_id = run
        self._seconds = seconds
        self._pid_files = pid_files
        self._proc = proc
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._until: float | None = None
        # None: it has none of its own yet, and is made a common one of. Empty: it cannot be told.
        self._weights: dict[Path, str] | None = None
        self._thread = threading.Thread(target=self._run, name="vmsnap-yielding", daemon=True)

    def begin(self) -> None:
        """Let it give way from now on. May be called before there is a clone, and again."""
        if self._seconds and self._thread.ident is None:
            self._thread.start()

    @contextmanager
    def weighed(self) -> Iterator[None]:
        """Give the clone its weight in the body. It is in effect when it no longer gives way."""
        with self._lock:
            group = self._group()
            if group is not None:
                # An idle group takes no weight, and has that of a common one when it ceases to be idle.
                self._write(group / _IDLE, "0")
            yield
            if group is not None:
                self._weights = _weights_of(group)
                if self._weights and self._is_time_left():
                    self._write(group / _IDLE, "1")
            else:
                # The clone is complete, so it will have none later either.
                self._over.set()
        self.begin()

    def cease(self) -> None:
        """Let it give way no longer: its weight is in effect when this returns."""
        self._over.set()
        with self._lock:
            self._weigh()

    def end(self) -> None:
        """Care no more for it: the clone has ended."""
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._begun():
            if self._over.wait(_PATROL_SECONDS):
                return
        if self._over.wait(max(0.0, (self._until or 0.0) - time.monotonic())):
            return
        with self._lock:
            self._weigh()

    def _weigh(self) -> None:
        group = self._group()
        if group is not None:
            self._write(group / _IDLE, "0")
            for file, weight in (self._weights or {}).items():
                self._write(file, weight)

    def _begun(self) -> bool:
        with self._lock:
            group = self._group()
            if group is None:
                return False
            self._until = time.monotonic() + self._seconds
            if self._weights != {} and not self._over.is_set():
                self._write(group / _IDLE, "1")
            return True

    def _is_time_left(self) -> bool:
        return self._until is not None and time.monotonic() < self._until and not self._over.is_set()

    def _group(self) -> Path | None:
        return group_of(self._name, run=self._run_id, pid_files=self._pid_files, proc=self._proc)

    def _write(self, file: Path, text: str) -> None:
        try:
            file.write_text(text)
        except OSError as error:
            _LOG.info("clone %s: %s: %s", self._name, file, error.strerror)


def _weights_of(group: Path) -> dict[Path, str]:
    try:
        return {group / name: (group / name).read_text() for name in _WEIGHTS if (group / name).exists()}
    except OSError:
        return {}


def group_of(name: str, *, run: RunId, pid_files: Path = PID_FILES, proc: Path = Path("/proc")) -> Path | None:
    """Return the group that holds all threads of a run's clone and nothing else, where there is one that can be idle."""
    pid = pid_of(name, pid_files=pid_files)
    if pid is None:
        return None
    with suppress(OSError, ValueError):
        for group in cpu_groups(proc / str(pid), mounts=mounts_of(proc)):
            # libvirt's name for it has the domain's in it, and below it are groups for parts of QEMU.
            own = [folder for folder in (group, *group.parents) if run in folder.name]
            if own and (own[-1] / _IDLE).exists():
                return own[-1]
    return None
