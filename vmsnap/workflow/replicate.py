"""Sending snapshots to the replica."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from vmsnap.errors import (
    CancelledError,
    CleanupError,
    ConfigError,
    SnapshotNotFoundError,
    StoreUnreachableError,
    VmsnapError,
)
from vmsnap.model.copies import LOCKED_AT_LEAST
from vmsnap.model.due import ReplicateEntry
from vmsnap.model.history import Action
from vmsnap.model.journal import RunKind
from vmsnap.model.manifest import Snapshot, StoreRecord
from vmsnap.model.policy import Policy
from vmsnap.model.report import BackupReport, ReplicateReport
from vmsnap.ports.clock import Cancel
from vmsnap.ports.progress import Progress
from vmsnap.ports.replica import DiskFile, LocalCopy, Replica, Sent
from vmsnap.workflow.chronicle import Chronicle, audited
from vmsnap.workflow.run import Run, as_vmsnap_error, closing, undone_on_failure
from vmsnap.workflow.world import World

_LOG = logging.getLogger(__name__)


def replica_of(world: World) -> Replica:
    """Return the replica. Raises ConfigError where the host has none."""
    if world.replica is None:
        raise ConfigError(
            "vmsnap.toml names no replica",
            remedy='write a section [replica] with kind = "s3" or kind = "directory" and its place',
        )
    return world.replica


def replicate(world: World, *, reference: str, progress: Progress, cancel: Cancel) -> ReplicateReport:
    """Copy a snapshot of the local store to the replica. May be repeated; what was sent is not sent again.

    A run that dies or fails leaves what it sent, and the next goes on from there. Raises SnapshotNotFoundError, ConfigError,
    BusyError where another process sends, VerificationError where the local copy is damaged, CancelledError, what the
    replica raises.
    """
    replica = replica_of(world)
    snapshot = world.store.find(reference)
    guest = snapshot.manifest.guest
    chronicle = Chronicle(world, kind=RunKind.REPLICATE, guest=guest)
    told = chronicle.telling(progress)
    run_id, started, began = world.new_run_id(), world.clock.now(), world.clock.monotonic()
    with chronicle.of(run_id), ExitStack() as stack:
        stack.enter_context(audited(world, Action.REPLICATE, guest=guest, subject=snapshot.id))
        journal = stack.enter_context(
            closing(world.journals.begin(run_id, kind=RunKind.REPLICATE, guest=guest, at=started))
        )
        run = Run(world, journal=journal, progress=told)
        with undone_on_failure(run.end, doing="sending to the replica"):
            hold = world.store.hold_resource(run_id, snapshot=snapshot)
            run.acquire(hold, lambda: world.store.hold(hold))
            with run.step("send"):
                sent = _send(world, replica, snapshot=snapshot, progress=told, cancel=cancel)
        chronicle.learned(snapshot=snapshot.id, store=_cost(sent, seconds=world.clock.monotonic() - began))
        errors = run.end()
        if errors:
            raise CleanupError(f"snapshot {snapshot.id} is at the replica, but is still held here", causes=errors)
    return ReplicateReport(
        snapshot=snapshot.id,
        guest=guest,
        there=sent.there,
        logical_bytes=sent.logical_bytes,
        sent_bytes=sent.stored_bytes,
        seconds=round(world.clock.monotonic() - began, 3),
    )


def local_copy(world: World, *, snapshot: Snapshot) -> LocalCopy:
    """Return a snapshot of the local store with its files. Hold it meanwhile. Raises SnapshotNotFoundError."""
    nvram = snapshot.manifest.machine.nvram
    files = () if nvram is None else (DiskFile(name=nvram, data=world.store.file(snapshot, name=nvram).read_bytes()),)
    return LocalCopy(snapshot=snapshot, disks=world.store.contents(snapshot), files=files)


def _send(world: World, replica: Replica, *, snapshot: Snapshot, progress: Progress, cancel: Cancel) -> Sent:
    copy = local_copy(world, snapshot=snapshot)
    locks = world.upkeep is not None and world.upkeep.locks
    until = world.clock.now() + LOCKED_AT_LEAST if locks else None
    return replica.send(copy, retain_until=until, progress=progress.bytes_done, cancel=cancel)


def _cost(sent: Sent, *, seconds: float) -> StoreRecord:
    return StoreRecord(logical_bytes=sent.logical_bytes, new_bytes=sent.stored_bytes, seconds=round(seconds, 3))


def is_replicated(policy: Policy) -> bool:
    """Tell whether a policy wants each snapshot sent as soon as it is made."""
    return policy.replica.enabled and policy.replica.after_backup


def replicate_due(
    world: World, *, policies: Sequence[Policy], progress: Progress, cancel: Cancel
) -> Iterator[ReplicateEntry]:
    """Send what policies want at the replica and was never sent whole, of each guest the oldest first. May be repeated.

    What fails is in its entry, and ends that guest's turn: the next round tries again. Where the replica does not answer when
    asked what it lacks, it is not asked for the other guests, whose entries say the same. Ends early where ``cancel`` is set.
    """
    away: VmsnapError | None = None
    for policy in policies:
        if not is_replicated(policy) or cancel.is_set():
            continue
        if away is not None:
            yield ReplicateEntry(guest=policy.guest, error=away)
            continue
        try:
            found = {one.id: one for one in world.store.snapshots(policy.guest)}
            lacking = replica_of(world).lacking(policy.guest, snapshots=found.values())
        except Exception as error:  # noqa: BLE001 - one guest's failure stops no other
            told = as_vmsnap_error(error, doing="looking what the replica lacks")
            away = told if isinstance(told, StoreUnreachableError) else None
            yield ReplicateEntry(guest=policy.guest, error=told)
            continue
        for identity in (one for one in found if one in lacking):
            if cancel.is_set():
                return
            progress.note(f"snapshot {identity} of {policy.guest} is not at the replica yet")
            try:
                report = replicate(world, reference=identity, progress=progress, cancel=cancel)
            except SnapshotNotFoundError:
                continue  # retention was faster
            except CancelledError:
                return
            except Exception as error:  # noqa: BLE001 - as above
                told = as_vmsnap_error(error, doing=f"sending snapshot {identity} to the replica")
                yield ReplicateEntry(guest=policy.guest, snapshot=identity, error=told)
                break
            yield ReplicateEntry(guest=policy.guest, snapshot=identity, report=report)


def with_replica(
    world: World, *, report: BackupReport, policy: Policy, progress: Progress, cancel: Cancel
) -> BackupReport:
    """Send a new snapshot where the policy says so. Never raises: the backup is done, so a failure is a warning of it."""
    if not is_replicated(policy):
        return report
    try:
        sent = replicate(world, reference=report.snapshot, progress=progress, cancel=cancel)
    except Exception as error:  # noqa: BLE001 - not even a bug there takes the backup back
        told = as_vmsnap_error(error, doing="sending to the replica")
        snapshot = report.snapshot
        _LOG.warning("snapshot %s was not sent to the replica: %s", snapshot, told.brief, exc_info=told is not error)
        warning = f"not sent to the replica: {told.brief}; 'vmsnap run --due' and the daemon try again"
        return report.model_copy(update={"warnings": (*report.warnings, warning)})
    return report.model_copy(update={"replica": sent})
