"""Lines of a run's journal, and what they add up to. Pure: no file is touched here.

Format 1: one JSON object a line, ``event`` names its kind. The first line is ``begin``. ``intend`` comes before a
resource is made and ``released`` after it is gone, so whatever is intended and not released may exist.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from vmsnap.model.ids import RunId
from vmsnap.model.journal import Resource, ResourceKind, RunKind, RunRecord

FORMAT_VERSION = 1
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """The first line of a journal."""

    run: RunId
    kind: RunKind
    guest: str
    started: datetime


def begin_line(beginning: Beginning) -> bytes:
    """Return the first line of a journal."""
    return _line(
        event="begin",
        version=FORMAT_VERSION,
        run=beginning.run,
        kind=beginning.kind.value,
        guest=beginning.guest,
        at=beginning.started.isoformat(),
    )


def resource_line(event: str, resource: Resource) -> bytes:
    """Return the line for ``intend`` or ``released``."""
    return _line(
        event=event,
        kind=resource.kind.value,
        run=resource.run,
        guest=resource.guest,
        name=resource.name,
        detail=resource.detail,
    )


def state_line(state: str) -> bytes:
    """Return the line that records a state."""
    return _line(event="state", state=state)


def note_line(text: str) -> bytes:
    """Return the line that tells something to a reader."""
    return _line(event="note", text=text)


def keep_line(environment: str | None) -> bytes:
    """Return the line for ``keep``, or for ``unkeep`` where ``environment`` is None."""
    return _line(event="unkeep") if environment is None else _line(event="keep", environment=environment)


def finish_line() -> bytes:
    """Return the line that ends a run."""
    return _line(event="finish")


def _line(**fields: str | int) -> bytes:
    # ASCII only, so that neither a name's newline nor a surrogate can break a line.
    return (json.dumps(fields) + "\n").encode("ascii")


def whole_lines(data: bytes) -> list[bytes]:
    """Return the lines that end with a newline. What follows the last one was torn by a crash and never took effect."""
    return data.split(b"\n")[:-1]


class History:
    """What a journal's lines add up to."""

    def __init__(self, beginning: Beginning) -> None:
        self._beginning = beginning
        self._unreleased: dict[tuple[ResourceKind, str], Resource] = {}
        self._state = ""
        self._kept_for: str | None = None
        self._closed = False

    @staticmethod
    def read(data: bytes, *, source: str) -> History | None:
        """Return the history a journal tells, or None where it has no first line. ``source`` is named in warnings."""
        lines = whole_lines(data)
        beginning = _beginning(lines[0], source=source) if lines else None
        if beginning is None:
            return None
        history = History(beginning)
        history._add_lines(lines[1:], source=source)
        return history

    @property
    def started(self) -> datetime:
        """Return when the run began."""
        return self._beginning.started

    @property
    def closed(self) -> bool:
        """Tell whether the run is over and left nothing."""
        return self._closed

    @property
    def unreleased(self) -> tuple[Resource, ...]:
        """Return what may exist, oldest first."""
        return tuple(self._unreleased.values())

    def intend(self, resource: Resource) -> None:
        """Take note of an intent. A second one for the same thing replaces its detail."""
        self._closed = False
        self._unreleased[resource.kind, resource.name] = resource

    def released(self, resource: Resource) -> None:
        """Take note of a release. Content with what was never intended."""
        self._unreleased.pop((resource.kind, resource.name), None)

    def state(self, state: str) -> None:
        """Take note of a state."""
        self._state = state

    def keep(self, environment: str | None) -> None:
        """Take note that the run's things stay for an environment, or (None) no longer do."""
        self._kept_for = environment

    def finish(self) -> None:
        """Take note of the end."""
        self._closed = True
        self._kept_for = None

    def record(self, *, alive: bool) -> RunRecord:
        """Return the history as a record."""
        return RunRecord(
            run=self._beginning.run,
            kind=self._beginning.kind,
            guest=self._beginning.guest,
            started=self._beginning.started,
            alive=alive,
            kept_for=self._kept_for,
            closed=self._closed,
            unreleased=self.unreleased,
            state=self._state,
        )

    def _add_lines(self, lines: Iterable[bytes], *, source: str) -> None:
        for number, line in enumerate(lines, start=2):
            try:
                self._add(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                _log.warning("%s, line %d: not understood and passed over (%s)", source, number, error)

    def _add(self, said: dict[str, Any]) -> None:
        match said["event"]:
            case "intend":
                self.intend(_resource(said))
            case "released":
                self.released(_resource(said))
            case "state":
                self.state(str(said["state"]))
            case "note":
                pass
            case "keep":
                self.keep(str(said["environment"]))
            case "unkeep":
                self.keep(None)
            case "finish":
                self.finish()
            case other:
                msg = f"unknown event {other!r}"
                raise ValueError(msg)


def _beginning(line: bytes, *, source: str) -> Beginning | None:
    try:
        said = json.loads(line)
        if said["version"] > FORMAT_VERSION:
            _log.warning("%s has format %s; reading what format %d knows", source, said["version"], FORMAT_VERSION)
        return Beginning(
            run=RunId(str(said["run"])),
            kind=RunKind(said["kind"]),
            guest=str(said["guest"]),
            started=datetime.fromisoformat(said["at"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        _log.warning("%s: the first line is damaged and the journal is passed over (%s)", source, error)
        return None


def _resource(said: dict[str, Any]) -> Resource:
    return Resource(
        kind=ResourceKind(said["kind"]),
        run=RunId(str(said["run"])),
        guest=str(said["guest"]),
        name=str(said["name"]),
        detail=str(said["detail"]),
    )
