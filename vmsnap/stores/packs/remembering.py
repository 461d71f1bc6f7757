"""What this host remembers of the copies at the replica: a small file a guest, so that they can be watched without asking there.

STATE/replica/copies/GUEST.json may be lost at any time: the next look at what is lacking writes it anew. It is written after
what it tells is so at the replica; a process that dies between leaves it behind, never ahead.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from vmsnap.model.ids import SnapshotId, folder_name
from vmsnap.ports.replica import Remembered
from vmsnap.stores.layout import replace_file

_log = logging.getLogger(__name__)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Newest(_Record):
    """The newest copy that is known, and when it was captured."""

    snapshot: SnapshotId
    captured: AwareDatetime


class _Copies(_Record):
    format_version: Literal[1] = 1
    guest: str
    repository: str
    newest: Newest | None = None
    settled: tuple[SnapshotId, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CopyMemory:
    """Remembers in ``folder``. Raises nothing: what cannot be read is not known, and what cannot be written is logged."""

    folder: Path

    def recall(self, guest: str) -> Remembered:
        """Return what is remembered of a guest, of whichever repository was used last."""
        found = self._read(guest)
        if found is None:
            return Remembered()
        newest = None if found.newest is None else found.newest.captured
        return Remembered(newest=newest, settled=frozenset(found.settled))

    def newest(self, guest: str, *, repository: str) -> Newest | None:
        """Return the newest copy in a repository that is remembered."""
        found = self._read(guest)
        return None if found is None or found.repository != repository else found.newest

    def found(self, guest: str, *, repository: str, settled: Iterable[SnapshotId], newest: Newest | None) -> None:
        """Remember what was found there, instead of all before."""
        record = _Copies(guest=guest, repository=repository, newest=newest, settled=tuple(sorted(settled)))
        if record != self._read(guest):
            self._write(record)

    def sent(self, guest: str, *, repository: str, copy: Newest, now: datetime) -> None:
        """Remember one more copy, beside those before. One dated ahead of the clock is not taken for the newest."""
        before = self._read(guest)
        if before is None or before.repository != repository:
            before = _Copies(guest=guest, repository=repository)
        newest = newest_of([copy, *([] if before.newest is None else [before.newest])], now=now)
        settled = tuple(sorted({*before.settled, copy.snapshot}))
        self._write(before.model_copy(update={"newest": newest, "settled": settled}))

    def _read(self, guest: str) -> _Copies | None:
        path = self._path(guest)
        try:
            return _Copies.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            _log.debug("%s is passed over: %s", path, error)
            return None

    def _write(self, record: _Copies) -> None:
        path = self._path(record.guest)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            replace_file(path, data=record.model_dump_json().encode() + b"\n", mode=0o600)
        except OSError as error:
            # What was sent is sent. It is found at the next look.
            _log.warning("which copies of %s are at the replica cannot be remembered: %s", record.guest, error)

    def _path(self, guest: str) -> Path:
        return self.folder / f"{folder_name(guest)}.json"


def newest_of(copies: Iterable[Newest], *, now: datetime) -> Newest | None:
    """Return the newest copy that is not dated ahead of the clock: that was made by a clock that was wrong."""
    return max((one for one in copies if one.captured <= now), key=lambda one: one.captured, default=None)
