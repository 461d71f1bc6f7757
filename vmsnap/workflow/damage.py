"""Which copies at the replica are known to be damaged, until they are read again and found whole, repaired, or gone.

Of the local store the snapshots' own marks say that. What is found at the replica is of this host alone, and kept here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from vmsnap.errors import SnapshotNotFoundError, VerificationError, VmsnapError
from vmsnap.model.ids import SnapshotId
from vmsnap.model.report import VerifyReport
from vmsnap.model.verification import Share, damage
from vmsnap.ports.clock import Cancel
from vmsnap.ports.replica import Replica
from vmsnap.workflow.run import as_vmsnap_error
from vmsnap.workflow.world import World

_LOG = logging.getLogger(__name__)
_NEXT_TO_NOTHING = Share(number=0, of=1_000_000_000)


def record_there(world: World, report: VerifyReport) -> None:
    """Remember what reading a copy at the replica came to. A share without defects says nothing of the rest.

    Never raises: where it cannot be written down, the log says so.
    """
    found = damage(report, guest=report.guest)
    if found is None and report.sample is not None:
        return
    try:
        world.samples.mark(report.guest, snapshot=report.snapshot, damage=None if found is None else found.brief)
    except Exception as error:  # noqa: BLE001 - whatever it is, who asked gets the report
        told = as_vmsnap_error(error, doing="writing down what reading again came to")
        _LOG.error("snapshot %s: %s", report.snapshot, told.brief, exc_info=told is not error)


def damage_there(world: World, *, guest: str, cancel: Cancel) -> Iterator[VerificationError]:
    """Return an error for each copy at the replica that is known to be damaged. One that is gone is forgotten.

    Where the replica does not answer, what is known stays. Raises DriverError, PreconditionError, NoSpaceError.
    """
    known = world.samples.damaged(guest)
    if not known or world.replica is None:
        return
    gone = _gone(world.replica, guest=guest, snapshots=frozenset(known), cancel=cancel)
    for snapshot, brief in sorted(known.items()):
        if snapshot in gone:
            world.samples.mark(guest, snapshot=snapshot, damage=None)
        else:
            yield VerificationError(
                brief,
                remedy=f"'vmsnap verify {snapshot} --replica --repair' repairs it where the copy here is intact; "
                f"'vmsnap verify {snapshot} --replica' reads it again",
            )


def _gone(replica: Replica, *, guest: str, snapshots: frozenset[SnapshotId], cancel: Cancel) -> frozenset[SnapshotId]:
    """Return which of the snapshots are not at the replica any more; none where it does not answer."""
    gone = set()
    try:
        for snapshot in snapshots - {one.id for one in replica.snapshots(guest)}:
            # One whose manifest is damaged is not listed. Whoever reads it learns of that.
            try:
                replica.check(
                    guest, snapshot=snapshot, share=_NEXT_TO_NOTHING, progress=lambda _done, _total: None, cancel=cancel
                )
            except SnapshotNotFoundError:
                gone.add(snapshot)
    except VmsnapError as error:
        _LOG.info("whether damaged copies of %s are still at the replica is not known: %s", guest, error.brief)
    return frozenset(gone)
