"""Which snapshot a reference names: an id, a prefix of one, ``GUEST@latest`` or ``GUEST@TIME``. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime

from vmsnap.errors import SnapshotNotFoundError
from vmsnap.model.ids import ID_LENGTH
from vmsnap.model.manifest import Snapshot
from vmsnap.model.schedule import FUTURE_SLACK

SHORTEST_PREFIX = 4

_PREFIX = re.compile(rf"[0-9a-f]{{1,{ID_LENGTH}}}\Z")
_LISTED = 10
_FORMS = (
    "name a snapshot as an id, the first four digits of one or more, GUEST@latest or GUEST@TIME; "
    "'vmsnap list' shows what there is"
)


def by_age(snapshots: Sequence[Snapshot]) -> tuple[Snapshot, ...]:
    """Return snapshots by guest and, within a guest, oldest first: by the instant they are of."""
    return tuple(sorted(snapshots, key=lambda one: (one.manifest.guest, one.manifest.captured, one.id)))


def not_ahead(snapshots: Sequence[Snapshot], *, now: datetime) -> Sequence[Snapshot]:
    """Return the snapshots without those that a wrong clock dated more than a day ahead; all where every one is."""
    return [one for one in snapshots if one.manifest.captured <= now + FUTURE_SLACK] or snapshots


def resolve(reference: str, *, snapshots: Sequence[Snapshot], now: datetime) -> Snapshot:
    """Return the one snapshot that ``reference`` names. ``GUEST@latest`` is one that is not dated ahead of ``now``.

    ``GUEST@TIME`` is the newest snapshot captured not after TIME (ISO 8601; without a zone it is UTC; a date alone is
    its first instant). Everything up to the last ``@`` is the guest's name, so names may contain one.
    Raises SnapshotNotFoundError, which lists what would match.
    """
    guest, at, moment = reference.rpartition("@")
    if not at:
        return _by_id(reference, snapshots=snapshots)
    mine = by_age([one for one in snapshots if one.manifest.guest == guest])
    if not mine:
        raise SnapshotNotFoundError(
            f"guest {guest!r} has no snapshots",
            details=_guests(snapshots),
            remedy=_advice(reference, snapshots=snapshots),
        )
    if moment == "latest":
        return not_ahead(mine, now=now)[-1]
    before = [one for one in mine if one.manifest.captured <= _moment(moment, reference=reference, snapshots=snapshots)]
    if not before:
        raise SnapshotNotFoundError(
            f"guest {guest!r} has no snapshot from {moment} or before", details=_listing(mine), remedy=_FORMS
        )
    return before[-1]


def _by_id(reference: str, *, snapshots: Sequence[Snapshot]) -> Snapshot:
    wanted = reference.lower()
    long_enough = len(wanted) >= SHORTEST_PREFIX and _PREFIX.match(wanted)
    matching = by_age([one for one in snapshots if long_enough and one.id.startswith(wanted)])
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise SnapshotNotFoundError(
            f"{reference!r} is the beginning of {len(matching)} snapshots",
            details=_listing(matching),
            remedy="give more digits",
        )
    raise SnapshotNotFoundError(
        f"there is no snapshot {reference!r}",
        details=_listing(by_age(snapshots)),
        remedy=_advice(reference, snapshots=snapshots),
    )


def _moment(text: str, *, reference: str, snapshots: Sequence[Snapshot]) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise SnapshotNotFoundError(
            f"{text!r} in {reference!r} is neither 'latest' nor a time such as 2026-01-31T22:00:00Z",
            details=_guests(snapshots),
            remedy=_advice(reference, snapshots=snapshots),
        ) from error
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def _advice(reference: str, *, snapshots: Sequence[Snapshot]) -> str:
    if any(one.manifest.guest == reference for one in snapshots):
        return f"{reference!r} is a guest: its newest snapshot is {reference}@latest"
    return _FORMS


def _guests(snapshots: Sequence[Snapshot]) -> str:
    names = sorted({one.manifest.guest for one in snapshots})
    return f"guests with snapshots: {', '.join(repr(name) for name in names)}" if names else "the store is empty"


def _listing(snapshots: Sequence[Snapshot]) -> str:
    if not snapshots:
        return "the store is empty"
    newest = list(reversed(snapshots))[:_LISTED]
    lines = [f"{one.id}  {one.manifest.captured.isoformat(timespec='seconds')}  {one.manifest.guest}" for one in newest]
    if len(snapshots) > _LISTED:
        lines.append(f"and {len(snapshots) - _LISTED} older")
    return "\n".join(lines)
