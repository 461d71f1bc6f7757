"""Re-reading stored snapshots."""

from __future__ import annotations

from datetime import timedelta

from vmsnap.model.history import Action
from vmsnap.model.manifest import Verification
from vmsnap.model.report import VerifyReport
from vmsnap.ports.clock import Cancel
from vmsnap.ports.progress import Progress
from vmsnap.workflow.chronicle import audit
from vmsnap.workflow.world import World

_LOCK_TIMEOUT = timedelta(minutes=30)


def verify(world: World, *, reference: str, progress: Progress, cancel: Cancel) -> VerifyReport:
    """Read every block of a snapshot, compare it with its digest, and record the result with the snapshot.

    Defects are in the report; they raise nothing. Raises SnapshotNotFoundError, CancelledError.
    """
    snapshot = world.store.find(reference)
    progress.step("verify")
    began = world.clock.monotonic()
    blocks, defects = world.store.verify(snapshot, progress=progress.bytes_done, cancel=cancel)
    verification = Verification(at=world.clock.now(), blocks=blocks, bad_blocks=len(defects))
    # Under the lock, so that a pin set meanwhile is not lost.
    with world.store.lock(snapshot.manifest.guest, timeout=_LOCK_TIMEOUT):
        current = world.store.find(snapshot.id)
        world.store.mark(current, marks=current.marks.model_copy(update={"verification": verification}))
    found = f"{blocks} blocks read, {len(defects)} defects"
    audit(world, Action.VERIFY, guest=snapshot.manifest.guest, subject=snapshot.id, detail=found)
    return VerifyReport(
        snapshot=snapshot.id, blocks=blocks, defects=defects, seconds=round(world.clock.monotonic() - began, 3)
    )
