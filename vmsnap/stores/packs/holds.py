"""Holds on snapshots in the replica: objects that keep retention and the collector of any host away from them.

``holds/SNAPSHOT/RUN.json`` says which run needs the snapshot and until when. A hold is a lease: who needs it longer renews it,
and what a dead host left ends by itself. One that cannot be read holds: it is better to keep too much.

Who removes a snapshot must first leave a mark that ``take`` sees (the snapshot's tombstone, or its missing manifest), then look
at ``held``, and only then remove. ``take`` puts its object first and looks for the snapshot afterwards: of the two at least one
sees the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from vmsnap.errors import ObjectNotFoundError, SnapshotNotFoundError
from vmsnap.model.ids import RunId, SnapshotId
from vmsnap.ports.objects import ObjectStore

PREFIX = "holds/"
LASTS = timedelta(days=7)
"""How long a hold lasts that nobody renews: longer than an outage of the host or of the way to the replica."""
RENEWED_EVERY = timedelta(hours=12)


class HoldRecord(BaseModel):
    """What a hold's object says."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: int = 1
    snapshot: SnapshotId
    run: RunId
    host: str
    since: AwareDatetime
    until: AwareDatetime


@dataclass(frozen=True, kw_only=True)
class Hold:
    """One hold in force. ``until`` None: its object cannot be read."""

    snapshot: SnapshotId
    run: RunId
    host: str = ""
    until: datetime | None = None


def name_of(snapshot: SnapshotId, *, run: RunId) -> str:
    """Return the name of a hold's object."""
    return f"{PREFIX}{snapshot}/{run}.json"


def take(objects: ObjectStore, *, hold: HoldRecord, exists: Callable[[], bool]) -> None:
    """Hold a snapshot, or renew the hold. ``exists`` tells whether the snapshot is there and nobody is removing it.

    May be repeated. Raises SnapshotNotFoundError, with nothing held, where it is gone; what the object store raises.
    """
    name = name_of(hold.snapshot, run=hold.run)
    objects.put(name, data=(hold.model_dump_json(indent=2) + "\n").encode())
    if not exists():
        objects.delete(name)
        raise SnapshotNotFoundError(
            f"snapshot {hold.snapshot} is no longer in the replica", remedy="'vmsnap list' shows what there is"
        )


def release(objects: ObjectStore, *, snapshot: SnapshotId, run: RunId) -> None:
    """Let a snapshot go. Content where it is not held."""
    objects.delete(name_of(snapshot, run=run))


def held(objects: ObjectStore, *, now: datetime) -> Mapping[SnapshotId, tuple[Hold, ...]]:
    """Return the holds in force, by snapshot."""
    found: dict[SnapshotId, tuple[Hold, ...]] = {}
    for info in objects.list(PREFIX):
        snapshot, slash, file = info.name.removeprefix(PREFIX).partition("/")
        if not slash or not file.endswith(".json"):
            continue
        key, run = SnapshotId(snapshot), RunId(file.removesuffix(".json"))
        try:
            record = HoldRecord.model_validate_json(objects.get(info.name).data)
            hold = Hold(snapshot=key, run=run, host=record.host, until=record.until)
        except ObjectNotFoundError:
            continue
        except ValidationError:
            hold = Hold(snapshot=key, run=run)
        if hold.until is None or hold.until > now:
            found[key] = (*found.get(key, ()), hold)
    return found
