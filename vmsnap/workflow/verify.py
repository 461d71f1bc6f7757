"""Re-reading stored snapshots."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from datetime import timedelta

from vmsnap.errors import SnapshotNotFoundError
from vmsnap.model.history import Action
from vmsnap.model.ids import SnapshotId
from vmsnap.model.manifest import Snapshot, Verification
from vmsnap.model.policy import Policy
from vmsnap.model.report import VerifyReport
from vmsnap.model.verification import VerifyEntry, damage, is_verification_due, last_read
from vmsnap.ports.clock import Cancel
from vmsnap.ports.progress import Progress
from vmsnap.workflow.chronicle import audit
from vmsnap.workflow.run import as_vmsnap_error
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


def verify_due(
    world: World,
    *,
    policies: Sequence[Policy],
    progress: Progress,
    cancel: Cancel,
    leave_out: Collection[SnapshotId] = (),
) -> Iterator[VerifyEntry]:
    """Verify what the policies want read again, one after another, what was read longest ago first.

    What fails is in its entry and stops nothing else. Ends early where ``cancel`` is set. May be repeated.
    """
    due: list[Snapshot] = []
    for policy in policies:
        try:
            now = world.clock.now()
            found = world.store.snapshots(policy.guest) if policy.verify.every is not None else ()
            due += [one for one in found if is_verification_due(one, every=policy.verify.every, now=now)]
        except Exception as error:  # noqa: BLE001 - one guest's failure stops no other
            yield VerifyEntry(guest=policy.guest, error=as_vmsnap_error(error, doing="looking what is to be verified"))
    for snapshot in sorted(due, key=lambda one: (last_read(one), one.id)):
        if snapshot.id in leave_out:
            continue
        if cancel.is_set():
            return
        guest = snapshot.manifest.guest
        progress.note(f"verifying snapshot {snapshot.id} of {guest}")
        try:
            report = verify(world, reference=snapshot.id, progress=progress, cancel=cancel)
        except SnapshotNotFoundError:
            continue  # retention was faster
        except Exception as error:  # noqa: BLE001 - as above
            if cancel.is_set():
                return
            told = as_vmsnap_error(error, doing=f"verifying snapshot {snapshot.id}")
            yield VerifyEntry(guest=guest, snapshot=snapshot.id, error=told)
        else:
            yield VerifyEntry(guest=guest, snapshot=snapshot.id, report=report, error=damage(report, guest=guest))
