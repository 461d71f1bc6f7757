"""QEMU's background snapshot of a guest's memory: what it needs set, and giving that back in every state a dead run leaves.

QEMU stops the guest, saves its devices, protects its memory from writing and lets it go on; then it writes the memory to a
stream, a page that the guest wants to change first (capability ``background-snapshot``, qapi/migration.json, QEMU 6.0). The
capability must not stay on: the next migration of the guest, or the next capture in another mode, would be one of these.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from vmsnap.errors import DeadlineError, PreconditionError, VmsnapError
from vmsnap.hypervisors.libvirt import unprotect
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
_FAILED = ("failed", "cancelled")
_OVER = ("none", "completed", *_FAILED)
LEFT_BY_A_FAILURE = (
    "a background snapshot failed in its QEMU, which fails every migration of the guest now, and captures in mode live"
)
LEFT_REMEDY = (
    'a capture in mode instant that succeeds ends it (capture.mode = "auto" takes one now), or a start of the guest'
)
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


def is_left_by_a_failure(domain: Any) -> bool:
    """Tell whether QEMU still believes a running guest's memory to be protected, by a snapshot that failed.

    Before 8.1 QEMU ends its watch over memory only after a whole snapshot (``ram_write_tracking_stop``, migration/ram.c). It
    may look so, too, where one failed, a later one succeeded, and then another migration failed; False also for who may not
    look. Raises DriverError.
    """
    if not was_used(domain):
        return False
    pid = pid_of(domain.name())
    if pid is None or Monitor(domain).migration().get("status") not in _FAILED:
        return False
    with suppress(PermissionError):
        return unprotect.is_left_open(pid)
    return False


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

    A guest that stands still is not let go on: QEMU's counters cannot tell whose pause it is (``stopped`` can).
    Without ``detail`` only guests whose monitor somebody used are looked at. ``until``: of the monotonic clock. Raises
    DeadlineError, DriverError.
    """
    if detail is None and not was_used(domain):
        return
    # Before anything is asked of QEMU: it may wait for ever for a snapshot that has failed, and answer nobody.
    let_guest_go_on(domain)
    monitor = Monitor(domain)
    if monitor.is_capable(BACKGROUND_SNAPSHOT):
        _end(domain, monitor, until)
        monitor.take_file_back(STREAM)
        monitor.set_capability(BACKGROUND_SNAPSHOT, on=False)
    if detail is not None and monitor.max_bandwidth() != detail.max_bandwidth:
        monitor.set_max_bandwidth(detail.max_bandwidth)
    _warn_of_a_failure(domain)


def _warn_of_a_failure(domain: Any) -> None:
    try:
        if is_left_by_a_failure(domain):
            _LOG.warning("%s: %s; %s", domain.name(), LEFT_BY_A_FAILURE, LEFT_REMEDY)
    except VmsnapError as error:
        _LOG.debug("%s: %s", domain.name(), error)


def let_guest_go_on(domain: Any) -> None:
    """Free a guest that waits for a background snapshot whose stream is gone. Raises DriverError."""
    pid = pid_of(domain.name())
    if pid is None:
        return
    with translated_os("take the protection off the guest's memory"):
        if not unprotect.let_go_on(pid, seconds=_LET_GO_SECONDS):
            _LOG.warning("QEMU keeps watching the memory of %r", domain.name())


def _end(domain: Any, monitor: Monitor, until: float) -> None:
    """End the migration, where one goes on."""
    while not is_over(monitor.migration()):
        monitor.ask("migrate_cancel")
        let_guest_go_on(domain)
        if time.monotonic() > until:
            raise DeadlineError(
                "a background snapshot does not end", remedy="see 'virsh qemu-monitor-command GUEST --hmp info migrate'"
            )
        time.sleep(_POLL_SECONDS)
