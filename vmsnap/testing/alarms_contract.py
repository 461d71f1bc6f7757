"""What every implementation of the port ``AlarmBook`` must do, and of the lock that goes with it.

A test module subclasses ``AlarmsContract`` and gives it a fixture ``world``.
"""
# ruff: noqa: S101, D102 - this module is a test suite; its tests are named by sentences

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Protocol

import pytest

from vmsnap.errors import BusyError
from vmsnap.model.alarms import Alarm, AlarmKind, Breach, Ledger, Raised
from vmsnap.ports.alarms import AlarmBook
from vmsnap.ports.state import Locks

AT = datetime(2026, 11, 21, 2, 0, 0, 250, tzinfo=UTC)
LATER = AT + timedelta(hours=1)
FULL = Ledger(
    raised=(
        Raised(alarm=Alarm(guest="db", kind=AlarmKind.FAILURE, text="no room", remedy="make some"), since=AT),
        Raised(
            alarm=Alarm(guest="", kind=AlarmKind.PROBLEM, text="a file is wrong", about="policy: x.toml"),
            since=AT,
            told=LATER,
            tried=AT,
            over=LATER,
        ),
    ),
    breaches={'d"b\n\N{SNOWMAN}\udcff': Breach(at=AT, text="a frame", remedy="look", count=3)},
    known={"db": AT, "../../etc/passwd": LATER},
    pruned={"": AT, "db": LATER},
    message=LATER,
)


class AlarmsWorld(Protocol):
    """One state directory, seen from a living process."""

    @property
    def alarms(self) -> AlarmBook:
        """Return the book of alarms."""

    @property
    def locks(self) -> Locks:
        """Return the locks."""

    def run_and_die(self, work: Callable[[AlarmsWorld], None]) -> None:
        """Do the work in a process that is then killed, without any of its code running again."""


class AlarmsContract:
    """Tests of the ledger of alarms."""

    def test_nothing_is_wrong_at_first(self, world: AlarmsWorld) -> None:
        assert world.alarms.load() == Ledger()

    def test_a_ledger_comes_back_as_it_was(self, world: AlarmsWorld) -> None:
        world.alarms.replace(FULL)
        assert world.alarms.load() == FULL
        world.alarms.replace(Ledger())
        assert world.alarms.load() == Ledger()

    def test_death_keeps_the_ledger(self, world: AlarmsWorld) -> None:
        world.run_and_die(lambda mine: mine.alarms.replace(FULL))
        assert world.alarms.load() == FULL

    def test_one_process_holds_it_at_a_time_and_death_frees_it(self, world: AlarmsWorld) -> None:
        with (
            world.locks.alarms(),
            pytest.raises(BusyError, match=r"the ledger of alarms is held by .* for alarms"),
            world.locks.alarms(),
        ):
            pytest.fail("held twice")
        world.run_and_die(lambda mine: mine.locks.alarms().__enter__())
        with world.locks.alarms():
            pass
