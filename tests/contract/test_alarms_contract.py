"""The ledger of alarms in a file and in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.contract.dying import work_and_die
from vmsnap.errors import PreconditionError
from vmsnap.model.alarms import Ledger
from vmsnap.ports.alarms import AlarmBook
from vmsnap.ports.state import Locks
from vmsnap.state.alarms import FileAlarmBook
from vmsnap.state.locks import FileLocks
from vmsnap.testing.alarms_contract import FULL, AlarmsContract, AlarmsWorld
from vmsnap.testing.memory_state import MemoryState
from vmsnap.testing.standing_clock import StandingClock
from vmsnap.testing.state_contract import AT


@dataclass(frozen=True)
class FileWorld:
    alarms: AlarmBook
    locks: Locks

    def run_and_die(self, work: Callable[[AlarmsWorld], None]) -> None:
        work_and_die(lambda: work(self))


@dataclass(frozen=True)
class MemoryWorld:
    state: MemoryState

    @property
    def alarms(self) -> AlarmBook:
        return self.state.alarms

    @property
    def locks(self) -> Locks:
        return self.state.locks

    def run_and_die(self, work: Callable[[AlarmsWorld], None]) -> None:
        work(self)
        self.state.die()
        self.state.restart()


class TestFileAlarms(AlarmsContract):
    @pytest.fixture
    def world(self, tmp_path: Path) -> AlarmsWorld:
        state = tmp_path / "state"
        return FileWorld(alarms=FileAlarmBook(state), locks=FileLocks(state, clock=StandingClock(AT)))


class TestMemoryAlarms(AlarmsContract):
    @pytest.fixture
    def world(self) -> AlarmsWorld:
        return MemoryWorld(MemoryState())


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"version": 2}', '{"version": 1}', '{"version": 1, "message": "yesterday"}', "\x00\xff"]
)
def test_a_damaged_ledger_counts_as_none(tmp_path: Path, content: str) -> None:
    book = FileAlarmBook(tmp_path)
    (tmp_path / "alarms.json").write_bytes(content.encode("latin-1"))
    assert book.load() == Ledger()
    book.replace(FULL)
    assert book.load() == FULL


def test_a_ledger_with_times_of_no_zone_counts_as_none(tmp_path: Path) -> None:
    book = FileAlarmBook(tmp_path)
    book.replace(FULL)
    path = tmp_path / "alarms.json"
    record = json.loads(path.read_text())
    record["known"]["db"] = "2026-11-21T02:00:00"
    path.write_text(json.dumps(record))
    assert book.load() == Ledger()


def test_only_its_owner_may_read_it(tmp_path: Path) -> None:
    state = tmp_path / "state"
    FileAlarmBook(state).replace(FULL)
    assert (state / "alarms.json").stat().st_mode & 0o077 == 0


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    state.chmod(0o777)
    with pytest.raises(PreconditionError, match="others than its owner may write"):
        FileAlarmBook(state).replace(FULL)
