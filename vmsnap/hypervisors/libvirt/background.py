"""QEMU's background snapshot of a guest's memory: what it needs set, and giving that back in every state a dead run leaves.

QEMU stops the guest, saves its devices, protects its memory from writing and lets it go on; then it writes the memory to a
stream, a page that the guest wants to change first (capability ``background-snapshot``, qapi/migration.json, QEMU 6.0). The
capability must not stay on: the next migration of the guest, or the next capture in another mode, would be one of these.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import libvirt
from pydantic import BaseModel, ConfigDict

from vmsnap.errors import DeadlineError, PreconditionError
from vmsnap.hypervisors.libvirt import unprotect
from vmsnap.hypervisors.libvirt.connection import translated
from vmsnap.hypervisors.libvirt.monitor import BACKGROUND_SNAPSHOT, Monitor, MonitorError, was_used
from vmsnap.hypervisors.libvirt.processes import PID_FILES, pid_of
from vmsnap.hypervisors.libvirt.tools import translated_os

_LOG = logging.getLogger(__name__)
STREAM = "vmsnap-stream"
"""The name under which QEMU is given the pipe for the stream."""
UNLIMITED = (1 << 63) - 1
FIRST_QEMU = 6_000_000
# QEMU 8.2 holds its big lock while it writes the beginning of a stream ("migration: hold the BQL during setup"): from then
# on a writer that is kept waiting there would keep the guest's devices, and the monitor, waiting.
_QEMU_THAT_CANNOT_WAIT = 8_002_000
_POLL_SECONDS = 0.05
_LET_GO_SECONDS = 5
_OVER = ("none", "completed", "failed", "cancelled")
_THREAD = "bg_snapshot"
_WAITS = "pipe_write"


class BackgroundDetail(BaseModel):
    """What a migration of the guest was allowed before a background snapshot, as the journal keeps it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_bandwidth: int


def describe(domain: Any) -> BackgroundDetail:
    """Return what a background snapshot of a running guest will change. Raises DriverError."""
    return BackgroundDetail(max_bandwidth=Monitor(domain).max_bandwidth())


def can_be_held(qemu_version: int) -> bool:
    """Tell whether QEMU can be kept waiting at the beginning of its stream, while the guest runs on."""
    return qemu_version < _QEMU_THAT_CANNOT_WAIT


def allow(monitor: Monitor) -> None:
    """Let the next migration be a background snapshot, as fast as it can be. Raises PreconditionError with QEMU's reason."""
    try:
        monitor.set_capability(BACKGROUND_SNAPSHOT, on=True)
    except MonitorError as error:
        raise PreconditionError(
            f"QEMU cannot take this guest in mode instant: {error.brief}",
            remedy="'vmsnap doctor GUEST' says what is missing; or set capture.mode = \"live\"",
        ) from error
    if monitor.max_bandwidth() < UNLIMITED:
        monitor.set_max_bandwidth(UNLIMITED)


def is_over(info: dict[str, Any]) -> bool:
    """Tell from QEMU's MigrationInfo whether no migration goes on."""
    return info.get("status", "none") in _OVER


def has_begun(info: dict[str, Any]) -> bool:
    """Tell whether the guest's memory is protected, so that it may go on: QEMU has sent a first page."""
    ram = info.get("ram", {})
    return bool(ram.get("normal", 0) + ram.get("duplicate", 0))


def waits_for_reader(guest: str, *, pid_files: Path = PID_FILES, proc: Path = Path("/proc")) -> bool | None:
    """Tell whether QEMU has done what it can before it writes, and waits for its stream's reader; None: cannot be told."""
    pid = pid_of(guest, pid_files=pid_files)
    try:
        for task in (proc / str(pid) / "task").iterdir():
            if (task / "comm").read_text(encoding="utf-8", errors="replace").strip() == _THREAD:
                return _WAITS in (task / "wchan").read_text(encoding="ascii")
    except OSError:
        return None
    return None


def give_back(domain: Any, *, detail: BackgroundDetail | None, until: float) -> None:
    """End a background snapshot that still goes on, and give back what was set for it. May be repeated.

    Without ``detail`` only guests whose monitor somebody used are looked at. ``until``: of the monotonic clock. Raises
    DeadlineError, DriverError.
    """
    if detail is None and not was_used(domain):
        return
    # Before anything is asked of QEMU: it may wait for ever for a snapshot that has failed, and answer nobody.
    let_guest_go_on(domain)
    monitor = Monitor(domain)
    if monitor.is_capable(BACKGROUND_SNAPSHOT):
        was_stopped = _end(domain, monitor, until)
        monitor.take_file_back(STREAM)
        monitor.set_capability(BACKGROUND_SNAPSHOT, on=False)
        if was_stopped:
            _resume(domain)
    if detail is not None and monitor.max_bandwidth() != detail.max_bandwidth:
        monitor.set_max_bandwidth(detail.max_bandwidth)


def let_guest_go_on(domain: Any) -> None:
    """Free a guest that waits for a background snapshot whose stream is gone. Raises DriverError."""
    pid = pid_of(domain.name())
    if pid is None:
        return
    with translated_os("take the protection off the guest's memory"):
        if not unprotect.let_go_on(pid, seconds=_LET_GO_SECONDS):
            _LOG.warning("QEMU keeps watching the memory of %r", domain.name())


def _end(domain: Any, monitor: Monitor, until: float) -> bool:
    """End the migration. Returns whether the guest is not known to have gone on after it was stopped for the capture."""
    info = monitor.migration()
    began = has_begun(info)
    while not is_over(info):
        monitor.ask("migrate_cancel")
        let_guest_go_on(domain)
        if time.monotonic() > until:
            raise DeadlineError(
                "a background snapshot does not end", remedy="see 'virsh qemu-monitor-command GUEST --hmp info migrate'"
            )
        time.sleep(_POLL_SECONDS)
        info = monitor.migration()
    return not began


def _resume(domain: Any) -> None:
    """Let a guest go on that a run stopped just before it died. After its memory was protected, only others stop it."""
    with translated("resume a guest"):
        if domain.state() == [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_USER]:
            _LOG.warning("%r was left paused by a capture that died; resuming it", domain.name())
            domain.resume()
