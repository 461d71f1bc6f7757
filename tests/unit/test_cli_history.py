from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from tests.unit.cli_samples import AT, write_config
from tests.unit.test_cli_commands import Program
from vmsnap.errors import NotCleanError
from vmsnap.model.history import (
    Action,
    AuditEntry,
    RunEntry,
    RunOutcome,
    RunResult,
    RunStep,
    Starter,
    Trigger,
    died,
    failed,
)
from vmsnap.model.ids import RunId, SnapshotId
from vmsnap.model.journal import RunKind

ALICE = Starter(trigger=Trigger.OPERATOR, user="alice", detail="vmsnap backup db1")
TIMER = Starter(trigger=Trigger.TIMER, detail="vmsnap-backup@db1.service")


def entry(number: int, result: RunResult | None, *, starter: Starter = ALICE, guest: str = "db1") -> RunEntry:
    return RunEntry(
        run=RunId(f"{number:010x}"),
        kind=RunKind.BACKUP,
        guest=guest,
        started=AT + timedelta(hours=number),
        starter=starter,
        steps=(RunStep(name="capture", began_after_seconds=1.5, seconds=None if result is None else 2.0),),
        ended=None if result is None else AT + timedelta(hours=number, seconds=93),
        seconds=93.5 if result is not None and result.exit_code is not None else None,
        result=result,
    )


GOOD = RunResult(
    outcome=RunOutcome.DONE,
    exit_code=0,
    snapshot=SnapshotId("3fa9b0c1d2"),
    pause_ms=23.4,
    new_bytes=300 << 20,
    logical_bytes=8 << 30,
    warnings=("the guest stood still for 23 ms",),
)


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(write_config(tmp_path))


def test_runs_are_a_table_newest_first(program: Program) -> None:
    unclean = NotCleanError("the database was\x1b[31m not shut down", remedy="look at its log")
    program.application.history = (
        entry(4, failed(unclean), starter=TIMER),
        entry(3, None),
        entry(2, died("capture")),
        entry(1, GOOD),
    )
    outcome = program("history", "db1")
    assert outcome.stdout.splitlines() == [
        "WHEN                  GUEST  KIND    OUTCOME  TOOK        PAUSE  NEW      RUN         BY     WHAT",
        (
            "2026-11-21 06:00:03Z  db1    backup  failed   1 min 34 s  -      -        0000000004  timer  "
            "the database was\\x1b[31m not shut down"
        ),
        "2026-11-21 05:00:03Z  db1    backup  running  -           -      -        0000000003  alice  in step 'capture'",
        (
            "2026-11-21 04:00:03Z  db1    backup  died     -           -      -        0000000002  alice  "
            "its process ended in step 'capture': killed, crashed, or the host went down"
        ),
        (
            "2026-11-21 03:00:03Z  db1    backup  done     1 min 34 s  23 ms  300 MiB  0000000001  alice  "
            "3fa9b0c1d2, with 1 warning"
        ),
        "What to do about run 0000000004: look at its log",
    ]
    assert program.application.calls[-1] == ("past_runs", "db1", False, 20)


def test_runs_in_json_have_their_steps(program: Program) -> None:
    program.application.history = (entry(1, GOOD, starter=TIMER),)
    assert program("history", "--json", "--limit", "0", "--failed").json == {
        "runs": [
            {
                "run": "0000000001",
                "kind": "backup",
                "guest": "db1",
                "outcome": "done",
                "started": "2026-11-21T03:00:03Z",
                "ended": "2026-11-21T03:01:36Z",
                "seconds": 93.5,
                "by": {"trigger": "timer", "user": None, "detail": "vmsnap-backup@db1.service"},
                "exit_code": 0,
                "error": None,
                "remedy": None,
                "snapshot": "3fa9b0c1d2",
                "environment": None,
                "pause_ms": 23.4,
                "new_bytes": 300 << 20,
                "logical_bytes": 8 << 30,
                "warnings": ["the guest stood still for 23 ms"],
                "steps": [{"name": "capture", "began_after_seconds": 1.5, "seconds": 2.0}],
            }
        ]
    }
    assert program.application.calls[-1] == ("past_runs", None, True, None)


def test_the_audit_trail(program: Program) -> None:
    program.application.trail = (
        AuditEntry(at=AT, action=Action.DESTROY, starter=ALICE, guest="db1", subject="db1-test", failure="it is busy"),
        AuditEntry(at=AT, action=Action.PIN, starter=ALICE, guest="db1", subject="3fa9b0c1d2", detail="for ann: audit"),
    )
    assert program("history", "--audit", "db1", "-n", "5").stdout.splitlines() == [
        "WHEN                  WHO    ACTION   WHAT        GUEST  OUTCOME  DETAIL",
        "2026-11-21 02:00:03Z  alice  destroy  db1-test    db1    FAILED   it is busy",
        "2026-11-21 02:00:03Z  alice  pin      3fa9b0c1d2  db1    done     for ann: audit",
    ]
    assert program.application.calls[-1] == ("audit_trail", "db1", 5)
    assert program("history", "--audit", "--json").json["audit"][0] == {
        "at": "2026-11-21T02:00:03Z",
        "action": "destroy",
        "guest": "db1",
        "subject": "db1-test",
        "detail": "",
        "failure": "it is busy",
        "by": {"trigger": "operator", "user": "alice", "detail": "vmsnap backup db1"},
    }


def test_nothing_is_known_yet(program: Program) -> None:
    assert program("history").stdout == "No runs are known.\n"
    assert program("history", "db1", "--audit").stdout == "Nothing was done that is audited.\n"


@pytest.mark.parametrize("option", [(), ("--audit",)])
def test_a_guest_that_nobody_knows_is_an_error(program: Program, option: tuple[str, ...]) -> None:
    outcome = program("history", "bd1", *option)
    assert outcome.code == 3
    assert "did you mean 'db1'?" in outcome.stderr


def test_audit_and_failed_contradict_each_other(program: Program) -> None:
    assert program("history", "--audit", "--failed").code == 2


def test_a_negative_limit_is_refused(program: Program) -> None:
    assert program("history", "--limit", "-1").code == 2
