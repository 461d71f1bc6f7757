"""Re-reading stored snapshots."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from datetime import timedelta

from vmsnap.errors import SnapshotNotFoundError, StoreUnreachableError
from vmsnap.model.history import Action
from vmsnap.model.ids import SnapshotId
from vmsnap.model.manifest import Snapshot, Verification
from vmsnap.model.policy import Policy
from vmsnap.model.report import VerifyReport
from vmsnap.model.verification import (
    VerifyEntry,
    VerifyTurn,
    VerifyWish,
    damage,
    last_read,
    share_of_day,
    turns_of,
)
from vmsnap.ports.clock import Cancel
from vmsnap.ports.progress import Progress
from vmsnap.ports.replica import Replica
from vmsnap.workflow.chronicle import audit
from vmsnap.workflow.damage import record_there
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
        record_there(world, report)
    else:
        report = _verify_here(world, reference=reference, wish=wish, progress=progress, cancel=cancel)
    part = "" if report.sample is None else f"part {report.sample}, "
    found = f"{part}{report.blocks} blocks read, {len(report.defects)} defects"
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
    if wish.share is None or wish.share.of == 1 or defects or repaired:
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
    """Verify what the policies want read again, one after another, what waits longest first; then the day's shares.

    First come the guests of which nothing was found whole lately. What fails is in its entry and stops nothing else; only a
    replica that cannot be reached is not asked again. Ends early where ``cancel`` is set. May be repeated.
    """
    turns: list[VerifyTurn] = []
    for policy in policies:
        try:
            now = world.clock.now()
            found = world.store.snapshots(policy.guest) if policy.verify.every is not None else ()
            readable = [one for one in found if one.id not in leave_out]
            turns += turns_of(readable, every=policy.verify.every, now=now)
        except Exception as error:  # noqa: BLE001 - one guest's failure stops no other
            yield VerifyEntry(guest=policy.guest, error=as_vmsnap_error(error, doing="looking what is to be verified"))
    whole: set[SnapshotId] = set()
    for turn in sorted(turns, key=lambda one: one.rank):
        if cancel.is_set():
            return
        if turn.unless in whole:
            continue
        progress.note(f"verifying snapshot {turn.snapshot.id} of {turn.snapshot.manifest.guest}")
        entry = _read(world, snapshot=turn.snapshot, wish=VerifyWish(), progress=progress, cancel=cancel)
        if entry is None:
            continue
        if entry.error is None:
            whole.add(turn.snapshot.id)
        yield entry
    replica = world.replica
    for policy in policies:
        if policy.verify.share_per_day == 0.0:
            continue
        yield from _sample(world, policy=policy, there=None, progress=progress, cancel=cancel, leave_out=leave_out)
        if replica is None or not policy.replica.enabled:
            continue
        for entry in _sample(world, policy=policy, there=replica, progress=progress, cancel=cancel):
            yield entry
            if isinstance(entry.error, StoreUnreachableError):
                # Each further question would wait for as long as replica.retry_for says. The next round asks them.
                replica = None
                break


def _sample(
    world: World,
    *,
    policy: Policy,
    there: Replica | None,
    progress: Progress,
    cancel: Cancel,
    leave_out: Collection[SnapshotId] = (),
) -> Iterator[VerifyEntry]:
    """Read today's share of each of a guest's snapshots, here or ``there``, where that was not done yet.

    The day is noted before the reading: what fails or dies in it is not begun again all day long, but made up for when its
    share's turn comes again. Where it cannot even be told which snapshots there are, the next round tries again.
    """
    guest, today = policy.guest, world.clock.now().date()
    try:
        if cancel.is_set() or world.samples.last(guest, replica=there is not None) == today:
            return
        found = world.store.snapshots(guest) if there is None else there.snapshots(guest)
        world.samples.note(guest, replica=there is not None, day=today)
    except Exception as error:  # noqa: BLE001 - one guest's failure stops no other
        yield VerifyEntry(guest=guest, error=as_vmsnap_error(error, doing="looking what is to be read again"))
        return
    wish = VerifyWish(replica=there is not None, share=share_of_day(policy.verify.share_per_day, day=today))
    for snapshot in found:
        if cancel.is_set():
            return
        if there is None and (snapshot.id in leave_out or last_read(snapshot).date() == today):
            continue
        entry = _read(world, snapshot=snapshot, wish=wish, progress=progress, cancel=cancel)
        if entry is not None:
            yield entry


def _read(
    world: World, *, snapshot: Snapshot, wish: VerifyWish, progress: Progress, cancel: Cancel
) -> VerifyEntry | None:
    """Read one that was due, and return what came of it. None: it is gone, or the reading was cancelled."""
    guest = snapshot.manifest.guest
    try:
        report = verify(world, reference=snapshot.id, wish=wish, progress=progress, cancel=cancel)
    except SnapshotNotFoundError:
        return None  # retention was faster
    except Exception as error:  # noqa: BLE001 - one snapshot's failure stops no other
        if cancel.is_set():
            return None
        told = as_vmsnap_error(error, doing=f"verifying snapshot {snapshot.id}")
        return VerifyEntry(guest=guest, snapshot=snapshot.id, error=told)
    return VerifyEntry(guest=guest, snapshot=snapshot.id, report=report, error=damage(report, guest=guest))
