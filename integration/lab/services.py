"""The lab's libvirt: starting, stopping and killing its daemons from inside."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import libvirt

from integration.lab.commands import LabError, run

URI = "qemu:///system"
DAEMONS = ("virtlogd", "libvirtd")

libvirt.registerErrorHandler(lambda _context, _error: None, None)  # errors are raised; do not print them as well


def start_libvirt(*, patience_s: float = 60.0) -> None:
    """Start virtlogd and libvirtd where they do not run, and wait until libvirtd answers. Repeatable."""
    for name in DAEMONS:
        if pid_of(name) is None:
            run([name, "--daemon", "--pid-file", f"/run/{name}.pid"])
    deadline = time.monotonic() + patience_s
    while True:
        try:
            libvirt.open(URI).close()
        except libvirt.libvirtError as error:
            if time.monotonic() > deadline:
                raise LabError(
                    f"the lab's libvirtd does not answer: {error}; see /var/log/libvirt in the lab"
                ) from error
            time.sleep(0.1)
        else:
            return


def stop_libvirtd(*, kill: bool = False, patience_s: float = 60.0) -> None:
    """End libvirtd, in order or by SIGKILL, and wait until it is gone. Guests run on. Repeatable."""
    pid = pid_of("libvirtd")
    if pid is None:
        return
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL if kill else signal.SIGTERM)
    deadline = time.monotonic() + patience_s
    while pid_of("libvirtd") is not None:
        if time.monotonic() > deadline:
            raise LabError("the lab's libvirtd does not end")
        time.sleep(0.05)


def pid_of(name: str) -> int | None:
    """The process id of the daemon that left `/run/NAME.pid`, or None where it does not live."""
    try:
        pid = int(Path(f"/run/{name}.pid").read_text())
        alive = Path(f"/proc/{pid}/comm").read_text().strip() == name
    except (OSError, ValueError):
        return None
    return pid if alive else None
