from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from tests.unit.cli_samples import sample
from vmsnap.model.ids import SnapshotId
from vmsnap.model.manifest import Marks, Pin, Verification
from vmsnap.model.retention import Verdict, decide, judge
from vmsnap.model.retention_policy import Counting, RetentionPolicy
from vmsnap.model.selection import RULES, Candidate

NOW = datetime(2026, 11, 21, tzinfo=UTC)
BERLIN = ZoneInfo("Europe/Berlin")
ZONES = [ZoneInfo(name) for name in ("UTC", "Europe/Berlin", "America/St_Johns", "Asia/Kathmandu", "Pacific/Apia")]

# Times crowd together (the same hour, the same instant) and reach from years ago into the future.
moments = st.one_of(
    st.integers(-3, 72).map(lambda hours: NOW - timedelta(hours=hours)),
    st.integers(0, 60 * 24 * 40).map(lambda minutes: NOW - timedelta(minutes=minutes)),
    st.integers(-400, 1500).map(lambda days: NOW - timedelta(days=days)),
)
pins = st.none() | st.builds(
    Pin, owner=st.just("me"), reason=st.just("because"), since=st.just(NOW), until=st.none() | moments
)


@st.composite
def candidate_sets(draw: st.DrawFn) -> tuple[Candidate, ...]:
    numbers = draw(st.lists(st.integers(0, 99), unique=True, max_size=14))
    state = st.sampled_from(["", "", "verified", "damaged"])
    found = []
    for number in numbers:
        known = draw(state)
        found.append(
            Candidate(
                id=SnapshotId(f"{number:010x}"),
                captured=draw(moments),
                pin=draw(pins) if draw(st.integers(0, 3)) == 0 else None,
                verified=known == "verified",
                damaged=known == "damaged",
                held=draw(st.integers(0, 5)) == 0,
            )
        )
    return tuple(found)


@st.composite
def rule_sets(draw: st.DrawFn) -> RetentionPolicy:
    if draw(st.integers(0, 9)) == 0:
        return RetentionPolicy(replace_on_next=True, min_age=draw(_ages), max_age=draw(st.none() | _long))
    counts = {rule: draw(st.integers(0, 4)) for rule in RULES}
    assume(any(counts.values()))
    return RetentionPolicy.model_validate(
        {
            **counts,
            "counting": draw(st.sampled_from(Counting)),
            "min_age": draw(_ages),
            "max_age": draw(st.none() | _long),
        }
    )


_ages = st.integers(0, 200).map(lambda hours: timedelta(hours=hours))
_long = st.integers(900, 2000).map(lambda days: timedelta(days=days))
zones = st.sampled_from(ZONES)


def kept(verdicts: Sequence[Verdict]) -> set[SnapshotId]:
    return {verdict.candidate.id for verdict in verdicts if verdict.keep}


def newest(candidates: Sequence[Candidate]) -> SnapshotId:
    return max(candidates, key=lambda one: (one.captured, one.id)).id


@settings(max_examples=300)
@given(candidates=candidate_sets(), policy=rule_sets(), zone=zones, trust=st.booleans())
def test_what_always_holds(
    candidates: tuple[Candidate, ...], policy: RetentionPolicy, zone: ZoneInfo, *, trust: bool
) -> None:
    verdicts = judge(candidates, policy=policy, now=NOW, zone=zone, trust_clock=trust)
    # A partition: each candidate once, oldest first, with its reasons.
    assert [verdict.candidate for verdict in verdicts] == sorted(candidates, key=lambda one: (one.captured, one.id))
    assert all(reason.rule and reason.text for verdict in verdicts for reason in verdict.reasons)
    assert all(verdict.reasons for verdict in verdicts)
    stay = kept(verdicts)
    assert {one.id for one in candidates if one.held} <= stay
    assert {one.id for one in candidates if one.pin and (one.pin.until is None or one.pin.until > NOW)} <= stay
    assert {one.id for one in candidates if one.captured > NOW} <= stay, "what is ahead of the clock stays"
    assert {one.id for one in candidates if policy.min_age and NOW - one.captured < policy.min_age} <= stay
    past = [one for one in candidates if one.captured <= NOW]
    for group in (
        candidates,
        past,
        [one for one in past if not one.damaged],
        [one for one in past if one.verified],
        [one for one in candidates if one.verified],
    ):
        assert not group or newest(group) in stay


@settings(max_examples=300)
@given(candidates=candidate_sets(), policy=rule_sets(), zone=zones, rule=st.sampled_from(RULES))
def test_a_larger_number_never_keeps_less(
    candidates: tuple[Candidate, ...], policy: RetentionPolicy, zone: ZoneInfo, rule: str
) -> None:
    assume(not policy.replace_on_next)
    # Weeks begin in one month or year and end in another, so with 'in-turn' a week more moves what months begin with.
    straddling = policy.keep_weekly or rule == "keep_weekly"
    assume(policy.counting is Counting.OVERLAPPING or not straddling or not (policy.keep_monthly or policy.keep_yearly))
    assume(policy.counting is Counting.OVERLAPPING or not straddling or rule not in {"keep_monthly", "keep_yearly"})
    more = policy.model_copy(update={rule: getattr(policy, rule) + 1})
    fewer = kept(judge(candidates, policy=policy, now=NOW, zone=zone))
    assert fewer <= kept(judge(candidates, policy=more, now=NOW, zone=zone))


@settings(max_examples=200)
@given(candidates=candidate_sets(), policy=rule_sets(), zone=zones)
def test_counting_in_turn_keeps_at_least_as_many(
    candidates: tuple[Candidate, ...], policy: RetentionPolicy, zone: ZoneInfo
) -> None:
    # While the history is long enough: 'overlapping' keeps the oldest of a history that is still too short as well.
    overlapping = judge(
        candidates, policy=policy.model_copy(update={"counting": Counting.OVERLAPPING}), now=NOW, zone=zone
    )
    assume(not any("oldest there is" in reason.text for verdict in overlapping for reason in verdict.reasons))
    in_turn = judge(candidates, policy=policy.model_copy(update={"counting": Counting.IN_TURN}), now=NOW, zone=zone)
    assert len(kept(overlapping)) <= len(kept(in_turn))


@settings(max_examples=100)
@given(data=st.data(), candidates=candidate_sets(), policy=rule_sets(), zone=zones)
def test_the_order_of_the_snapshots_does_not_matter(
    data: st.DataObject, candidates: tuple[Candidate, ...], policy: RetentionPolicy, zone: ZoneInfo
) -> None:
    shuffled = data.draw(st.permutations(candidates))
    assert judge(shuffled, policy=policy, now=NOW, zone=zone) == judge(candidates, policy=policy, now=NOW, zone=zone)


@settings(max_examples=300)
@given(candidates=candidate_sets(), policy=rule_sets(), zone=zones, trust=st.booleans())
def test_removing_what_goes_and_deciding_again_removes_nothing(
    candidates: tuple[Candidate, ...], policy: RetentionPolicy, zone: ZoneInfo, *, trust: bool
) -> None:
    stay = kept(judge(candidates, policy=policy, now=NOW, zone=zone, trust_clock=trust))
    rest = [one for one in candidates if one.id in stay]
    assert all(verdict.keep for verdict in judge(rest, policy=policy, now=NOW, zone=zone, trust_clock=trust))


@settings(max_examples=200)
@given(candidates=candidate_sets(), policy=rule_sets(), zone=zones, hours=st.integers(-20_000, 20_000))
@example(candidates=(), policy=RetentionPolicy(), zone=ZONES[0], hours=0)
def test_a_clock_that_is_wrong_removes_little_that_the_right_one_would_not(
    candidates: tuple[Candidate, ...], policy: RetentionPolicy, zone: ZoneInfo, hours: int
) -> None:
    past = [one for one in candidates if one.captured <= NOW and one.pin is None]
    right = kept(judge(past, policy=policy, now=NOW, zone=zone, trust_clock=True))
    wrong = kept(judge(past, policy=policy, now=NOW + timedelta(hours=hours), zone=zone))
    lost = [one for one in past if one.id in right - wrong]
    if hours <= 0:
        assert not lost, "a clock that went back removes nothing"
    # A clock ahead: only what reaches its age within half of max_age, and what min_age alone held.
    limit = max((policy.max_age or timedelta(0)) / 2, timedelta(days=2))
    for one in lost:
        outlived = policy.max_age is not None and NOW - one.captured > policy.max_age - limit
        assert outlived or NOW - one.captured < policy.min_age


# Protections, and reasons


def _days_ago(number: int, identity: int, *, verified: bool = False, damaged: bool = False) -> Candidate:
    captured = NOW - timedelta(days=number)
    return Candidate(id=SnapshotId(f"{identity:010x}"), captured=captured, verified=verified, damaged=damaged)


def test_the_reasons_say_what_decided() -> None:
    pinned = Marks(pin=Pin(owner="ann", reason="audit", since=NOW, until=NOW + timedelta(days=2)))
    ended = Marks(pin=Pin(owner="ann", reason="audit", since=NOW, until=NOW))
    good = Marks(verification=Verification(at=NOW, blocks=9, bad_blocks=0))
    snapshots = [
        sample("0000000001", captured=NOW - timedelta(days=6)),
        sample("0000000002", captured=NOW - timedelta(days=5), marks=ended),
        sample("0000000003", captured=NOW - timedelta(days=4), marks=pinned),
        sample("0000000004", captured=NOW - timedelta(days=3)),
        sample("0000000005", captured=NOW - timedelta(days=2), marks=good),
        sample("0000000006", captured=NOW - timedelta(days=1)),
        sample("0000000007", captured=NOW + timedelta(days=1)),
    ]
    decisions = decide(
        snapshots, policy=RetentionPolicy(keep_last=1), held=frozenset({SnapshotId("0000000004")}), now=NOW
    )
    assert [(item.keep, item.reasons) for item in decisions] == [
        (False, ("beyond keep_last 1",)),
        (False, ("beyond keep_last 1", "its pin ended 2026-11-21 00:00Z")),
        (True, ("pinned by ann until 2026-11-23 00:00Z: audit",)),
        (True, ("in use by an environment",)),
        (True, ("the newest verified one",)),
        (True, ("the newest", "keep_last 1 of 1")),
        (True, ("its time is ahead of the clock, which says 2026-11-21 00:00Z",)),
    ]
    assert [item.rules for item in decisions] == [
        ("beyond",),
        ("beyond", "pin-ended"),
        ("pinned",),
        ("in-use",),
        ("newest-verified",),
        ("newest", "keep_last"),
        ("ahead-of-clock",),
    ]


def test_several_rules_may_keep_a_snapshot_and_all_are_named() -> None:
    policy = RetentionPolicy(keep_daily=2, keep_weekly=1, keep_yearly=3, min_age=timedelta(hours=2))
    candidates = [_days_ago(0, 3), _days_ago(1, 2), _days_ago(2, 1), _days_ago(4, 0)]
    verdicts = judge(candidates, policy=policy, now=NOW, zone=UTC)
    assert [[reason.text for reason in verdict.reasons] for verdict in verdicts] == [
        ["keep_yearly 2 of 3 (the oldest there is)"],
        ["beyond keep_daily 2", "another of its week and year stays"],
        ["keep_daily 2 of 2"],
        ["the newest", "keep_daily 1 of 2", "keep_weekly 1 of 1", "keep_yearly 1 of 3", "younger than 2h (min_age)"],
    ]


def test_in_turn_says_that_another_of_the_period_stays() -> None:
    policy = RetentionPolicy(keep_last=2, keep_daily=1, keep_weekly=1, counting=Counting.IN_TURN)
    moments = [NOW - timedelta(hours=hours) for hours in (0, 1, 2, 30, 31, 24 * 8, 24 * 9, 24 * 30)]
    candidates = [Candidate(id=SnapshotId(f"{number:010x}"), captured=moment) for number, moment in enumerate(moments)]
    verdicts = judge(candidates, policy=policy, now=NOW, zone=UTC)
    assert [[reason.text for reason in verdict.reasons] for verdict in reversed(verdicts)] == [
        ["the newest", "keep_last 1 of 2"],
        ["keep_last 2 of 2"],
        ["beyond keep_last 2", "another of its day and week stays"],
        ["keep_daily 1 of 1"],
        ["beyond keep_last 2", "another of its day and week stays"],
        ["keep_weekly 1 of 1"],
        ["beyond keep_last 2, keep_daily 1", "another of its week stays"],
        ["beyond keep_last 2, keep_daily 1, keep_weekly 1"],
    ]


def test_damaged_snapshots_take_no_place_from_sound_ones() -> None:
    candidates = [_days_ago(3, 1), _days_ago(2, 2), _days_ago(1, 3, damaged=True)]
    verdicts = judge(candidates, policy=RetentionPolicy(keep_last=1), now=NOW, zone=UTC)
    assert [verdict.keep for verdict in verdicts] == [False, True, True]
    assert [reason.rule for reason in verdicts[1].reasons] == ["newest-undamaged", "keep_last"]
    between = [_days_ago(3, 1), _days_ago(2, 2, damaged=True), _days_ago(1, 3), _days_ago(0, 4)]
    three = judge(between, policy=RetentionPolicy(keep_last=3), now=NOW, zone=UTC)
    assert [verdict.keep for verdict in three] == [True, True, True, True], "nor do they go before their time"
    two = judge(between, policy=RetentionPolicy(keep_last=2), now=NOW, zone=UTC)
    assert [verdict.keep for verdict in two] == [False, False, True, True]


def test_only_until_a_new_one_is_there() -> None:
    policy = RetentionPolicy(replace_on_next=True)
    alone = judge([_days_ago(400, 1)], policy=policy, now=NOW, zone=UTC)
    assert [verdict.keep for verdict in alone] == [True]
    verdicts = judge([_days_ago(1, 1), _days_ago(0, 2)], policy=policy, now=NOW, zone=UTC)
    assert [(verdict.keep, [reason.text for reason in verdict.reasons]) for verdict in verdicts] == [
        (False, ["a newer one is there (replace_on_next)"]),
        (True, ["the newest"]),
    ]
    verified = judge([_days_ago(1, 1, verified=True), _days_ago(0, 2)], policy=policy, now=NOW, zone=UTC)
    assert [verdict.keep for verdict in verified] == [True, True], "the new one is not verified yet"


def test_of_two_of_the_same_instant_the_same_one_always_stays() -> None:
    for ids in ((1, 2), (2, 1)):
        verdicts = judge([_days_ago(1, one) for one in ids], policy=RetentionPolicy(keep_last=1), now=NOW, zone=UTC)
        assert kept(verdicts) == {"0000000002"}


def test_snapshots_of_two_guests_are_refused() -> None:
    with pytest.raises(ValueError, match="one guest"):
        decide(
            [sample("0000000001"), sample("0000000002", guest="other")],
            policy=RetentionPolicy(),
            held=frozenset(),
            now=NOW,
        )


def test_nothing_is_decided_about_nothing() -> None:
    assert decide([], policy=RetentionPolicy(), held=frozenset(), now=NOW) == ()


# Ages, and clocks


def _nightly(count: int) -> list[Candidate]:
    return [_days_ago(number, 1000 - number) for number in range(count)]


def test_nothing_is_older_than_max_age_but_what_must_stay() -> None:
    policy = RetentionPolicy(keep_last=90, max_age=timedelta(days=10))
    verdicts = judge(_nightly(30), policy=policy, now=NOW, zone=UTC)
    assert [verdict.keep for verdict in verdicts] == [False] * 19 + [True] * 11
    assert verdicts[0].reasons[0].text == "older than 10d (max_age)"
    old = judge([_days_ago(40, 1)], policy=policy, now=NOW, zone=UTC, trust_clock=True)
    assert [verdict.keep for verdict in old] == [True], "the newest stays, however old it is"


def test_a_clock_far_ahead_removes_nothing_by_age_unless_somebody_says_it_is_right() -> None:
    policy = RetentionPolicy(keep_last=90, max_age=timedelta(days=10))
    later = NOW + timedelta(days=365)
    verdicts = judge(_nightly(9), policy=policy, now=later, zone=UTC)
    assert all(verdict.keep for verdict in verdicts)
    assert all("clock-in-doubt" in [reason.rule for reason in verdict.reasons] for verdict in verdicts)
    trusted = judge(_nightly(9), policy=policy, now=later, zone=UTC, trust_clock=True)
    assert [verdict.keep for verdict in trusted] == [False] * 8 + [True]


def test_a_backup_made_while_the_clock_was_ahead_is_no_witness() -> None:
    policy = RetentionPolicy(keep_last=90, max_age=timedelta(days=30))
    jumped = NOW + timedelta(days=365)
    doubt = timedelta(days=365)
    candidates = [*_nightly(9), Candidate(id=SnapshotId("ffffffffff"), captured=jumped, doubt=doubt)]
    assert all(verdict.keep for verdict in judge(candidates, policy=policy, now=jumped, zone=UTC))
    # When the clock is right again, that snapshot stays and counts for nothing.
    back = judge(candidates, policy=RetentionPolicy(keep_last=2), now=NOW, zone=UTC)
    assert [verdict.keep for verdict in back] == [False] * 7 + [True] * 3


def test_a_pin_does_not_end_by_a_clock_in_doubt() -> None:
    pinned = Candidate(
        id=SnapshotId("0000000001"),
        captured=NOW - timedelta(days=5),
        pin=Pin(owner="ann", reason="audit", since=NOW, until=NOW + timedelta(days=90)),
    )
    candidates = [pinned, *_nightly(3)]
    later = NOW + timedelta(days=365)
    first = judge(candidates, policy=RetentionPolicy(keep_last=2), now=later, zone=UTC)[0]
    assert first.keep
    assert [reason.rule for reason in first.reasons] == ["pinned", "clock-in-doubt"]
    assert not judge(candidates, policy=RetentionPolicy(keep_last=2), now=later, zone=UTC, trust_clock=True)[0].keep


@pytest.mark.parametrize("backups", [1, 2, 3, 10, 25])
def test_however_many_backups_a_wrong_clock_makes_nothing_goes_by_age(backups: int) -> None:
    policy = RetentionPolicy(keep_last=200, max_age=timedelta(days=30))
    jumped, doubt = NOW + timedelta(days=365), timedelta(days=365)
    good = _nightly(5)
    wrong = [
        Candidate(id=SnapshotId(f"f{number:09x}"), captured=jumped + timedelta(days=number), doubt=doubt)
        for number in range(backups)
    ]
    now = wrong[-1].captured
    assert {one.id for one in good} <= kept(judge([*good, *wrong], policy=policy, now=now, zone=UTC))
    # Also where retention has removed all of them but the last.
    assert {one.id for one in good} <= kept(judge([*good, wrong[-1]], policy=policy, now=now, zone=UTC))
    trusted = kept(judge([*good, *wrong], policy=policy, now=now, zone=UTC, trust_clock=True))
    assert not trusted & {one.id for one in good}


def test_after_a_pause_snapshots_grow_old_again() -> None:
    policy = RetentionPolicy(keep_last=200, max_age=timedelta(days=10))
    before = [_days_ago(100 + number, number) for number in range(3)]
    after = [replace(_days_ago(number, 100 + number), doubt=timedelta(days=91)) for number in range(10)]
    # Nine days have passed since, and none of the ninety-one.
    assert kept(judge([*before, *after], policy=policy, now=NOW, zone=UTC)) == {one.id for one in (*before[:2], *after)}


def test_a_snapshot_that_a_wrong_clock_dated_spoils_nothing_when_its_time_has_come() -> None:
    policy = RetentionPolicy(keep_last=200, max_age=timedelta(days=10))
    wrong = replace(_days_ago(0, 99), doubt=timedelta(days=365))
    verdicts = judge([*_nightly(20), wrong], policy=policy, now=NOW + timedelta(hours=1), zone=UTC)
    assert sum(verdict.keep for verdict in verdicts) == 11
    assert not [reason for verdict in verdicts for reason in verdict.reasons if reason.rule == "clock-in-doubt"]


def test_a_pin_that_was_set_after_a_pause_ends_when_it_says() -> None:
    pin = Pin(owner="ann", reason="audit", since=NOW - timedelta(days=5), until=NOW - timedelta(days=1))
    pinned = Candidate(id=SnapshotId("0000000001"), captured=NOW - timedelta(days=100), pin=pin)
    after = [replace(one, doubt=timedelta(days=91)) for one in _nightly(9)]
    verdict = judge([pinned, *after], policy=RetentionPolicy(keep_last=2), now=NOW, zone=UTC)[0]
    assert not verdict.keep
    assert verdict.reasons[-1].rule == "pin-ended"


# Calendars


def _at(*texts: str, zone: ZoneInfo = BERLIN) -> list[Candidate]:
    return [
        Candidate(id=SnapshotId(f"{number:010x}"), captured=datetime.fromisoformat(text).astimezone(UTC))
        for number, text in enumerate(texts)
    ]


def _stay(candidates: list[Candidate], policy: RetentionPolicy, *, zone: ZoneInfo = BERLIN) -> list[int]:
    verdicts = judge(candidates, policy=policy, now=datetime(2030, 1, 1, tzinfo=UTC), zone=zone)
    return [number for number, verdict in enumerate(verdicts) if verdict.keep]


def test_days_begin_at_midnight_of_the_policys_time_zone() -> None:
    candidates = _at("2026-07-01T21:30Z", "2026-07-01T22:30Z", "2026-07-02T21:30Z")
    assert _stay(candidates, RetentionPolicy(keep_daily=2)) == [0, 2]
    assert _stay(candidates, RetentionPolicy(keep_daily=2), zone=ZoneInfo("UTC")) == [1, 2]


def test_the_hour_that_comes_twice_is_two_hours_and_the_day_of_25_hours_is_one_day() -> None:
    # On 25 October 2026 clocks in Berlin went from 03:00+02:00 back to 02:00+01:00.
    candidates = _at("2026-10-25T00:05Z", "2026-10-25T00:55Z", "2026-10-25T01:05Z", "2026-10-25T01:55Z")
    assert _stay(candidates, RetentionPolicy(keep_hourly=9)) == [0, 1, 3]  # 0: the oldest there is
    assert _stay(candidates, RetentionPolicy(keep_hourly=9, counting=Counting.IN_TURN)) == [1, 3]
    day = _at("2026-10-24T22:00Z", "2026-10-25T22:59Z", "2026-10-25T23:00Z")
    assert _stay(day, RetentionPolicy(keep_daily=9, counting=Counting.IN_TURN)) == [1, 2]


def test_the_day_of_23_hours_is_one_day() -> None:
    # On 29 March 2026 clocks in Berlin went from 02:00+01:00 to 03:00+02:00.
    day = _at("2026-03-28T23:00Z", "2026-03-29T00:59Z", "2026-03-29T01:00Z", "2026-03-29T21:59Z", "2026-03-29T22:00Z")
    assert _stay(day, RetentionPolicy(keep_daily=9, counting=Counting.IN_TURN)) == [3, 4]
    assert _stay(day[1:3], RetentionPolicy(keep_hourly=9, counting=Counting.IN_TURN)) == [0, 1]


def test_a_zone_that_skipped_a_day_has_no_such_day() -> None:
    # Samoa went from 29 to 31 December 2011.
    days = _at("2011-12-30T09:59Z", "2011-12-30T10:00Z", "2011-12-31T09:59Z")
    assert _stay(days, RetentionPolicy(keep_daily=9, counting=Counting.IN_TURN), zone=ZoneInfo("Pacific/Apia")) == [
        0,
        2,
    ]


def test_weeks_are_iso_weeks_also_at_the_end_of_a_year_and_leap_days_are_days() -> None:
    # 31 December 2024 and 1 to 5 January 2025 are the same week, and so are 28 December 2026 and 3 January 2027.
    weeks = _at("2024-12-29T12:00Z", "2024-12-30T12:00Z", "2025-01-05T12:00Z", "2026-12-28T12:00Z", "2027-01-03T12:00Z")
    assert _stay(weeks, RetentionPolicy(keep_weekly=9, counting=Counting.IN_TURN)) == [0, 2, 4]
    leap = _at("2028-02-28T12:00Z", "2028-02-29T12:00Z", "2028-03-01T12:00Z")
    assert _stay(leap, RetentionPolicy(keep_daily=2)) == [1, 2]
    assert _stay(leap, RetentionPolicy(keep_monthly=2)) == [1, 2]


def test_two_thousand_snapshots_of_a_guest_are_decided_quickly() -> None:
    candidates = [
        Candidate(id=SnapshotId(f"{number:010x}"), captured=NOW - timedelta(hours=number)) for number in range(2000)
    ]
    policy = RetentionPolicy(keep_last=24, keep_hourly=48, keep_daily=30, keep_weekly=8, keep_monthly=24, keep_yearly=9)
    assert len(kept(judge(candidates, policy=policy, now=NOW, zone=BERLIN))) < 100
