"""Processes that must outlive the one that starts them, whatever ends it: they give back what a capture took from its guest.

A session of its own protects such a process from signals for a terminal or a process group, and from nothing else. When the
main process of a systemd service dies, systemd kills at once what is left in the service's control group (KillMode=mixed and
control-group, systemd.kill(5)), and so may whoever runs out of memory. So where systemd runs (sd_booted(3)) it is asked to put
the process into a scope of its own (systemd-run(1)), where it keeps its pipes, its number and its parent.
"""

from __future__ import annotations

import contextlib
import logging
import signal
from pathlib import Path

from vmsnap.errors import VmsnapError
from vmsnap.hypervisors.libvirt.tools import run_tool

_LOG = logging.getLogger(__name__)
_SYSTEMD = Path("/run/systemd/system")
_SCOPE = ("systemd-run", "--scope", "--quiet", "--collect", "--no-ask-password")
_TRY_SECONDS = 10


def outliving(argv: tuple[str, ...], *, what: str) -> tuple[str, ...]:
    """Return the command that starts ``argv`` outside the control group of this process. ``what`` is its scope's description.

    Where systemd does not run, or refuses, that is ``argv`` itself: it ends by itself, and is worth having there too.
    """
    if not _SYSTEMD.is_dir():
        return argv
    scope = (*_SCOPE, f"--description=vmsnap: {what}", "--")
    try:
        # A scope that is refused now must not keep the process from being started.
        run_tool((*scope, "true"), timeout_seconds=_TRY_SECONDS)
    except VmsnapError as error:
        _LOG.warning("%s would end with this service: systemd gives it no scope of its own: %s", what, error)
        return argv
    return (*scope, *argv)


def outlive() -> None:
    """Be such a process: listen to no signal (its starter tells it when to end), and be the last to go when memory is short."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("-1000", encoding="ascii")
