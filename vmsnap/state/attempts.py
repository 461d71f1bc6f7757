"""What the schedule began for a guest without a snapshot to show for it: ``STATE/attempts/GUEST.json``."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from vmsnap.model.ids import folder_name
from vmsnap.model.schedule import FailedAttempt
from vmsnap.state.files import make_private_folder, read_if_there, remove_if_there, write_replace

FORMAT_VERSION = 1
_LOG = logging.getLogger(__name__)


class FileAttemptBook:
    """The port ``AttemptBook``. Each change is on disk, whole, when its method returns."""

    def __init__(self, state: Path) -> None:
        self._folder = state / "attempts"

    def failures(self, guest: str) -> tuple[FailedAttempt, ...]:
        """Return a guest's failed attempts, oldest first. What cannot be understood counts as none: backups go on."""
        path = self._path(guest)
        data = read_if_there(path)
        if data is None:
            return ()
        try:
            record = json.loads(data)
            if record["version"] != FORMAT_VERSION:
                _LOG.warning("'%s' has a format that this vmsnap does not know, and is passed over", path)
                return ()
            return tuple(_decode(item) for item in record["attempts"])
        except (ValueError, KeyError, TypeError) as error:
            _LOG.warning("'%s' is damaged and passed over (%s)", path, error)
            return ()

    def replace(self, guest: str, *, failures: Sequence[FailedAttempt]) -> None:
        """Record a guest's failed attempts instead of those before. Raises NoSpaceError, PreconditionError, DriverError."""
        path = self._path(guest)
        if not failures:
            remove_if_there(path)
            return
        make_private_folder(self._folder)
        record = {"version": FORMAT_VERSION, "guest": guest, "attempts": [_encode(item) for item in failures]}
        write_replace(path, data=(json.dumps(record, indent=2) + "\n").encode("ascii"))

    def _path(self, guest: str) -> Path:
        return self._folder / f"{folder_name(guest)}.json"


def _encode(failure: FailedAttempt) -> dict[str, Any]:
    return {
        "began": failure.began.isoformat(),
        "ended": None if failure.ended is None else failure.ended.isoformat(),
        "exit_code": failure.exit_code,
        "brief": failure.brief,
    }


def _decode(record: dict[str, Any]) -> FailedAttempt:
    ended, exit_code, brief = record["ended"], record["exit_code"], record["brief"]
    if not isinstance(brief, str) or not isinstance(exit_code, int | None):
        msg = "an attempt has fields of other types"
        raise TypeError(msg)
    return FailedAttempt(
        began=_moment(record["began"]),
        ended=None if ended is None else _moment(ended),
        exit_code=exit_code,
        brief=brief,
    )


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(f"'{text}' has no time zone")
    return moment
