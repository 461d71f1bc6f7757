"""Collecting the replica's garbage, and looking what copies it has."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import timedelta
from queue import Empty, SimpleQueue

from vmsnap.errors import PreconditionError, StoreUnreachableError
from vmsnap.model.collection import CollectReport
from vmsnap.model.copies import ReplicaCopies
from vmsnap.model.history import Action
from vmsnap.model.policy import Policy
from vmsnap.ports.clock import Cancel
from vmsnap.ports.progress import Progress
from vmsnap.ports.replica import Replica
from vmsnap.ports.upkeep import CollectWishes, Upkeep
from vmsnap.workflow.chronicle import audit, audited
from vmsnap.workflow.prune import lock_copies
from vmsnap.workflow.run import as_vmsnap_error
from vmsnap.workflow.world import World

_PATIENCE = timedelta(seconds=15)


def collect(
    world: World, *, policies: Sequence[Policy], wishes: CollectWishes, progress: Progress, cancel: Cancel
) -> CollectReport:
    """Lock what is kept at the replica for longer, where it has locks; remove what nobody needs; record what was done.

    A dry run only looks. ``policies`` are those of all guests.

    May be repeated, and cut anywhere. Raises PreconditionError where there is no replica, BusyError where another collector is
    at it, VerificationError where it cannot be told what is needed.
    """
    if world.upkeep is None:
        raise PreconditionError(
            "there is no replica, and in the local store nothing is left to collect",
            remedy="snapshots are removed by 'vmsnap prune'; to have a replica, write [replica] into vmsnap.toml",
        )
    if wishes.dry_run:
        return world.upkeep.collect(wishes, progress=progress, cancel=cancel)
    try:
        renewed = _lock(world, world.upkeep, policies=policies, progress=progress, cancel=cancel)
        report = world.upkeep.collect(wishes, progress=progress, cancel=cancel).model_copy(update={"renewed": renewed})
    except Exception:
        with audited(world, Action.COLLECT, guest="", subject="replica"):
            raise
    for one in report.ended:
        detail = f"upload {one.upload} of snapshot {one.snapshot} from {one.host} was called over: {one.reason}"
        audit(world, Action.COLLECT, guest=one.guest, subject="replica", detail=detail)
    removed, found = report.removed, report.found
    if removed.objects or found.objects or report.rewritten.objects:
        detail = (
            f"removed {removed.objects} objects of {removed.size_bytes} bytes; found {found.objects} more of "
            f"{found.size_bytes} bytes; rewrote {report.rewritten.objects} packs"
        )
        audit(world, Action.COLLECT, guest="", subject="replica", detail=detail)
    return report


def copies_of(replica: Replica, *, guest: str | None, patience: timedelta = _PATIENCE) -> ReplicaCopies:
    """Return what the replica has, of one guest or of all, or that it does not answer: nobody waits for it any longer.

    What is asked of it goes on in a thread of its own meanwhile, and is forgotten.
    """
    found: SimpleQueue[ReplicaCopies] = SimpleQueue()

    def ask() -> None:
        try:
            found.put(ReplicaCopies(replica=True, snapshots=replica.snapshots(guest)))
        except Exception as error:  # noqa: BLE001 - told by who asked
            found.put(ReplicaCopies(replica=True, problem=as_vmsnap_error(error, doing="asking the replica")))

    threading.Thread(target=ask, name="copies", daemon=True).start()
    try:
        return found.get(timeout=patience.total_seconds())
    except Empty:
        seconds = int(patience.total_seconds())
        problem = StoreUnreachableError(
            f"the replica has not answered within {seconds} s", remedy="'vmsnap doctor' says what is wrong with it"
        )
        return ReplicaCopies(replica=True, problem=problem)


def _lock(world: World, upkeep: Upkeep, *, policies: Sequence[Policy], progress: Progress, cancel: Cancel) -> int:
    renewed = 0
    for policy in policies if upkeep.locks else ():
        if policy.replica.enabled:
            cancel.check()
            progress.step(f"lock the copies of {policy.guest}")
            renewed += lock_copies(world, upkeep, policy=policy)
    return renewed
