"""On which day a share of a guest's snapshots was last read again, and what of it is damaged: ``STATE/samples/GUEST.json``."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path

from vmsnap.model.ids import SnapshotId, folder_name
from vmsnap.state.files import make_private_folder, read_if_there, write_replace

FORMAT_VERSION = 1
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Record:
    days: Mapping[str, date] = field(default_factory=dict)
    damaged: Mapping[SnapshotId, str] = field(default_factory=dict)


class FileSampleBook:
    """The port ``SampleBook``. What cannot be understood counts as nothing: then a share is read once more than needed."""

    def __init__(self, state: Path) -> None:
        self._folder = state / "samples"

    def last(self, guest: str, *, replica: bool) -> date | None:
        """Return the day on which a share was last read."""
        return self._read(guest).days.get(_key(replica=replica))

    def note(self, guest: str, *, replica: bool, day: date) -> None:
        """Record the day. Raises NoSpaceError, PreconditionError, DriverError."""
        known = self._read(guest)
        self._write(guest, record=replace(known, days={**known.days, _key(replica=replica): day}))

    def damaged(self, guest: str) -> Mapping[SnapshotId, str]:
        """Return the snapshots whose copies at the replica were found damaged."""
        return self._read(guest).damaged

    def mark(self, guest: str, *, snapshot: SnapshotId, damage: str | None) -> None:
        """Record that a copy is damaged, or is not. Raises NoSpaceError, PreconditionError, DriverError."""
        known = self._read(guest)
        damaged = {one: text for one, text in known.damaged.items() if one != snapshot}
        if damage is not None:
            damaged[snapshot] = damage
        if damaged != known.damaged:
            self._write(guest, record=replace(known, damaged=damaged))

    def _write(self, guest: str, *, record: _Record) -> None:
        make_private_folder(self._folder)
        document = {
            "version": FORMAT_VERSION,
            "guest": guest,
            "days": {key: value.isoformat() for key, value in record.days.items()},
            "damaged": dict(record.damaged),
        }
        write_replace(self._path(guest), data=(json.dumps(document, indent=2) + "\n").encode("ascii"))

    def _read(self, guest: str) -> _Record:
        data = read_if_there(self._path(guest))
        if data is None:
            return _Record()
        try:
            record = json.loads(data)
            if record["version"] != FORMAT_VERSION:
                return _Record()
            return _Record(
                days={key: date.fromisoformat(day) for key, day in record["days"].items()},
                damaged={SnapshotId(one): str(text) for one, text in record.get("damaged", {}).items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            _LOG.warning("'%s' is damaged and passed over (%s)", self._path(guest), error)
            return _Record()

    def _path(self, guest: str) -> Path:
        return self._folder / f"{folder_name(guest)}.json"


def _key(*, replica: bool) -> str:
    return "replica" if replica else "here"
