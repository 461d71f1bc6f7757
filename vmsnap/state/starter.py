"""Who or what started this process: told by the kernel's login id, sudo and systemd."""

from __future__ import annotations

import os
import pwd
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from vmsnap.model.history import Starter, Trigger

_NOBODY = (1 << 32) - 1
"""The login id of a process that nobody's login led to: (uid_t) -1, see proc_pid_loginuid(5)."""
_UNIT = re.compile(r"/([^/\n]+\.service)(?:/|$)", re.MULTILINE)
_LONGEST_COMMAND = 200


def starter_of_process(
    trigger: Trigger | None = None,
    *,
    environ: Mapping[str, str] = os.environ,
    command: Sequence[str] | None = None,
    proc: Path = Path("/proc/self"),
) -> Starter:
    """Return who or what started this process. Never fails: what cannot be read is left out.

    ``trigger`` is what the caller knows to be true. Otherwise: a person, where the kernel knows whose login led here
    (the audit login id stays the same through sudo and su) or sudo says so; else a systemd unit, by the control group; else
    something else, for example cron.
    """
    unit = _unit(proc)
    spoken = shlex.join(sys.argv if command is None else command)[:_LONGEST_COMMAND]
    if trigger is not None:
        return Starter(trigger=trigger, detail=unit or spoken)
    user = _login_name(proc) or environ.get("SUDO_USER", "")
    if user:
        return Starter(trigger=Trigger.OPERATOR, user=user, detail=spoken)
    if unit and "INVOCATION_ID" in environ:
        return Starter(trigger=Trigger.TIMER, detail=unit)
    return Starter(trigger=Trigger.OTHER, user=_user_name(os.getuid()), detail=spoken)


def _login_name(proc: Path) -> str:
    try:
        login = int((proc / "loginuid").read_text(encoding="ascii"))
    except (OSError, ValueError):  # a kernel without auditing has no such file
        return ""
    return "" if login == _NOBODY else _user_name(login)


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _unit(proc: Path) -> str:
    """Return the systemd service of this process, by its control group; empty where it is in none."""
    try:
        groups = (proc / "cgroup").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    # Of a user's own manager the innermost one counts: /user.slice/.../user@1000.service/app.slice/x.service
    found = _UNIT.findall(groups)
    return found[-1] if found else ""
