"""The history of runs and the audit trail: ``STATE/history.sqlite``. ``docs/formats.md`` describes the tables."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from vmsnap.model.history import Action, AuditEntry, RunEntry, RunOutcome, RunResult, RunStep, Starter, Trigger
from vmsnap.model.ids import RunId, SnapshotId
from vmsnap.model.journal import RunKind
from vmsnap.state.database import Database
from vmsnap.state.history_schema import APPLICATION_ID, MIGRATIONS
from vmsnap.state.processes import process_identity

T = TypeVar("T")
FILE_NAME = "history.sqlite"
KEEP_RUNS = 1000
"""Runs kept of each guest and kind. Counted, not by age: a clock that is wrong forgets nothing."""
KEEP_AUDIT = 1_000_000
_FAILURES = (RunOutcome.FAILED.value, RunOutcome.DIED.value)
_LOG = logging.getLogger(__name__)


class SqliteHistory:
    """The port ``HistoryBook``. Opens nothing before it is used. Keeps 1000 runs of each guest and kind."""

    def __init__(self, state: Path, *, migrations: Sequence[Sequence[str]] = MIGRATIONS) -> None:
        self._database = Database(state / FILE_NAME, application_id=APPLICATION_ID, migrations=migrations)

    def begin(self, run: RunId, *, kind: RunKind, guest: str, at: datetime, starter: Starter) -> None:
        """Record that a run began. May be repeated: the first one stands."""

        def work(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT INTO runs (run, kind, guest, started, started_by, user, starter, process)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (run) DO NOTHING",
                (run, kind.value, _text(guest), _time(at), *_starter_row(starter), process_identity(os.getpid())),
            )
            _forget_oldest(connection, kind=kind, guest=guest)

        self._database.write(work)

    def step(self, run: RunId, *, name: str, after: timedelta) -> None:
        """Record that a step began, ``after`` the run did; the one before it is over. Content with an unknown run."""
        self._database.write(
            lambda connection: connection.execute(
                "INSERT INTO steps (run_number, position, name, began_after)"
                " SELECT number, (SELECT count(*) FROM steps WHERE run_number = number), ?, ?"
                " FROM runs WHERE run = ? AND ended IS NULL",
                (_text(name), after.total_seconds(), run),
            )
        )

    def end(self, run: RunId, *, at: datetime, after: timedelta | None, result: RunResult) -> None:
        """Record how a run ended, ``after`` it began (None: not known). The first end stands."""

        def work(connection: sqlite3.Connection) -> None:
            changed = connection.execute(
                "UPDATE runs SET ended = ?, seconds = ?, outcome = ?, exit_code = ?, error = ?, remedy = ?, snapshot = ?,"
                " environment = ?, pause_ms = ?, new_bytes = ?, logical_bytes = ?, warnings = ?"
                " WHERE run = ? AND ended IS NULL",
                (_time(at), None if after is None else after.total_seconds(), *_result_row(result), run),
            )
            if changed.rowcount:
                connection.execute(
                    "INSERT INTO newest (kind, guest, ended, done)"
                    " SELECT kind, guest, number, CASE WHEN outcome = 'done' THEN number END FROM runs WHERE run = ?"
                    " ON CONFLICT (kind, guest) DO UPDATE SET ended = max(ended, excluded.ended),"
                    " done = max(coalesce(done, 0), coalesce(excluded.done, done))",
                    (run,),
                )

        self._database.write(work)

    def audit(self, entry: AuditEntry) -> None:
        """Record what was done, or tried."""

        def work(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT INTO audit (at, action, started_by, user, starter, guest, subject, detail, failure)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    _time(entry.at),
                    entry.action.value,
                    *_starter_row(entry.starter),
                    _text(entry.guest),
                    _text(entry.subject),
                    _text(entry.detail),
                    _text_or_none(entry.failure),
                ),
            )
            connection.execute("DELETE FROM audit WHERE number <= (SELECT max(number) FROM audit) - ?", (KEEP_AUDIT,))

        self._database.write(work)

    def runs(
        self,
        *,
        guest: str | None = None,
        kind: RunKind | None = None,
        failures_only: bool = False,
        limit: int | None = None,
    ) -> tuple[RunEntry, ...]:
        """Return runs, the newest first."""
        conditions: list[tuple[str, Sequence[str]]] = []
        if guest is not None:
            conditions.append(("guest = ?", [_text(guest)]))
        if kind is not None:
            conditions.append(("kind = ?", [kind.value]))
        if failures_only:
            conditions.append(("outcome IN (?, ?)", _FAILURES))
        where = " AND ".join(condition for condition, _ in conditions) or "TRUE"
        values = [value for _, given in conditions for value in given]
        # Only words of this function are in the text; everything given is bound.
        return self._runs(f"WHERE {where} ORDER BY number DESC LIMIT ?", (*values, -1 if limit is None else limit))

    def unended(self) -> tuple[RunEntry, ...]:
        """Return the runs whose end is not recorded, the oldest first."""
        return self._runs("WHERE ended IS NULL ORDER BY number", ())

    def dead(self) -> tuple[RunEntry, ...]:
        """Return those of them whose process is gone."""
        return self._runs("WHERE ended IS NULL ORDER BY number", (), only=lambda row: _is_gone(row["process"]))

    def last_ended(self, *, kind: RunKind) -> Mapping[str, RunEntry]:
        """Return by guest the newest run whose end is recorded, whatever that is."""
        found = self._runs("WHERE number IN (SELECT ended FROM newest WHERE kind = ?) ORDER BY guest", (kind.value,))
        return {entry.guest: entry for entry in found}

    def last_done(self, *, kind: RunKind) -> Mapping[str, RunEntry]:
        """Return by guest the newest run that succeeded."""
        found = self._runs("WHERE number IN (SELECT done FROM newest WHERE kind = ?) ORDER BY guest", (kind.value,))
        return {entry.guest: entry for entry in found}

    def trail(self, *, guest: str | None = None, limit: int | None = None) -> tuple[AuditEntry, ...]:
        """Return audited actions, the newest first."""

        def work(connection: sqlite3.Connection) -> list[sqlite3.Row]:
            connection.row_factory = sqlite3.Row
            where, values = ("", ()) if guest is None else ("WHERE guest = ?", (_text(guest),))
            query = f"SELECT * FROM audit {where} ORDER BY number DESC LIMIT ?"  # noqa: S608 - no given text is in it
            return connection.execute(query, (*values, -1 if limit is None else limit)).fetchall()

        return _decoded(self._database.read(work), decode=_audit_entry)

    def _runs(
        self, which: str, values: Sequence[str | int], *, only: Callable[[sqlite3.Row], bool] = lambda _: True
    ) -> tuple[RunEntry, ...]:
        def work(connection: sqlite3.Connection) -> list[tuple[sqlite3.Row, list[sqlite3.Row]]]:
            connection.row_factory = sqlite3.Row
            rows = connection.execute(f"SELECT * FROM runs {which}", values).fetchall()  # noqa: S608 - as above
            steps = "SELECT name, began_after FROM steps WHERE run_number = ? ORDER BY position"
            return [(row, connection.execute(steps, (row["number"],)).fetchall()) for row in rows if only(row)]

        return _decoded(self._database.read(work), decode=lambda found: _run_entry(*found))


def _is_gone(identity: str) -> bool:
    """Tell whether a process has ended, by what ``process_identity`` said of it."""
    try:
        return process_identity(int(identity.split(":", maxsplit=1)[0])) != identity
    except ValueError:
        return True


def _forget_oldest(connection: sqlite3.Connection, *, kind: RunKind, guest: str) -> None:
    """Forget the oldest runs of a guest beyond the count, but for its newest good one and what still goes on."""
    connection.execute(
        "DELETE FROM runs WHERE kind = :kind AND guest = :guest AND ended IS NOT NULL AND number <="
        " (SELECT number FROM runs WHERE kind = :kind AND guest = :guest ORDER BY number DESC LIMIT 1 OFFSET :keep)"
        " AND number NOT IN (SELECT coalesce(done, 0) FROM newest WHERE kind = :kind AND guest = :guest)",
        {"kind": kind.value, "guest": _text(guest), "keep": KEEP_RUNS},
    )


def _decoded(rows: Iterable[Any], *, decode: Callable[[Any], T]) -> tuple[T, ...]:
    """Return what can be understood; a row whose words nobody knows is passed over, with a warning."""
    found = []
    for row in rows:
        try:
            found.append(decode(row))
        except (ValueError, TypeError) as error:
            _LOG.warning("an entry of the history is not understood and passed over: %s", error)
    return tuple(found)


def _starter_row(starter: Starter) -> tuple[str, str, str]:
    return starter.trigger.value, _text(starter.user), _text(starter.detail)


def _starter(row: sqlite3.Row) -> Starter:
    return Starter(trigger=Trigger(row["started_by"]), user=row["user"], detail=row["starter"])


def _result_row(result: RunResult) -> tuple[str | int | float | None, ...]:
    return (
        result.outcome.value,
        None if result.exit_code is None else int(result.exit_code),
        _text_or_none(result.error),
        _text_or_none(result.remedy),
        result.snapshot,
        _text_or_none(result.environment),
        result.pause_ms,
        result.new_bytes,
        result.logical_bytes,
        json.dumps(result.warnings),
    )


def _run_entry(row: sqlite3.Row, steps: Sequence[sqlite3.Row]) -> RunEntry:
    ends = [*(step["began_after"] for step in steps[1:]), row["seconds"]]
    return RunEntry(
        run=RunId(row["run"]),
        kind=RunKind(row["kind"]),
        guest=row["guest"],
        started=datetime.fromisoformat(row["started"]),
        starter=_starter(row),
        steps=tuple(
            RunStep(
                name=step["name"],
                began_after_seconds=step["began_after"],
                seconds=None if end is None else round(end - step["began_after"], 6),
            )
            for step, end in zip(steps, ends, strict=False)
        ),
        ended=None if row["ended"] is None else datetime.fromisoformat(row["ended"]),
        seconds=row["seconds"],
        result=None if row["outcome"] is None else _result(row),
    )


def _result(row: sqlite3.Row) -> RunResult:
    return RunResult(
        outcome=RunOutcome(row["outcome"]),
        exit_code=row["exit_code"],
        error=row["error"],
        remedy=row["remedy"],
        snapshot=None if row["snapshot"] is None else SnapshotId(row["snapshot"]),
        environment=row["environment"],
        pause_ms=row["pause_ms"],
        new_bytes=row["new_bytes"],
        logical_bytes=row["logical_bytes"],
        warnings=tuple(json.loads(row["warnings"])),
    )


def _audit_entry(row: sqlite3.Row) -> AuditEntry:
    return AuditEntry(
        at=datetime.fromisoformat(row["at"]),
        action=Action(row["action"]),
        starter=_starter(row),
        guest=row["guest"],
        subject=row["subject"],
        detail=row["detail"],
        failure=row["failure"],
    )


def _time(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="microseconds")


def _text(text: str) -> str:
    """Return a text that can be stored: bytes that are no UTF-8 (lone surrogates) are written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _text_or_none(text: str | None) -> str | None:
    return None if text is None else _text(text)
