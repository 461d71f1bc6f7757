from __future__ import annotations

from datetime import timedelta

import pytest

from tests.unit.cli_samples import AT, sample
from vmsnap.model.doubt import doubt_before
from vmsnap.model.manifest import Snapshot
from vmsnap.model.policy import Policy
from vmsnap.model.retention_policy import RetentionPolicy
from vmsnap.model.schedule_policy import SchedulePolicy

DAY = timedelta(days=1)
NONE = timedelta(0)


def policy(*, max_age: int | None = 14, every: int = 1) -> Policy:
    return Policy(
        guest="db1",
        schedule=SchedulePolicy(every=every * DAY),
        retention=RetentionPolicy(keep_last=9, max_age=None if max_age is None else max_age * DAY),
    )


def chain(*days: float, policy: Policy) -> list[Snapshot]:
    """Return snapshots captured after so many days, each with the doubt that a backup records."""
    made: list[Snapshot] = []
    for number, day in enumerate(days):
        captured = AT + day * DAY
        doubt = doubt_before(captured, snapshots=made, policy=policy)
        one = sample(f"{number:010x}", captured=captured)
        manifest = one.manifest.model_copy(update={"clock_doubt_seconds": doubt.total_seconds()})
        made.append(Snapshot(manifest=manifest))
    return made


def doubts(*days: float, policy: Policy) -> list[float]:
    return [one.manifest.clock_doubt_seconds / 86400 for one in chain(*days, policy=policy)]


def test_the_first_snapshot_leaves_no_doubt() -> None:
    assert doubt_before(AT, snapshots=(), policy=policy()) == NONE


def test_a_jump_is_in_doubt_for_ever_and_further_backups_do_not_change_that() -> None:
    assert doubts(0, 1, 2, 367, 368, 369, 370, policy=policy()) == [0, 0, 0, 365, 365, 365, 365]


def test_doubts_add_up() -> None:
    assert doubts(0, 100, 101, 300, policy=policy()) == [0, 100, 100, 299]


def test_a_clock_that_is_right_again_leaves_no_doubt() -> None:
    assert doubts(0, 1, 367, 2, 3, policy=policy()) == [0, 0, 366, 0, 0]


def test_nor_does_it_when_the_wrong_time_has_come() -> None:
    regular = range(2, 367)
    assert set(doubts(0, 1, 366.5, *regular, 367, 368, policy=policy())) == {0, 365.5}
    assert doubts(0, 1, 366.5, *regular, 367, 368, policy=policy())[-2:] == [0, 0]


@pytest.mark.parametrize(("apart", "max_age"), [(1, 14), (7, 10), (7, 30), (30, 31), (30, 60), (31, None), (365, 400)])
def test_backups_as_the_schedule_wants_them_leave_no_doubt(apart: int, max_age: int | None) -> None:
    wanted = policy(max_age=max_age, every=apart)
    assert doubts(*(number * apart for number in range(12)), policy=wanted) == [0] * 12


def test_a_calendar_tells_as_well_how_far_apart_backups_are() -> None:
    monthly = Policy(
        guest="db1",
        schedule=SchedulePolicy(calendar=("*-*-01 02:00",)),
        retention=RetentionPolicy(keep_last=9, max_age=20 * DAY),
    )
    captured = AT.replace(month=12, day=1)
    assert doubt_before(captured, snapshots=[sample(captured=AT.replace(day=1))], policy=monthly) == NONE
    assert doubt_before(captured + 300 * DAY, snapshots=[sample(captured=captured)], policy=monthly) == 300 * DAY
