"""One collector at a time: a lease on the repository, kept and taken over by conditional writes.

Nobody's wall clock counts. A holder shows that it lives by changing the object; who wants the lease watches the object for as
long as ``LASTS`` on its own clock, and takes over where it did not change. Every holder is one generation later than the one
before it, so the object is never removed.

The lease keeps collectors from doing the same work twice. That no live block is lost does not hang on it, but for packs that
are rewritten: see ``docs/collecting.md``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from vmsnap.errors import BusyError, ObjectConflictError, ObjectNotFoundError
from vmsnap.ports.objects import ObjectInfo, ObjectStore
from vmsnap.stores.packs.names import COLLECTOR_LOCK, damaged

LASTS = timedelta(minutes=5)
"""A lease that was not renewed for so long may be taken over. No call of an object store may take effect later than that."""
_FRESH = timedelta(seconds=10)
_LOOK_EVERY = timedelta(seconds=15)


def seconds_since_boot() -> float:
    """Return seconds of a clock that also runs while the machine sleeps (clock_gettime(2), CLOCK_BOOTTIME)."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Sighting(BaseModel):
    """When collectors first saw an intent as it is now. ``version`` is the intent's, ``generation`` the collector's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    upload: str
    version: str
    generation: int
    at: AwareDatetime


class LeaseRecord(BaseModel):
    """The JSON of ``locks/collector``. ``held`` false: nobody collects. ``sightings``: what the last holder saw of uploads."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = 1
    generation: int = 0
    holder: str = ""
    held: bool = False
    renewals: int = 0
    since: AwareDatetime
    renewed: AwareDatetime
    sightings: tuple[Sighting, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Clocks:
    """The clocks of a collector. ``seconds`` also counts while the machine sleeps."""

    now: Callable[[], datetime]
    seconds: Callable[[], float] = seconds_since_boot
    sleep: Callable[[timedelta], None] = field(default=lambda span: time.sleep(span.total_seconds()))


class Lease:
    """A lease that is held. Used by one thread."""

    def __init__(self, store: ObjectStore, *, record: LeaseRecord, version: str, clocks: Clocks) -> None:
        self._store = store
        self._version = version
        self._clocks = clocks
        self._sure = clocks.seconds()
        self.record = record

    @property
    def generation(self) -> int:
        """Return how many holders there were, this one included."""
        return self.record.generation

    def hold(self) -> None:
        """Make sure that the lease is held, now or some seconds ago. Raises BusyError where somebody has taken it over."""
        if self._clocks.seconds() - self._sure >= _FRESH.total_seconds():
            self.renew()

    def renew(self) -> None:
        """Show that this holder lives. Raises BusyError where somebody has taken the lease over."""
        self._write(self.record.model_copy(update={"renewals": self.record.renewals + 1}))

    def release(self, *, sightings: tuple[Sighting, ...]) -> None:
        """Let the lease go, and leave word of what was seen of uploads."""
        update = {"held": False, "sightings": sightings, "renewals": self.record.renewals + 1}
        self._write(self.record.model_copy(update=update))

    def _write(self, record: LeaseRecord) -> None:
        record = record.model_copy(update={"renewed": self._clocks.now()})
        began = self._clocks.seconds()
        try:
            info = self._store.replace(COLLECTOR_LOCK, data=_text(record), version=self._version)
        except ObjectConflictError as error:
            found = _read(self._store)
            if found is None or found[0] != record:
                raise BusyError(
                    "another collector took this one for dead and goes on in its place: this one has ended",
                    remedy="was this host asleep, or the replica out of reach? The other one does the work",
                ) from error
            info = found[1]  # the first answer to this very write was lost
        self._version, self._sure, self.record = info.version, began, record


def _nothing() -> None:
    """Let the wait go on."""


def take(
    store: ObjectStore, *, holder: str, clocks: Clocks, waits: bool, check: Callable[[], None] = _nothing
) -> Lease:
    """Take the lease. ``waits``: watch one that is held for as long as a lease lasts, and take it over if it is dead.

    ``check`` raises where the wait is to end.

    Raises BusyError where another collector lives, or may.
    """
    found = _read(store)
    if found is not None and found[0].held and waits:
        found = _watch(store, found=found, clocks=clocks, check=check)
    elif found is not None and found[0].held:
        raise _busy(found[0])
    now = clocks.now()
    before = found[0] if found else None
    record = LeaseRecord(
        generation=before.generation + 1 if before else 1,
        holder=holder,
        held=True,
        since=now,
        renewed=now,
        sightings=before.sightings if before else (),
    )
    try:
        if found is None:
            info = store.put_new(COLLECTOR_LOCK, data=_text(record))
        else:
            info = store.replace(COLLECTOR_LOCK, data=_text(record), version=found[1].version)
    except (ObjectConflictError, ObjectNotFoundError) as error:
        again = _read(store)
        if again is None or again[0] != record:
            raise _busy(again[0] if again else record) from error
        info = again[1]
    return Lease(store, record=record, version=info.version, clocks=clocks)


def _watch(
    store: ObjectStore, *, found: tuple[LeaseRecord, ObjectInfo], clocks: Clocks, check: Callable[[], None]
) -> tuple[LeaseRecord, ObjectInfo] | None:
    """Return the lease once it is free, or was not renewed for as long as it lasts. Raises BusyError where it is renewed."""
    began = clocks.seconds()
    while clocks.seconds() - began < LASTS.total_seconds():
        check()
        clocks.sleep(_LOOK_EVERY)
        now = _read(store)
        if now is None or not now[0].held:
            return now
        if now[1].version != found[1].version:
            raise _busy(now[0])
    return found


def _busy(record: LeaseRecord) -> BusyError:
    return BusyError(
        f"{record.holder or 'another host'} collects the replica's garbage since {record.since:%Y-%m-%d %H:%MZ}",
        remedy="wait for it; if it is dead, 'vmsnap gc --wait' takes over after some minutes",
    )


def _read(store: ObjectStore) -> tuple[LeaseRecord, ObjectInfo] | None:
    try:
        found = store.get(COLLECTOR_LOCK)
    except ObjectNotFoundError:
        return None
    try:
        return LeaseRecord.model_validate_json(found.data), found.info
    except ValidationError as error:
        raise damaged(COLLECTOR_LOCK, what="it is no lease of format 1") from error


def _text(record: LeaseRecord) -> bytes:
    return record.model_dump_json(indent=2).encode() + b"\n"
