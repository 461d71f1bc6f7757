"""A client outside the guest that commits numbered markers and remembers which commits were acknowledged when."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

import psycopg

from integration.lab.commands import LabError

INSERT = "INSERT INTO markers (n) VALUES (%s)"


@dataclass(frozen=True)
class Marker:
    """One numbered commit. Without `acknowledged_s` its outcome is unknown: the connection broke before the answer."""

    number: int
    began_s: float  # time.monotonic() just before the statement was sent
    began_at: datetime
    acknowledged_s: float | None  # time.monotonic() just after the server said it was committed
    acknowledged_at: datetime | None
    error: str | None = None


class LabClient:
    """Commits a marker every `interval_s` into `app.markers` of a guest, over the production network.

    Numbers rise from one more than what the table holds, and none is used twice, so a row tells which statement made it.
    A context manager: connected and committing inside the block, stopped after it.
    """

    def __init__(self, address: str, *, port: int = 5432, interval_s: float = 0.1, patience_s: float = 60.0) -> None:
        self._conninfo = psycopg.conninfo.make_conninfo(
            host=address,
            port=port,
            dbname="app",
            user="postgres",
            connect_timeout=max(2, int(patience_s)),
            tcp_user_timeout=int(patience_s * 1000),
            application_name="lab-client",
        )
        self._interval_s = interval_s
        self._patience_s = patience_s
        self._markers: list[Marker] = []
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="lab-client", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self.wait_for_more(1)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def markers(self) -> list[Marker]:
        """All markers so far, in the order they were sent."""
        with self._changed:
            return list(self._markers)

    def acknowledged_before(self, instant_s: float) -> set[int]:
        """Numbers whose commit was acknowledged before this `time.monotonic()`: a capture after it must hold all of them."""
        return {m.number for m in self.markers if m.acknowledged_s is not None and m.acknowledged_s < instant_s}

    def begun_after(self, instant_s: float) -> set[int]:
        """Numbers first sent after this `time.monotonic()`: a capture before it must hold none of them."""
        return {m.number for m in self.markers if m.began_s > instant_s}

    def wait_for_more(self, count: int) -> None:
        """Wait until `count` more markers are acknowledged. Raises `LabError` with the last error if they are not."""

        def acknowledged() -> int:
            return sum(marker.acknowledged_s is not None for marker in self._markers)

        with self._changed:
            goal = acknowledged() + count
            if not self._changed.wait_for(lambda: acknowledged() >= goal, timeout=self._patience_s):
                last = self._markers[-1].error if self._markers else "no connection"
                raise LabError(f"the lab client's commits are not acknowledged: {last}")

    def stop(self) -> list[Marker]:
        """Finish the statement in flight, disconnect, and return all markers. Repeatable."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=self._patience_s * 2)
        return self.markers

    def _work(self) -> None:
        number = 0
        while not self._stop.is_set():
            try:
                with psycopg.connect(self._conninfo, autocommit=True) as connection:
                    row = connection.execute("SELECT coalesce(max(n), 0) FROM markers").fetchone()
                    assert row is not None
                    number = max(number, int(row[0]))
                    while not self._stop.is_set():
                        number += 1
                        self._commit(connection, number)
                        self._stop.wait(self._interval_s)
            except psycopg.Error:
                self._stop.wait(1.0)  # the marker, if one was in flight, holds the error

    def _commit(self, connection: psycopg.Connection[tuple[object, ...]], number: int) -> None:
        began_s, began_at = time.monotonic(), datetime.now(UTC)
        try:
            connection.execute(INSERT, (number,))
        except psycopg.Error as error:
            self._note(Marker(number, began_s, began_at, None, None, error=str(error)))
            raise
        self._note(Marker(number, began_s, began_at, time.monotonic(), datetime.now(UTC)))

    def _note(self, marker: Marker) -> None:
        with self._changed:
            self._markers.append(marker)
            self._changed.notify_all()
