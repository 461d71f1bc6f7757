"""Ending uploads whose process is dead, and keeping marks of removed snapshots no longer than they are of use.

An upload that is called over while it lives comes to no harm but that it must begin again: it cannot publish any more. So
it does not matter for safety when that is done, and by which clock.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from datetime import datetime, timedelta

from vmsnap.errors import HeldError, ObjectConflictError
from vmsnap.model.collection import EndedUpload
from vmsnap.model.durations import format_duration
from vmsnap.stores.packs import intents
from vmsnap.stores.packs.intents import IntentRecord
from vmsnap.stores.packs.lease import Lease, Sighting
from vmsnap.stores.packs.manifests import Absence, PackedSnapshot, encode_absence
from vmsnap.stores.packs.names import INTENTS, snapshot_name
from vmsnap.stores.packs.repository import Repository

MARKS_LAST = timedelta(days=90)
"""So long the mark of a removed snapshot stays: nobody who began to upload that snapshot before can still be on it."""


def end_uploads(
    repository: Repository, *, lease: Lease, now: datetime, patience: timedelta
) -> tuple[tuple[EndedUpload, ...], tuple[Sighting, ...]]:
    """End uploads that are published, and those whose intent was not renewed for ``patience`` between two collectors' looks.

    Returns those that were ended, and what was seen of the others, for the next collector.
    """
    before = {one.upload: one for one in lease.record.sightings}
    versions = {
        info.name.removeprefix(INTENTS).removesuffix(".json"): info.version for info in repository.store.list(INTENTS)
    }
    ended, seen = [], []
    for record in intents.intents(repository.store):
        lease.hold()
        sighting = _sighting(record, version=versions.get(record.upload, ""), before=before, lease=lease, now=now)
        stale = now - sighting.at >= patience and (patience <= timedelta(0) or sighting.generation < lease.generation)
        reason = _end(repository, record=record, stale=stale, now=now)
        if reason is None:
            seen.append(sighting)
            continue
        told = reason or f"not renewed for {format_duration(now - sighting.at)}"
        ended.append(
            EndedUpload(
                upload=record.upload, guest=record.guest, snapshot=record.snapshot, host=record.host, reason=told
            )
        )
    return tuple(ended), tuple(seen)


def _sighting(
    record: IntentRecord, *, version: str, before: dict[str, Sighting], lease: Lease, now: datetime
) -> Sighting:
    old = before.get(record.upload)
    if old is not None and old.version == version and old.at <= now:
        return old
    return Sighting(upload=record.upload, version=version, generation=lease.generation, at=now)


def _end(repository: Repository, *, record: IntentRecord, stale: bool, now: datetime) -> str | None:
    """End an upload if it is published, or stale and not published. Returns why; None: it goes on. Empty: it is stale."""
    name = snapshot_name(record.guest, snapshot=record.snapshot)
    found = repository.versioned_entry(name)
    if found is not None and isinstance(found[0], PackedSnapshot):
        if not stale and found[0].upload != record.upload:
            return None
        return _remove(repository, record=record, reason="its snapshot is published")
    if not stale:
        return None
    mark = encode_absence(Absence(reason="revoked", upload=record.upload, at=now), repository=repository.id)
    try:
        if found is None:
            repository.store.put_new(name, data=mark)
        else:
            repository.store.replace(name, data=mark, version=found[1])
    except ObjectConflictError:
        return None  # it has just published, or another collector does this
    return _remove(repository, record=record, reason="")


def _remove(repository: Repository, *, record: IntentRecord, reason: str) -> str | None:
    try:
        intents.end(repository.store, upload=record.upload)
    except HeldError:  # a bucket that locks whatever is put there
        return None
    return reason


def forget_marks(
    repository: Repository, *, now: datetime, uploads: Collection[IntentRecord], hold: Callable[[], None]
) -> int:
    """Remove the marks of snapshots that were removed long ago. Returns how many."""
    under_way = {snapshot_name(one.guest, snapshot=one.snapshot) for one in uploads}
    removed = 0
    for _, _, name in list(repository.snapshot_names()):
        entry = repository.entry(name)
        if isinstance(entry, Absence) and now - entry.at >= MARKS_LAST and name not in under_way:
            hold()
            with suppress(HeldError):  # an older version may be locked
                repository.store.delete(name)
                removed += 1
    return removed
