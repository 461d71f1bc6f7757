"""Which rung of the ladder worked last for each guest: ``STATE/rungs/GUEST.json``."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from vmsnap.model.ids import folder_name
from vmsnap.model.isolation import Rung
from vmsnap.state.files import make_private_folder, read_if_there, write_replace

FORMAT_VERSION = 1
_LOG = logging.getLogger(__name__)


class FileRungMemory:
    """The port ``RungMemory``. Each change is on disk, whole, when its method returns."""

    def __init__(self, state: Path) -> None:
        self._folder = state / "rungs"

    def recall(self, guest: str) -> Rung | None:
        """Return the rung that worked last. What cannot be understood counts as not known: it costs time only."""
        path = self._path(guest)
        data = read_if_there(path)
        if data is None:
            return None
        try:
            record = json.loads(data)
            return Rung(record["rung"]) if record["version"] == FORMAT_VERSION else None
        except (ValueError, KeyError, TypeError) as error:
            _LOG.warning("'%s' is damaged and passed over (%s)", path, error)
            return None

    def remember(self, guest: str, *, rung: Rung) -> None:
        """Record the rung that worked. Raises NoSpaceError, PreconditionError, DriverError."""
        make_private_folder(self._folder)
        record = {"version": FORMAT_VERSION, "guest": guest, "rung": rung.value}
        write_replace(self._path(guest), data=(json.dumps(record) + "\n").encode("ascii"))

    def _path(self, guest: str) -> Path:
        return self._folder / f"{folder_name(guest)}.json"
