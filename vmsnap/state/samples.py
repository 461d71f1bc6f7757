"""On which day a share of a guest's snapshots was last read again: ``STATE/samples/GUEST.json``."""

from __future__ import annotations

import json
import logging
from datetime import date
from pathlib import Path

from vmsnap.model.ids import folder_name
from vmsnap.state.files import make_private_folder, read_if_there, write_replace

FORMAT_VERSION = 1
_LOG = logging.getLogger(__name__)


class FileSampleBook:
    """The port ``SampleBook``. What cannot be understood counts as nothing: then a share is read once more than needed."""

    def __init__(self, state: Path) -> None:
        self._folder = state / "samples"

    def last(self, guest: str, *, replica: bool) -> date | None:
        """Return the day on which a share was last read."""
        return self._days(guest).get(_key(replica=replica))

    def note(self, guest: str, *, replica: bool, day: date) -> None:
        """Record the day. Raises NoSpaceError, PreconditionError, DriverError."""
        days = {**self._days(guest), _key(replica=replica): day}
        make_private_folder(self._folder)
        record = {
            "version": FORMAT_VERSION,
            "guest": guest,
            "days": {key: value.isoformat() for key, value in days.items()},
        }
        write_replace(self._path(guest), data=(json.dumps(record, indent=2) + "\n").encode("ascii"))

    def _days(self, guest: str) -> dict[str, date]:
        data = read_if_there(self._path(guest))
        if data is None:
            return {}
        try:
            record = json.loads(data)
            if record["version"] != FORMAT_VERSION:
                return {}
            return {key: date.fromisoformat(day) for key, day in record["days"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            _LOG.warning("'%s' is damaged and passed over (%s)", self._path(guest), error)
            return {}

    def _path(self, guest: str) -> Path:
        return self._folder / f"{folder_name(guest)}.json"


def _key(*, replica: bool) -> str:
    return "replica" if replica else "here"
