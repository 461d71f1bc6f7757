"""Tombstones: lists of objects that nobody needs, put where every later upload sees them, before anything is removed.

``docs/collecting.md`` says why each field is there.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from vmsnap.errors import ObjectConflictError, ObjectNotFoundError
from vmsnap.ports.objects import ObjectStore
from vmsnap.stores.packs.names import TOMBSTONES, damaged

MOST_OBJECTS = 5000
"""A tombstone lists at most so many."""


class TombstoneRecord(BaseModel):
    """The JSON of a tombstone. ``generation`` is the collector's that put it.

    ``objects`` are the names that no later upload may rely upon. Those in ``moved`` are packs that were rewritten: a leaf that
    speaks of one may still be shared. ``waits`` are the uploads that were open after the tombstone was there, any of
    which may have missed it; None: nobody has looked yet.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = 1
    generation: int
    made: AwareDatetime
    objects: tuple[str, ...]
    moved: tuple[str, ...] = ()
    waits: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Tombstone:
    """A tombstone as it is in the repository."""

    name: str
    version: str
    record: TombstoneRecord


def put(store: ObjectStore, *, record: TombstoneRecord) -> Tombstone:
    """Put a tombstone under a name that no other has."""
    name = f"{TOMBSTONES}{record.generation:010d}-{secrets.token_hex(8)}.json"
    info = store.put(name, data=_text(record))
    return Tombstone(name=name, version=info.version, record=record)


def note_waits(store: ObjectStore, *, tombstone: Tombstone, waits: Sequence[str]) -> Tombstone:
    """Write down which uploads may have missed the tombstone. Raises ObjectConflictError where another has done so."""
    record = tombstone.record.model_copy(update={"waits": tuple(sorted(waits))})
    try:
        version = store.replace(tombstone.name, data=_text(record), version=tombstone.version).version
    except ObjectConflictError:
        found = read(store, tombstone.name)
        if found is None or found.record != record:
            raise
        return found
    return Tombstone(name=tombstone.name, version=version, record=record)


def shorten(store: ObjectStore, *, tombstone: Tombstone, record: TombstoneRecord) -> Tombstone:
    """Let a tombstone list fewer objects. Left as it is where another collector was faster."""
    try:
        version = store.replace(tombstone.name, data=_text(record), version=tombstone.version).version
    except ObjectConflictError:
        return tombstone
    return Tombstone(name=tombstone.name, version=version, record=record)


def read(store: ObjectStore, name: str) -> Tombstone | None:
    """Read a tombstone; None where it is gone. Raises VerificationError."""
    try:
        found = store.get(name)
    except ObjectNotFoundError:
        return None
    try:
        record = TombstoneRecord.model_validate_json(found.data)
    except ValidationError as error:
        raise damaged(name, what="it is no tombstone of format 1") from error
    return Tombstone(name=name, version=found.info.version, record=record)


def tombstones(store: ObjectStore) -> Iterator[Tombstone]:
    """Yield all tombstones, oldest first. Raises VerificationError for one that cannot be read."""
    for info in list(store.list(TOMBSTONES)):
        found = read(store, info.name)
        if found is not None:
            yield found


def _text(record: TombstoneRecord) -> bytes:
    return record.model_dump_json(indent=1).encode() + b"\n"
