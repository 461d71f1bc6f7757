"""What somebody has to be told of, and when: pure.

``alarms_of`` says what is wrong at this moment. ``settle`` compares that with what was wrong, and told, before: each thing is
told once, when it begins; again after ``remind_after``; and once when it is over. What is to be told at one time is one
message, and there is at most one message each ``at_most_every``, so that a host whose guests all fail sends one. A breach of
isolation does not wait.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum

from vmsnap.model.facts import Facts, GuestFacts, chore_of
from vmsnap.model.history import RunOutcome

_STARTING = timedelta(minutes=5)
"""How long an attempt may go on before its run is in the journal: the look at the guest comes first."""


class AlarmKind(StrEnum):
    """What is wrong, the worst first."""

    BREACH = "breach"
    DAMAGED = "damaged"
    OVERDUE = "overdue"
    MISSED_WINDOW = "missed-window"
    FAILURE = "failure"
    PROBLEM = "problem"


WORST_FIRST = tuple(AlarmKind)


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """One thing that is wrong with one guest ("": with all). ``text`` says what, ``remedy`` what to do."""

    guest: str
    kind: AlarmKind
    text: str
    remedy: str | None = None
    about: str = ""

    @property
    def key(self) -> tuple[str, AlarmKind, str]:
        """Return what makes it the same alarm as a later one, whatever that says."""
        return self.guest, self.kind, self.about


@dataclass(frozen=True, kw_only=True)
class Breach:
    """The last time that the isolation of a guest's clone was broken. ``count``: how often it was, as far as known."""

    at: datetime
    text: str
    remedy: str | None = None
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class Raised:
    """An alarm that was raised. ``told`` and ``tried``: when somebody was last told, and when that was last begun.

    ``over``: since when it is no longer so, where somebody was told of it and not yet of its end.
    """

    alarm: Alarm
    since: datetime
    told: datetime | None = None
    tried: datetime | None = None
    over: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """What outlives a process of alarms. ``known``: since when each guest with a policy is known.

    ``pruned``: when retention was last applied to each guest ("": to all). ``message``: when the last message was begun.
    """

    raised: tuple[Raised, ...] = ()
    breaches: Mapping[str, Breach] = field(default_factory=dict)
    known: Mapping[str, datetime] = field(default_factory=dict)
    pruned: Mapping[str, datetime] = field(default_factory=dict)
    message: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How often somebody is told. ``remind_after`` None: once."""

    remind_after: timedelta | None = timedelta(days=1)
    at_most_every: timedelta = timedelta(minutes=5)


@dataclass(frozen=True, kw_only=True)
class Notice:
    """What is to be told at one time. ``begun`` is new, ``going_on`` a reminder, ``over`` has ended."""

    begun: tuple[Raised, ...] = ()
    going_on: tuple[Raised, ...] = ()
    over: tuple[Raised, ...] = ()

    @property
    def all(self) -> tuple[Raised, ...]:
        """Return everything that is in it."""
        return (*self.begun, *self.going_on, *self.over)


def alarms_of(facts: Facts, *, breaches: Mapping[str, Breach]) -> tuple[Alarm, ...]:
    """Return what is wrong now, by guest, the worst first. ``breaches``: the last one of each guest's clones."""
    alarms = [
        Alarm(
            guest=problem.guest,
            kind=AlarmKind.PROBLEM,
            text=problem.error.brief,
            remedy=problem.error.remedy,
            about=problem.about,
        )
        for problem in facts.problems
    ]
    for guest in facts.guests:
        alarms += _alarms_of(guest, breach=breaches.get(guest.guest), now=facts.at)
    return tuple(sorted(alarms, key=lambda alarm: (alarm.guest, WORST_FIRST.index(alarm.kind))))


def _alarms_of(guest: GuestFacts, *, breach: Breach | None, now: datetime) -> Iterable[Alarm]:
    name = guest.guest
    captured = None if guest.newest is None else guest.newest.manifest.captured
    broken = None
    if breach is not None and (captured is None or captured < breach.at):
        broken = breach.at
        yield Alarm(guest=name, kind=AlarmKind.BREACH, text=breach.text, remedy=breach.remedy)
    if guest.damaged:
        yield Alarm(
            guest=name,
            kind=AlarmKind.DAMAGED,
            text=f"{guest.damaged} of its {guest.snapshots} snapshots are not what their digests say",
            remedy=f"'vmsnap list {name}' shows which, 'vmsnap verify SNAPSHOT --repair' repairs one whose copy at the replica "
            "is intact; look at the store's disks, and make a new snapshot",
        )
    if not guest.watched:
        return
    expected = guest.expected
    newest = "there is no snapshot" if captured is None else f"the newest snapshot is of {_minute(captured)}"
    if expected is not None and expected.is_overdue(now):
        yield Alarm(
            guest=name,
            kind=AlarmKind.OVERDUE,
            text=f"{newest}; by its policy there should be a newer one since {_minute(expected.deadline)}",
            remedy=f"'vmsnap history {name}' shows what became of its runs, 'vmsnap policy show {name}' when it is due; "
            f"'vmsnap backup {name}' makes a snapshot now",
        )
    if expected is not None and expected.missed_window(now) and not guest.running:
        yield Alarm(
            guest=name,
            kind=AlarmKind.MISSED_WINDOW,
            text=f"its window from {_minute(expected.start)} is over and no snapshot was made in it; {newest}",
            remedy=f"widen schedule.windows, or 'vmsnap backup {name}' outside of them",
        )
    # The run that was broken off by a breach has failed, and that is told already.
    yield from _failure(guest, since=max(filter(None, (captured, broken)), default=None), now=now)


def _failure(guest: GuestFacts, *, since: datetime | None, now: datetime) -> Iterable[Alarm]:
    """Return that a run begun after ``since`` failed, by its history, or by an attempt that did not get that far."""
    found: list[tuple[datetime, str, str | None]] = []
    last = guest.last
    result = None if last is None else last.result
    if last is not None and result is not None and result.outcome in {RunOutcome.FAILED, RunOutcome.DIED}:
        found.append((last.started, result.error or result.outcome.value, result.remedy))
    if guest.failures:
        attempt = guest.failures[-1]
        if attempt.ended is not None:
            found.append((attempt.began, attempt.brief, None))
        elif not guest.running and now - attempt.began > _STARTING:
            found.append((attempt.began, "its process ended without saying how", None))
    fresh = [item for item in found if since is None or item[0] > since]
    if not fresh:
        return
    began, text, remedy = max(fresh, key=lambda item: (item[0], item[2] is not None))
    waits = ""
    if guest.due is not None and guest.due.at is not None:
        waits = f"; the next attempt is due {'now' if guest.due.at <= now else _minute(guest.due.at)}"
    yield Alarm(
        guest=guest.guest,
        kind=AlarmKind.FAILURE,
        text=f"the run of {_minute(began)} failed: {text}{waits}",
        remedy=remedy or f"'vmsnap history {guest.guest}' and 'vmsnap doctor {guest.guest}' say more",
    )


def acquainted(ledger: Ledger, *, guests: Iterable[str], now: datetime) -> Ledger:
    """Return the ledger with the guests that have a policy now; those it did not know are known from now on."""
    return replace(ledger, known={guest: min(ledger.known.get(guest, now), now) for guest in sorted(guests)})


def with_breach(ledger: Ledger, *, guest: str, breach: Breach) -> Ledger:
    """Return the ledger after a breach. May be repeated: one that it has is not counted again."""
    before = ledger.breaches.get(guest)
    if before is not None and (before.at, before.text) == (breach.at, breach.text):
        return ledger
    counted = replace(breach, count=1 if before is None else before.count + 1)
    return replace(ledger, breaches={**ledger.breaches, guest: counted})


def settle(ledger: Ledger, *, facts: Facts, rules: Rules) -> tuple[Ledger, Notice | None]:
    """Return the ledger of this moment, and what is to be told now; None: nothing, or it is too soon.

    What is known of guests that could not be looked at, and of chores that were not heard, stays. Where there is a notice, write
    down ``trying`` before telling it, so that a death between does not tell it at once again, and ``told`` after; without that,
    it is told again later.
    """
    now = facts.at
    before = {raised.alarm.key: raised for raised in ledger.raised}
    current: list[Raised] = []
    for alarm in alarms_of(facts, breaches=ledger.breaches):
        known = before.pop(alarm.key, None)
        current.append(Raised(alarm=alarm, since=now) if known is None else replace(known, alarm=alarm, over=None))
    for gone in before.values():
        if _unseen(gone.alarm, facts=facts):
            current.append(gone)
        elif gone.told is None and gone.alarm.kind is AlarmKind.BREACH:
            # Nobody has heard of it yet, and somebody must.
            current.append(gone)
        elif gone.told is not None or gone.tried is not None:
            current.append(replace(gone, over=gone.over or now))
    notice = _notice(current, rules=rules, now=now)
    if not _passed(ledger.message, rules.at_most_every, now=now):
        breaches = (item for item in notice.begun if item.alarm.kind is AlarmKind.BREACH)
        notice = Notice(begun=tuple(item for item in breaches if _passed(item.tried, rules.at_most_every, now=now)))
    return replace(ledger, raised=tuple(current)), notice if notice.all else None


def _unseen(alarm: Alarm, *, facts: Facts) -> bool:
    if alarm.kind is AlarmKind.PROBLEM:
        chore = chore_of(alarm.about)
        return chore is not None and facts.heard is not None and chore not in facts.heard
    return facts.unseen is None or alarm.guest in facts.unseen


def _notice(raised: Iterable[Raised], *, rules: Rules, now: datetime) -> Notice:
    """Return everything that is to be told, were it not for ``at_most_every``. A reminder is of all that goes on."""
    raised = tuple(raised)
    going_on = tuple(item for item in raised if item.told is not None and item.over is None)
    reminds = rules.remind_after is not None and any(
        _passed(item.told, rules.remind_after, now=now) for item in going_on
    )
    return Notice(
        begun=tuple(item for item in raised if item.told is None and item.over is None),
        going_on=going_on if reminds else (),
        over=tuple(item for item in raised if item.over is not None),
    )


def trying(ledger: Ledger, notice: Notice, *, now: datetime) -> Ledger:
    """Return the ledger as it is to be written before a notice is told."""
    keys = {item.alarm.key for item in notice.all}
    raised = tuple(replace(item, tried=now) if item.alarm.key in keys else item for item in ledger.raised)
    return replace(ledger, raised=raised, message=now)


def told(ledger: Ledger, notice: Notice, *, now: datetime) -> Ledger:
    """Return the ledger after somebody was told: what is over is forgotten."""
    keys = {item.alarm.key for item in notice.all}
    over = {item.alarm.key for item in notice.over}
    return replace(
        ledger,
        raised=tuple(
            replace(item, told=now) if item.alarm.key in keys else item
            for item in ledger.raised
            if item.alarm.key not in over
        ),
    )


def _passed(since: datetime | None, duration: timedelta, *, now: datetime) -> bool:
    """Tell whether it is so long ago. A time ahead of the clock was written by a clock that was wrong."""
    return since is None or since > now or now - since >= duration


def _minute(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%MZ}"
