"""Notes of what guests write, over ``FakeHost``. It passes ``hints_contract``."""

from __future__ import annotations

from datetime import timedelta

from vmsnap.errors import BugError, DriverError
from vmsnap.model.capture import CapturePlan
from vmsnap.model.guest import Guest, GuestState
from vmsnap.model.hints import HINT_BLOCK_BYTES, BlockSet, DiskHint
from vmsnap.model.ids import RunId, SnapshotId
from vmsnap.model.journal import Resource, ResourceKind
from vmsnap.testing.fake_host import FakeHost


class FakeHints:
    """``ports.hints.ChangeHints`` over a ``FakeHost``. Make a new one for each process: it keeps nothing between calls."""

    def __init__(self, host: FakeHost) -> None:
        self._host = host

    @property
    def kinds(self) -> frozenset[ResourceKind]:
        """Return the kinds of resource that this owner releases."""
        return frozenset({ResourceKind.HINTS})

    def resource(self, plan: CapturePlan) -> Resource:
        """Name the notes."""
        return Resource(kind=ResourceKind.HINTS, run=plan.run, guest=plan.guest.name, name=f"notes of {plan.run}")

    def begin(self, plan: CapturePlan) -> None:
        """Begin notes."""
        machine = self._host.machine(plan.guest.name)
        if machine.state is GuestState.SHUT_OFF:
            raise DriverError("the guest is off")
        self._host.live_on()
        for disk in plan.guest.disks:
            machine.notes.setdefault(plan.run, {})[disk.target] = set()
            self._host.between(f"notes of {disk.target} begun")

    def read(self, plan: CapturePlan, *, since: SnapshotId) -> tuple[DiskHint, ...]:
        """Return what was written since a snapshot."""
        self._host.live_on()
        notes = self._host.machine(plan.guest.name).notes.get(RunId(since), {})
        return tuple(
            DiskHint(target=disk.target, since=since, reason=f"there are no notes since {since}")
            if disk.target not in notes
            else DiskHint(
                target=disk.target,
                since=since,
                written=BlockSet.of(
                    ((block * HINT_BLOCK_BYTES, 1) for block in notes[disk.target]), size_bytes=disk.size_bytes
                ),
            )
            for disk in plan.guest.disks
        )

    def keep(self, guest: Guest, *, run: RunId | None) -> None:
        """End all notes but a run's."""
        machine = self._host.machine(guest.name)
        for other in [one for one in machine.notes if one != run]:
            del machine.notes[other]
            self._host.between("notes ended")

    def known_since(self, guest: Guest) -> tuple[SnapshotId, ...]:
        """Return the snapshots since which all disks' writes are known."""
        targets = {disk.target for disk in guest.disks}
        notes = self._host.machine(guest.name).notes
        return tuple(SnapshotId(run) for run, disks in notes.items() if set(disks) == targets)

    def release(self, resource: Resource, *, deadline: timedelta) -> None:
        """End a run's notes."""
        del deadline
        if resource.kind not in self.kinds:
            raise BugError(f"hints are no {resource.kind}")
        machine = self._host.machines.get(resource.guest)
        if machine is not None:
            machine.notes.pop(resource.run, None)

    def owned(self) -> tuple[Resource, ...]:
        """Return nothing: which notes are of use, only a backup knows."""
        return ()
