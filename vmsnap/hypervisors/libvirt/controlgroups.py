"""Control groups of QEMU's threads, by the kernel's word: cgroups(7), proc(5)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def cpu_groups(task: Path, *, mounts: dict[str, Path]) -> Iterator[Path]:
    """Return the folders of the groups with a ``cpu`` controller that a process or thread is in: none, or one.

    ``task``: its folder in ``/proc``. ``mounts``: see ``mounts_of``. Raises OSError where it is gone, ValueError.
    """
    for line in (task / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        mount = mounts.get("cpu" if "cpu" in controllers.split(",") else controllers)
        if mount is not None and (mount / path.lstrip("/")).is_dir():
            yield mount / path.lstrip("/")


def mounts_of(proc: Path) -> dict[str, Path]:
    """Return where version 1's cpu controller is mounted (``cpu``), and version 2 (an empty name): proc(5), mountinfo."""
    found = {}
    for line in (proc / "self" / "mountinfo").read_text().splitlines():
        before, after = line.split(" - ", 1)
        kind, _, options = after.split(" ", 2)
        where = Path(before.split()[4])
        if kind == "cgroup2":
            found[""] = where
        elif kind == "cgroup" and "cpu" in options.split(","):
            found["cpu"] = where
    return found
