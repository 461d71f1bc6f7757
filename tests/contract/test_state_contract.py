from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.contract.dying import work_and_die
from vmsnap.ports.state import Admissions, AttemptBook, EnvironmentBook, Exchanges, Journals, Locks, RungMemory
from vmsnap.state.admissions import FileAdmissions
from vmsnap.state.attempts import FileAttemptBook
from vmsnap.state.environments import FileEnvironmentBook
from vmsnap.state.exchanges import FileExchanges
from vmsnap.state.journal import FileJournals
from vmsnap.state.locks import FileLocks
from vmsnap.state.rungs import FileRungMemory
from vmsnap.testing.memory_state import MemoryState
from vmsnap.testing.standing_clock import StandingClock
from vmsnap.testing.state_contract import AT, StateContract, StateWorld


@dataclass(frozen=True)
class FileWorld:
    journals: Journals
    locks: Locks
    environments: EnvironmentBook
    exchanges: Exchanges
    attempts: AttemptBook
    rungs: RungMemory
    admissions: Admissions

    @staticmethod
    def at(folder: Path) -> FileWorld:
        return FileWorld(
            journals=FileJournals(folder),
            locks=FileLocks(folder, clock=StandingClock(AT)),
            environments=FileEnvironmentBook(folder),
            exchanges=FileExchanges(folder),
            attempts=FileAttemptBook(folder),
            rungs=FileRungMemory(folder),
            admissions=FileAdmissions(folder, most=4),
        )

    def run_and_die(self, work: Callable[[StateWorld], None]) -> None:
        work_and_die(lambda: work(self))


@dataclass(frozen=True)
class MemoryWorld:
    state: MemoryState

    @property
    def journals(self) -> Journals:
        return self.state.journals

    @property
    def locks(self) -> Locks:
        return self.state.locks

    @property
    def admissions(self) -> Admissions:
        return self.state.admissions

    @property
    def environments(self) -> EnvironmentBook:
        return self.state.environments

    @property
    def exchanges(self) -> Exchanges:
        return self.state.exchanges

    @property
    def attempts(self) -> AttemptBook:
        return self.state.attempts

    @property
    def rungs(self) -> RungMemory:
        return self.state.rungs

    def run_and_die(self, work: Callable[[StateWorld], None]) -> None:
        work(self)
        self.state.die()
        self.state.restart()


class TestFileState(StateContract):
    @pytest.fixture
    def world(self, tmp_path: Path) -> StateWorld:
        return FileWorld.at(tmp_path / "state")


class TestMemoryState(StateContract):
    @pytest.fixture
    def world(self) -> StateWorld:
        return MemoryWorld(MemoryState())
