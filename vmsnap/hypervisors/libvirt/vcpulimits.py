"""Slowing a running guest's vCPUs down for a while, by the CPU bandwidth of the control groups that libvirt made for them.

QEMU's own way (the migration capability ``auto-converge``) is out of reach: libvirt turns it off at the beginning of each
capture, and QEMU takes no capability while a migration goes on. libvirt's way (``virsh schedinfo``) waits for the end of the
capture. Control groups take effect at once: Linux, Documentation/admin-guide/cgroup-v2.rst (``cpu.max``) and
Documentation/scheduler/sched-bwc.rst (``cpu.cfs_quota_us``, version 1).
"""

from __future__ import annotations

import json
import re
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from vmsnap.errors import DriverError, PreconditionError
from vmsnap.hypervisors.libvirt.controlgroups import cpu_groups, mounts_of
from vmsnap.hypervisors.libvirt.outliving import outlive, outliving
from vmsnap.hypervisors.libvirt.processes import PID_FILES, pid_of
from vmsnap.hypervisors.libvirt.tools import translated_os
from vmsnap.model.guest import Finding, Severity

_VCPU_THREAD = re.compile(r"CPU \d+/")
_VCPU_GROUP = re.compile(r"vcpu\d+\Z")
# Short, so that a slowed vCPU never stands still for long: with 90 % taken, 9 ms at a time. The kernel gives 1 ms at least.
_PERIOD_US = 10_000
LEVELS = (50, 75, 90)
"""How much of each vCPU is taken away, in percent: first, and more with each pass that did not suffice."""
_GUARD_ANSWER_SECONDS = 10


class VcpuLimit(BaseModel):
    """The CPU bandwidth of one vCPU, as its group said it. ``quota_us`` None: as much as it wants."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    group: str
    quota_us: int | None
    period_us: int

    def lowered(self, percent: int) -> VcpuLimit:
        """Return the limit with so much taken away."""
        share = 1.0 if self.quota_us is None else self.quota_us / self.period_us
        quota = max(1000, int(min(share, 1.0) * _PERIOD_US * (100 - percent) / 100))
        return VcpuLimit(group=self.group, quota_us=quota, period_us=_PERIOD_US)

    def is_lower_than(self, other: VcpuLimit) -> bool:
        """Tell whether this leaves the vCPU less time than the other does."""
        if self.quota_us is None:
            return False
        return other.quota_us is None or self.quota_us / self.period_us < other.quota_us / other.period_us


def find_limits(guest: str, *, pid_files: Path = PID_FILES, proc: Path = Path("/proc")) -> tuple[VcpuLimit, ...]:
    """Return the limits of a running guest's vCPUs as they are now. Raises PreconditionError where they have none to set."""
    groups = sorted(set(_groups(guest, pid_files=pid_files, proc=proc)))
    if not groups:
        raise PreconditionError(
            f"the vCPUs of {guest!r} have no control groups of their own, so they cannot be slowed down",
            remedy="let libvirt use the cpu controller (cgroup_controllers in qemu.conf), or set capture.on_no_convergence to "
            "another value",
        )
    with translated_os(f"read the CPU limits of {guest!r}"):
        return tuple(read_limit(group) for group in groups)


def check_limits(guest: str, *, pid_files: Path = PID_FILES, proc: Path = Path("/proc")) -> Finding:
    """Say whether a running guest's vCPUs can be slowed down."""
    try:
        limits = find_limits(guest, pid_files=pid_files, proc=proc)
    except PreconditionError as error:
        return Finding(check="throttle", severity=Severity.REFUSAL, message=error.brief, remedy=error.remedy)
    return Finding(
        check="throttle",
        severity=Severity.OK,
        message=f"{len(limits)} vCPUs can be slowed down if its memory does not converge",
    )


def _groups(guest: str, *, pid_files: Path, proc: Path) -> Iterator[str]:
    """Return the folders of the vCPU threads' groups. QEMU names the threads, because libvirt asks it to."""
    pid = pid_of(guest, pid_files=pid_files)
    if pid is None:
        return
    try:
        mounts = mounts_of(proc)
        for task in (proc / str(pid) / "task").iterdir():
            if not _VCPU_THREAD.match((task / "comm").read_text()):
                continue
            for group in cpu_groups(task, mounts=mounts):
                # Any other group would hold more than one vCPU: QEMU's other threads, or all guests.
                if _VCPU_GROUP.search(group.name):
                    yield str(group)
    except (OSError, ValueError):
        return


def read_limit(group: str) -> VcpuLimit:
    """Return what a group says. Raises OSError."""
    folder = Path(group)
    if (folder / "cpu.max").exists():
        quota, period = (folder / "cpu.max").read_text().split()
        return VcpuLimit(group=group, quota_us=None if quota == "max" else int(quota), period_us=int(period))
    number = int((folder / "cpu.cfs_quota_us").read_text())
    period_us = int((folder / "cpu.cfs_period_us").read_text())
    return VcpuLimit(group=group, quota_us=None if number < 0 else number, period_us=period_us)


def write_limit(limit: VcpuLimit) -> None:
    """Set a group's limit. Raises OSError."""
    folder = Path(limit.group)
    quota = limit.quota_us
    if (folder / "cpu.max").exists():
        (folder / "cpu.max").write_text(f"{'max' if quota is None else quota} {limit.period_us}")
        return
    # Without a limit first: in between, the old quota of the new period could be more than the kernel allows.
    (folder / "cpu.cfs_quota_us").write_text("-1")
    (folder / "cpu.cfs_period_us").write_text(str(limit.period_us))
    if quota is not None:
        (folder / "cpu.cfs_quota_us").write_text(str(quota))


def give_back(limits: tuple[VcpuLimit, ...]) -> None:
    """Give vCPUs back what was taken from them. May be repeated; content where they are gone. Raises DriverError."""
    for limit in limits:
        try:
            if read_limit(limit.group).is_lower_than(limit):
                write_limit(limit)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise DriverError(
                f"the CPU limit of {limit.group} could not be given back: {error.strerror}",
                remedy="see 'virsh schedinfo GUEST', and 'virsh schedinfo GUEST --set vcpu_quota=-1' where it had none",
            ) from error


class SlowedVcpus:
    """vCPUs that get slower step by step, and are given back all they had when told, or whatever becomes of this process.

    A guard, a process of its own, gives back when this one says so, when it dies, and after ``limit_seconds`` at the latest.
    """

    def __init__(self, limits: tuple[VcpuLimit, ...], *, limit_seconds: float) -> None:
        self._limits = limits
        self._limit_seconds = limit_seconds
        self._guard: subprocess.Popen[str] | None = None
        self._step = 0

    @property
    def percent(self) -> int:
        """Return how much is taken away now."""
        return LEVELS[self._step - 1] if self._step else 0

    @property
    def is_slowest(self) -> bool:
        """Tell whether there is no further step."""
        return self._step == len(LEVELS)

    def slow_down(self) -> None:
        """Take the next step, where there is one. Raises DriverError; nothing is taken then that is not given back."""
        if self._guard is None:
            self._guard = self._start_guard()
        if self._step == len(LEVELS):
            return
        self._step += 1
        try:
            for limit in self._limits:
                write_limit(limit.lowered(self.percent))
        except OSError as error:
            raise DriverError(f"the vCPUs could not be slowed down: {error.strerror}") from error

    def let_go(self) -> None:
        """Give all back. May be repeated. Raises DriverError."""
        if self._guard is not None:
            assert self._guard.stdin is not None  # noqa: S101 - it was asked for
            assert self._guard.stdout is not None  # noqa: S101
            self._guard.stdin.close()
            try:
                self._guard.wait(timeout=_GUARD_ANSWER_SECONDS)
            except subprocess.TimeoutExpired:
                self._guard.kill()
                self._guard.wait()
            self._guard.stdout.close()
            self._guard = None
        self._step = 0
        give_back(self._limits)

    def _start_guard(self) -> subprocess.Popen[str]:
        argv = (sys.executable, "-m", __name__, str(self._limit_seconds))
        guard = subprocess.Popen(
            outliving(argv, what="guard of CPU limits"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Signals for this process' group are not for the guard.
            start_new_session=True,
        )
        assert guard.stdin is not None  # noqa: S101 - it was asked for
        assert guard.stdout is not None  # noqa: S101
        guard.stdin.write(json.dumps([limit.model_dump() for limit in self._limits]) + "\n")
        guard.stdin.flush()
        if guard.stdout.readline().strip() != "ready":
            guard.kill()
            guard.wait()
            raise DriverError("the process that guards the CPU limits did not start; the guest is not slowed down")
        return guard


def _guard(limit_seconds: float) -> None:
    """Be the guard: wait for the end of stdin, or for the time to be over, and give back."""
    outlive()
    limits = tuple(VcpuLimit.model_validate(item) for item in json.loads(sys.stdin.readline()))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    select.select([sys.stdin], [], [], limit_seconds)
    give_back(limits)


if __name__ == "__main__":
    _guard(float(sys.argv[1]))
