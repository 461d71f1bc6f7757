# ruff: noqa: D102 - the ports state the contracts
"""A fake of exports of the replica."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

from vmsnap.errors import PreconditionError, StoreUnreachableError
from vmsnap.model.capture import DiskImage
from vmsnap.model.export import ExportPhase, ExportPlan, ExportStatus
from vmsnap.model.ids import RunId
from vmsnap.model.journal import Resource, ResourceKind
from vmsnap.ports.replica import Replica


class FakeExports:
    """Exports in memory: what they fetch comes when a test says so. ``away``: the replica does not answer.

    ``held`` are the runs whose snapshots are held in the replica.
    """

    def __init__(self, replica: Callable[[], Replica | None], *, between: Callable[[str], None]) -> None:
        self._replica = replica
        self._between = between
        self.statuses: dict[RunId, ExportStatus] = {}
        self.held: set[RunId] = set()
        self.hurried: set[RunId] = set()
        self.away = False

    @property
    def kinds(self) -> frozenset[ResourceKind]:
        return frozenset({ResourceKind.REPLICA_EXPORT})

    def resource(self, plan: ExportPlan) -> Resource:
        return self._resource(plan.run, guest=plan.guest)

    def _resource(self, run: RunId, *, guest: str) -> Resource:
        return Resource(kind=ResourceKind.REPLICA_EXPORT, run=run, guest=guest, name=f"/exports/{run}")

    def socket(self, run: RunId) -> str:
        return f"/run/{run}/nbd"

    def begin(self, plan: ExportPlan) -> None:
        if plan.run not in self.statuses:
            self.statuses[plan.run] = ExportStatus(
                run=plan.run,
                guest=plan.guest,
                snapshot=plan.snapshot,
                hydrate=plan.hydrate,
                phase=ExportPhase.STARTING,
                alive=False,
            )
        self._between("the folder of the export is made")
        self.revive(plan.run)

    def revive(self, run: RunId) -> None:
        status = self.statuses.get(run)
        if status is not None and status.phase is not ExportPhase.LOCAL:
            self._set(run, alive=True)

    def hurry(self, run: RunId) -> None:
        if self.status(run) is not None:
            self.hurried.add(run)

    def wait(self, plan: ExportPlan, *, deadline: timedelta) -> tuple[DiskImage, ...]:
        del deadline
        if self.away:
            raise StoreUnreachableError("the replica does not answer")
        self.held.add(plan.run)
        self._set(plan.run, phase=ExportPhase.SERVING)
        return self._images(plan.run, image_format="nbd")

    def _images(self, run: RunId, *, image_format: str) -> tuple[DiskImage, ...]:
        status = self.statuses[run]
        replica = self._replica()
        assert replica is not None  # noqa: S101 - part of tests
        snapshot = replica.find(status.snapshot)
        return tuple(
            DiskImage(
                target=disk.target,
                path=self.socket(run) if image_format == "nbd" else f"/exports/{run}/{disk.target}.raw",
                image_format=image_format,
                size_bytes=disk.size_bytes,
            )
            for disk in snapshot.manifest.disks
        )

    def images(self, run: RunId) -> tuple[DiskImage, ...]:
        status = self.statuses.get(run)
        if status is None or status.phase not in (ExportPhase.HYDRATED, ExportPhase.LOCAL):
            raise PreconditionError("its disks have not come from the replica yet")
        return self._images(run, image_format="raw")

    def settled(self, run: RunId) -> None:
        if run in self.statuses:
            self._set(run, alive=False)
            self._between("the export's process is ended")
            self.held.discard(run)
            self._set(run, phase=ExportPhase.LOCAL)

    def status(self, run: RunId) -> ExportStatus | None:
        return self.statuses.get(run)

    def all(self) -> tuple[ExportStatus, ...]:
        return tuple(self.statuses[run] for run in sorted(self.statuses))

    def release(self, resource: Resource, *, deadline: timedelta) -> None:
        del deadline
        if resource.run in self.statuses:
            self._set(resource.run, alive=False)
            self._between("the export's process is ended")
        self.held.discard(resource.run)
        self.statuses.pop(resource.run, None)

    def owned(self) -> tuple[Resource, ...]:
        return tuple(self._resource(run, guest="") for run in sorted(self.statuses))

    # What tests do

    def die(self, run: RunId) -> None:
        """End an export's process, as a crash would."""
        self._set(run, alive=False)

    def bring(self, run: RunId) -> None:
        """Let everything have come."""
        self._set(run, phase=ExportPhase.HYDRATED)

    def _set(self, run: RunId, *, phase: ExportPhase | None = None, alive: bool | None = None) -> None:
        status = self.statuses[run]
        self.statuses[run] = replace(
            status,
            phase=status.phase if phase is None else phase,
            alive=status.alive if alive is None else alive,
        )
