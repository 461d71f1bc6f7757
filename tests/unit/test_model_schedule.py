"""When backups are due: by hand, for any policy, and over simulated years."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vmsnap.errors import ExitCode
from vmsnap.model.openings import Openings, parse_span
from vmsnap.model.policy import Policy
from vmsnap.model.schedule import (
    Due,
    FailedAttempt,
    Load,
    newest_before,
    next_due,
    over_limit,
    upcoming,
)
from vmsnap.model.schedule_policy import SchedulePolicy

HOUR, DAY, MINUTE = timedelta(hours=1), timedelta(days=1), timedelta(minutes=1)


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


NEWEST = utc("2026-11-20 02:00")
NOW = utc("2026-11-20 12:00")


def plan(*, time_zone: str = "UTC", **schedule: Any) -> Policy:
    """Return a policy with such a schedule."""
    return Policy(guest="db", time_zone=time_zone, schedule=SchedulePolicy(**schedule))


def due(
    schedule: Policy,
    *,
    newest: datetime | None = NEWEST,
    now: datetime = NOW,
    failures: tuple[FailedAttempt, ...] = (),
    guest: str = "db",
) -> Due:
    return next_due(schedule.model_copy(update={"guest": guest}), newest=newest, failures=failures, now=now)


def failure(at: datetime, *, exit_code: int | None = 7) -> FailedAttempt:
    return FailedAttempt(began=at, ended=None if exit_code is None else at, exit_code=exit_code, brief="no agent")


# What is wanted


@pytest.mark.parametrize(
    ("schedule", "at"),
    [
        (plan(), "2026-11-21 02:00"),
        (plan(every=6 * HOUR), "2026-11-20 08:00"),
        (plan(at=("03:00", "15:00")), "2026-11-20 03:00"),
        (plan(at=("02:00",)), "2026-11-21 02:00"),
        (plan(at=("03:00",), time_zone="Asia/Tokyo"), "2026-11-20 18:00"),
        (plan(calendar=("Sat 01:00", "Sun 01:00")), "2026-11-21 01:00"),
        (plan(at=("23:00",), calendar=("*-*-20 22:00",)), "2026-11-20 22:00"),
        (plan(calendar=("03:00 UTC",), time_zone="Asia/Tokyo"), "2026-11-20 03:00"),
    ],
)
def test_it_is_counted_from_the_newest_snapshot(schedule: Policy, at: str) -> None:
    assert due(schedule).at == utc(at)


@pytest.mark.parametrize("schedule", [plan(), plan(at=("03:00",)), plan(jitter=DAY)])
def test_a_guest_without_a_snapshot_is_due_at_once(schedule: Policy) -> None:
    found = due(schedule, newest=None)
    assert (found.at, found.is_due(NOW)) == (NOW, True)
    assert found.reason == "there is no snapshot yet"


def test_without_a_snapshot_windows_still_hold() -> None:
    schedule = plan(windows=("22:00-04:00",))
    found = due(schedule, newest=None)
    assert found.at == utc("2026-11-20 22:00")
    assert found.reason == "there is no snapshot yet; the next opening is 2026-11-20 22:00Z"
    assert due(schedule, newest=None, now=utc("2026-11-20 23:00")).is_due(utc("2026-11-20 23:00"))


def test_a_calendar_that_is_over_is_never_due() -> None:
    found = due(plan(calendar=("2026-11-19 02:00",)))
    assert found.at is None
    assert not found.is_due(NOW)
    assert found.reason == "no time of the calendar comes after the newest snapshot (2026-11-20 02:00Z)"


def test_a_window_that_never_opens_is_never_due() -> None:
    found = due(plan(windows=("2020-01-01",)))
    assert found.at is None
    assert found.reason.endswith("; no window opens in the next ten years")
    assert due(plan(windows=("Mon",), blackouts=("Mon",))).at is None


@pytest.mark.parametrize(
    ("windows", "blackouts", "at"),
    [
        (("22:00-06:00",), (), "2026-11-21 02:00"),
        (("06:00-07:00",), (), "2026-11-21 06:00"),
        (("Mon..Fri 22:00-06:00",), (), "2026-11-21 02:00"),  # Friday's window lasts until Saturday morning
        (("Sun",), (), "2026-11-22 00:00"),
        ((), ("Sat",), "2026-11-22 00:00"),
        ((), ("Sat,Sun", "Mon 00:00-06:00"), "2026-11-23 06:00"),
        ((), ("2026-11-20..2027-01-03",), "2027-01-04 00:00"),
        ((), ("*-11-21..30",), "2026-12-01 00:00"),
        (("22:00-06:00",), ("Fri 18:00-24:00", "Sat,Sun", "Mon 00:00-06:00"), "2026-11-23 22:00"),
        (("2027-02-01 01:00-02:00",), (), "2027-02-01 01:00"),
    ],
)
def test_windows_and_blackouts_move_it(windows: tuple[str, ...], blackouts: tuple[str, ...], at: str) -> None:
    assert due(plan(windows=windows, blackouts=blackouts)).at == utc(at)


def test_what_was_missed_is_made_up_for_once() -> None:
    now = utc("2026-11-28 13:00")
    schedule = plan(at=("02:00",))
    assert due(schedule, now=now).at == utc("2026-11-21 02:00")
    assert due(schedule, newest=now, now=now + MINUTE).at == utc("2026-11-29 02:00")
    long_ago = due(schedule, newest=utc("2025-01-01 00:00"), now=now)
    assert long_ago.is_due(now)


def test_a_missed_window_is_not_made_up_for_outside_of_windows() -> None:
    found = due(plan(at=("02:00",), windows=("02:00-04:00",)), now=utc("2026-11-21 05:00"))
    assert found.at == utc("2026-11-22 02:00")
    assert found.reason == (
        "'02:00' comes after the newest snapshot (2026-11-20 02:00Z); the next opening is 2026-11-22 02:00Z"
    )


# Failures


@pytest.mark.parametrize(("count", "waits"), [(1, 15), (2, 30), (3, 60), (5, 240), (6, 360), (7, 360), (500, 360)])
def test_failures_put_it_off_twice_as_long_each_time_up_to_a_limit(count: int, waits: int) -> None:
    now = utc("2026-11-21 02:30")
    failures = tuple(failure(now - number * MINUTE) for number in range(count))
    found = due(plan(), now=now, failures=failures)
    assert found.at == now + waits * MINUTE
    assert "failed (the last began 2026-11-21 02:30Z: no agent), so it waits" in found.reason


def test_waiting_begins_when_the_failed_run_ended() -> None:
    long = FailedAttempt(began=utc("2026-11-21 02:00"), ended=utc("2026-11-21 03:00"), exit_code=6, brief="too slow")
    assert due(plan(), now=utc("2026-11-21 03:01"), failures=(long,)).at == utc("2026-11-21 03:15")


@pytest.mark.parametrize("ended", ["2027-11-21 02:00", "9999-12-31 23:00", "2020-01-01 00:00"])
def test_an_end_that_a_wrong_clock_wrote_is_not_waited_for(ended: str) -> None:
    jumped = FailedAttempt(began=utc("2026-11-21 02:00"), ended=utc(ended), exit_code=6, brief="too slow")
    assert due(plan(), now=utc("2026-11-21 02:01"), failures=(jumped,)).at == utc("2026-11-21 02:15")


def test_a_run_whose_process_died_is_a_failure() -> None:
    now = utc("2026-11-21 02:01")
    found = due(plan(), now=now, failures=(failure(utc("2026-11-21 02:00"), exit_code=None),))
    assert found.at == utc("2026-11-21 02:15")
    assert "it did not end in order" in found.reason


def test_failures_before_the_newest_snapshot_do_not_count() -> None:
    assert due(plan(), failures=(failure(NEWEST - HOUR), failure(NEWEST))).at == NEWEST + DAY


@pytest.mark.parametrize(
    ("schedule", "at"),
    [(plan(), "2026-11-22 02:05"), (plan(at=("02:00",)), "2026-11-22 02:00")],
)
def test_what_was_not_safe_is_not_retried_before_the_next_regular_time(schedule: Policy, at: str) -> None:
    refused = failure(utc("2026-11-21 02:05"), exit_code=int(ExitCode.SAFETY))
    found = due(schedule, now=utc("2026-11-21 12:00"), failures=(refused,))
    assert found.at == utc(at)
    assert "after an attempt that was not safe (2026-11-21 02:05Z)" in found.reason
    assert due(schedule, newest=None, now=utc("2026-11-21 12:00"), failures=(refused,)).at == utc(at)


def test_what_was_not_safe_is_not_tried_again_at_once_where_the_period_is_short() -> None:
    schedule = plan(every=5 * MINUTE)
    attempts = [failure(NEWEST + number * HOUR, exit_code=int(ExitCode.SAFETY)) for number in range(1, 4)]
    for number, wait in enumerate((15, 30, 60), start=1):
        last = attempts[number - 1]
        assert last.ended is not None
        found = due(schedule, now=last.ended + MINUTE, failures=tuple(attempts[:number]))
        assert found.at == last.ended + wait * MINUTE
        assert "so it waits" in found.reason


def test_a_retry_stays_in_the_windows() -> None:
    schedule = plan(at=("02:00",), windows=("02:00-04:00",))
    late = failure(utc("2026-11-21 03:55"))
    assert due(schedule, now=utc("2026-11-21 03:56"), failures=(late,)).at == utc("2026-11-22 02:00")


# Clocks that are wrong


def test_what_is_dated_far_in_the_future_does_not_count() -> None:
    assert due(plan(), newest=NOW + timedelta(days=300)).is_due(NOW)
    assert newest_before([NEWEST, NOW + timedelta(days=300)], now=NOW) == NEWEST
    assert newest_before([], now=NOW) is None
    future = failure(NOW + timedelta(days=300))
    assert due(plan(), newest=None, failures=(future,)).is_due(NOW)


def test_a_clock_set_back_by_an_hour_makes_no_second_run() -> None:
    schedule = plan(at=("02:00",))
    for minutes in range(0, 180, 7):
        now = NEWEST - HOUR + minutes * MINUTE
        assert not due(schedule, newest=NEWEST + MINUTE, now=now).is_due(now)


# Jitter


def test_200_guests_are_spread_over_the_jitter() -> None:
    schedule = plan(at=("03:00",), jitter=2 * HOUR)
    starts = [due(schedule, guest=f"guest-{number}").at for number in range(200)]
    delays = sorted((start - utc("2026-11-20 03:00")) / MINUTE for start in starts if start)
    assert len(delays) == 200
    assert delays[0] >= 0
    assert delays[-1] < 120
    # Evenly: each eighth of the time has between a half and twice its share of guests.
    shares = [sum(eighth * 15 <= delay < (eighth + 1) * 15 for delay in delays) for eighth in range(8)]
    assert all(12 <= share <= 50 for share in shares), shares
    assert starts == [due(schedule, guest=f"guest-{number}").at for number in range(200)]


def test_jitter_never_leads_out_of_a_window_and_still_spreads() -> None:
    schedule = plan(at=("03:00",), windows=("02:50-03:10",), jitter=5 * HOUR)
    starts = [due(schedule, guest=f"guest-{number}").at for number in range(200)]
    assert all(start and utc("2026-11-20 03:00") <= start < utc("2026-11-20 03:10") for start in starts) is False
    # 03:00 of the 20th is over at noon: they are all in the next opening.
    delays = [(start - utc("2026-11-21 02:50")) / MINUTE for start in starts if start]
    assert all(0 <= delay < 20 for delay in delays)
    assert len({int(delay) for delay in delays}) > 15


def test_an_interval_is_not_made_longer_by_jitter() -> None:
    assert due(plan(every=6 * HOUR, jitter=HOUR)).at == NEWEST + 6 * HOUR


# Limits


def test_limits_on_runs_at_a_time() -> None:
    one, two = Load(guest="one", storage="san"), Load(guest="two", storage=None)
    assert over_limit(two, running=[], per_host=1, per_storage=1) is None
    said = over_limit(two, running=[one], per_host=1, per_storage=1)
    assert said == "a run of 'one' goes on, and at most 1 may at a time on this host"
    assert over_limit(two, running=[one], per_host=2, per_storage=1) is None
    said = over_limit(Load(guest="three", storage="san"), running=[one, two], per_host=3, per_storage=1)
    assert said == "a run of 'one' goes on, and at most 1 may at a time on storage 'san'"
    assert over_limit(Load(guest="three", storage=None), running=[two, two], per_host=3, per_storage=1) is None


# What comes next


def test_the_next_runs_come_one_after_another() -> None:
    starts = [found.at for found in islice(upcoming(plan(at=("03:00",)), newest=None, now=NOW), 3)]
    assert starts == [NOW, utc("2026-11-21 03:00"), utc("2026-11-22 03:00")]
    only = plan(calendar=("2026-11-24 00:00", "2026-11-25 00:00"))
    assert len(list(upcoming(only, newest=NEWEST, now=NOW))) == 2


# Any policy

spans = (
    st.tuples(
        st.sampled_from(
            ["", "Mon..Fri", "Sat,Sun", "Sun", "*-*-1..7", "2026-12-20..2027-01-03", "*-12-24..26", "*-02-29"]
        ),
        st.sampled_from(["", "22:00-06:00", "02:00-03:00", "01:30-02:30", "00:00-24:00", "12:00-11:00"]),
    )
    .map(lambda parts: " ".join(part for part in parts if part))
    .filter(bool)
)
zones = st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "America/Havana"])
times_of_day = st.tuples(st.integers(0, 23), st.integers(0, 59)).map(lambda pair: f"{pair[0]:02}:{pair[1]:02}")
calendars = st.sampled_from(["hourly", "daily", "Mon..Fri 02:30", "*-*-01 00:00", "Sun *-*-1..7 03:00", "*-02-29 1:00"])
lists = st.lists(spans, max_size=2).map(tuple)
wanted = st.one_of(
    st.integers(10, 60 * 24 * 9).map(lambda minutes: {"every": minutes * MINUTE}),
    st.lists(times_of_day, min_size=1, max_size=3).map(lambda texts: {"at": tuple(texts)}),
    st.lists(calendars, min_size=1, max_size=2).map(lambda texts: {"calendar": tuple(texts)}),
)
schedules = st.builds(
    lambda wanted, windows, blackouts, zone, jitter: plan(
        **wanted, windows=windows, blackouts=blackouts, time_zone=zone, jitter=jitter * MINUTE
    ),
    wanted,
    lists,
    st.lists(spans.filter(lambda text: text != "00:00-24:00"), max_size=2).map(tuple),
    zones,
    st.integers(0, 24 * 60),
)
moments = st.integers(0, 60 * 24 * 1000).map(lambda minutes: utc("2026-01-01 00:00") + minutes * MINUTE)
ages = st.integers(0, 60 * 24 * 20).map(lambda minutes: minutes * MINUTE)


def is_open(schedule: Policy, moment: datetime) -> bool:
    """Tell by the definition whether a run may start: some window's interval holds it, and no blackout's."""
    zone = ZoneInfo(schedule.time_zone)

    def holds(text: str, *, late: bool) -> bool:
        intervals = parse_span(text).intervals(moment - 3 * DAY, zone=zone, late=late)
        return any(start <= moment < stop for start, stop in islice(intervals, 10))

    windows, blackouts = schedule.schedule.windows, schedule.schedule.blackouts
    inside = not windows or any(holds(text, late=False) for text in windows)
    return inside and not any(holds(text, late=True) for text in blackouts)


@given(schedules, moments, st.none() | ages, st.lists(ages, max_size=4), st.text(min_size=1, max_size=5))
def test_it_is_always_in_a_window_and_never_in_a_blackout(
    schedule: Policy, now: datetime, age: timedelta | None, failed: list[timedelta], guest: str
) -> None:
    newest = None if age is None else now - age
    failures = tuple(failure(now - ago) for ago in failed)
    found = due(schedule, newest=newest, now=now, failures=failures, guest=guest)
    if found.at is None:
        return
    assert is_open(schedule, found.at)
    if found.is_due(now):
        assert is_open(schedule, now)
    if newest is not None:
        assert found.at > newest


@given(schedules, moments, st.none() | ages, st.lists(st.integers(0, 60 * 24 * 10), min_size=2, max_size=6))
def test_it_never_goes_back_while_time_goes_on(
    schedule: Policy, now: datetime, age: timedelta | None, steps: list[int]
) -> None:
    newest = None if age is None else now - age
    looks = [now + minutes * MINUTE for minutes in sorted(steps)]
    found = [due(schedule, newest=newest, now=look).at for look in looks]
    assert all(one is None or two is None or one <= two for one, two in pairwise(found))
    # What was announced happens: a look at that time says that the run is due.
    if found[0] is not None and found[0] > looks[0]:
        assert due(schedule, newest=newest, now=found[0]).is_due(found[0])


@given(schedules, moments, ages, ages)
def test_a_newer_snapshot_never_makes_it_earlier(
    schedule: Policy, now: datetime, age: timedelta, more: timedelta
) -> None:
    older, newer = due(schedule, newest=now - age - more, now=now), due(schedule, newest=now - age, now=now)
    # But for jitter: what waits for an opening is spread over it, what is wanted at its first instant is not.
    jitter = schedule.schedule.jitter
    assert newer.at is None or (older.at is not None and max(older.at, now) <= max(newer.at, now) + jitter)


@given(schedules, moments, st.none() | ages, st.lists(ages, max_size=3), ages)
def test_a_failure_never_makes_it_earlier(
    schedule: Policy, now: datetime, age: timedelta | None, failed: list[timedelta], last: timedelta
) -> None:
    newest = None if age is None else now - age
    before = tuple(failure(now - ago) for ago in failed)
    one = due(schedule, newest=newest, now=now, failures=before)
    two = due(schedule, newest=newest, now=now, failures=(*before, failure(now - min([last, *failed]))))
    assert two.at is None or (one.at is not None and max(one.at, now) <= max(two.at, now))


@given(lists, lists, zones, moments)
def test_an_opening_is_open_to_its_end(
    windows: tuple[str, ...], blackouts: tuple[str, ...], zone: str, moment: datetime
) -> None:
    schedule = plan(windows=windows, blackouts=blackouts, time_zone=zone)
    openings = Openings(
        windows=tuple(map(parse_span, windows)), blackouts=tuple(map(parse_span, blackouts)), zone=ZoneInfo(zone)
    )
    opening = openings.next_open(moment)
    if opening is None:
        return
    closing = openings.closes(opening, limit=opening + 3 * DAY)
    for part in range(8):
        assert is_open(schedule, opening + (closing - opening) * (part / 8))
    assert closing == opening + 3 * DAY or not is_open(schedule, closing)
    if opening > moment:
        for part in range(8):
            assert not is_open(schedule, moment + (opening - moment) * (part / 8))


# Simulated years


@dataclass
class Simulation:
    """A host that looks every ``tick`` what is due, with nothing but what it stored; its clock may be wrong."""

    schedules: dict[str, Policy]
    tick: timedelta = 20 * MINUTE
    lasts: timedelta = 4 * MINUTE
    down: tuple[tuple[datetime, datetime], ...] = ()
    wrong_by: Callable[[datetime], timedelta] = lambda _: timedelta(0)
    fails: Callable[[str, datetime], bool] = lambda _guest, _moment: False
    runs: dict[str, list[datetime]] = field(default_factory=dict)
    attempts: dict[str, list[FailedAttempt]] = field(default_factory=dict)

    def go(self, start: datetime, end: datetime) -> None:
        """Live through a time; ``runs`` has when each run began, by the true clock."""
        stored: dict[str, list[datetime]] = {guest: [] for guest in self.schedules}
        moment = start
        while moment < end:
            if not any(first <= moment < last for first, last in self.down):
                moment = self._look(moment, stored)
            moment += self.tick

    def _look(self, moment: datetime, stored: dict[str, list[datetime]]) -> datetime:
        for guest, schedule in self.schedules.items():
            now = moment + self.wrong_by(moment)
            found = next_due(
                schedule.model_copy(update={"guest": guest}),
                newest=newest_before(stored[guest], now=now),
                failures=self.attempts.setdefault(guest, []),
                now=now,
            )
            if not found.is_due(now):
                continue
            if self.fails(guest, moment):
                self.attempts[guest].append(failure(now))
            else:
                stored[guest].append(now + MINUTE)
                self.runs.setdefault(guest, []).append(moment)
            moment += self.lasts
        return moment


YEAR = (utc("2027-06-01 00:07"), utc("2028-06-01 00:07"))  # a leap day is in it
YEAR_ZONES = ("UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "America/Havana", "Africa/Casablanca")


@pytest.mark.parametrize("zone", YEAR_ZONES)
def test_a_year_at_a_time_of_day_has_one_run_on_each_day(zone: str) -> None:
    simulation = Simulation({"db": plan(at=("02:30",), time_zone=zone)})
    simulation.go(*YEAR)
    first, *runs = simulation.runs["db"]
    assert first == YEAR[0]
    days = [run.astimezone(ZoneInfo(zone)).date() for run in runs]
    assert all(two - one == DAY for one, two in pairwise(days))
    assert len(days) >= 365
    clocks = {run.astimezone(ZoneInfo(zone)).strftime("%H:%M") for run in runs}
    # On the day on which the clocks jump over 02:30 it is as much later as they jump.
    assert clocks <= {f"{hour:02}:{minute:02}" for hour in (2, 3) for minute in range(60)}


def test_a_year_of_intervals_never_has_two_runs_in_one() -> None:
    simulation = Simulation({"db": plan(every=6 * HOUR)})
    simulation.go(*YEAR)
    gaps = [two - one for one, two in pairwise(simulation.runs["db"])]
    assert all(6 * HOUR <= gap <= 6 * HOUR + 20 * MINUTE for gap in gaps)


def test_a_year_of_nights_with_blackouts() -> None:
    schedule = plan(
        every=20 * HOUR,
        time_zone="Europe/Berlin",
        windows=("Mon..Fri 22:00-06:00",),
        blackouts=("*-12-24..31", "*-01-01..02"),
        jitter=HOUR,
    )
    simulation = Simulation({"db": schedule, "other": schedule})
    simulation.go(*YEAR)
    zone = ZoneInfo("Europe/Berlin")
    for runs in simulation.runs.values():
        assert len(runs) > 230
        assert all(is_open(schedule, run) for run in runs)
        local = [run.astimezone(zone) for run in runs]
        assert all(run.hour >= 22 or run.hour < 6 for run in local)
        assert not [run for run in local if run.month == 12 and run.day >= 24]
        assert all(two - one >= 20 * HOUR for one, two in pairwise(runs))
    assert simulation.runs["db"] != simulation.runs["other"]


def test_a_host_that_was_down_for_a_week_makes_one_run() -> None:
    down = (utc("2027-09-01 00:00"), utc("2027-09-08 13:00"))
    simulation = Simulation({"db": plan(at=("02:00", "14:00"))}, down=(down,), lasts=timedelta(0))
    simulation.go(utc("2027-08-25 00:00"), utc("2027-09-15 00:00"))
    after = [run for run in simulation.runs["db"] if run >= down[0]]
    assert after[:3] == [down[1], utc("2027-09-08 14:00"), utc("2027-09-09 02:00")]


@pytest.mark.parametrize("jump", [HOUR, -HOUR, 20 * HOUR, -20 * HOUR, timedelta(days=400), timedelta(days=-400)])
@pytest.mark.parametrize("mended", [False, True])
def test_clock_jumps_cost_one_run_at_most_and_never_end_the_backups(jump: timedelta, *, mended: bool) -> None:
    wrong = (utc("2027-09-03 09:00"), utc("2027-09-06 09:00") if mended else utc("2030-01-01 00:00"))
    simulation = Simulation(
        {"db": plan(at=("02:00",)), "often": plan(every=6 * HOUR)},
        wrong_by=lambda moment: jump if wrong[0] <= moment < wrong[1] else timedelta(0),
    )
    simulation.go(utc("2027-08-25 00:00"), utc("2027-09-15 00:00"))
    for guest, period in (("db", DAY), ("often", 6 * HOUR)):
        runs = simulation.runs[guest]
        gaps = [two - one for one, two in pairwise(runs)]
        jumps = 2 if mended else 1
        # Each jump may bring one run early, and hold one back for as long as it goes back, or a day at most.
        assert sum(gap < period / 2 for gap in gaps[1:]) <= jumps
        assert max(gaps) <= period + DAY + HOUR
        assert abs(len(runs) - timedelta(days=21) / period) <= 1 + jumps * (1 + DAY / period)


def test_a_guest_that_fails_is_tried_less_and_less_and_then_regularly_again() -> None:
    broken = (utc("2027-09-03 00:00"), utc("2027-09-05 00:00"))
    simulation = Simulation(
        {"db": plan(at=("02:00",)), "good": plan(at=("02:00",))},
        tick=MINUTE,
        fails=lambda guest, moment: guest == "db" and broken[0] <= moment < broken[1],
    )
    simulation.go(utc("2027-09-01 00:00"), utc("2027-09-08 00:00"))
    tried = [attempt.began for attempt in simulation.attempts["db"]]
    waits = [(two - one) / MINUTE for one, two in pairwise(tried)]
    assert [round(wait / 15) for wait in waits[:6]] == [1, 2, 4, 8, 16, 24]
    assert len(tried) < 16
    assert [run.date().day for run in simulation.runs["good"]][-5:] == [3, 4, 5, 6, 7]
    assert [run.date().day for run in simulation.runs["db"]][-3:] == [5, 6, 7]


@settings(max_examples=25, deadline=None)
@given(schedules, st.sampled_from([47 * MINUTE, 3 * HOUR]))
def test_never_two_runs_within_one_period_whatever_the_policy(schedule: Policy, tick: timedelta) -> None:
    # One that never opens never runs, and finding that out each time would take most of the test's time.
    assume(due(schedule, newest=None, now=utc("2028-02-20 00:00")).at)
    simulation = Simulation({"db": schedule}, tick=tick)
    simulation.go(utc("2028-02-20 00:00"), utc("2028-04-05 00:00"))
    runs = simulation.runs.get("db", [])
    assert all(is_open(schedule, run) for run in runs)
    for one, two in pairwise(runs):
        # Without windows and jitter, the second would not have been due before the first was stored.
        free = schedule.schedule.model_copy(update={"windows": (), "blackouts": (), "jitter": timedelta(0)})
        plain = schedule.model_copy(update={"schedule": free})
        wanted = next_due(plain, newest=one + MINUTE, now=one).at
        assert wanted is not None
        assert one < wanted <= two
