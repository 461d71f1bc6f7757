"""Whether scheduled backups find the time they need: what doctor says of it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from vmsnap.errors import DriverError
from vmsnap.model.guest import Severity
from vmsnap.model.history import Starter, Trigger, done
from vmsnap.model.ids import RunId
from vmsnap.model.journal import RunKind
from vmsnap.model.load import usual_interval
from vmsnap.model.policy import Policy
from vmsnap.model.schedule_policy import SchedulePolicy
from vmsnap.testing.world import FakeWorld
from vmsnap.workflow.load import load_findings
from vmsnap.workflow.world import World

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
HOUR, MINUTE = timedelta(hours=1), timedelta(minutes=1)


def policy(guest: str = "db", *, enabled: bool = True, **schedule: Any) -> Policy:
    return Policy(guest=guest, enabled=enabled, schedule=SchedulePolicy(**schedule))


def took(world: World, guest: str, span: timedelta, *, number: int = 1) -> None:
    """Record that the last backup of a guest took so long."""
    run = RunId(f"{number:010x}")
    started = world.clock.now()
    starter = Starter(trigger=Trigger.OPERATOR)
    world.history.begin(run, kind=RunKind.BACKUP, guest=guest, at=started, starter=starter)
    world.history.end(run, at=started + span, after=span, result=done())


@pytest.mark.parametrize(
    ("schedule", "between"),
    [
        ({}, 24 * HOUR),
        ({"every": 6 * HOUR}, 6 * HOUR),
        ({"at": ("02:00", "14:00")}, 12 * HOUR),
        ({"calendar": ("*-*-* 03:00",)}, 24 * HOUR),
    ],
)
def test_the_interval_follows_from_the_schedule(schedule: dict[str, Any], between: timedelta) -> None:
    assert usual_interval(policy(**schedule), now=NOW) == between


def test_a_schedule_that_ends_has_no_interval() -> None:
    assert usual_interval(policy(calendar=("2026-12-24 02:00",)), now=NOW) is None


def test_too_much_is_a_warning_that_names_the_longest(tmp_path: Path) -> None:
    world = FakeWorld(tmp_path).process()
    took(world, "db", 40 * MINUTE)
    took(world, "big", 50 * MINUTE, number=2)
    both = [policy(every=HOUR), policy("big", every=HOUR)]
    (found,) = load_findings(world, policies=both, per_host=1)
    assert found.severity is Severity.WARNING
    assert "150%" in found.message
    assert "big (50m), db (40m)" in found.message
    assert "runs_per_host" in (found.remedy or "")


def test_enough_time_is_said_too(tmp_path: Path) -> None:
    world = FakeWorld(tmp_path).process()
    took(world, "db", 40 * MINUTE)
    took(world, "big", 50 * MINUTE, number=2)
    both = [policy(every=HOUR), policy("big", every=HOUR)]
    (found,) = load_findings(world, policies=both, per_host=2)
    assert (found.severity, found.check) == (Severity.OK, "schedule")
    assert "75% of the time there is, 2 at a time" in found.message
    (found,) = load_findings(world, policies=[policy(), policy("big", every=HOUR, enabled=False)], per_host=1)
    assert found.severity is Severity.OK


def test_without_a_backup_to_judge_by_nothing_is_said(tmp_path: Path) -> None:
    world = FakeWorld(tmp_path).process()
    took(world, "retired", 40 * MINUTE)
    assert load_findings(world, policies=[policy()], per_host=1) == ()


def test_a_history_that_cannot_be_read_stops_nothing(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    world = lab.process()

    def broken(*, kind: RunKind) -> dict[str, Any]:
        raise DriverError(f"the history of {kind} cannot be read")

    odd: Any = world.history
    odd.last_done = broken
    (found,) = load_findings(world, policies=[policy()], per_host=1)
    assert found.severity is Severity.WARNING
