from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmsnap.errors import BusyError, DriverError, NoSpaceError, PreconditionError
from vmsnap.model.environment import Environment
from vmsnap.model.ids import RunId, SnapshotId
from vmsnap.model.isolation import Exchange, Rung
from vmsnap.model.journal import Resource, ResourceKind, RunKind
from vmsnap.model.schedule import FailedAttempt
from vmsnap.state import files
from vmsnap.state.attempts import FileAttemptBook
from vmsnap.state.environments import FileEnvironmentBook
from vmsnap.state.events import Beginning, History, begin_line, resource_line, state_line
from vmsnap.state.exchanges import FileExchanges
from vmsnap.state.journal import KEEP_FINISHED_COUNT, FileJournals, FileRunJournal
from vmsnap.state.locks import FileLocks
from vmsnap.state.rungs import FileRungMemory
from vmsnap.testing.standing_clock import StandingClock

AT = datetime(2026, 11, 21, 2, 0, tzinfo=UTC)
RUN = RunId("00000000a1")
CLONE = Resource(kind=ResourceKind.CLONE, run=RUN, guest="db", name="clone")
BEGINNING = Beginning(run=RUN, kind=RunKind.BACKUP, guest="db", started=AT)
ENVIRONMENT = Environment(
    name="e", run=RUN, guest="db", snapshot=SnapshotId("00000000b2"), created=AT, expires=None, network=None
)


def begin(state: Path, run: RunId = RUN, *, at: datetime = AT) -> FileRunJournal:
    return FileJournals(state).begin(run, kind=RunKind.BACKUP, guest="db", at=at)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_everything_is_private_whatever_the_umask(tmp_path: Path) -> None:
    state = tmp_path / "state"
    before = os.umask(0)
    try:
        begin(state).close()
        FileEnvironmentBook(state).add(ENVIRONMENT)
        with FileLocks(state, clock=StandingClock(AT)).guest("db", purpose="backup"):
            pass
    finally:
        os.umask(before)
    paths = [state, *state.rglob("*")]
    assert len(paths) == 7
    assert {mode(path) for path in paths if path.is_dir()} == {0o700}
    assert {mode(path) for path in paths if path.is_file()} == {0o600}


def test_a_state_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    state.chmod(0o777)
    with pytest.raises(PreconditionError) as caught:
        begin(state)
    assert f"chmod go-w '{state}'" in (caught.value.remedy or "")


@pytest.mark.parametrize(
    ("number", "expected", "remedy"),
    [
        (errno.ENOSPC, NoSpaceError, "free space"),
        (errno.EDQUOT, NoSpaceError, "free space"),
        (errno.EROFS, PreconditionError, "read-only"),
        (errno.EACCES, PreconditionError, "root"),
        (errno.EIO, DriverError, "kernel's log"),
    ],
)
def test_failures_of_the_disk_come_with_a_remedy(number: int, expected: type[Exception], remedy: str) -> None:
    error = files.translate(OSError(number, os.strerror(number)), doing="write", path=Path("/state/runs/x.jsonl"))
    assert type(error) is expected
    assert "/state/runs/x.jsonl" in error.brief
    assert remedy in (error.remedy or "")


def test_a_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    # A file size limit makes write(2) stop in the middle, as a full file system does.
    script = """
import resource, signal, sys
from datetime import UTC, datetime
from pathlib import Path
from vmsnap.errors import VmsnapError
from vmsnap.model.ids import RunId
from vmsnap.model.journal import RunKind
from vmsnap.state.journal import FileJournals
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
journals = FileJournals(Path(sys.argv[1]))
journal = journals.begin(RunId("00000000a1"), kind=RunKind.BACKUP, guest="db", at=datetime.now(UTC))
journal.state("first")
size = (Path(sys.argv[1]) / "runs/00000000a1.jsonl").stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, resource.RLIM_INFINITY))
try:
    journal.state("second, which is longer than what fits")
except VmsnapError as error:
    print("refused")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
journal.state("third")
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "state")], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "refused\n"
    lines = (tmp_path / "state/runs/00000000a1.jsonl").read_text().splitlines()
    assert [json.loads(line).get("state") for line in lines] == [None, "first", "third"]


def test_a_torn_last_line_is_ignored_and_cut_off_when_taken_over(tmp_path: Path) -> None:
    journal = begin(tmp_path)
    journal.intend(CLONE)
    journal.close()
    path = tmp_path / "runs" / f"{RUN}.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"event": "relea')
    (record,) = FileJournals(tmp_path).records()
    assert record.unreleased == (CLONE,)
    again = FileJournals(tmp_path).reopen(RUN)
    again.released(CLONE)
    again.finish()
    again.close()
    assert path.read_bytes().startswith(whole)
    (record,) = FileJournals(tmp_path).records()
    assert record.closed
    assert record.unreleased == ()


@given(cut=st.integers(min_value=0, max_value=2000))
def test_any_prefix_of_a_journal_reads_as_what_its_whole_lines_say(cut: int) -> None:
    resources = [
        Resource(kind=kind, run=RUN, guest="db", name=f"n-{kind}", detail="ä\n") for kind in list(ResourceKind)
    ]
    lines = [begin_line(BEGINNING), *(resource_line("intend", item) for item in resources), state_line("captured")]
    data = b"".join(lines)[:cut]
    history = History.read(data, source="test")
    count = data.count(b"\n")
    if count == 0:
        assert history is None
    else:
        assert history is not None
        assert history.unreleased == tuple(resources[: count - 1])


@pytest.mark.parametrize(
    "line",
    [
        b'{"event": "sing", "song": "unknown"}',
        b"\0\0\0\0",
        b"[]",
        b'"text"',
        b"{}",
        b'{"event": "intend", "kind": "teapot", "run": "x", "guest": "g", "name": "n", "detail": ""}',
        b'{"event": "intend"}',
        b"\xff\xfe",
    ],
)
def test_a_line_nobody_understands_is_warned_of_and_passed_over(line: bytes, caplog: pytest.LogCaptureFixture) -> None:
    data = begin_line(BEGINNING) + line + b"\n" + resource_line("intend", CLONE)
    with caplog.at_level(logging.WARNING):
        history = History.read(data, source="this.jsonl")
    assert history is not None
    assert history.unreleased == (CLONE,)
    assert "this.jsonl, line 2" in caplog.text


@pytest.mark.parametrize("first", [b"", b"rubbish\n", b"\0\n", b'{"event": "begin"}\n', b"[1]\n", b"{"])
def test_a_journal_without_a_beginning_is_passed_over(
    tmp_path: Path, first: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    begin(tmp_path).close()
    (tmp_path / "runs" / "00000000c3.jsonl").write_bytes(first)
    assert [record.run for record in FileJournals(tmp_path).records()] == [RUN]
    with pytest.raises(PreconditionError, match=r"00000000c3.* is damaged"):
        FileJournals(tmp_path).reopen(RunId("00000000c3"))
    with pytest.raises(PreconditionError, match=r"00000000c3.* is damaged") as caught:
        FileJournals(tmp_path).begin(RunId("00000000c3"), kind=RunKind.BACKUP, guest="db", at=BEGINNING.started)
    assert "--adopt 00000000c3" in (caught.value.remedy or "")
    assert FileJournals(tmp_path).records()  # the descriptor was let go


def test_a_newer_format_is_read_as_far_as_it_is_known(caplog: pytest.LogCaptureFixture) -> None:
    data = begin_line(BEGINNING).replace(b'"version": 1', b'"version": 2') + resource_line("intend", CLONE)
    history = History.read(data, source="test")
    assert history is not None
    assert history.unreleased == (CLONE,)
    assert "format 2" in caplog.text


def test_finished_journals_are_forgotten_after_a_month_others_never(tmp_path: Path) -> None:
    old, dead, recent = RunId("00000000a1"), RunId("00000000a2"), RunId("00000000a3")
    for run, at, finish in ((old, AT, True), (dead, AT, False), (recent, AT + timedelta(days=20), True)):
        journal = begin(tmp_path, run, at=at)
        if finish:
            journal.finish()
        journal.close()
    begin(tmp_path, RunId("00000000a4"), at=AT + timedelta(days=31)).close()
    assert [record.run for record in FileJournals(tmp_path).records()] == [dead, recent, "00000000a4"]


def test_finished_journals_are_bounded_in_number(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir(mode=0o700)
    for number in range(KEEP_FINISHED_COUNT + 5):
        beginning = Beginning(
            run=RunId(f"{number:010x}"), kind=RunKind.BACKUP, guest="db", started=AT + timedelta(seconds=number)
        )
        (folder / f"{number:010x}.jsonl").write_bytes(begin_line(beginning) + b'{"event": "finish"}\n')
    begin(tmp_path, RunId("ffffffffff"), at=AT + timedelta(days=1)).close()
    runs = [record.run for record in FileJournals(tmp_path).records()]
    assert len(runs) == KEEP_FINISHED_COUNT + 1
    assert runs[0] == f"{5:010x}"


def test_drafts_of_a_dead_process_go_away(tmp_path: Path) -> None:
    begin(tmp_path).close()
    stale, fresh = tmp_path / "runs/.draft-1", tmp_path / "runs/.draft-2"
    for path in (stale, fresh):
        path.touch()
    os.utime(stale, (time.time() - 7200,) * 2)
    begin(tmp_path, RunId("00000000a2")).close()
    assert not stale.exists()
    assert fresh.exists()


def test_a_look_at_the_records_does_not_stop_a_take_over(tmp_path: Path) -> None:
    begin(tmp_path).close()
    descriptor = os.open(tmp_path / "runs" / f"{RUN}.jsonl", os.O_RDONLY)
    child = os.fork()
    if child == 0:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            time.sleep(0.1)
        finally:
            os._exit(0)
    os.close(descriptor)
    time.sleep(0.05)
    FileJournals(tmp_path).reopen(RUN).close()
    os.waitpid(child, 0)


def test_programs_started_meanwhile_keep_neither_run_nor_lock_alive(tmp_path: Path) -> None:
    journal = begin(tmp_path)
    locks = FileLocks(tmp_path, clock=StandingClock(AT))
    with locks.guest("db", purpose="backup"):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        journal.close()
        (record,) = FileJournals(tmp_path).records()
        assert not record.alive
        with locks.guest("db", purpose="backup"):
            pass
    finally:
        child.kill()
        child.wait()


def test_the_holder_of_a_lock_is_named_with_pid_purpose_and_time(tmp_path: Path) -> None:
    locks = FileLocks(tmp_path, clock=StandingClock(AT))
    with locks.guest("db", purpose="backup"), pytest.raises(BusyError) as caught, locks.guest("db", purpose="x"):
        pytest.fail("held twice")
    assert caught.value.brief == (
        f"guest 'db' is held by process {os.getpid()} for backup, since 2026-11-21T02:00:00+00:00"
    )


@pytest.mark.parametrize(
    "content", ['{"version": 1, "pid": 1, "purpose": "backup", "since": "long ago"}\n', "rubbish", ""]
)
def test_what_a_lock_file_says_is_no_lock(tmp_path: Path, content: str) -> None:
    (tmp_path / "locks").mkdir(mode=0o700)
    (tmp_path / "locks" / "guest-db.lock").write_text(content)
    with FileLocks(tmp_path, clock=StandingClock(AT)).guest("db", purpose="backup"):
        pass


def test_a_holder_that_wrote_rubbish_is_still_a_holder(tmp_path: Path) -> None:
    locks = FileLocks(tmp_path, clock=StandingClock(AT))
    with locks.guest("db", purpose="backup"):
        (tmp_path / "locks" / "guest-db.lock").write_text("[1, 2")
        with pytest.raises(BusyError, match="another process"), locks.guest("db", purpose="x"):
            pytest.fail("held twice")


def test_a_damaged_environment_is_named(tmp_path: Path) -> None:
    book = FileEnvironmentBook(tmp_path)
    book.add(ENVIRONMENT)
    (tmp_path / "environments" / "broken.json").write_text('{"version": 1}')
    for look in (book.all, lambda: book.get("broken")):
        with pytest.raises(DriverError, match=r"broken\.json"):
            look()
    assert book.get("e") == ENVIRONMENT


def test_an_environment_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    book = FileEnvironmentBook(tmp_path)
    book.add(ENVIRONMENT)
    path = tmp_path / "environments" / "e.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 9'))
    with pytest.raises(PreconditionError, match="format 9"):
        book.get("e")


WRITER = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from vmsnap.model.ids import RunId
from vmsnap.model.journal import Resource, ResourceKind, RunKind
from vmsnap.state.journal import FileJournals
run = RunId("00000000a1")
journal = FileJournals(Path(sys.argv[1])).begin(run, kind=RunKind.BACKUP, guest="db", at=datetime.now(UTC))
print("begun", flush=True)
for number in range(100000):
    resource = Resource(kind=ResourceKind.CLONE, run=run, guest="db", name=str(number), detail="x" * (number % 700))
    journal.intend(resource)
    print(number, flush=True)
"""


@pytest.mark.parametrize("seed", range(6))
def test_a_writer_killed_at_any_moment_leaves_a_prefix(tmp_path: Path, seed: int) -> None:
    child = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "begun\n"
    time.sleep(random.Random(seed).uniform(0, 0.15))
    (living,) = FileJournals(tmp_path).records()
    assert living.alive
    child.send_signal(signal.SIGKILL)
    acknowledged = child.stdout.read().splitlines()
    child.wait()
    child.stdout.close()
    (record,) = FileJournals(tmp_path).records()
    assert not record.alive
    names = [item.name for item in record.unreleased]
    assert names == [str(number) for number in range(len(names))]
    # Everything acknowledged is there; at most one more was written and not yet acknowledged.
    assert len(acknowledged) <= len(names) <= len(acknowledged) + 1


# Exchanges and rungs

EXCHANGE = Exchange(
    mac="52:54:00:aa:00:01", address=IPv4Address("192.0.2.7"), server=IPv4Address("192.0.2.1"), xid=7, seen=AT,
    nonce=b"0123456789abcdef",
)  # fmt: skip


def test_exchanges_and_rungs_are_their_owners_alone(tmp_path: Path) -> None:
    state = tmp_path / "state"
    FileExchanges(state).put(EXCHANGE)
    FileRungMemory(state).remember("db", rung=Rung.AGENT)
    for path in state.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600)
    assert sorted(path.name for path in state.rglob("*.json")) == ["52-54-00-aa-00-01.json", "db.json"]


@pytest.mark.parametrize(
    ("before", "after"),
    [('"version": 1', '"version": 2'), ('"xid": 7', '"xid": "x"'), ("192.0.2.7", "192.0.2"), ("{", ""), ("3031", "31")],
)
def test_a_damaged_exchange_is_an_error_that_shows_nothing_of_it(before: str, after: str, tmp_path: Path) -> None:
    book = FileExchanges(tmp_path / "state")
    book.put(EXCHANGE)
    (path,) = (tmp_path / "state" / "exchanges").iterdir()
    path.write_text(path.read_text().replace(before, after, 1))
    with pytest.raises(DriverError, match="describes no DHCP exchange") as caught:
        book.get(EXCHANGE.mac)
    shown = f"{caught.value} {caught.value.details} {EXCHANGE!r}"
    assert EXCHANGE.nonce is not None
    assert EXCHANGE.nonce.hex() not in shown
    assert EXCHANGE.nonce.decode() not in shown


@pytest.mark.parametrize("content", ["", "[]", '{"version": 1, "rung": "ladder"}', '{"version": 2, "rung": "agent"}'])
def test_a_damaged_memory_of_rungs_is_no_memory(content: str, tmp_path: Path) -> None:
    memory = FileRungMemory(tmp_path / "state")
    memory.remember("db", rung=Rung.AGENT)
    (path,) = (tmp_path / "state" / "rungs").iterdir()
    path.write_text(content)
    assert memory.recall("db") is None
    memory.remember("db", rung=Rung.LINK_FLAP)
    assert memory.recall("db") is Rung.LINK_FLAP


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b'{"version": 99, "attempts": []}',
        b'{"version": 1, "attempts": [{"began": "yesterday", "ended": null, "exit_code": 7, "brief": ""}]}',
        b'{"version": 1, "attempts": [{"began": "2026-11-21T02:00:00", "ended": null, "exit_code": 7, "brief": ""}]}',
        b'{"version": 1, "attempts": [{"began": "2026-11-21T02:00:00+00:00", "ended": null, "exit_code": "7", "brief": ""}]}',
        b'{"version": 1, "attempts": [{}]}',
    ],
)
def test_a_damaged_record_of_attempts_counts_as_none_and_is_replaced(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    attempts = FileAttemptBook(tmp_path)
    failed = FailedAttempt(began=AT, ended=AT, exit_code=7, brief="no")
    attempts.replace("a/b", failures=[failed])
    (path,) = (tmp_path / "attempts").iterdir()
    assert (path.name, mode(path), mode(path.parent)) == ("a%2Fb.json", 0o600, 0o700)
    path.write_bytes(content)
    assert attempts.failures("a/b") == ()
    assert str(path) in caplog.text
    attempts.replace("a/b", failures=[failed])
    assert attempts.failures("a/b") == (failed,)
    attempts.replace("a/b", failures=[])
    assert list((tmp_path / "attempts").iterdir()) == []


def test_a_death_while_attempts_are_written_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    attempts = FileAttemptBook(tmp_path)
    one, two = FailedAttempt(began=AT), FailedAttempt(began=AT + timedelta(hours=1))
    attempts.replace("db", failures=[one])
    for _ in range(20):
        child = os.fork()
        if child == 0:
            while True:
                attempts.replace("db", failures=[one, two])
                attempts.replace("db", failures=[one])
        time.sleep(random.random() * 0.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert attempts.failures("db") in {(one,), (one, two)}
