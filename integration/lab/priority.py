"""Keeping an emulated guest's CPU threads from being preempted.

On overloaded hosts (load 8 and more on two cores) about one clone in ten of an emulated guest came up dead: its kernel went round
in a corrupt list, or panicked. On the same machine at a lower load 20 of 20 came up. So the memory image was inconsistent, most
likely because QEMU's emulator (7.2) lost track of a changed page while its CPU thread was preempted; that cause was not proven.
Hardware virtualisation records changes in hardware. Real-time priority would make it worse: its throttling stops a busy
thread once a second. A weight far above everybody else's makes preemption rare and short.
"""

from __future__ import annotations

import os
from pathlib import Path
from xml.sax.saxutils import escape

_CPU_GROUP = Path(
    "/sys/fs/cgroup/cpu"
)  # version 1; in version 2 the nice value counts only within the guest's own group
_SHARES = 1 << 18
_HIGHEST = -20


def cpu_threads(name: str) -> list[int]:
    """The ids of a running domain's emulated CPU threads."""
    # libvirt escapes the name for XML, and then uses it for this file as well.
    escaped = escape(name, {'"': "&quot;", "'": "&apos;"})
    pid = int(Path(f"/run/libvirt/qemu/{escaped}.pid").read_text())
    tasks = Path(f"/proc/{pid}/task")
    return [int(task.name) for task in tasks.iterdir() if (task / "comm").read_text().rstrip().endswith("/TCG")]


def prefer(name: str) -> None:
    """Let a domain's emulated CPU threads go before everything else on this machine."""
    if (_CPU_GROUP / "tasks").exists():
        (_CPU_GROUP / "cpu.shares").write_text(str(_SHARES))
    for thread in cpu_threads(name):
        if (_CPU_GROUP / "tasks").exists():
            # Out of the guest's group, whose weight would be the one that counts.
            (_CPU_GROUP / "tasks").write_text(str(thread))
        os.setpriority(os.PRIO_PROCESS, thread, _HIGHEST)


def treat_equally(name: str) -> None:
    """Take that back, for measurements in which guest and clone compete for the host's CPUs."""
    for thread in cpu_threads(name):
        os.setpriority(os.PRIO_PROCESS, thread, 0)
        group = _vcpu_group(name)
        if group is not None:
            (group / "tasks").write_text(str(thread))


def _vcpu_group(name: str) -> Path | None:
    found = sorted(_CPU_GROUP.glob(f"machine*/*{name}*/**/vcpu0"))
    return found[0] if found else None
