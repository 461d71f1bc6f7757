"""The ledger of alarms: ``STATE/alarms.json``."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from vmsnap.model.alarms import Alarm, AlarmKind, Breach, Ledger, Raised
from vmsnap.state.files import make_private_folder, read_if_there, write_replace

FORMAT_VERSION = 1
FILE_NAME = "alarms.json"
_LOG = logging.getLogger(__name__)


class FileAlarmBook:
    """The port ``AlarmBook``. Each change is on disk, whole, when ``replace`` returns."""

    def __init__(self, state: Path) -> None:
        self._path = state / FILE_NAME

    def load(self) -> Ledger:
        """Return the ledger. What cannot be understood counts as none: then something is told twice, and nothing is lost."""
        data = read_if_there(self._path)
        if data is None:
            return Ledger()
        try:
            return _decode(json.loads(data))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            _LOG.warning("'%s' is damaged, or of another version, and passed over (%s)", self._path, error)
            return Ledger()

    def replace(self, ledger: Ledger) -> None:
        """Write the ledger. Raises NoSpaceError, PreconditionError, DriverError."""
        make_private_folder(self._path.parent)
        write_replace(self._path, data=(json.dumps(_encode(ledger), indent=1) + "\n").encode("ascii"))


def _encode(ledger: Ledger) -> dict[str, Any]:
    return {
        "version": FORMAT_VERSION,
        "message": _text(ledger.message),
        "raised": [
            {
                "guest": item.alarm.guest,
                "kind": item.alarm.kind.value,
                "about": item.alarm.about,
                "text": item.alarm.text,
                "remedy": item.alarm.remedy,
                "since": _text(item.since),
                "told": _text(item.told),
                "tried": _text(item.tried),
                "over": _text(item.over),
            }
            for item in ledger.raised
        ],
        "breaches": {
            guest: {"at": _text(breach.at), "text": breach.text, "remedy": breach.remedy, "count": breach.count}
            for guest, breach in ledger.breaches.items()
        },
        "known": {guest: _text(since) for guest, since in ledger.known.items()},
        "pruned": {guest: _text(at) for guest, at in ledger.pruned.items()},
    }


def _decode(record: dict[str, Any]) -> Ledger:
    if record["version"] != FORMAT_VERSION:
        raise ValueError(f"format {record['version']}")
    return Ledger(
        message=_moment_or_none(record["message"]),
        raised=tuple(_raised(item) for item in record["raised"]),
        breaches={
            guest: Breach(
                at=_moment(item["at"]), text=str(item["text"]), remedy=item["remedy"], count=int(item["count"])
            )
            for guest, item in record["breaches"].items()
        },
        known=_moments(record["known"]),
        pruned=_moments(record["pruned"]),
    )


def _raised(record: dict[str, Any]) -> Raised:
    alarm = Alarm(
        guest=str(record["guest"]),
        kind=AlarmKind(record["kind"]),
        about=str(record["about"]),
        text=str(record["text"]),
        remedy=record["remedy"],
    )
    return Raised(
        alarm=alarm,
        since=_moment(record["since"]),
        told=_moment_or_none(record["told"]),
        tried=_moment_or_none(record["tried"]),
        over=_moment_or_none(record["over"]),
    )


def _moments(record: Mapping[str, str]) -> dict[str, datetime]:
    return {name: _moment(text) for name, text in record.items()}


def _text(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()


def _moment_or_none(text: str | None) -> datetime | None:
    return None if text is None else _moment(text)


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(f"'{text}' has no time zone")
    return moment
