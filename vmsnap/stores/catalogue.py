"""Reading what a store holds: manifests and marks. Nothing here changes anything."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pydantic import ValidationError

from vmsnap.model.ids import folder_name
from vmsnap.model.manifest import Manifest, Marks, Pin, Snapshot
from vmsnap.stores.layout import HOLDS, MANIFEST, MARKS, REMOVED, Layout
from vmsnap.stores.references import by_age

_log = logging.getLogger(__name__)
_SETTLED_NS = 2_000_000_000
"""Times of files may be as coarse as two seconds."""


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A folder that cannot be read as a snapshot. It is reported and left alone."""

    folder: Path
    reason: str


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """Everything in a store."""

    snapshots: tuple[Snapshot, ...]
    damaged: tuple[Damage, ...]


def take_inventory(layout: Layout, *, guest: str | None = None) -> Inventory:
    """Read every snapshot, or those of one guest, oldest first by guest. Raises DriverError for the store itself."""
    snapshots: list[Snapshot] = []
    damaged: list[Damage] = []
    with _uncollected():
        for folder in layout.snapshot_folders(guest):
            found = read_snapshot(folder)
            if isinstance(found, Snapshot):
                snapshots.append(found)
            elif found is not None:
                damaged.append(found)
                _log.warning("%s: %s; it is left alone", found.folder, found.reason)
    return Inventory(snapshots=by_age(snapshots), damaged=tuple(damaged))


@contextmanager
def _uncollected() -> Iterator[None]:
    """Make many objects that all stay without looking for garbage among them: of 20,000 manifests that is most of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Captures:
    """When snapshots were captured, remembered as long as this lives.

    A snapshot's folder changes its time when its manifest or its marks come, go or are replaced, which is always by a new
    name. So a folder whose time is what it was holds what it held, unless that time is too fresh to tell two changes apart.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._known: dict[str, dict[str, tuple[tuple[int, int], datetime | None]]] = {}

    def of(self, guest: str) -> tuple[datetime, ...]:
        """Return when a guest's snapshots were captured, oldest first. Raises DriverError."""
        before = self._known.get(guest, {})
        known: dict[str, tuple[tuple[int, int], datetime | None]] = {}
        found: list[datetime | None] = []
        for name, state in self._layout.snapshot_states(guest, known=before.keys()):
            stamp = (state.st_ino, state.st_mtime_ns)
            remembered = before.get(name)
            if remembered is not None and remembered[0] == stamp:
                captured = remembered[1]
            else:
                captured = _captured(self._layout.guest(guest) / name)
            if time.time_ns() - state.st_mtime_ns > _SETTLED_NS:
                known[name] = (stamp, captured)
            found.append(captured)
        self._known[guest] = known
        return tuple(sorted(moment for moment in found if moment is not None))


def _captured(folder: Path) -> datetime | None:
    found = read_snapshot(folder)
    if isinstance(found, Damage):
        _log.warning("%s: %s; it is left alone", found.folder, found.reason)
    return found.manifest.captured if isinstance(found, Snapshot) else None


def read_snapshot(folder: Path) -> Snapshot | Damage | None:
    """Return the snapshot in a folder; None where there is none because it is being removed or already is."""
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        return None if is_half_removed(folder) else Damage(folder=folder, reason="there is no manifest.json")
    except OSError as error:
        return Damage(folder=folder, reason=f"manifest.json cannot be read: {error.strerror}")
    except ValidationError as error:
        return Damage(folder=folder, reason=f"manifest.json is damaged: {_first_line(error)}")
    if manifest.id != folder.name or folder_name(manifest.guest) != folder.parent.name:
        return Damage(
            folder=folder, reason=f"manifest.json is of snapshot {manifest.id} of guest {manifest.guest!r}, not of this"
        )
    return Snapshot(manifest=manifest, marks=_marks(folder, manifest=manifest))


def is_half_removed(folder: Path) -> bool:
    """Tell whether a removal of this snapshot began and did not end: the manifest is gone or renamed by us."""
    if (folder / MANIFEST).exists():
        return False
    try:
        names = {entry.name for entry in folder.iterdir()}
    except OSError:
        return not folder.exists()
    return MANIFEST not in names and (REMOVED in names or names <= {HOLDS})


def _marks(folder: Path, *, manifest: Manifest) -> Marks:
    try:
        return Marks.model_validate_json((folder / MARKS).read_bytes())
    except FileNotFoundError:
        return Marks()
    except (OSError, ValidationError) as error:
        # Whether somebody pinned it cannot be told any more, so it counts as pinned.
        reason = f"marks.json cannot be read: {_first_line(error)}"
        _log.warning("%s: %s; the snapshot counts as pinned", folder, reason)
        return Marks(pin=Pin(owner="vmsnap", reason=reason, since=manifest.created))


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        return f"{where}: {first['msg']}" if where else str(first["msg"])
    return str(error)
