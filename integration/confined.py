"""Runs a command held as a unit of systemd/ would hold it, where there is no systemd: capabilities and system calls.

    /usr/bin/python3 integration/confined.py systemd/vmsnap.service COMMAND...

For Debian's Python, whose package python3-seccomp has the binding of libseccomp. Takes from the unit CapabilityBoundingSet,
SystemCallFilter (allowed groups), RestrictAddressFamilies, RestrictNamespaces (allowed ones) and NoNewPrivileges, with the
meaning that systemd.exec(5) gives them.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

PR_CAPBSET_DROP = 24  # linux/prctl.h
# linux/capability.h, from 0 on.
CAPABILITIES = (
    *("CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP"),
    *("LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER"),
    *("SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE"),
    *("SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP"),
    *("MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF"),
    "CHECKPOINT_RESTORE",
)
# linux/sched.h
NAMESPACES = {
    "mnt": 0x00020000,
    "cgroup": 0x02000000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
}


def service_of(unit: Path) -> dict[str, str]:
    """The unit's settings, of any section; each of those that are read here stands once."""
    lines = [line for line in unit.read_text(encoding="utf-8").splitlines() if line[:1].isalpha()]
    return dict(line.split("=", maxsplit=1) for line in lines)


def calls_of(group: str) -> set[str]:
    """The system calls of a group such as @mount, by systemd's own list, or a single one."""
    if not group.startswith("@"):
        return {group}
    said = subprocess.run(
        ["systemd-analyze", "syscall-filter", group], capture_output=True, text=True, check=True
    ).stdout
    words = {line.strip() for line in said.splitlines()[1:] if line.strip() and not line.strip().startswith("#")}
    found: set[str] = set()
    for word in words:
        found |= calls_of(word) if word.startswith("@") else {word}
    return found


def allow(calls: set[str], *, families: list[str], namespaces: list[str]) -> None:
    """Refuse every other call with EPERM, sockets of other families, and namespaces of other kinds."""
    import seccomp  # noqa: PLC0415 - only Debian's Python has it

    rules: Any = seccomp.SyscallFilter(seccomp.ERRNO(errno.EPERM))
    others = 0
    for name, flag in NAMESPACES.items():
        others |= 0 if name in namespaces else flag
    for call in sorted(calls - {"socket", "unshare", "clone", "clone3", "setns"}):
        try:
            rules.add_rule(seccomp.ALLOW, call)
        except (OSError, RuntimeError, ValueError):
            continue  # a call of another architecture
    for family in families:
        rules.add_rule(seccomp.ALLOW, "socket", seccomp.Arg(0, seccomp.EQ, int(getattr(socket, family))))
    for call in ("unshare", "clone"):
        rules.add_rule(seccomp.ALLOW, call, seccomp.Arg(0, seccomp.MASKED_EQ, others, 0))
    for name in namespaces:
        rules.add_rule(seccomp.ALLOW, "setns", seccomp.Arg(1, seccomp.EQ, NAMESPACES[name]))
    rules.add_rule(seccomp.ERRNO(errno.ENOSYS), "clone3")  # its flags cannot be looked at; programs then use clone
    rules.load()


def main() -> None:
    """Hold this process, then become the command."""
    service = service_of(Path(sys.argv[1]))
    calls: set[str] = set()
    for group in service["SystemCallFilter"].split():
        calls |= calls_of(group)
    kept = service["CapabilityBoundingSet"].split()
    libc = ctypes.CDLL(None, use_errno=True)
    for number, name in enumerate(CAPABILITIES):
        if f"CAP_{name}" not in kept and libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), f"CAP_{name} cannot be dropped")
    # The filter sets NoNewPrivileges itself.
    allow(calls, families=service["RestrictAddressFamilies"].split(), namespaces=service["RestrictNamespaces"].split())
    os.execvp(sys.argv[2], sys.argv[2:])  # noqa: S606 - the arguments are the caller's


if __name__ == "__main__":
    main()
