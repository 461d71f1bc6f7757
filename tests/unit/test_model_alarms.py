"""What somebody is told, and when: once, again as a reminder, and when it is over; never a storm."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.cli_samples import sample
from vmsnap.errors import ConfigError
from vmsnap.model.alarms import (
    Alarm,
    AlarmKind,
    Breach,
    Ledger,
    Notice,
    Rules,
    acquainted,
    alarms_of,
    settle,
    told,
    trying,
    with_breach,
)
from vmsnap.model.facts import Facts, GuestFacts, Problem, chore_problem
from vmsnap.model.freshness import Expected
from vmsnap.model.history import RunEntry, RunOutcome, RunResult, Starter, Trigger
from vmsnap.model.ids import RunId
from vmsnap.model.journal import RunKind
from vmsnap.model.policy import Policy
from vmsnap.model.schedule import Due, FailedAttempt

HOUR, MINUTE, DAY = timedelta(hours=1), timedelta(minutes=1), timedelta(days=1)
NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
RULES = Rules()


def guest(name: str = "db", *, newest: datetime | None = NOW - HOUR, **changes: object) -> GuestFacts:
    snapshot = None if newest is None else sample(guest=name, captured=newest)
    facts = GuestFacts(guest=name, policy=Policy(guest=name), snapshots=int(newest is not None), newest=snapshot)
    return replace(facts, **changes)  # type: ignore[arg-type]


def facts(*guests: GuestFacts, at: datetime = NOW, **changes: object) -> Facts:
    return replace(Facts(at=at, guests=guests), **changes)  # type: ignore[arg-type]


def run(outcome: RunOutcome, *, started: datetime = NOW - MINUTE, remedy: str | None = None) -> RunEntry:
    return RunEntry(
        run=RunId("00000000a1"),
        kind=RunKind.BACKUP,
        guest="db",
        started=started,
        starter=Starter(trigger=Trigger.DAEMON),
        ended=started,
        result=RunResult(outcome=outcome, error="no room", remedy=remedy),
    )


def kinds(*guests: GuestFacts, breaches: dict[str, Breach] | None = None) -> list[AlarmKind]:
    return [alarm.kind for alarm in alarms_of(facts(*guests), breaches=breaches or {})]


LATE = Expected(start=NOW - 5 * HOUR, deadline=NOW - HOUR, closes=NOW - MINUTE)
FAILED = FailedAttempt(began=NOW - MINUTE, ended=NOW - MINUTE, exit_code=7, brief="no agent")


def test_a_guest_that_fares_well_raises_no_alarm() -> None:
    well = guest(last=run(RunOutcome.DONE), expected=Expected(start=NOW, deadline=NOW + HOUR), verified=NOW)
    assert kinds(well) == []


def test_without_a_fresh_snapshot_it_is_overdue_and_its_window_is_missed() -> None:
    assert kinds(guest(expected=LATE)) == [AlarmKind.OVERDUE, AlarmKind.MISSED_WINDOW]
    assert kinds(guest(expected=replace(LATE, closes=None))) == [AlarmKind.OVERDUE]


def test_a_run_that_began_in_its_window_has_not_missed_it() -> None:
    assert kinds(guest(expected=LATE, running=True)) == [AlarmKind.OVERDUE]


def test_a_guest_that_is_not_enabled_is_not_waited_for() -> None:
    disabled = guest(expected=LATE, failures=(FAILED,), policy=Policy(guest="db", enabled=False))
    assert kinds(disabled) == []
    assert kinds(replace(disabled, policy=None)) == []


def test_a_failure_says_what_to_do_and_when_it_is_tried_again() -> None:
    entry = guest(last=run(RunOutcome.FAILED, remedy="make room"), due=Due(at=NOW + HOUR, reason="backoff"))
    (alarm,) = alarms_of(facts(entry), breaches={})
    assert alarm.kind is AlarmKind.FAILURE
    assert alarm.remedy == "make room"
    assert "no room" in alarm.text
    assert "2026-11-21 13:00Z" in alarm.text


@pytest.mark.parametrize(
    ("outcome", "raised"),
    [(RunOutcome.FAILED, True), (RunOutcome.DIED, True), (RunOutcome.STOPPED, False), (RunOutcome.DONE, False)],
)
def test_only_a_run_that_failed_or_died_is_a_failure(outcome: RunOutcome, *, raised: bool) -> None:
    assert kinds(guest(last=run(outcome))) == ([AlarmKind.FAILURE] if raised else [])


def test_a_snapshot_made_after_it_makes_up_for_a_failure() -> None:
    assert kinds(guest(last=run(RunOutcome.FAILED, started=NOW - 2 * HOUR))) == []


def test_an_attempt_that_never_reached_the_history_is_a_failure() -> None:
    assert kinds(guest(failures=(FAILED,))) == [AlarmKind.FAILURE]


def test_an_attempt_that_just_began_is_none_until_its_run_should_be_known() -> None:
    begun = FailedAttempt(began=NOW - MINUTE)
    assert kinds(guest(failures=(begun,))) == []
    long_ago = FailedAttempt(began=NOW - 10 * MINUTE)
    assert kinds(guest(failures=(long_ago,))) == [AlarmKind.FAILURE]
    assert kinds(guest(failures=(long_ago,), running=True)) == []


def test_a_breach_stands_for_the_failure_of_its_run_until_a_snapshot_is_made() -> None:
    breach = Breach(at=NOW - timedelta(seconds=30), text="a frame of the clone on br0", remedy="look")
    broken = guest(last=run(RunOutcome.FAILED), failures=(FAILED,))
    assert kinds(broken, breaches={"db": breach}) == [AlarmKind.BREACH]
    failed_again = replace(broken, last=run(RunOutcome.FAILED, started=NOW))
    assert kinds(failed_again, breaches={"db": breach}) == [AlarmKind.BREACH, AlarmKind.FAILURE]
    assert kinds(guest(newest=NOW), breaches={"db": breach}) == []


def test_damage_and_problems_are_told() -> None:
    problem = Problem(about="policy: x.toml", error=ConfigError("x.toml:1: wrong", remedy="correct it"), guest="x")
    found = alarms_of(facts(guest(damaged=2), problems=(problem,)), breaches={})
    assert [(alarm.guest, alarm.kind) for alarm in found] == [("db", AlarmKind.DAMAGED), ("x", AlarmKind.PROBLEM)]
    assert found[1].remedy == "correct it"


def test_a_problem_of_a_chore_that_was_not_heard_stays_and_any_other_does_not() -> None:
    chores = (
        chore_problem("prune", guest="db", error=ConfigError("x")),
        chore_problem("tend", guest="", error=ConfigError("y")),
    )
    problem = Problem(about="policy: x.toml", error=ConfigError("z"))
    ledger, notice = settle(Ledger(), facts=facts(problems=(*chores, problem)), rules=RULES)
    assert notice is not None
    ledger = told(ledger, notice, now=NOW)
    stays = {"chore: prune db": frozenset({"tend"}), "chore: tend": frozenset({"prune", "verify"})}
    for about, heard in stays.items():
        after, _ = settle(ledger, facts=facts(at=NOW + HOUR, heard=heard), rules=RULES)
        assert [item.alarm.about for item in after.raised if item.over is None] == [about]
    after, _ = settle(ledger, facts=facts(at=NOW + HOUR), rules=RULES)
    assert all(item.over is not None for item in after.raised)


# How often


class Told:
    """Settles one moment after another and remembers what was told."""

    def __init__(self, rules: Rules = RULES, *, works: bool = True) -> None:
        self.rules = rules
        self.works = works
        self.ledger = Ledger()
        self.notices: list[tuple[datetime, Notice]] = []

    def at(self, now: datetime, *guests: GuestFacts, **changes: object) -> Notice | None:
        self.ledger, notice = settle(self.ledger, facts=facts(*guests, at=now, **changes), rules=self.rules)
        if notice is not None:
            self.ledger = trying(self.ledger, notice, now=now)
            self.notices.append((now, notice))
            if self.works:
                self.ledger = told(self.ledger, notice, now=now)
        return notice


FAILING = guest(failures=(FAILED,))
WELL = guest()


def test_it_is_told_once_and_then_that_it_is_over_and_then_anew() -> None:
    somebody = Told()
    first = somebody.at(NOW, FAILING)
    assert first is not None
    assert [item.alarm.kind for item in first.begun] == [AlarmKind.FAILURE]
    for minutes in range(1, 60 * 24):
        assert somebody.at(NOW + minutes * MINUTE, FAILING) is None
    over = somebody.at(NOW + DAY - MINUTE, WELL)
    assert over is not None
    assert not over.begun
    assert [item.since for item in over.over] == [NOW]
    assert somebody.ledger.raised == ()
    again = somebody.at(NOW + DAY + HOUR, FAILING)
    assert again is not None
    assert again.begun


def test_a_reminder_comes_after_its_time_with_everything_that_goes_on() -> None:
    somebody = Told(Rules(remind_after=DAY))
    somebody.at(NOW, FAILING)
    somebody.at(NOW + HOUR, FAILING, guest("other", expected=LATE))
    reminder = somebody.at(NOW + DAY, FAILING, guest("other", expected=LATE))
    assert reminder is not None
    assert not reminder.begun
    assert {item.alarm.guest for item in reminder.going_on} == {"db", "other"}
    assert somebody.at(NOW + DAY + HOUR, FAILING, guest("other", expected=LATE)) is None


def test_nobody_is_reminded_who_does_not_want_to_be() -> None:
    somebody = Told(Rules(remind_after=None))
    somebody.at(NOW, FAILING)
    assert somebody.at(NOW + 400 * DAY, FAILING) is None


def test_five_hundred_guests_that_fail_one_after_another_make_few_messages() -> None:
    somebody = Told()
    names = [f"vm{number:03}" for number in range(500)]
    failing = [guest(name, failures=(FAILED,)) for name in names]
    for half_minute in range(120):
        somebody.at(NOW + half_minute * timedelta(seconds=30), *failing[: 1 + 4 * half_minute])
    assert len(somebody.notices) == 12
    assert {item.alarm.guest for _, notice in somebody.notices for item in notice.begun} >= set(names[:400])
    for (earlier, _), (later, _) in pairwise(somebody.notices):
        assert later - earlier >= RULES.at_most_every


def test_a_breach_does_not_wait_for_its_turn() -> None:
    somebody = Told()
    somebody.at(NOW, guest("other", failures=(FAILED,)))
    somebody.ledger = with_breach(somebody.ledger, guest="db", breach=Breach(at=NOW, text="a frame"))
    soon = NOW + timedelta(seconds=1)
    notice = somebody.at(soon, guest(), guest("other", failures=(FAILED,)), guest("third", failures=(FAILED,)))
    assert notice is not None
    assert [(item.alarm.guest, item.alarm.kind) for item in notice.all] == [("db", AlarmKind.BREACH)]
    assert somebody.at(soon + MINUTE, guest(), guest("other", failures=(FAILED,))) is None


def test_a_breach_is_counted_and_kept_until_somebody_was_told() -> None:
    somebody = Told(works=False)
    for number in range(3):
        somebody.ledger = with_breach(somebody.ledger, guest="db", breach=Breach(at=NOW, text=f"frame {number}"))
    assert somebody.ledger.breaches["db"].count == 3
    again = with_breach(somebody.ledger, guest="db", breach=Breach(at=NOW, text="frame 2"))
    assert again == somebody.ledger
    assert somebody.at(NOW, guest(newest=None)) is not None
    somebody.works = True
    later = somebody.at(NOW + HOUR, guest(newest=NOW + HOUR))
    assert later is not None
    assert [item.alarm.kind for item in later.begun] == [AlarmKind.BREACH]


def test_what_could_not_be_told_is_told_later_and_not_at_once() -> None:
    somebody = Told(works=False)
    assert somebody.at(NOW, FAILING) is not None
    assert somebody.at(NOW + MINUTE, FAILING) is None
    somebody.works = True
    later = somebody.at(NOW + RULES.at_most_every, FAILING)
    assert later is not None
    assert later.begun
    assert somebody.at(NOW + HOUR, FAILING) is None


def test_what_came_and_went_between_two_messages_is_not_told() -> None:
    somebody = Told()
    somebody.at(NOW, guest("other", failures=(FAILED,)))
    assert somebody.at(NOW + MINUTE, FAILING, guest("other", failures=(FAILED,))) is None
    assert somebody.at(NOW + HOUR, WELL, guest("other", failures=(FAILED,))) is None


def test_nothing_is_over_because_it_could_not_be_looked_at() -> None:
    somebody = Told()
    somebody.at(NOW, FAILING, guest("other", failures=(FAILED,)))
    problem = Problem(about="store", error=ConfigError("gone"))
    blind = somebody.at(NOW + HOUR, unseen=None, problems=(problem,))
    assert blind is not None
    assert [item.alarm.kind for item in blind.all] == [AlarmKind.PROBLEM]
    seen = somebody.at(NOW + 2 * HOUR, guest("other"), unseen=frozenset({"db"}))
    assert seen is not None
    assert {item.alarm.guest for item in seen.over} == {"other", ""}


def test_a_clock_that_was_wrong_silences_nothing_for_long() -> None:
    somebody = Told()
    somebody.at(NOW + 3650 * DAY, guest("other", failures=(FAILED,)))
    notice = somebody.at(NOW, FAILING, guest("other", failures=(FAILED,)))
    assert notice is not None
    assert [item.alarm.guest for item in notice.begun] == ["db"]


def test_guests_are_known_from_their_first_look_and_forgotten_with_their_policy() -> None:
    ledger = acquainted(Ledger(), guests=("a", "b"), now=NOW)
    ledger = acquainted(ledger, guests=("b", "c"), now=NOW + DAY)
    assert ledger.known == {"b": NOW, "c": NOW + DAY}
    assert acquainted(ledger, guests=("b", "c"), now=NOW - DAY).known == {"b": NOW - DAY, "c": NOW - DAY}


STATES = st.lists(
    st.tuples(st.integers(0, 600), st.sets(st.sampled_from("abc")), st.booleans(), st.booleans()), max_size=25
)


@given(STATES)
def test_whatever_happens_each_alarm_is_told_and_ended_in_turn(states: list[tuple[int, set[str], bool, bool]]) -> None:
    """Of each guest: begun and over alternate, and in the end everything that is wrong has been told."""
    somebody = Told(Rules(remind_after=None, at_most_every=5 * MINUTE))
    now = NOW
    for minutes, failing, works, blind in states:
        now += minutes * MINUTE
        somebody.works = works
        names = [guest(name, failures=(FAILED,) if name in failing else ()) for name in "abc"]
        somebody.at(now, *([] if blind else names), unseen=None if blind else frozenset())
    somebody.works = True
    failing = states[-1][1] if states else set()
    now += HOUR
    somebody.at(now, *(guest(name, failures=(FAILED,) if name in failing else ()) for name in "abc"))
    assert {item.alarm.guest for item in somebody.ledger.raised} == failing
    assert all(item.told is not None and item.over is None for item in somebody.ledger.raised)
    times = [moment for moment, _ in somebody.notices]
    assert all(later - earlier >= 5 * MINUTE for earlier, later in pairwise(times))


def test_an_alarm_is_the_same_whatever_it_says() -> None:
    one = Alarm(guest="db", kind=AlarmKind.FAILURE, text="no room")
    assert one.key == replace(one, text="no agent").key
    assert one.key != replace(one, about="x").key
