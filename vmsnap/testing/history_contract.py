"""What every implementation of the port ``HistoryBook`` must do.

A test module subclasses ``HistoryContract`` and gives it a fixture ``world``.
"""
# ruff: noqa: S101, D102 - this module is a test suite; its tests are named by sentences

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Protocol

import pytest

from vmsnap.errors import CancelledError, DriverError, ExitCode
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
    done,
    failed,
)
from vmsnap.model.ids import RunId, SnapshotId
from vmsnap.model.journal import RunKind
from vmsnap.ports.history import HistoryBook
from vmsnap.testing.state_contract import HARD_NAMES

AT = datetime(2026, 11, 21, 2, 0, 0, 123456, tzinfo=UTC)
ALICE = Starter(trigger=Trigger.OPERATOR, user="alice", detail="vmsnap backup db")
TIMER = Starter(trigger=Trigger.TIMER, detail="vmsnap-backup@db.service")
WHOLE = RunResult(
    outcome=RunOutcome.DONE,
    exit_code=0,
    error=None,
    remedy=None,
    snapshot=SnapshotId("00000000a1"),
    environment="db-test",
    pause_ms=12.5,
    new_bytes=1 << 40,
    logical_bytes=1 << 41,
    warnings=("one", "\N{SNOWMAN}\n'; DROP TABLE runs; --"),
)


class HistoryWorld(Protocol):
    """One history, seen from a living process."""

    @property
    def history(self) -> HistoryBook:
        """Return the history."""

    def run_and_die(self, work: Callable[[HistoryBook], None]) -> None:
        """Do the work in a process that is then killed, without any of its code running again."""


def run_id(number: int) -> RunId:
    """Return a run id for tests."""
    return RunId(f"{number:010x}")


def begin(history: HistoryBook, number: int, *, guest: str = "db", kind: RunKind = RunKind.BACKUP) -> RunId:
    """Record that a run began."""
    run = run_id(number)
    history.begin(run, kind=kind, guest=guest, at=AT + timedelta(hours=number), starter=ALICE)
    return run


def end(history: HistoryBook, run: RunId, result: RunResult) -> None:
    """Record that a run ended."""
    history.end(run, at=AT + timedelta(days=9), after=timedelta(seconds=9), result=result)


def audited(guest: str, *, subject: str = "00000000a1", failure: str | None = None) -> AuditEntry:
    """Return an entry of the audit trail for tests."""
    return AuditEntry(
        at=AT, action=Action.PIN, starter=ALICE, guest=guest, subject=subject, detail="until we know", failure=failure
    )


class HistoryContract:
    """Tests of the history."""

    def test_nothing_is_known_at_first(self, world: HistoryWorld) -> None:
        assert world.history.runs() == ()
        assert world.history.unended() == ()
        assert world.history.trail() == ()
        assert dict(world.history.last_ended(kind=RunKind.BACKUP)) == {}
        assert dict(world.history.last_done(kind=RunKind.BACKUP)) == {}

    def test_a_run_is_told_as_far_as_it_is(self, world: HistoryWorld) -> None:
        history = world.history
        run = begin(history, 1)
        begun = RunEntry(run=run, kind=RunKind.BACKUP, guest="db", started=AT + timedelta(hours=1), starter=ALICE)
        assert history.runs() == history.unended() == (begun,)
        assert begun.outcome is RunOutcome.RUNNING
        history.step(run, name="preflight", after=timedelta(0))
        history.step(run, name="capture", after=timedelta(seconds=1.5))
        (entry,) = history.runs()
        assert entry.steps == (
            RunStep(name="preflight", began_after_seconds=0.0, seconds=1.5),
            RunStep(name="capture", began_after_seconds=1.5, seconds=None),
        )
        history.end(run, at=AT + timedelta(days=1), after=timedelta(seconds=4), result=WHOLE)
        (entry,) = history.runs()
        assert entry.steps[1].seconds == 2.5
        assert (entry.ended, entry.seconds, entry.result) == (AT + timedelta(days=1), 4.0, WHOLE)
        assert entry.outcome is RunOutcome.DONE
        assert history.unended() == ()

    def test_beginning_twice_is_beginning_once(self, world: HistoryWorld) -> None:
        run = begin(world.history, 1)
        world.history.begin(run, kind=RunKind.PROVISION, guest="other", at=AT, starter=TIMER)
        (entry,) = world.history.runs()
        assert (entry.guest, entry.kind, entry.starter) == ("db", RunKind.BACKUP, ALICE)

    def test_the_first_end_stands_and_no_step_follows_it(self, world: HistoryWorld) -> None:
        run = begin(world.history, 1)
        end(world.history, run, done())
        end(world.history, run, died(None))
        world.history.step(run, name="late", after=timedelta(seconds=10))
        (entry,) = world.history.runs()
        assert entry.outcome is RunOutcome.DONE
        assert entry.steps == ()

    def test_what_is_told_of_an_unknown_run_is_no_failure(self, world: HistoryWorld) -> None:
        world.history.step(run_id(7), name="capture", after=timedelta(0))
        end(world.history, run_id(7), done())
        assert world.history.runs() == ()

    def test_an_error_is_told_with_its_remedy_and_its_exit_code(self, world: HistoryWorld) -> None:
        for number, error in enumerate((DriverError("no answer", remedy="restart it"), CancelledError("stopped"))):
            end(world.history, begin(world.history, number), failed(error))
        stopped, broken = (entry.result for entry in world.history.runs())
        assert broken == RunResult(
            outcome=RunOutcome.FAILED, exit_code=int(ExitCode.DRIVER), error="no answer", remedy="restart it"
        )
        assert stopped is not None
        assert stopped.outcome is RunOutcome.STOPPED

    def test_one_that_died_has_no_exit_code_and_says_where(self, world: HistoryWorld) -> None:
        run = begin(world.history, 1)
        world.history.step(run, name="capture", after=timedelta(seconds=1))
        world.history.end(run, at=AT, after=None, result=died("capture"))
        (entry,) = world.history.runs()
        assert entry.result == died("capture")
        assert entry.seconds is None
        assert entry.steps[0].seconds is None

    def test_runs_come_newest_first_whatever_the_clock_said(self, world: HistoryWorld) -> None:
        for number in (5, 1, 9):
            begin(world.history, number)
        assert [entry.run for entry in world.history.runs()] == [run_id(9), run_id(1), run_id(5)]
        assert [entry.run for entry in world.history.runs(limit=2)] == [run_id(9), run_id(1)]
        assert [entry.run for entry in world.history.unended()] == [run_id(5), run_id(1), run_id(9)]

    def test_runs_are_found_by_guest_kind_and_failure(self, world: HistoryWorld) -> None:
        history = world.history
        end(history, begin(history, 1), done())
        end(history, begin(history, 2), failed(DriverError("no")))
        end(history, begin(history, 3, kind=RunKind.PROVISION), died(None))
        end(history, begin(history, 4, guest="other"), failed(CancelledError("stopped")))
        begin(history, 5)
        assert [entry.run for entry in history.runs(guest="db")] == [run_id(n) for n in (5, 3, 2, 1)]
        assert [entry.run for entry in history.runs(guest="db", kind=RunKind.PROVISION)] == [run_id(3)]
        assert [entry.run for entry in history.runs(failures_only=True)] == [run_id(3), run_id(2)]
        assert [entry.run for entry in history.runs(failures_only=True, limit=1)] == [run_id(3)]
        assert history.runs(guest="d") == ()

    def test_the_last_of_each_guest(self, world: HistoryWorld) -> None:
        history = world.history
        end(history, begin(history, 1), done())
        end(history, begin(history, 2), failed(DriverError("no")))
        end(history, begin(history, 3, guest="other"), failed(DriverError("no")))
        end(history, begin(history, 4, kind=RunKind.PROVISION), done())
        begin(history, 5)
        ended, good = history.last_ended(kind=RunKind.BACKUP), history.last_done(kind=RunKind.BACKUP)
        assert {guest: entry.run for guest, entry in ended.items()} == {"db": run_id(2), "other": run_id(3)}
        assert {guest: entry.run for guest, entry in good.items()} == {"db": run_id(1)}
        end(history, begin(history, 6, guest="other"), done())
        assert history.last_done(kind=RunKind.BACKUP)["other"].run == run_id(6)
        assert history.last_ended(kind=RunKind.BACKUP)["other"].run == run_id(6)

    @pytest.mark.parametrize("name", HARD_NAMES)
    def test_any_guest_has_a_history(self, world: HistoryWorld, name: str) -> None:
        run = begin(world.history, 1, guest=name)
        world.history.step(run, name=name, after=timedelta(0))
        end(world.history, run, failed(DriverError(name, remedy=name)))
        world.history.audit(audited(name, subject=name, failure=name))
        (entry,) = world.history.runs(guest=name)
        assert entry.guest == entry.steps[0].name == name
        assert entry.result is not None
        assert entry.result.error == name
        assert world.history.trail(guest=name) == (audited(name, subject=name, failure=name),)
        assert list(world.history.last_ended(kind=RunKind.BACKUP)) == [name]
        assert world.history.runs(guest=f"{name} ") == ()

    def test_bytes_that_are_no_text_stop_nothing(self, world: HistoryWorld) -> None:
        run = begin(world.history, 1, guest="db\udcff")
        end(world.history, run, failed(DriverError("no file 'x\udcff'", remedy="\udcff")))
        world.history.audit(audited("db\udcff"))
        assert len(world.history.runs(guest="db\udcff")) == len(world.history.trail(guest="db\udcff")) == 1

    def test_the_trail_comes_newest_first(self, world: HistoryWorld) -> None:
        one, two, three = audited("db"), audited("other"), audited("db", failure="it is busy")
        for entry in (one, two, three):
            world.history.audit(entry)
        assert world.history.trail() == (three, two, one)
        assert world.history.trail(guest="db", limit=1) == (three,)
        assert world.history.trail(guest="db") == (three, one)

    def test_death_keeps_what_was_recorded(self, world: HistoryWorld) -> None:
        def work(history: HistoryBook) -> None:
            begin(history, 1)
            history.step(run_id(1), name="capture", after=timedelta(seconds=1))
            history.audit(audited("db"))

        world.run_and_die(work)
        (entry,) = world.history.unended()
        assert entry.steps[-1].name == "capture"
        begin(world.history, 2)
        assert world.history.dead() == (entry,)
        end(world.history, entry.run, died("capture"))
        assert world.history.dead() == ()
        assert [living.run for living in world.history.unended()] == [run_id(2)]
        assert world.history.trail() == (audited("db"),)
