"""vCPUs that are slowed down for a capture get back what they had, whatever dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from vmsnap.errors import PreconditionError
from vmsnap.hypervisors.libvirt.vcpulimits import (
    LEVELS,
    SlowedVcpus,
    VcpuLimit,
    check_limits,
    find_limits,
    give_back,
    read_limit,
    write_limit,
)
from vmsnap.model.guest import Severity

_CHILD = """
import sys, time
from vmsnap.hypervisors.libvirt.vcpulimits import SlowedVcpus, read_limit
slowed = SlowedVcpus((read_limit(sys.argv[1]),), limit_seconds=600)
slowed.slow_down()
print("slow", flush=True)
time.sleep(600)
"""


@pytest.fixture(params=["v1", "v2"])
def group(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A control group of one vCPU, without a limit."""
    folder = tmp_path / "vcpu0"
    folder.mkdir()
    if request.param == "v2":
        (folder / "cpu.max").write_text("max 100000\n")
    else:
        (folder / "cpu.cfs_quota_us").write_text("-1\n")
        (folder / "cpu.cfs_period_us").write_text("100000\n")
    return folder


def wait_for(limit: VcpuLimit) -> None:
    until = time.monotonic() + 20
    while True:
        # A real group is never half written; a plain file may be seen empty.
        with suppress(ValueError):
            if read_limit(limit.group) == limit:
                return
        assert time.monotonic() < until, "it was not given back"
        time.sleep(0.02)


def test_it_gets_slower_step_by_step_and_is_given_back(group: Path) -> None:
    before = read_limit(str(group))
    assert before == VcpuLimit(group=str(group), quota_us=None, period_us=100000)
    slowed = SlowedVcpus((before,), limit_seconds=600)
    for percent in (*LEVELS, LEVELS[-1]):
        slowed.slow_down()
        now = read_limit(str(group))
        assert now.quota_us == now.period_us * (100 - percent) // 100
        assert now.is_lower_than(before)
    slowed.let_go()
    assert read_limit(str(group)) == before
    slowed.let_go()
    assert read_limit(str(group)) == before


def test_a_limit_of_its_own_is_lowered_in_proportion(group: Path) -> None:
    before = VcpuLimit(group=str(group), quota_us=50_000, period_us=100_000)
    write_limit(before)
    slowed = SlowedVcpus((before,), limit_seconds=600)
    slowed.slow_down()
    assert read_limit(str(group)) == VcpuLimit(group=str(group), quota_us=2500, period_us=10_000)
    slowed.let_go()
    assert read_limit(str(group)) == before


def test_it_is_given_back_when_the_process_is_killed(group: Path) -> None:
    before = read_limit(str(group))
    child = subprocess.Popen([sys.executable, "-c", _CHILD, str(group)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "slow\n"
        assert read_limit(str(group)).is_lower_than(before)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.communicate(timeout=20)
    wait_for(before)


def test_it_is_given_back_when_the_time_is_over(group: Path) -> None:
    before = read_limit(str(group))
    slowed = SlowedVcpus((before,), limit_seconds=2)
    slowed.slow_down()
    wait_for(before)
    slowed.let_go()


def test_from_the_journal_only_what_was_taken_is_given_back(group: Path) -> None:
    before = read_limit(str(group))
    write_limit(before.lowered(75))
    give_back((before,))
    assert read_limit(str(group)) == before
    # Its operator gave it more meanwhile.
    small = VcpuLimit(group=str(group), quota_us=10_000, period_us=100_000)
    give_back((small,))
    assert read_limit(str(group)) == before
    # The guest was restarted, and its groups with it.
    give_back((VcpuLimit(group=str(group.parent / "gone"), quota_us=None, period_us=100_000),))


@pytest.mark.parametrize(
    ("line", "mount", "found"),
    [
        ("0::/machine.slice/db1.scope/libvirt/vcpu0", "{root} - cgroup2 cgroup2 rw", True),
        ("4:cpu,cpuacct:/machine/db1/vcpu0", "{root} - cgroup cgroup rw,cpu,cpuacct", True),
        # These hold QEMU's other threads as well.
        ("0::/machine.slice/db1.scope/libvirt", "{root} - cgroup2 cgroup2 rw", False),
        ("4:cpu:/", "{root} - cgroup cgroup rw,cpu", False),
    ],
)
def test_finds_the_groups_of_vcpus_alone(tmp_path: Path, line: str, mount: str, *, found: bool) -> None:
    root = tmp_path / "cgroup"
    folder = root / line.rpartition(":")[2].lstrip("/")
    folder.mkdir(parents=True)
    (folder / "cpu.max").write_text("max 100000\n")
    pid_files, proc = tmp_path / "pids", tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "mountinfo").write_text(f"25 20 0:22 / {mount.format(root=f'{root} rw')}\n")
    pid_files.mkdir()
    (pid_files / "db1.pid").write_text("42")
    for task, name in (("42", "qemu-system-x86"), ("43", "CPU 0/KVM")):
        (proc / "42" / "task" / task).mkdir(parents=True)
        (proc / "42" / "task" / task / "comm").write_text(f"{name}\n")
        (proc / "42" / "task" / task / "cgroup").write_text(f"{line}\n")
    finding = check_limits("db1", pid_files=pid_files, proc=proc)
    assert (finding.severity is Severity.OK) is found
    assert bool(finding.remedy) is not found
    if found:
        (limit,) = find_limits("db1", pid_files=pid_files, proc=proc)
        assert limit == VcpuLimit(group=str(folder), quota_us=None, period_us=100000)
    else:
        with pytest.raises(PreconditionError, match="cannot be slowed down"):
            find_limits("db1", pid_files=pid_files, proc=proc)
