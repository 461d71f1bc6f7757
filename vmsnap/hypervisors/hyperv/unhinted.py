"""Hyper-V's own change tracking is not asked for hints: every backup reads the clone's disks in full."""

from __future__ import annotations

from datetime import timedelta

from vmsnap.model.capture import CapturePlan
from vmsnap.model.guest import Guest
from vmsnap.model.hints import DiskHint
from vmsnap.model.ids import RunId, SnapshotId
from vmsnap.model.journal import Resource, ResourceKind


class NoHints:
    """Implements ports.hints.ChangeHints: nothing is noted, and that is the reason given for each disk."""

    kinds = frozenset({ResourceKind.HINTS})

    def resource(self, plan: CapturePlan) -> Resource:
        """Name notes that are never begun."""
        return Resource(kind=ResourceKind.HINTS, run=plan.run, guest=plan.guest.name, name="no notes")

    def begin(self, plan: CapturePlan) -> None:
        """Do nothing."""

    def read(self, plan: CapturePlan, *, since: SnapshotId) -> tuple[DiskHint, ...]:
        """Return that nothing is known."""
        reason = "vmsnap does not ask Hyper-V what changed"
        return tuple(DiskHint(target=disk.target, since=since, reason=reason) for disk in plan.guest.disks)

    def keep(self, guest: Guest, *, run: RunId | None) -> None:
        """Do nothing."""

    def known_since(self, guest: Guest) -> tuple[SnapshotId, ...]:
        """Return nothing."""
        del guest
        return ()

    def release(self, resource: Resource, *, deadline: timedelta) -> None:
        """Do nothing."""

    def owned(self) -> tuple[Resource, ...]:
        """Return nothing."""
        return ()
