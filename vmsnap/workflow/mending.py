"""Repairing a snapshot here from the replica, and there from here."""

from __future__ import annotations

from datetime import timedelta

from vmsnap.errors import CleanupError, SnapshotNotFoundError, VerificationError
from vmsnap.model.journal import RunKind
from vmsnap.model.manifest import Snapshot
from vmsnap.model.verification import Checked
from vmsnap.ports.clock import Cancel
from vmsnap.ports.progress import Progress
from vmsnap.workflow.replicate import local_copy, replica_of
from vmsnap.workflow.run import Run, closing, undone_on_failure
from vmsnap.workflow.world import World

_LOCK_TIMEOUT = timedelta(minutes=30)
_ROUNDS = 3


def mend_here(world: World, *, snapshot: Snapshot, progress: Progress, cancel: Cancel) -> None:
    """Repair a snapshot of the local store with blocks of the replica, in place.

    Each is compared with the digest of its place before it is written. Raises ConfigError without a replica,
    SnapshotNotFoundError where it has no copy, VerificationError where its manifest is damaged too.
    """
    replica = replica_of(world)
    there = replica.find(snapshot.id)
    if there.manifest != snapshot.manifest:
        raise VerificationError(
            f"snapshot {snapshot.id} at the replica is another than the one here: nothing is repaired",
            remedy="compare 'vmsnap show' of both; the damaged one cannot be trusted with its own manifest",
        )
    progress.step("repair")
    # Under the lock: nobody removes it meanwhile, or begins another snapshot over its blocks.
    with world.store.lock(snapshot.manifest.guest, timeout=_LOCK_TIMEOUT):
        world.store.mend(snapshot, read=replica.reader(there), cancel=cancel)


def mend_there(
    world: World, *, guest: str, found: Checked, reference: str, progress: Progress, cancel: Cancel
) -> Checked:
    """Repair a snapshot of the replica from the local store, and return what reading it again finds.

    Raises SnapshotNotFoundError where it is not here, VerificationError where it is damaged here too.
    """
    replica = replica_of(world)
    try:
        snapshot = world.store.find(reference)
    except SnapshotNotFoundError as error:
        raise SnapshotNotFoundError(
            f"snapshot {reference} of '{guest}' is damaged at the replica, and is not here: it cannot be repaired",
            details="\n".join(found.defects[:20]),
            remedy="another host may have it: run 'vmsnap verify --replica --repair' there; or use another snapshot",
        ) from error
    run_id = world.new_run_id()
    with closing(world.journals.begin(run_id, kind=RunKind.REPLICATE, guest=guest, at=world.clock.now())) as journal:
        run = Run(world, journal=journal, progress=progress)
        with undone_on_failure(run.release_all, doing="repairing the replica"):
            hold = world.store.hold_resource(run_id, snapshot=snapshot)
            run.acquire(hold, lambda: world.store.hold(hold))
            for _ in range(_ROUNDS):
                progress.step("repair")
                copy = local_copy(world, snapshot=snapshot)
                replica.mend(copy, found=found, progress=progress.bytes_done, cancel=cancel)
                progress.step("verify")
                # What it was repaired with may lie in packs whose damage nobody knew of.
                told = progress.bytes_done
                found = replica.check(guest, snapshot=snapshot.id, share=None, progress=told, cancel=cancel)
                if not found.defects:
                    break
        errors = run.release_all()
        if errors:
            raise CleanupError(f"snapshot {snapshot.id} was repaired, but is still held here", causes=errors)
        journal.finish()
    return found
