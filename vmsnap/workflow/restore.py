"""Bringing a snapshot from the replica back into the local store, on any host."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from datetime import datetime, timedelta
from pathlib import Path

from vmsnap.errors import CleanupError, SnapshotNotFoundError
from vmsnap.model.durations import format_duration
from vmsnap.model.history import Action
from vmsnap.model.journal import RunKind
from vmsnap.model.manifest import Pin, Snapshot, StoreRecord
from vmsnap.model.report import RestoreOptions, RestoreReport
from vmsnap.ports.clock import Cancel
from vmsnap.ports.progress import Progress
from vmsnap.ports.replica import Replica
from vmsnap.ports.store import ByteProgress, DiskContent, Staging
from vmsnap.workflow.backup import refuse
from vmsnap.workflow.chronicle import Chronicle, audited
from vmsnap.workflow.replicate import replica_of
from vmsnap.workflow.run import Run, closing, undone_on_failure
from vmsnap.workflow.world import World

_LOCK_TIMEOUT = timedelta(minutes=5)
_REASON = "restored"


def restore(
    world: World, *, reference: str, options: RestoreOptions, progress: Progress, cancel: Cancel
) -> RestoreReport:
    """Copy a snapshot of the replica into the local store; it is published once every digest has been compared.

    It is pinned, as ``options`` say, as soon as it is there: this host's retention may not want it. Only reads the replica.
    May be repeated; a snapshot that is here already is pinned, unless a pin holds it. Raises SnapshotNotFoundError,
    PreconditionError where there is too little room, VerificationError, CancelledError, what the replica raises.
    """
    replica = replica_of(world)
    snapshot = replica.find(reference)
    manifest = snapshot.manifest
    began = world.clock.monotonic()
    if any(one.id == snapshot.id for one in world.store.snapshots(manifest.guest)):
        return _report(world, _held(world, snapshot, options=options), began=began, there=True)
    needed = sum(disk.data_bytes for disk in manifest.disks)
    refuse(world.store.findings(needed_bytes=needed), what="the store cannot take the snapshot")
    chronicle = Chronicle(world, kind=RunKind.RESTORE, guest=manifest.guest)
    told = chronicle.telling(progress)
    run_id, started = world.new_run_id(), world.clock.now()
    with chronicle.of(run_id), ExitStack() as stack:
        stack.enter_context(
            audited(world, Action.RESTORE, guest=manifest.guest, subject=snapshot.id, detail=_detail(options))
        )
        journal = stack.enter_context(
            closing(world.journals.begin(run_id, kind=RunKind.RESTORE, guest=manifest.guest, at=started))
        )
        run = Run(world, journal=journal, progress=told)
        with undone_on_failure(run.end, doing="the restore"):
            with world.store.lock(manifest.guest, timeout=_LOCK_TIMEOUT):
                resource = world.store.staging_resource(run_id, guest=manifest.guest)
                staging = run.acquire(resource, lambda: world.store.stage(run_id, guest=manifest.guest))
            with run.step("fetch"):
                _fetch(world, replica, snapshot=snapshot, staging=staging, waiting=(told, cancel))
            with run.step("publish"), world.store.lock(manifest.guest, timeout=_LOCK_TIMEOUT):
                pin = _pin(options, now=world.clock.now())
                restored = world.store.publish_copy(staging, manifest=manifest, pin=pin)
        seconds = round(world.clock.monotonic() - began, 3)
        logical = sum(disk.size_bytes for disk in manifest.disks)
        cost = StoreRecord(logical_bytes=logical, new_bytes=needed, seconds=seconds)
        chronicle.learned(snapshot=snapshot.id, store=cost)
        errors = run.end()
        if errors:
            raise CleanupError(f"snapshot {snapshot.id} is restored, but the run left something behind", causes=errors)
    return _report(world, restored, began=began, there=False)


def _fetch(
    world: World, replica: Replica, *, snapshot: Snapshot, staging: Staging, waiting: tuple[Progress, Cancel]
) -> None:
    progress, cancel = waiting
    total, before = sum(disk.size_bytes for disk in snapshot.manifest.disks), 0
    for record in snapshot.manifest.disks:
        tell = counted(progress.bytes_done, before=before, total=total)

        def fill(content: DiskContent, tell: ByteProgress = tell) -> None:
            replica.fetch_disk(snapshot, content=content, progress=tell, cancel=cancel)

        world.store.receive_disk(staging, record=record, fill=fill)
        before += record.size_bytes
    for file in replica.fetch_files(snapshot):
        with tempfile.TemporaryDirectory(prefix="vmsnap-") as folder:
            path = Path(folder) / "file"
            path.write_bytes(file.data)
            world.store.add_file(staging, name=file.name, source=path)


def counted(progress: ByteProgress, *, before: int, total: int) -> ByteProgress:
    """Return the progress of one disk among several."""
    return lambda done, _: progress(before + done, total)


def find_anywhere(world: World, reference: str, *, replica_only: bool) -> tuple[Snapshot, Replica | None]:
    """Return a snapshot and, where it is taken from there, the replica: the local store goes first."""
    if not replica_only:
        try:
            return world.store.find(reference), None
        except SnapshotNotFoundError:
            if world.replica is None:
                raise
    replica = replica_of(world)
    return replica.find(reference), replica


def _pin(options: RestoreOptions, *, now: datetime) -> Pin | None:
    if options.keep is None:
        return None
    return Pin(owner=options.owner, reason=_REASON, since=now, until=now + options.keep)


def _detail(options: RestoreOptions) -> str:
    return "" if options.keep is None else f"held for {format_duration(options.keep)}, for {options.owner}"


def _held(world: World, snapshot: Snapshot, *, options: RestoreOptions) -> Snapshot:
    """Pin a snapshot that is here, and return it; a pin that holds it is left as it is. Raises SnapshotNotFoundError."""
    # Under the lock, so that no prune removes it meanwhile, and nobody else's pin is lost.
    with world.store.lock(snapshot.manifest.guest, timeout=_LOCK_TIMEOUT):
        here, now = world.store.find(snapshot.id), world.clock.now()
        pin = _pin(options, now=now)
        if pin is None or (here.marks.pin is not None and here.marks.pin.holds(now)):
            return here
        detail = f"for {pin.owner}, until {pin.until}: {pin.reason}"
        with audited(world, Action.PIN, guest=here.manifest.guest, subject=here.id, detail=detail):
            return world.store.mark(here, marks=here.marks.model_copy(update={"pin": pin}))


def _report(world: World, snapshot: Snapshot, *, began: float, there: bool) -> RestoreReport:
    return RestoreReport(
        snapshot=snapshot.id,
        guest=snapshot.manifest.guest,
        there=there,
        logical_bytes=sum(disk.size_bytes for disk in snapshot.manifest.disks),
        seconds=round(world.clock.monotonic() - began, 3),
        pin=snapshot.marks.pin,
    )
