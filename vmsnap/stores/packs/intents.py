"""Intents: what an upload puts before its first pack, so that a collector leaves alone what it writes and relies upon."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import datetime

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from vmsnap.errors import ObjectConflictError, ObjectNotFoundError
from vmsnap.model.ids import SnapshotId
from vmsnap.ports.objects import ObjectStore
from vmsnap.stores.packs.names import INTENTS, TOMBSTONES, damaged, intent_name
from vmsnap.stores.packs.packfile import TOKEN_BYTES


class IntentRecord(BaseModel):
    """The JSON of an intent. ``upload`` is the token, in hexadecimal, of all packs and maps the upload writes.

    ``renewed`` is for people: whether an upload lives is told by its intent's version, which changes with every renewal.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = 1
    upload: str
    guest: str
    snapshot: SnapshotId
    host: str
    since: AwareDatetime
    renewed: AwareDatetime


class TombstoneRecord(BaseModel):
    """What an upload reads of a tombstone: the names of objects that nobody may rely upon any more."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    objects: tuple[str, ...]


@dataclass(kw_only=True)
class Intent:
    """An upload's own intent, and the version it wrote last."""

    record: IntentRecord
    version: str

    @property
    def token(self) -> bytes:
        """Return the token that the upload's packs and maps bear."""
        return bytes.fromhex(self.record.upload)


def new_token() -> str:
    """Return a token for a new upload."""
    return secrets.token_hex(TOKEN_BYTES)


def begin(store: ObjectStore, *, record: IntentRecord) -> Intent:
    """Put an intent, or take up one of the same token that a dead process of the same upload left."""
    name = intent_name(record.upload)
    data = _text(record)
    try:
        info = store.put_new(name, data=data)
    except ObjectConflictError:
        # Read back, not overwritten blindly: a collector may end it at any time.
        info = store.replace(name, data=data, version=store.info(name).version)
    return Intent(record=record, version=info.version)


def renew(store: ObjectStore, *, intent: Intent, now: datetime) -> bool:
    """Show that the upload lives. Returns False where a collector took it for dead: nothing may be published then."""
    record = intent.record.model_copy(update={"renewed": now})
    name = intent_name(record.upload)
    try:
        intent.version = store.replace(name, data=_text(record), version=intent.version).version
    except ObjectConflictError:
        # The answer to a renewal before may have been lost: then the intent is there, and ours.
        try:
            intent.version = store.replace(name, data=_text(record), version=store.info(name).version).version
        except (ObjectNotFoundError, ObjectConflictError):
            return False
    except ObjectNotFoundError:
        return False
    intent.record = record
    return True


def exists(store: ObjectStore, *, upload: str) -> bool:
    """Tell whether an upload's intent is there."""
    try:
        store.info(intent_name(upload))
    except ObjectNotFoundError:
        return False
    return True


def end(store: ObjectStore, *, upload: str) -> None:
    """Remove an upload's intent. Content where it is gone."""
    store.delete(intent_name(upload))


def intents(store: ObjectStore) -> tuple[IntentRecord, ...]:
    """Return all intents. Raises VerificationError for one that cannot be read."""
    found = []
    for info in store.list(INTENTS):
        try:
            found.append(IntentRecord.model_validate_json(store.get(info.name).data))
        except ObjectNotFoundError:
            continue  # ended just now
        except ValidationError as error:
            raise damaged(info.name, what="it is no intent") from error
    return tuple(found)


def condemned(store: ObjectStore) -> frozenset[str]:
    """Return the names of all objects that have a tombstone. Raises VerificationError for one that cannot be read."""
    names: set[str] = set()
    for info in store.list(TOMBSTONES):
        try:
            names.update(TombstoneRecord.model_validate_json(store.get(info.name).data).objects)
        except ObjectNotFoundError:
            continue  # collected just now
        except ValidationError as error:
            raise damaged(info.name, what="it is no tombstone") from error
    return frozenset(names)


def _text(record: BaseModel) -> bytes:
    return record.model_dump_json(indent=2).encode() + b"\n"
