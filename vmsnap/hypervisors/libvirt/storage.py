"""Disks whose storage takes the snapshots: libvirt stops the guest and leaves it so, storage does its work, the guest goes on.

libvirt's name for it is ``snapshot='manual'``. On libvirt 9.0 the guest is paused afterwards with the reason 'unknown', its
image files flushed and let go by QEMU (status ``postmigrate``).
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from typing import Any, Protocol

import libvirt

from vmsnap.errors import DeadlineError, SafetyError
from vmsnap.hypervisors.libvirt import copies
from vmsnap.hypervisors.libvirt.connection import translated
from vmsnap.hypervisors.libvirt.copies import CopiesDetail, filled
from vmsnap.hypervisors.libvirt.events import PauseRecorder
from vmsnap.hypervisors.libvirt.tools import run_tool
from vmsnap.model.capture import CaptureMode, CapturePlan, CaptureSettings, StorageCommands
from vmsnap.model.guest import Finding, Guest, Severity

_LOG = logging.getLogger(__name__)


class StorageSnapshot(Protocol):
    """One way to take snapshots of disks that nobody writes to."""

    def prepare(self, detail: CopiesDetail, *, min_free_bytes: int) -> None:
        """Do what can be done while the guest still runs. Raises NoSpaceError, PreconditionError."""

    def take(self, detail: CopiesDetail, *, timeout_seconds: float) -> None:
        """Take a snapshot of each disk, under the paths of the detail. Raises DeadlineError, DriverError."""


class ReflinkSnapshot:
    """Snapshots that are files which share the disks' blocks."""

    def prepare(self, detail: CopiesDetail, *, min_free_bytes: int) -> None:
        """Make the files, empty."""
        copies.create(detail, min_free_bytes=min_free_bytes)

    def take(self, detail: CopiesDetail, *, timeout_seconds: float) -> None:
        """Copy the disks by reflink."""
        del timeout_seconds
        copies.fill(detail)


class CommandSnapshot:
    """Snapshots that the policy's command takes, one call a disk."""

    def __init__(self, commands: StorageCommands) -> None:
        self._commands = commands

    def prepare(self, detail: CopiesDetail, *, min_free_bytes: int) -> None:
        """Do nothing: only the storage knows how much room it has."""

    def take(self, detail: CopiesDetail, *, timeout_seconds: float) -> None:
        """Run the command for each disk. It ends with this process: a snapshot taken later would be found by nobody."""
        until = time.monotonic() + timeout_seconds
        for copy in detail.copies:
            argv = filled(self._commands.snapshot, source=copy.disk, snapshot=copy.path)
            left = max(0.0, until - time.monotonic())
            try:
                run_tool(("setpriv", "--pdeathsig", "KILL", *argv), timeout_seconds=left)
            except DeadlineError as error:
                raise DeadlineError(
                    f"the snapshots by {argv[0]!r} were not taken within {timeout_seconds:g} s, while the guest stood still",
                    details=error.details,
                    remedy="raise capture.storage_timeout, or find out why the storage takes so long",
                ) from error


def storage_of(settings: CaptureSettings) -> StorageSnapshot:
    """Return how the policy's storage takes snapshots: by its commands, else by reflinks."""
    return ReflinkSnapshot() if settings.storage is None else CommandSnapshot(settings.storage)


class AtRest:
    """What is done while libvirt has left the guest paused: snapshots, then the guest goes on."""

    def __init__(self, plan: CapturePlan) -> None:
        self._plan = plan

    def __call__(self, domain: Any, recorder: PauseRecorder) -> None:
        """Take the snapshots and resume the guest.

        Raises SafetyError where the guest did not stand still all the time: its snapshots are of no one instant then.
        """
        name = self._plan.guest.name
        settings = self._plan.settings
        began = time.monotonic()
        storage_of(settings).take(copies.describe(self._plan), timeout_seconds=settings.storage_timeout.total_seconds())
        with translated(f"look at {name!r}"):
            state, _ = domain.state()
        if state != libvirt.VIR_DOMAIN_PAUSED or recorder.pause(timeout_seconds=0) is not None:
            raise SafetyError(
                f"{name!r} went on while its storage took the snapshots, which are therefore worth nothing",
                details=f"they took {time.monotonic() - began:.1f} s",
                remedy="raise capture.storage_timeout, or find out who resumed the guest",
            )
        with translated(f"resume {name!r}"):
            domain.resume()


def check(guest: Guest, *, settings: CaptureSettings, mode: CaptureMode) -> Iterator[Finding]:
    """Check whether the storage can take the snapshots."""
    if mode is not CaptureMode.LIVE or copies.may_be_instant(settings, mode):
        yield _refusal(
            f"the storage's snapshots need mode live and nothing else; here it is {mode}, or may become instant",
            'set capture.mode = "live" and on_no_convergence to anything but "instant", or disk_snapshot = "overlay"',
        )
        return
    if settings.storage is None:
        obstacles = tuple(reason for disk in guest.disks if (reason := copies.obstacle(disk)) is not None)
        if obstacles:
            yield _refusal(
                f"without [capture.storage] the snapshots are reflinks, and {'; '.join(obstacles)}",
                "give [capture.storage] with the commands of your storage",
            )
            return
    else:
        for command in (settings.storage.snapshot, settings.storage.remove):
            if shutil.which(command[0]) is None:
                yield _refusal(
                    f"there is no program {command[0]!r}", "correct [capture.storage], or install the program"
                )
                return
    yield Finding(
        check="storage",
        severity=Severity.OK,
        message="the storage takes the snapshots while the guest stands still; production is never on overlays",
    )


def _refusal(message: str, remedy: str) -> Finding:
    return Finding(check="storage", severity=Severity.REFUSAL, message=message, remedy=remedy)
