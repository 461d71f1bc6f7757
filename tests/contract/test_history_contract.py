from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from vmsnap.ports.history import HistoryBook
from vmsnap.state.history import SqliteHistory
from vmsnap.testing.history_contract import HistoryContract, HistoryWorld
from vmsnap.testing.memory_state import MemoryState


@dataclass(frozen=True)
class FileWorld:
    history: HistoryBook

    def run_and_die(self, work: Callable[[HistoryBook], None]) -> None:
        child = os.fork()
        if child == 0:
            try:
                work(self.history)
                os.kill(os.getpid(), signal.SIGKILL)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the work itself failed"


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
