"""Removing a snapshot from a repository: a mark in the place of its manifest, on condition that the manifest is as it was.

From then on the snapshot does not exist; what only it needed is garbage.
"""

from __future__ import annotations

from datetime import datetime

from vmsnap.errors import DriverError, HeldError, ObjectConflictError
from vmsnap.model.ids import SnapshotId
from vmsnap.ports.objects import ObjectInfo
from vmsnap.stores.packs import holds
from vmsnap.stores.packs.manifests import Absence, PackedSnapshot, encode_absence
from vmsnap.stores.packs.names import snapshot_name
from vmsnap.stores.packs.repository import Repository


def require_removable(repository: Repository, *, guest: str, snapshot: SnapshotId, now: datetime) -> None:
    """Raise HeldError where ``remove`` would, as things are now. Content where the snapshot is gone. Changes nothing."""
    name = snapshot_name(guest, snapshot=snapshot)
    if isinstance(repository.entry(name), PackedSnapshot):
        _refuse_held(repository, snapshot=snapshot, now=now)
        _refuse_locked(repository.store.info(name), snapshot=snapshot, now=now)


def remove(repository: Repository, *, guest: str, snapshot: SnapshotId, now: datetime) -> bool:
    """Remove a snapshot. Content where it is gone; returns whether it was there.

    Raises HeldError where an environment reads from it, or where it is locked; DriverError where somebody replaced it at this
    very moment. Looks for holds before the mark is put and after: who takes one puts it first, and then looks for the manifest.
    """
    name, store = snapshot_name(guest, snapshot=snapshot), repository.store
    found = repository.versioned_entry(name)
    if found is None or not isinstance(found[0], PackedSnapshot):
        return False
    _refuse_held(repository, snapshot=snapshot, now=now)
    before = store.get(name)
    _refuse_locked(before.info, snapshot=snapshot, now=now)
    mark = encode_absence(Absence(reason="removed", upload=found[0].upload, at=now), repository=repository.id)
    try:
        version = store.replace(name, data=mark, version=found[1]).version
    except ObjectConflictError as error:
        again = store.get(name)
        if again.data != mark:
            if isinstance(repository.entry(name), Absence):
                return False
            raise DriverError(
                f"snapshot {snapshot} was written anew in the replica while it was being removed",
                remedy="nothing was removed; look at 'vmsnap list', and try again if it is to go",
            ) from error
        version = again.info.version
    try:
        _refuse_held(repository, snapshot=snapshot, now=now)
    except HeldError:
        store.replace(name, data=before.data, version=version)
        raise
    return True


def _refuse_held(repository: Repository, *, snapshot: SnapshotId, now: datetime) -> None:
    found = holds.held(repository.store, now=now).get(snapshot)
    if found:
        hosts = ", ".join(sorted({hold.host or "an unknown host" for hold in found}))
        raise HeldError(
            f"snapshot {snapshot} is in use in the replica, by an environment of {hosts}",
            remedy="destroy the environment, or wait until it is whole on its own host",
        )


def _refuse_locked(info: ObjectInfo, *, snapshot: SnapshotId, now: datetime) -> None:
    if info.retained_until is not None and info.retained_until > now:
        raise HeldError(
            f"snapshot {snapshot} is locked in the replica until {info.retained_until:%Y-%m-%d %H:%MZ}",
            remedy="it goes by itself when its lock has ended and retention is applied again",
        )
