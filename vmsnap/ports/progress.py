"""Telling an operator how far a run is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives what happens. Must not raise."""

    def step(self, name: str) -> None:
        """A step began; the one before it is over."""

    def bytes_done(self, done: int, total: int) -> None:
        """Bytes of the present step that are done."""

    def waiting(self, what: str, *, deadline_seconds: float) -> None:
        """The present step waits for something, at most that long."""

    def note(self, text: str) -> None:
        """Something worth a line: a rung that failed, work rolled back."""
