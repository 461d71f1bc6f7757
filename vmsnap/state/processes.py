"""Telling whether a process still lives, although its number may meanwhile be another's."""

from __future__ import annotations

from pathlib import Path

_STARTED = 22 - 3
"""The field ``starttime`` of /proc/PID/stat, counted from ``state``, which follows the name (proc_pid_stat(5))."""


def process_identity(pid: int) -> str:
    """Return what no other process of this machine has ever: number, start in clock ticks, and boot.

    For a process that is gone it ends with a question mark, and equals that of no living one.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        # The name is in brackets and may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        if fields[0] not in (b"Z", b"X"):  # dead, and nobody has asked how it ended yet
            return f"{pid}:{int(fields[_STARTED])}:{boot}"
    except (OSError, IndexError):
        pass
    return f"{pid}:?"
