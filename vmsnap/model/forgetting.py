"""Removing snapshots by hand: what an operator wants gone, what stands against it, and for what the guest's name is asked.

Pure. Retention never comes here, and what it keeps a snapshot for (``keep_*``, ages, the clock) counts for nothing here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from vmsnap.errors import VmsnapError
from vmsnap.model.copies import ReplicaCopies
from vmsnap.model.ids import SnapshotId
from vmsnap.model.manifest import Pin, Snapshot
from vmsnap.model.report import Place
from vmsnap.model.retention import candidate_of
from vmsnap.model.selection import newest_first


@dataclass(frozen=True, kw_only=True)
class ForgetWishes:
    """What is to go, and why. ``references``: snapshots of one guest; none: all of ``guest``.

    ``replica``: the copies there go as well. ``confirmed``: the guest's name, where it was given to say so twice.
    """

    reason: str
    references: tuple[str, ...] = ()
    guest: str | None = None
    replica: bool = False
    dry_run: bool = False
    confirmed: str | None = None


@dataclass(frozen=True, kw_only=True)
class Forgotten:
    """One copy that goes, or went. ``copy_stays``: whether the snapshot has another that stays; None: that is not known."""

    snapshot: Snapshot
    place: Place
    copy_stays: bool | None


@dataclass(frozen=True, kw_only=True)
class ForgetReport:
    """What went or, in a dry run, would go: the copies here, then those at the replica, oldest first.

    ``freed_bytes``: of the local store; what only a copy at the replica needed is collected later. ``confirm``: why the guest's
    name is asked for. ``problem``: why the replica could not be asked for copies.
    """

    guest: str
    reason: str
    dry_run: bool
    entries: tuple[Forgotten, ...] = ()
    freed_bytes: int = 0
    confirm: tuple[str, ...] = ()
    problem: VmsnapError | None = None

    def of(self, place: Place) -> tuple[Snapshot, ...]:
        """Return the snapshots whose copy in a place goes."""
        return tuple(entry.snapshot for entry in self.entries if entry.place is place)


def entries_of(
    here: Sequence[Snapshot], away: Sequence[Snapshot], *, copies: ReplicaCopies, replica: bool
) -> tuple[Forgotten, ...]:
    """Return the copies that go: those ``here``, and those ``away``. ``replica``: what is there of them goes as well."""
    unknown = copies.problem is not None and not replica
    local = (
        Forgotten(
            snapshot=one,
            place=Place.LOCAL,
            copy_stays=None if unknown else not replica and one.id in copies.ids,
        )
        for one in here
    )
    return (*local, *(Forgotten(snapshot=one, place=Place.REPLICA, copy_stays=False) for one in away))


def objections(
    snapshots: Sequence[Snapshot], *, holders: Mapping[SnapshotId, Sequence[str]], now: datetime
) -> tuple[str, ...]:
    """Return what holds snapshots of the local store, a line each. ``holders``: who uses them, in words."""
    found = []
    for one in snapshots:
        pin = one.marks.pin
        if pin is not None and pin.holds(now):
            found.append(f"{_told(one)} is pinned by {_pin_text(pin)}")
        found += [f"{_told(one)} is in use by {who}" for who in holders.get(one.id, ())]
    return tuple(found)


def reasons_to_confirm(
    here: Sequence[Snapshot], *, entries: Sequence[Forgotten], copies: ReplicaCopies, guest: str
) -> tuple[str, ...]:
    """Return why it takes the guest's name: what is gone for good then, or is the best there is. ``here``: all in the store."""
    going = {entry.snapshot.id for entry in entries if entry.place is Place.LOCAL}
    reasons = []
    lost = sorted({entry.snapshot.id for entry in entries if entry.copy_stays is False})
    if lost:
        reasons.append(f"no copy is left anywhere of {', '.join(lost)}")
    if copies.problem is not None and any(entry.copy_stays is None for entry in entries):
        reasons.append(f"whether copies are at the replica is not known: {copies.problem.brief}")
    ordered = newest_first([candidate_of(one, held=frozenset()) for one in here])
    verified = next((one for one in ordered if one.verified), None)
    best = verified or next((one for one in ordered if not one.damaged), None)
    if best is not None and best.id in going:
        what = "verified one" if verified else "one without known damage (none is verified)"
        reasons.append(f"{best.id} is the newest {what} in the local store")
    if going and len(going) == len(here):
        reasons.append(f"no snapshot of {guest!r} is left in the local store")
        distrusted = here[-1].hints_distrusted
        if distrusted is not None:
            reasons.append(
                f"it is not known any more then that hints of what changed were wrong ({distrusted}): before another backup, "
                'set capture.hints = "off"'
            )
    gone = {entry.snapshot.id for entry in entries if entry.place is Place.REPLICA}
    if gone and gone == copies.ids:
        reasons.append(f"no snapshot of {guest!r} is left at the replica")
    return tuple(reasons)


def _told(snapshot: Snapshot) -> str:
    return f"snapshot {snapshot.id} of {snapshot.manifest.captured.astimezone(UTC):%Y-%m-%d %H:%MZ}"


def _pin_text(pin: Pin) -> str:
    end = "" if pin.until is None else f" until {pin.until.astimezone(UTC):%Y-%m-%d %H:%MZ}"
    return f"{pin.owner}{end}: {pin.reason}"
