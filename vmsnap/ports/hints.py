"""What a hypervisor notes of a guest's writes, so that the next backup reads only what changed."""

from __future__ import annotations

from typing import Protocol

from vmsnap.model.capture import CapturePlan
from vmsnap.model.guest import Guest
from vmsnap.model.hints import DiskHint
from vmsnap.model.ids import RunId, SnapshotId
from vmsnap.model.journal import Resource
from vmsnap.ports.owner import Owner


class ChangeHints(Owner, Protocol):
    """Notes of which blocks a guest writes. A run begins them; where it becomes a snapshot, they go on until the next one.

    Notes may tell too much, never too little: whatever can happen to a disk unseen must end them. None of these calls may
    make the guest stand still. A backup never fails by an error of theirs; it reads everything then.
    Errors: PreconditionError, DeadlineError, DriverError.
    """

    def resource(self, plan: CapturePlan) -> Resource:
        """Name the notes that a run begins. Releasing it ends them."""

    def begin(self, plan: CapturePlan) -> None:
        """Note from now on what the guest writes to each of its disks. Call it before the capture."""

    def read(self, plan: CapturePlan, *, since: SnapshotId) -> tuple[DiskHint, ...]:
        """Return what the guest wrote from the capture of a snapshot to now, one hint a disk of the plan, in order.

        Call it after the capture. The notes go on. A disk of which nothing is known has the reason in its hint.
        """

    def keep(self, guest: Guest, *, run: RunId | None) -> None:
        """End all notes of a guest but those of one run, or all of them. May be repeated."""

    def known_since(self, guest: Guest) -> tuple[SnapshotId, ...]:
        """Return the snapshots since which the writes to all of the guest's disks are known now. Changes nothing."""
