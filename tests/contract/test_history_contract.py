from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.contract.dying import work_and_die
from vmsnap.ports.history import HistoryBook
from vmsnap.state.history import SqliteHistory
from vmsnap.testing.history_contract import HistoryContract, HistoryWorld
from vmsnap.testing.memory_state import MemoryState


@dataclass(frozen=True)
class FileWorld:
    history: HistoryBook

    def run_and_die(self, work: Callable[[HistoryBook], None]) -> None:
        work_and_die(lambda: work(self.history))


@dataclass(frozen=True)
class MemoryWorld:
    state: MemoryState

    @property
    def history(self) -> HistoryBook:
        return self.state.history

    def run_and_die(self, work: Callable[[HistoryBook], None]) -> None:
        work(self.history)
        self.state.die()
        self.state.restart()


class TestSqliteHistory(HistoryContract):
    @pytest.fixture
    def world(self, tmp_path: Path) -> HistoryWorld:
        return FileWorld(SqliteHistory(tmp_path / "state"))


class TestMemoryHistory(HistoryContract):
    @pytest.fixture
    def world(self) -> HistoryWorld:
        return MemoryWorld(MemoryState())
