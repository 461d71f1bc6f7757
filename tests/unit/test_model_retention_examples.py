"""The documented examples of other backup programs, with the answers that their documents give.

restic: https://restic.readthedocs.io/en/stable/060_forget.html ("Removing snapshots according to a policy").
Proxmox Backup Server: https://pbs.proxmox.com/docs/maintenance.html#pruning and its tests of pruning,
https://git.proxmox.com/?p=proxmox-backup.git;a=blob;f=tests/prune.rs; Proxmox VE's example of retention settings:
https://pve.proxmox.com/pve-docs/chapter-vzdump.html#vzdump_retention.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta

import pytest

from vmsnap.model.ids import SnapshotId
from vmsnap.model.retention import judge
from vmsnap.model.retention_policy import Counting, RetentionPolicy
from vmsnap.model.selection import Candidate


def _candidates(moments: Sequence[datetime]) -> list[Candidate]:
    return [Candidate(id=SnapshotId(f"{number:010x}"), captured=moment) for number, moment in enumerate(moments)]


def _kept(moments: Sequence[datetime], policy: RetentionPolicy) -> Iterator[tuple[datetime, set[str]]]:
    for verdict in judge(_candidates(moments), policy=policy, now=max(moments), zone=UTC):
        if verdict.keep:
            yield verdict.candidate.captured, {reason.rule for reason in verdict.reasons}


def _dates(moments: Sequence[datetime], policy: RetentionPolicy) -> list[str]:
    return [f"{moment:%Y-%m-%d %H:%M}" for moment, _ in _kept(moments, policy)]


def _nightly(last: datetime, *, years: int) -> list[datetime]:
    return [last - timedelta(days=number) for number in reversed(range(365 * years + years // 4))]


# restic


def test_restic_daily_backups_of_working_days() -> None:
    moments = [
        datetime.fromisoformat(f"2025-{text}:00+00:00")
        for text in (
            "04-21T11:00", "04-22T11:00", "04-23T11:00", "04-24T11:00", "04-25T11:00", "04-25T23:00", "04-28T11:00",
            "04-29T11:00", "05-01T11:00", "05-02T11:00", "05-02T23:00",
        )
    ]  # fmt: skip
    assert _dates(moments, RetentionPolicy(keep_daily=5)) == [
        "2025-04-25 23:00",
        "2025-04-28 11:00",
        "2025-04-29 11:00",
        "2025-05-01 11:00",
        "2025-05-02 23:00",
    ]


@pytest.mark.parametrize("last", ["2124-12-31", "2125-04-15"])
def test_restic_one_backup_every_day_for_a_hundred_years(last: str) -> None:
    # The document counts as of a Sunday: on other days the seven days reach into two weeks.
    moments = _nightly(datetime.fromisoformat(f"{last}T23:00:00+00:00"), years=100)
    policy = RetentionPolicy(keep_daily=7, keep_weekly=5, keep_monthly=12, keep_yearly=75)
    kept = dict(_kept(moments, policy))
    daily, weekly, monthly, yearly = (
        [moment for moment, rules in kept.items() if rule in rules]
        for rule in ("keep_daily", "keep_weekly", "keep_monthly", "keep_yearly")
    )
    assert daily == moments[-7:]
    assert (len(weekly), len(monthly), len(yearly)) == (5, 12, 75)
    weeks = sorted({*weekly} - {*daily})
    assert len(weeks) == 4
    assert all(moment.isoweekday() == 7 for moment in weeks), "the last day of a week"
    months = sorted({*monthly} - {*daily, *weekly})
    assert len(months) == 11
    assert all((moment + timedelta(days=1)).day == 1 for moment in months)
    years = sorted({*yearly} - {*daily, *weekly, *monthly})
    assert len(years) == 74 - (1 if last == "2125-04-15" else 0), "one of them is one of the months as well"
    assert all((moment.month, moment.day) == (12, 31) for moment in years)
    assert len(kept) == 7 + 4 + 11 + len(years)


def test_restic_keeps_the_oldest_of_a_history_that_is_too_short() -> None:
    moments = _nightly(datetime(2026, 5, 20, tzinfo=UTC), years=1)[-100:]
    kept = dict(_kept(moments, RetentionPolicy(keep_monthly=12)))
    assert next(iter(kept)) == moments[0]
    assert [f"{moment:%m-%d}" for moment in list(kept)[1:]] == ["02-28", "03-31", "04-30", "05-20"]


def test_restic_ignores_and_keeps_snapshots_from_the_future() -> None:
    moments = [datetime(2026, 5, day, tzinfo=UTC) for day in (1, 2, 3, 30)]
    verdicts = judge(
        _candidates(moments), policy=RetentionPolicy(keep_daily=1), now=datetime(2026, 5, 4, tzinfo=UTC), zone=UTC
    )
    assert [verdict.keep for verdict in verdicts] == [False, False, True, True]


# Proxmox

WEEK = ("2019-12-02T11:59", "2019-12-03T11:59", "2019-12-04T11:59", "2019-12-04T12:59")
HOURS = (
    "2019-11-15T09:39", "2019-11-15T10:49", "2019-11-15T10:59", "2019-11-15T11:39", "2019-11-15T11:49",
    "2019-11-15T11:59",
)  # fmt: skip
YEARS = (
    "2018-11-15T11:59", "2019-11-15T11:59", "2019-11-21T11:59", "2019-11-22T11:59", "2019-11-29T11:59",
    "2019-12-01T11:59", "2019-12-02T11:59", "2019-12-03T11:59", "2019-12-04T11:59",
)  # fmt: skip


@pytest.mark.parametrize(
    ("there", "rules", "stay"),
    [
        (HOURS, {"keep_hourly": 3}, [0, 2, 5]),
        (HOURS, {"keep_hourly": 2}, [2, 5]),
        (YEARS, {"keep_daily": 1}, [8]),
        (YEARS, {"keep_last": 1, "keep_daily": 1}, [7, 8]),
        (YEARS, {"keep_daily": 1, "keep_weekly": 1}, [5, 8]),
        (YEARS, {"keep_daily": 1, "keep_weekly": 1, "keep_monthly": 1}, [3, 5, 8]),
        (YEARS, {"keep_monthly": 1, "keep_yearly": 1}, [0, 8]),
        (WEEK, {"keep_last": 4}, [0, 1, 2, 3]),
        (WEEK, {"keep_last": 3}, [1, 2, 3]),
        (WEEK, {"keep_last": 2}, [2, 3]),
        (WEEK, {"keep_last": 1}, [3]),
        (WEEK, {"keep_last": 2, "keep_daily": 2}, [0, 1, 2, 3]),
        (WEEK, {"keep_daily": 3}, [0, 1, 3]),
        (WEEK, {"keep_daily": 2}, [1, 3]),
        (WEEK, {"keep_weekly": 5}, [3]),
        (WEEK, {"keep_daily": 1, "keep_weekly": 5}, [3]),
        (WEEK, {"keep_monthly": 6}, [3]),
        (WEEK, {"keep_yearly": 7}, [3]),
        (WEEK, {"keep_weekly": 5, "keep_monthly": 6, "keep_yearly": 7}, [3]),
    ],
)
def test_proxmox_backup_server(there: tuple[str, ...], rules: dict[str, int], stay: list[int]) -> None:
    moments = [datetime.fromisoformat(f"{text}:15+00:00") for text in there]
    policy = RetentionPolicy.model_validate({**rules, "counting": "in-turn"})
    assert [moment for moment, _ in _kept(moments, policy)] == [moments[number] for number in stay]


def test_proxmox_ten_years_of_nightly_backups() -> None:
    # 'Two weeks at least, two full months of weekly backups, a year of monthly ones, ten years in all.'
    moments = _nightly(datetime(2026, 6, 15, 23, tzinfo=UTC), years=14)
    policy = RetentionPolicy(
        keep_last=3, keep_daily=13, keep_weekly=8, keep_monthly=11, keep_yearly=9, counting=Counting.IN_TURN
    )
    kept = list(_kept(moments, policy))
    by_rule = Counter(rule for _, rules in kept for rule in rules if rule.startswith("keep_"))
    assert by_rule == {"keep_last": 3, "keep_daily": 13, "keep_weekly": 8, "keep_monthly": 11, "keep_yearly": 9}
    assert len(kept) == 44, "each rule covers time of its own"
    first_of = {
        rule: next(moment for moment, rules in kept if rule in rules)
        for rule in ("keep_daily", "keep_weekly", "keep_monthly", "keep_yearly")
    }
    assert moments[-1] - first_of["keep_daily"] >= timedelta(days=14)
    assert moments[-1] - first_of["keep_weekly"] >= timedelta(days=61)
    assert moments[-1] - first_of["keep_monthly"] >= timedelta(days=365)
    assert moments[-1].year - first_of["keep_yearly"].year >= 10


def test_with_proxmox_a_week_more_may_move_what_the_months_begin_with() -> None:
    # Which is why 'in-turn' is not the default: see YEARS above, where 29 November stays without keep_weekly only.
    moments = [datetime.fromisoformat(f"{text}:15+00:00") for text in YEARS]
    without = RetentionPolicy(keep_daily=1, keep_monthly=1, counting=Counting.IN_TURN)
    assert [moment for moment, _ in _kept(moments, without)] == [moments[4], moments[8]]
