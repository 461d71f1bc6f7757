"""Starting and ending the processes of exports: as units of systemd where it runs, else as processes of their own."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from vmsnap.errors import DeadlineError, DriverError, ToolError
from vmsnap.exports.folder import ExportFolder

UNIT = "vmsnap-export@{run}.service"
_TOOL_TIMEOUT = timedelta(seconds=30)
_SYSTEMD = Path("/run/systemd/system")


class Launcher(Protocol):
    """Starts and ends one export's process."""

    def start(self, folder: ExportFolder) -> None:
        """Start it. Returns before it serves."""

    def stop(self, folder: ExportFolder, *, deadline: timedelta) -> None:
        """End it. Content where none runs. Raises DeadlineError, DriverError."""


class ProcessLauncher:
    """A process in a session of its own, which outlives whoever starts it. ``argv`` is followed by the export's folder."""

    def __init__(self, argv: Sequence[str]) -> None:
        self._argv = tuple(argv)

    def start(self, folder: ExportFolder) -> None:
        """Start it. What it says goes to the folder's log."""
        try:
            descriptor = os.open(folder.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "ab") as log:
                # setsid(1) is gone at once, so that the process is nobody's child who would have to wait for it.
                subprocess.run(
                    ["setsid", "--fork", *self._argv, str(folder.path)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd="/",
                    timeout=_TOOL_TIMEOUT.total_seconds(),
                    check=True,
                )
        except (OSError, subprocess.SubprocessError) as error:
            raise DriverError(f"the export of run {folder.run} cannot be started: {error}") from error

    def stop(self, folder: ExportFolder, *, deadline: timedelta) -> None:
        """End it: politely, and after half of the time by force."""
        half = deadline.total_seconds() / 2
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._end(folder, number=number, seconds=half):
                return
        raise DeadlineError(f"the export of run {folder.run} does not end", remedy=f"look at process {folder.pid()}")

    def _end(self, folder: ExportFolder, *, number: signal.Signals, seconds: float) -> bool:
        pid = folder.pid()
        if pid is None:
            return True
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            return True
        try:
            # The lock is held by this process still, now that the handle cannot come to mean another.
            if folder.pid() != pid:
                return not folder.is_alive
            signal.pidfd_send_signal(handle, number)
            return bool(select.select([handle], [], [], seconds)[0])
        except ProcessLookupError:
            return True
        finally:
            os.close(handle)


class UnitLauncher:
    """An instance of ``vmsnap-export@.service``, which systemd starts again when it dies."""

    def start(self, folder: ExportFolder) -> None:
        """Start the unit."""
        _systemctl("start", "--no-block", UNIT.format(run=folder.run), timeout=_TOOL_TIMEOUT)

    def stop(self, folder: ExportFolder, *, deadline: timedelta) -> None:
        """Stop the unit."""
        unit = UNIT.format(run=folder.run)
        _systemctl("stop", unit, timeout=deadline)
        # One that failed is remembered until somebody asks for it not to be.
        _systemctl("reset-failed", unit, timeout=_TOOL_TIMEOUT, missing_is_fine=True)


def find_launcher(argv: Sequence[str], *, units: bool, systemd: Path = _SYSTEMD) -> Launcher:
    """Return how exports are started here. ``units``: the installed unit would read the same settings as this process."""
    if units and systemd.is_dir():
        try:
            _systemctl("cat", UNIT.format(run=""), timeout=_TOOL_TIMEOUT)
        except (ToolError, DeadlineError):
            return ProcessLauncher(argv)
        return UnitLauncher()
    return ProcessLauncher(argv)


def _systemctl(*words: str, timeout: timedelta, missing_is_fine: bool = False) -> None:
    argv = ["systemctl", *words]
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout.total_seconds(), check=False
        )
    except subprocess.TimeoutExpired as error:
        raise DeadlineError(f"'{' '.join(argv)}' did not end in {timeout.total_seconds():.0f} s") from error
    except OSError as error:
        raise ToolError(f"systemctl cannot be run: {error.strerror}") from error
    if done.returncode != 0 and not missing_is_fine:
        raise ToolError(
            f"'{' '.join(argv)}' failed with status {done.returncode}",
            details=done.stderr.decode("utf-8", "replace").strip(),
            remedy="see 'journalctl -u vmsnap-export@*'",
        )
