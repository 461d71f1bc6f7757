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
from vmsnap.model.verification import (
    VerifyEntry,
    VerifyWish,
    damage,
    is_verification_due,
    last_read,
    share_of_day,
)
from vmsnap.ports.clock import Cancel
from vmsnap.ports.progress import Progress
from vmsnap.workflow.chronicle import audit
from vmsnap.workflow.mending import mend_here, mend_there
from vmsnap.workflow.replicate import replica_of
from vmsnap.workflow.run import as_vmsnap_error
from vmsnap.workflow.world import World

_LOCK_TIMEOUT = timedelta(minutes=30)


def verify(
    world: World, *, reference: str, wish: VerifyWish | None = None, progress: Progress, cancel: Cancel
) -> VerifyReport:
    """Read a snapshot again, here or at the replica, compare it with its digests, and record what was found here.

    With ``repair``, what is damaged is repaired from the other copy, and read again. Defects are in the report; they raise
    nothing. Raises SnapshotNotFoundError, ConfigError without the replica that is asked for, CancelledError, and where
    nothing can be repaired what ``workflow.mending`` raises.
    """
    wish = wish or VerifyWish()
    began = world.clock.monotonic()
    if wish.replica:
        report = _verify_there(world, reference=reference, wish=wish, progress=progress, cancel=cancel)
    else:
        report = _verify_here(world, reference=reference, wish=wish, progress=progress, cancel=cancel)
    found = f"{report.blocks} blocks read, {len(report.defects)} defects"
    if report.replica:
        found += ", at the replica"
    if report.repaired:
        found += f", {len(report.repaired)} before a repair"
    audit(world, Action.VERIFY, guest=report.guest, subject=report.snapshot, detail=found)
    return report.model_copy(update={"seconds": round(world.clock.monotonic() - began, 3)})


def _verify_here(world: World, *, reference: str, wish: VerifyWish, progress: Progress, cancel: Cancel) -> VerifyReport:
    snapshot = world.store.find(reference)
    progress.step("verify")
    told = progress.bytes_done
    blocks, defects = world.store.verify(snapshot, share=wish.share, progress=told, cancel=cancel)
    repaired: tuple[str, ...] = ()
    if wish.repair and defects:
        repaired = defects
        _record(world, snapshot=snapshot, blocks=blocks, defects=defects)
        mend_here(world, snapshot=snapshot, progress=progress, cancel=cancel)
        progress.step("verify")
        blocks, defects = world.store.verify(snapshot, progress=told, cancel=cancel)
    if wish.share is None or defects or repaired:
        _record(world, snapshot=snapshot, blocks=blocks, defects=defects)
    return VerifyReport(
        snapshot=snapshot.id,
        guest=snapshot.manifest.guest,
        sample=None if wish.share is None else str(wish.share),
        blocks=blocks,
        defects=defects,
        repaired=repaired,
        seconds=0,
    )


def _record(world: World, *, snapshot: Snapshot, blocks: int, defects: Sequence[str]) -> None:
    verification = Verification(at=world.clock.now(), blocks=blocks, bad_blocks=len(defects))
    # Under the lock, so that a pin set meanwhile is not lost.
    with world.store.lock(snapshot.manifest.guest, timeout=_LOCK_TIMEOUT):
        current = world.store.find(snapshot.id)
        world.store.mark(current, marks=current.marks.model_copy(update={"verification": verification}))


def _verify_there(
    world: World, *, reference: str, wish: VerifyWish, progress: Progress, cancel: Cancel
) -> VerifyReport:
    replica = replica_of(world)
    try:
        snapshot = replica.find(reference)
    except SnapshotNotFoundError:
        # One whose manifest is damaged there is not found there. Here it may be.
        snapshot = world.store.find(reference)
    guest = snapshot.manifest.guest
    progress.step("verify")
    found = replica.check(guest, snapshot=snapshot.id, share=wish.share, progress=progress.bytes_done, cancel=cancel)
    repaired: tuple[str, ...] = ()
    if wish.repair and found.defects:
        if wish.share is not None:  # a repair has to know of all damage
            found = replica.check(guest, snapshot=snapshot.id, share=None, progress=progress.bytes_done, cancel=cancel)
        repaired = found.defects
        found = mend_there(world, guest=guest, found=found, reference=snapshot.id, progress=progress, cancel=cancel)
    return VerifyReport(
        snapshot=snapshot.id,
        guest=guest,
        replica=True,
        sample=None if wish.share is None else str(wish.share),
        blocks=found.blocks,
        defects=found.defects,
        repaired=repaired,
        seconds=0,
    )


def verify_due(
    world: World,
    *,
    policies: Sequence[Policy],
    progress: Progress,
    cancel: Cancel,
    leave_out: Collection[SnapshotId] = (),
) -> Iterator[VerifyEntry]:
    """Verify what the policies want read again, one after another, what was read longest ago first; then the day's shares.

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
    for policy in policies:
        if policy.verify.share_per_day > 0.0:
            yield from _sample(world, policy=policy, progress=progress, cancel=cancel, leave_out=leave_out)


def _sample(
    world: World, *, policy: Policy, progress: Progress, cancel: Cancel, leave_out: Collection[SnapshotId]
) -> Iterator[VerifyEntry]:
    """Read today's share of each of a guest's snapshots, here and at the replica, where that was not done yet.

    The day is noted before: one that fails or is cut is made up for when its share's turn comes again.
    """
    guest, today = policy.guest, world.clock.now().date()
    share = share_of_day(policy.verify.share_per_day, day=today)
    replica = world.replica if policy.replica.enabled else None
    for there in (None, replica) if replica is not None else (None,):
        try:
            if cancel.is_set() or world.samples.last(guest, replica=there is not None) == today:
                continue
            world.samples.note(guest, replica=there is not None, day=today)
            found = world.store.snapshots(guest) if there is None else there.snapshots(guest)
        except Exception as error:  # noqa: BLE001 - one guest's failure stops no other
            yield VerifyEntry(guest=guest, error=as_vmsnap_error(error, doing="looking what is to be read again"))
            continue
        for snapshot in found:
            if cancel.is_set():
                return
            if there is None and (snapshot.id in leave_out or last_read(snapshot).date() == today):
                continue
            wish = VerifyWish(replica=there is not None, share=share)
            try:
                report = verify(world, reference=snapshot.id, wish=wish, progress=progress, cancel=cancel)
            except SnapshotNotFoundError:
                continue  # retention was faster
            except Exception as error:  # noqa: BLE001 - as above
                if cancel.is_set():
                    return
                told = as_vmsnap_error(error, doing=f"verifying snapshot {snapshot.id}")
                yield VerifyEntry(guest=guest, snapshot=snapshot.id, error=told)
            else:
                yield VerifyEntry(guest=guest, snapshot=snapshot.id, report=report, error=damage(report, guest=guest))
