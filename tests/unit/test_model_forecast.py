from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmsnap.model.forecast import MOST_BACKUPS, Forecast, as_scheduled, every_so_often, forecast
from vmsnap.model.ids import SnapshotId
from vmsnap.model.manifest import Pin
from vmsnap.model.policy import Policy
from vmsnap.model.retention import judge
from vmsnap.model.retention_policy import RetentionPolicy
from vmsnap.model.schedule_policy import SchedulePolicy
from vmsnap.model.selection import Candidate

NOW = datetime(2026, 11, 21, 2, tzinfo=UTC)
DAY = timedelta(days=1)


def ahead(retention: RetentionPolicy, *existing: Candidate, span: timedelta, every: timedelta = DAY) -> Forecast:
    policy = Policy(guest="db", retention=retention)
    moments = every_so_often(every, now=NOW)
    return forecast(existing, policy=policy, moments=moments, now=NOW, span=span, every=every)


def test_two_years_of_nightly_backups() -> None:
    policy = RetentionPolicy(keep_daily=7, keep_weekly=5, keep_monthly=12, keep_yearly=3)
    said = ahead(policy, span=timedelta(days=730))
    assert (len(said.backups), said.end) == (731, NOW + timedelta(days=730))
    assert len(said.kept) <= said.most <= 25
    rules = [{reason.rule for reason in verdict.reasons} for verdict in said.kept]
    counts = [sum(rule in mine for mine in rules) for rule in ("keep_daily", "keep_weekly", "keep_monthly")]
    assert counts == [7, 5, 12]
    years = [verdict.candidate.captured.date().isoformat() for verdict, mine in zip(said.kept, rules, strict=True)
             if "keep_yearly" in mine]  # fmt: skip
    assert years == ["2026-12-31", "2027-12-31", "2028-11-20"]


@settings(max_examples=30, deadline=None)
@given(
    counts=st.fixed_dictionaries(
        {f"keep_{name}": st.integers(1, 4) for name in ("last", "hourly", "daily", "monthly")}
    ),
    hours=st.integers(20, 900),
    minutes=st.sampled_from([30, 60, 240, 700]),
)
def test_it_is_what_pruning_after_each_backup_leaves(counts: dict[str, int], hours: int, minutes: int) -> None:
    policy = RetentionPolicy.model_validate(counts)
    every = timedelta(minutes=minutes)
    said = ahead(policy, span=timedelta(hours=hours), every=every)
    left: list[Candidate] = []
    assert said.backups == tuple(NOW + number * every for number in range(int(timedelta(hours=hours) / every) + 1))
    for number, moment in enumerate(said.backups):
        left.append(Candidate(id=SnapshotId(f"+{number:09}"), captured=moment))
        left = [one.candidate for one in judge(left, policy=policy, now=moment, zone=UTC) if one.keep]
    assert [verdict.candidate for verdict in said.kept] == left


def test_snapshots_that_are_there_are_part_of_it() -> None:
    pin = Pin(owner="ann", reason="audit", since=NOW, until=NOW + timedelta(days=40))
    existing = [
        Candidate(id=SnapshotId("00000000a1"), captured=NOW - timedelta(days=100)),
        Candidate(id=SnapshotId("00000000a2"), captured=NOW - timedelta(days=90), pin=pin),
        Candidate(id=SnapshotId("00000000a3"), captured=NOW - timedelta(days=80), held=True),
    ]
    kept = {span: [verdict.candidate.id for verdict in ahead(RetentionPolicy(keep_last=1), *existing, span=span).kept]
            for span in (timedelta(days=30), timedelta(days=50))}  # fmt: skip
    assert kept[timedelta(days=30)] == ["00000000a2", "00000000a3", "+000000030"]
    assert kept[timedelta(days=50)] == ["00000000a3", "+000000050"]


def test_backups_come_when_the_schedule_has_them_and_one_that_is_overdue_comes_first() -> None:
    policy = Policy(
        guest="db",
        time_zone="Europe/Berlin",
        schedule=SchedulePolicy(calendar=("Mon..Fri 03:00",)),
        retention=RetentionPolicy(keep_last=3),
    )
    existing = [Candidate(id=SnapshotId("00000000a1"), captured=NOW - 9 * DAY)]
    moments = as_scheduled(policy, existing=existing, now=NOW)
    said = forecast(existing, policy=policy, moments=moments, now=NOW, span=9 * DAY, every=None)
    assert [f"{moment:%a %d %H:%M}" for moment in said.backups] == [
        "Sat 21 02:00", "Mon 23 02:00", "Tue 24 02:00", "Wed 25 02:00", "Thu 26 02:00", "Fri 27 02:00", "Mon 30 02:00",
    ]  # fmt: skip
    assert [verdict.candidate.captured for verdict in said.kept] == list(said.backups[-3:])


def test_what_cannot_be_reckoned_is_refused() -> None:
    with pytest.raises(ValueError, match=f"{MOST_BACKUPS} backups"):
        ahead(RetentionPolicy(), span=timedelta(days=365), every=timedelta(seconds=1))
    with pytest.raises(ValueError, match="a thousand years"):
        ahead(RetentionPolicy(), span=timedelta(days=365 * 9000), every=timedelta(days=365))
    assert len(ahead(RetentionPolicy(), span=timedelta(days=9), every=timedelta(days=365 * 9000)).backups) == 1


def test_a_schedule_without_backups_leaves_what_retention_leaves() -> None:
    existing = [Candidate(id=SnapshotId(f"00000000a{n}"), captured=NOW - n * DAY) for n in range(3)]
    policy = Policy(guest="db", retention=RetentionPolicy(keep_last=2))
    said = forecast(existing, policy=policy, moments=(), now=NOW, span=DAY, every=None)
    assert [verdict.candidate.id for verdict in said.kept] == ["00000000a1", "00000000a0"]
    assert (said.backups, said.most) == ((), 3)
