from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import timedelta
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.unit.killing import killed_before
from vmsnap.errors import BusyError, DriverError, NoSpaceError, PreconditionError, VmsnapError
from vmsnap.model.history import RunOutcome, RunResult, done
from vmsnap.model.journal import RunKind
from vmsnap.state import history as module
from vmsnap.state.history import SqliteHistory
from vmsnap.state.history_schema import APPLICATION_ID, MIGRATIONS
from vmsnap.testing.history_contract import AT, TIMER, WHOLE, audited, begin, end, run_id


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Return a folder in memory, where the host has one: what a killed process leaves does not depend on the disk."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


def test_nothing_is_made_before_it_is_used(tmp_path: Path) -> None:
    SqliteHistory(tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_it_is_private(tmp_path: Path) -> None:
    begin(SqliteHistory(tmp_path / "state"), 1)
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "state" / "history.sqlite").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["history.sqlite"]


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state").chmod(0o777)
    with pytest.raises(PreconditionError, match="others than its owner"):
        SqliteHistory(tmp_path / "state").runs()


WRITES: dict[str, Callable[[SqliteHistory], object]] = {
    "begin": lambda history: history.begin(run_id(2), kind=RunKind.BACKUP, guest="db", at=AT, starter=TIMER),
    "step": lambda history: history.step(run_id(1), name="capture", after=timedelta(seconds=1)),
    "end": lambda history: end(history, run_id(1), WHOLE),
    "audit": lambda history: history.audit(audited("db")),
}


@pytest.mark.parametrize("name", WRITES)
def test_kill_at_any_write_leaves_all_of_it_or_nothing(tmp_path: Path, name: str) -> None:
    killed = set()
    for change in count(1):
        state = tmp_path / f"{change}"
        history = SqliteHistory(state)
        begin(history, 1)
        earlier = _all_of(history)
        was_killed = killed_before(partial(WRITES[name], history), change=change)
        now = _all_of(history)
        assert was_killed or now != earlier
        assert _sound(state)
        assert not list(state.glob("*damaged*"))
        history.audit(audited("later"))  # and work goes on
        if not was_killed:
            break
        killed.add(now == earlier)
    assert killed == {True, False}, "it was not killed both before and after the moment that counts"


def test_kill_at_any_write_of_the_first_use_loses_nothing_later(tmp_path: Path) -> None:
    for change in count(1):
        history = SqliteHistory(tmp_path / f"{change}" / "state")
        was_killed = killed_before(partial(begin, history, 1), change=change)
        begin(history, 1)
        assert [entry.run for entry in history.runs()] == [run_id(1)]
        assert not list((tmp_path / f"{change}" / "state").glob("*damaged*"))
        if not was_killed:
            break
    assert change > 10


def test_kill_while_a_damaged_file_is_moved_aside_keeps_it(tmp_path: Path) -> None:
    for change in count(1):
        state = tmp_path / f"{change}"
        state.mkdir(mode=0o700)
        (state / "history.sqlite").write_bytes(b"no database" * 1000)
        history = SqliteHistory(state)
        was_killed = killed_before(partial(begin, history, 1), change=change)
        over = len(list(state.glob("history.sqlite*"))) > 2  # moved, and the new one begun
        begin(history, 1)
        assert [entry.run for entry in history.runs()] == [run_id(1)]
        assert [path.read_bytes() for path in state.glob("*.damaged-*")] == [b"no database" * 1000]
        assert was_killed
        if over:
            break
    assert change > 5


def _all_of(history: SqliteHistory) -> object:
    return history.runs(), history.trail(), history.last_ended(kind=RunKind.BACKUP)


def _sound(state: Path) -> bool:
    with closing(sqlite3.connect(state / "history.sqlite")) as connection:
        answers = connection.execute("PRAGMA integrity_check").fetchall()
        return answers == [("ok",)] and connection.execute("PRAGMA foreign_key_check").fetchall() == []


def _other_database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE runs (mine TEXT)")
        connection.commit()


def _spoiled_page(path: Path) -> None:
    history = SqliteHistory(path.parent)
    for number in range(200):
        begin(history, number)
    data = bytearray(path.read_bytes())
    data[4096:] = os.urandom(len(data) - 4096)
    path.write_bytes(data)


def _table_missing(path: Path) -> None:
    begin(SqliteHistory(path.parent), 1)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE steps")
        connection.commit()


def _cut_off(path: Path) -> None:
    begin(SqliteHistory(path.parent), 1)
    path.write_bytes(path.read_bytes()[:5000])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no database": lambda path: path.write_bytes(b"this is no database" * 1000),
    "somebody else's database": _other_database,
    "spoiled pages": _spoiled_page,
    "a table missing": _table_missing,
    "cut off": _cut_off,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_moved_aside_with_a_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    DAMAGES[name](state / "history.sqlite")
    size = (state / "history.sqlite").stat().st_size
    history = SqliteHistory(state)
    run = begin(history, 999)
    history.step(run, name="capture", after=timedelta(0))
    begin(history, 999)  # where the damage was met by the step, the beginning went aside with the rest
    end(history, run, done())
    assert [entry.run for entry in history.runs()] == [run]
    (aside,) = state.glob("history.sqlite.damaged-*")
    assert aside.stat().st_size >= size
    assert len(caplog.messages) == 1
    assert "history.sqlite.damaged-1" in caplog.text
    assert "Backups and snapshots are not concerned" in caplog.text


def test_two_damaged_files_are_both_kept(tmp_path: Path) -> None:
    state = tmp_path / "state"
    for number in (1, 2):
        begin(SqliteHistory(state), number)
        (state / "history.sqlite").write_bytes(b"x" * 999)
    assert SqliteHistory(state).runs() == ()
    assert len(list(state.glob("history.sqlite.damaged-*"))) == 2


def test_processes_that_meet_the_damage_together_move_it_aside_once(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    (state / "history.sqlite").write_bytes(b"no database" * 1000)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: begin(SqliteHistory(state), number), range(16)))
    assert len(SqliteHistory(state).runs()) == 16
    assert len(list(state.glob("history.sqlite.damaged-*"))) == 1


def test_several_at_once_lose_nothing(tmp_path: Path) -> None:
    state = tmp_path / "state"

    def work(number: int) -> None:
        history = SqliteHistory(state)
        run = begin(history, number, guest=f"db{number}")
        for step in range(5):
            history.step(run, name=str(step), after=timedelta(seconds=step))
        end(history, run, done())

    children = []
    for number in range(4):
        child = os.fork()
        if child == 0:
            try:
                work(number)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4, 8)))
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    entries = SqliteHistory(state).runs()
    assert sorted(entry.run for entry in entries) == [run_id(number) for number in range(8)]
    assert all(len(entry.steps) == 5 and entry.outcome is RunOutcome.DONE for entry in entries)


def test_one_that_is_held_by_another_is_busy_and_not_damaged(tmp_path: Path) -> None:
    history = SqliteHistory(tmp_path / "state")
    begin(history, 1)
    with closing(sqlite3.connect(tmp_path / "state" / "history.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(BusyError, match="locked"):
            begin(history, 2)
        other.execute("ROLLBACK")
    begin(history, 2)
    assert len(history.runs()) == 2


def test_a_newer_format_is_refused_and_left_alone(tmp_path: Path) -> None:
    begin(SqliteHistory(tmp_path / "state"), 1)
    newer = SqliteHistory(tmp_path / "state", migrations=(*MIGRATIONS, ("ALTER TABLE runs ADD COLUMN more TEXT",)))
    begin(newer, 2)
    with pytest.raises(PreconditionError, match="has format 2, this vmsnap knows 1"):
        begin(SqliteHistory(tmp_path / "state"), 3)
    assert len(newer.runs()) == 2


def test_a_migration_is_made_once_and_keeps_what_there_is(tmp_path: Path) -> None:
    state = tmp_path / "state"
    begin(SqliteHistory(state), 1)
    migrations = (*MIGRATIONS, ("ALTER TABLE runs ADD COLUMN more TEXT NOT NULL DEFAULT 'x'",))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: begin(SqliteHistory(state, migrations=migrations), number), range(2, 10)))
    newer = SqliteHistory(state, migrations=migrations)
    assert len(newer.runs()) == 9
    with closing(sqlite3.connect(state / "history.sqlite")) as connection:
        assert connection.execute("SELECT more FROM runs").fetchall() == [("x",)] * 9
        assert connection.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
    assert not list(state.glob("*damaged*"))


def test_death_in_a_migration_leaves_the_old_format_or_the_new(tmp_path: Path) -> None:
    migrations = (*MIGRATIONS, ("ALTER TABLE runs ADD COLUMN more TEXT", "CREATE TABLE more (one TEXT) STRICT"))
    for change in count(1):
        state = tmp_path / f"{change}"
        begin(SqliteHistory(state), 1)
        newer = SqliteHistory(state, migrations=migrations)
        was_killed = killed_before(newer.runs, change=change)
        assert [entry.run for entry in newer.runs()] == [run_id(1)]
        if not was_killed:
            break
    assert change > 5


def test_only_the_newest_runs_of_a_guest_are_kept_and_its_newest_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEEP_RUNS", 3)
    history = SqliteHistory(tmp_path / "state")
    stuck = begin(history, 0)
    good = begin(history, 1)
    history.step(good, name="capture", after=timedelta(0))
    end(history, good, WHOLE)
    end(history, begin(history, 2, guest="other"), done())
    for number in range(3, 9):
        end(history, begin(history, number), RunResult(outcome=RunOutcome.FAILED))
    # The one that begins makes three; one whose end is not known, and the newest good one, are not forgotten.
    assert [entry.run for entry in history.runs(guest="db")] == [*(run_id(n) for n in (8, 7, 6)), good, stuck]
    assert history.last_done(kind=RunKind.BACKUP)["db"].steps
    assert len(history.runs(guest="other")) == 1
    assert _sound(tmp_path / "state")


def test_the_trail_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEEP_AUDIT", 3)
    history = SqliteHistory(tmp_path / "state")
    for number in range(5):
        history.audit(audited("db", subject=str(number)))
    assert [entry.subject for entry in history.trail()] == ["4", "3", "2"]


def test_an_entry_with_unknown_words_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    history = SqliteHistory(tmp_path / "state")
    begin(history, 1)
    begin(history, 2)
    with closing(sqlite3.connect(tmp_path / "state" / "history.sqlite")) as connection:
        connection.execute("UPDATE runs SET kind = 'unheard-of' WHERE number = 1")
        connection.commit()
    assert [entry.run for entry in history.runs()] == [run_id(2)]
    assert "unheard-of" in caplog.text


def test_a_state_folder_on_a_full_file_system_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    history = SqliteHistory(tmp_path / "state")
    begin(history, 1)
    real = sqlite3.connect

    def small(*args: object, **kwargs: object) -> sqlite3.Connection:
        connection = real(*args, **kwargs)  # type: ignore[call-overload]
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")
        assert isinstance(connection, sqlite3.Connection)
        return connection

    monkeypatch.setattr(sqlite3, "connect", small)

    def fill() -> None:
        for number in range(2, 1000):
            begin(history, number)

    with pytest.raises(NoSpaceError, match="full"):
        fill()
    monkeypatch.undo()
    assert _sound(tmp_path / "state")


def test_what_is_no_file_is_told_and_not_moved(tmp_path: Path) -> None:
    (tmp_path / "state" / "history.sqlite").mkdir(parents=True)
    (tmp_path / "state").chmod(0o700)
    with pytest.raises(VmsnapError) as caught:
        SqliteHistory(tmp_path / "state").runs()
    assert isinstance(caught.value, DriverError | PreconditionError)
    assert caught.value.remedy


def test_a_connection_is_used_by_the_thread_that_asks(tmp_path: Path) -> None:
    history = SqliteHistory(tmp_path / "state")
    begin(history, 1)
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(len(history.runs())))
    thread.start()
    thread.join()
    assert found == [1]
