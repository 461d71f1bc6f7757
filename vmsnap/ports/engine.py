"""What a backup needs to know about a database. Engines do no input or output: they are procedures."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from vmsnap.model.command import Procedure
from vmsnap.model.drain import DrainReport, Instance, InstanceEvidence


@dataclass(frozen=True, kw_only=True)
class GuestPath:
    """Where a path of a guest lies: the UUID of its file system, and the path from that file system's root."""

    file_system_uuid: str
    path: str


class Engine(Protocol):
    """One kind of database."""

    @property
    def name(self) -> str:
        """Return the name used in policies."""

    def discover(self) -> Procedure[tuple[Instance, ...]]:
        """Find the running instances. Raises PreconditionError (PreconditionError names what was looked for)."""

    def require_recoverable(self, instance: Instance) -> Procedure[None]:
        """Make sure that the instance, whose disks alone were captured, could recover for certain. May be repeated.

        Raises PreconditionError where its settings allow a recovery that loses or breaks what was committed.
        """

    def drain(self, instance: Instance, *, deadline: timedelta) -> Procedure[DrainReport]:
        """Refuse new work, wait for work in flight up to the deadline, roll back and count the rest."""

    def stop(self, instance: Instance, *, deadline: timedelta) -> Procedure[None]:
        """Stop the instance in order, never at once. Raises NotCleanError or DeadlineError where it did not stop."""

    def require_all_stopped(self) -> Procedure[None]:
        """Make sure that no server of this kind runs, once all instances were stopped. May be repeated.

        Raises NotCleanError for one that was left, or came up meanwhile: nobody drained it, or could judge how it ended.
        """

    def evidence_in_guest(self, instance: Instance) -> Procedure[InstanceEvidence]:
        """Ask the stopped instance's own tools in the guest whether it ended in order."""

    def evidence_paths(self, instance: Instance) -> tuple[str, ...]:
        """Return the paths in the guest whose content proves the shutdown, for ``judge``."""

    def judge(self, instance: Instance, *, files: tuple[bytes | None, ...]) -> InstanceEvidence:
        """Judge the content of ``evidence_paths`` as read from the disk; None stands for a missing file."""

    def locate(self, instance: Instance) -> Procedure[tuple[GuestPath, ...]]:
        """Find the file systems that hold ``evidence_paths``, in their order. Works on a stopped instance too.

        More paths may follow: each only has to be on a captured disk. ``judge`` gets their content too, and ignores it.
        """
