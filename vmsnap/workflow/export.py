"""Disks of a snapshot as plain files, from the local store or straight from the replica."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path

from vmsnap.errors import CleanupError
from vmsnap.model.history import Action
from vmsnap.model.ids import folder_name
from vmsnap.model.journal import Resource, RunKind
from vmsnap.model.manifest import DiskRecord, Snapshot
from vmsnap.model.report import ExportOptions, ExportReport
from vmsnap.ports.clock import Cancel
from vmsnap.ports.progress import Progress
from vmsnap.ports.replica import Replica
from vmsnap.ports.store import ByteProgress, DiskContent
from vmsnap.workflow.chronicle import Chronicle, audited
from vmsnap.workflow.restore import counted, find_anywhere
from vmsnap.workflow.run import Run, closing, undone_on_failure
from vmsnap.workflow.world import World

_DIGEST_BYTES = 32


def export(
    world: World,
    *,
    reference: str,
    options: ExportOptions,
    progress: Progress,
    cancel: Cancel,
) -> ExportReport:
    """Write each disk of a snapshot as ``TARGET.raw`` or ``TARGET.qcow2`` into a folder; no file that is there is touched.

    A snapshot that the local store does not have is taken from the replica, every block compared with its digest. A file
    has its name only once it is whole. Raises SnapshotNotFoundError, PreconditionError, NoSpaceError, CancelledError, what the
    replica raises.
    """
    snapshot, replica = find_anywhere(world, reference, replica_only=options.replica_only)
    guest = snapshot.manifest.guest
    chronicle = Chronicle(world, kind=RunKind.EXPORT, guest=guest)
    told = chronicle.telling(progress)
    run_id, started, began = world.new_run_id(), world.clock.now(), world.clock.monotonic()
    names = {disk.target: f"{folder_name(disk.target)}.{options.image_format}" for disk in snapshot.manifest.disks}
    with chronicle.of(run_id), ExitStack() as stack:
        detail = f"as {options.image_format} to {options.folder}"
        stack.enter_context(audited(world, Action.EXPORT, guest=guest, subject=snapshot.id, detail=detail))
        journal = stack.enter_context(
            closing(world.journals.begin(run_id, kind=RunKind.EXPORT, guest=guest, at=started))
        )
        run = Run(world, journal=journal, progress=told)
        with undone_on_failure(run.end, doing="the export"):
            if replica is None:
                hold = world.store.hold_resource(run_id, snapshot=snapshot)
                run.acquire(hold, partial(world.store.hold, hold))
            resource = world.folders.resource(run_id, guest=guest, folder=options.folder)
            run.acquire(resource, lambda: world.folders.begin(resource, names=tuple(names.values())))
            with run.step("write"):
                writer = _Writer(world, resource=resource, snapshot=snapshot, replica=replica, cancel=cancel)
                writer.write(names, qcow2=options.image_format == "qcow2", progress=told.bytes_done)
            with run.step("finish"):
                files = tuple(str(world.folders.finish(resource, name=name)) for name in names.values())
        chronicle.learned(snapshot=snapshot.id)
        errors = run.end()
        if errors:
            raise CleanupError(f"snapshot {snapshot.id} is exported, but the run left something behind", causes=errors)
    return ExportReport(
        snapshot=snapshot.id,
        guest=guest,
        source="local" if replica is None else "replica",
        image_format=options.image_format,
        files=files,
        seconds=round(world.clock.monotonic() - began, 3),
    )


class _Writer:
    def __init__(
        self, world: World, *, resource: Resource, snapshot: Snapshot, replica: Replica | None, cancel: Cancel
    ) -> None:
        self._world = world
        self._resource = resource
        self._snapshot = snapshot
        self._replica = replica
        self._cancel = cancel

    def write(self, names: dict[str, str], *, qcow2: bool, progress: ByteProgress) -> None:
        """Write the drafts of all disks."""
        total, before = sum(disk.size_bytes for disk in self._snapshot.manifest.disks), 0
        local = {} if self._replica is not None else {one.record.target: one for one in self._local()}
        for record in self._snapshot.manifest.disks:
            self._cancel.check()
            draft = self._draft(names[record.target])
            raw = self._draft(f"{names[record.target]}.raw") if qcow2 else draft
            if self._replica is not None:
                self._fetch(self._replica, record, raw=raw, progress=counted(progress, before=before, total=total))
            elif not qcow2:
                self._world.folders.copy(local[record.target].image, draft=draft, cancel=self._cancel)
            else:
                raw = local[record.target].image
            if qcow2:
                self._world.folders.convert(raw, draft=draft, cancel=self._cancel)
                if self._replica is not None:
                    raw.unlink()
            before += record.size_bytes
            progress(before, total)

    def _local(self) -> tuple[DiskContent, ...]:
        return self._world.store.contents(self._snapshot)

    def _draft(self, name: str) -> Path:
        return self._world.folders.draft(self._resource, name=name)

    def _fetch(self, replica: Replica, record: DiskRecord, *, raw: Path, progress: ByteProgress) -> None:
        digests = self._draft(f"{record.digests}.tmp")
        blocks = -(-record.size_bytes // record.block_bytes)
        for path, size in ((raw, record.size_bytes), (digests, blocks * _DIGEST_BYTES)):
            self._world.folders.create(path, size_bytes=size)
        content = DiskContent(record=record, image=raw, digests=digests)
        replica.fetch_disk(self._snapshot, content=content, progress=progress, cancel=self._cancel)
        digests.unlink()
