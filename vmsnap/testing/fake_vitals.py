"""Signs of life in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vmsnap.model.ids import RunId


class FakeVitals:
    """The port ``Vitals``. A test says what other vmsnaps of the host do."""

    def __init__(self) -> None:
        self._working: dict[RunId, str] = {}
        self._known: set[RunId] = set()

    def signs(self, run: RunId, *, guest: str) -> tuple[str, ...]:
        """Return what shows that a run may be alive."""
        found = [f"another process works on run {run}"] if run in self._working else []
        if guest and guest in self._working.values():
            found.append(f"another process holds guest {guest!r}")
        if run in self._known:
            found.append(f"run {run} is in the journals of another vmsnap")
        return tuple(found)

    @contextmanager
    def working(self, run: RunId, *, guest: str) -> Iterator[None]:
        """Let a process with another state directory work on a run of a guest meanwhile."""
        self._working[run] = guest
        try:
            yield
        finally:
            del self._working[run]

    @contextmanager
    def knowing(self, run: RunId) -> Iterator[None]:
        """Let another vmsnap, which is at work for other guests, have a dead run in its journals meanwhile."""
        self._known.add(run)
        try:
            yield
        finally:
            self._known.discard(run)
