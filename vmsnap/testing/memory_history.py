"""The history in memory. It belongs to a ``MemoryState``: what was recorded outlives the death of its process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from vmsnap.model.history import AuditEntry, RunEntry, RunOutcome, RunResult, RunStep, Starter
from vmsnap.model.ids import RunId
from vmsnap.model.journal import RunKind

if TYPE_CHECKING:
    from vmsnap.testing.memory_state import MemoryState


class MemoryHistory:
    """The port ``HistoryBook`` in memory."""

    def __init__(self, state: MemoryState) -> None:
        self._state = state
        self.entries: dict[RunId, RunEntry] = {}
        self._processes: dict[RunId, int] = {}
        self.audited: list[AuditEntry] = []

    def begin(self, run: RunId, *, kind: RunKind, guest: str, at: datetime, starter: Starter) -> None:
        """Record that a run began. May be repeated: the first one stands."""
        self._state.check_alive()
        self._processes.setdefault(run, self._state.process)
        self.entries.setdefault(run, RunEntry(run=run, kind=kind, guest=guest, started=at, starter=starter))

    def step(self, run: RunId, *, name: str, after: timedelta) -> None:
        """Record that a step began, ``after`` the run did. Content with an unknown run."""
        self._state.check_alive()
        entry = self.entries.get(run)
        if entry is not None and entry.result is None:
            began = after.total_seconds()
            step = RunStep(name=name, began_after_seconds=began, seconds=None)
            self.entries[run] = replace(entry, steps=(*_ended(entry.steps, began), step))

    def end(self, run: RunId, *, at: datetime, after: timedelta | None, result: RunResult) -> None:
        """Record how a run ended, ``after`` it began (None: not known). The first end stands."""
        self._state.check_alive()
        entry = self.entries.get(run)
        if entry is not None and entry.result is None:
            seconds = None if after is None else after.total_seconds()
            steps = entry.steps if seconds is None else _ended(entry.steps, seconds)
            self.entries[run] = replace(entry, steps=steps, ended=at, seconds=seconds, result=result)

    def audit(self, entry: AuditEntry) -> None:
        """Record what was done, or tried."""
        self._state.check_alive()
        self.audited.append(entry)

    def runs(
        self,
        *,
        guest: str | None = None,
        kind: RunKind | None = None,
        failures_only: bool = False,
        limit: int | None = None,
    ) -> tuple[RunEntry, ...]:
        """Return runs, the newest first."""
        self._state.check_alive()
        found = [
            entry
            for entry in reversed(self.entries.values())
            if guest in (None, entry.guest)
            and kind in (None, entry.kind)
            and (not failures_only or entry.outcome in (RunOutcome.FAILED, RunOutcome.DIED))
        ]
        return tuple(found[:limit])

    def unended(self) -> tuple[RunEntry, ...]:
        """Return the runs whose end is not recorded, the oldest first."""
        self._state.check_alive()
        return tuple(entry for entry in self.entries.values() if entry.result is None)

    def dead(self) -> tuple[RunEntry, ...]:
        """Return those of them whose process is gone."""
        return tuple(entry for entry in self.unended() if self._processes[entry.run] != self._state.process)

    def last_ended(self, *, kind: RunKind) -> Mapping[str, RunEntry]:
        """Return by guest the newest run whose end is recorded, whatever that is."""
        self._state.check_alive()
        return {
            entry.guest: entry for entry in self.entries.values() if entry.kind is kind and entry.result is not None
        }

    def last_done(self, *, kind: RunKind) -> Mapping[str, RunEntry]:
        """Return by guest the newest run that succeeded."""
        ended = (entry for entry in self.entries.values() if entry.kind is kind)
        self._state.check_alive()
        return {entry.guest: entry for entry in ended if entry.outcome is RunOutcome.DONE}

    def trail(self, *, guest: str | None = None, limit: int | None = None) -> tuple[AuditEntry, ...]:
        """Return audited actions, the newest first."""
        self._state.check_alive()
        return tuple([entry for entry in reversed(self.audited) if guest in (None, entry.guest)][:limit])


def _ended(steps: tuple[RunStep, ...], after_seconds: float) -> tuple[RunStep, ...]:
    """Return the steps, the last of which ended ``after_seconds`` of the run."""
    if not steps:
        return steps
    last = steps[-1]
    return (*steps[:-1], replace(last, seconds=round(after_seconds - last.began_after_seconds, 6)))
