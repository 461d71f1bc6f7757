"""Control groups of the lab's own.

libvirt makes a group per guest under `/machine` of whatever it sees as the root. Without a subtree of its own, the lab's
groups would stay on the host when the lab is killed. So the lab's first process moves into a fresh group, makes that the
root of a new cgroup namespace, and mounts the hierarchies anew; the process outside removes the subtree at the end.
Version 1 and version 2 (cgroups(7), cgroup_namespaces(7)).
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from integration.lab.commands import LabError, run

CLONE_NEWCGROUP = 0x02000000  # linux/sched.h
HYBRID = Path("/sys/fs/cgroup/unified")  # version 2 beside version 1, without controllers: of no use to libvirt


@dataclass(frozen=True)
class Hierarchy:
    """One mounted cgroup hierarchy of the host, and where this process sits in it."""

    mount: Path
    options: str  # version 1: the controllers' names; version 2: empty
    own: str  # '/...'

    @property
    def parent(self) -> Path:
        """Where the lab's group goes.

        In version 2 that is the root, the only group that may hold processes and still hand controllers down.
        """
        return self.mount / self.own.lstrip("/") if self.options else self.mount


def hierarchies() -> list[Hierarchy]:
    """The host's hierarchies as this process sees them, from /proc/self/mountinfo and /proc/self/cgroup (proc(5))."""
    own: dict[str, str] = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own[controllers] = path
    found: dict[Path, Hierarchy] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, after = line.split(" - ", 1)
        mount = Path(before.split()[4])
        kind, _, superblock = after.split(" ", 2)
        if kind == "cgroup2" and mount != HYBRID:
            found[mount] = Hierarchy(mount, "", own.get("", "/"))
        elif kind == "cgroup":
            for controllers, path in own.items():
                if controllers and set(controllers.split(",")) <= set(superblock.split(",")):
                    found[mount] = Hierarchy(mount, controllers, path)
    return list(found.values())


def enter(name: str) -> list[Hierarchy]:
    """Move this process into new groups `name` and make them the root of its cgroup namespace. Call once, before threads."""
    entered = []
    for hierarchy in hierarchies():
        group = hierarchy.parent / name
        try:
            group.mkdir()
        except OSError as error:  # in a container, for instance
            print(f"lab: guests run without limits of {hierarchy.mount}: {error.strerror}", file=sys.stderr)
            continue
        entered.append(hierarchy)
        if "cpuset" in hierarchy.options.split(","):
            for setting in ("cpuset.cpus", "cpuset.mems"):  # empty in a new group, which then takes no process
                (group / setting).write_text((hierarchy.parent / setting).read_text())
        if not hierarchy.options:
            _hand_down(hierarchy.parent)
        (group / "cgroup.procs").write_text("0")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWCGROUP) != 0:
        code = ctypes.get_errno()
        raise LabError(f"cannot make a cgroup namespace: {os.strerror(code)}")
    return entered


def mount_again(entered: list[Hierarchy]) -> None:
    """Mount the hierarchies below a fresh /sys, where they show this namespace's groups only."""
    for hierarchy in entered:
        if hierarchy.options:
            if not os.path.ismount("/sys/fs/cgroup"):
                run(["mount", "-t", "tmpfs", "-o", "mode=755", "cgroup", "/sys/fs/cgroup"])
            hierarchy.mount.mkdir(parents=True, exist_ok=True)
            run(["mount", "-t", "cgroup", "-o", hierarchy.options, "cgroup", hierarchy.mount])
        else:
            run(["mount", "-t", "cgroup2", "cgroup2", hierarchy.mount])
        if not hierarchy.options or "cpu" in hierarchy.options.split(","):
            # As on a host with systemd: what is no guest has a group of its own, beside that of all guests and not above it.
            # With version 2 the root must be free of processes, too, before it can hand controllers to its children.
            leaf = hierarchy.mount / "lab"
            leaf.mkdir()
            (leaf / "cgroup.procs").write_text("0")
        if not hierarchy.options:
            _hand_down(hierarchy.mount)


def _hand_down(group: Path) -> None:
    for controller in (group / "cgroup.controllers").read_text().split():
        try:
            (group / "cgroup.subtree_control").write_text(f"+{controller}")
        except OSError:
            continue  # held by someone else: guests then run without that limit


def remove(name: str, *, patience_s: float = 5.0) -> None:
    """Remove the groups `name` of a lab whose processes have ended. Repeatable."""
    for hierarchy in hierarchies():
        top = hierarchy.parent / name
        if not top.exists():
            continue
        deadline = time.monotonic() + patience_s
        for folder, _, _ in os.walk(top, topdown=False):
            while True:
                try:
                    Path(folder).rmdir()
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.05)
