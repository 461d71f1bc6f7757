"""Looking at all guests over a fake host and a simulated clock: who is told, when, and what that survives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.workflow.invocations import simply
from tests.workflow.test_due import BackUp, due, failing_with, policy
from vmsnap.errors import ConfigError, DriverError, NoSpaceError, NotCleanError, VmsnapError
from vmsnap.model.alarms import Breach, Ledger, Rules
from vmsnap.model.environment import Environment
from vmsnap.model.facts import Facts, Problem, Room
from vmsnap.model.ids import RunId
from vmsnap.model.journal import RunKind
from vmsnap.model.manifest import Verification
from vmsnap.model.policy import Policy
from vmsnap.model.schedule import FailedAttempt
from vmsnap.monitoring.channels import Message
from vmsnap.monitoring.lookout import Lookout, News, Outlets, Subject
from vmsnap.ports.alarms import AlarmBook
from vmsnap.testing.faults import DEATHS, Fault, Faults, Mode
from vmsnap.testing.memory_state import ProcessDied
from vmsnap.testing.world import FakeWorld
from vmsnap.workflow.facts import Stock, gather, overlay_room
from vmsnap.workflow.world import World

SECOND, MINUTE, HOUR, DAY = timedelta(seconds=1), timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
TICK = 30 * SECOND


@dataclass
class Somebody:
    """Takes messages and pings, and knows when they came. ``deaf``: takes none."""

    lab: FakeWorld
    deaf: bool = False
    told: list[tuple[datetime, Message]] = field(default_factory=list)
    pings: list[datetime] = field(default_factory=list)
    while_sending: Callable[[], None] = lambda: None

    @property
    def is_empty(self) -> bool:
        return False

    @property
    def titles(self) -> list[str]:
        return [message.title.removeprefix("vmsnap on host: ") for _, message in self.told]

    def send(self, message: Message) -> bool:
        self.while_sending()
        if not self.deaf:
            self.told.append((self.lab.clock.now(), message))
        return not self.deaf


@dataclass
class Pinger:
    somebody: Somebody

    def send(self) -> None:
        self.somebody.pings.append(self.somebody.lab.clock.now())


@dataclass
class Host:
    """An installation that is looked at. Each look is a process of its own, unless ``lookout`` is kept by a test."""

    lab: FakeWorld
    somebody: Somebody
    policies: tuple[Policy, ...]
    rules: Rules = field(default_factory=Rules)
    textfile: Path | None = None

    def lookout(self, world: World, *, book: AlarmBook | None = None, channels: Any = None) -> Lookout:
        def look(subject: Subject, ledger: Ledger) -> Facts:
            room = Room(free_bytes=1, size_bytes=2)
            return gather(world, policies=subject.policies, ledger=ledger, stock=Stock(world), room=lambda: room)

        outlets = Outlets(
            host="host",
            channels=channels or self.somebody,
            rules=self.rules,
            ping=Pinger(self.somebody),
            textfile=self.textfile,
        )
        return Lookout(look, outlets=outlets, book=book or self.lab.state.alarms, locks=world.locks, clock=world.clock)

    def look(self, *problems: Problem, news: News | None = None, ping: bool = True) -> bool:
        looked = self.lookout(self.lab.process()).look(
            Subject(policies=self.policies, problems=problems), news=news or News(), ping=ping
        )
        self.lab.end()
        return looked

    def tick_until(self, end: datetime, *, step: timedelta = TICK) -> None:
        while self.lab.clock.now() < end:
            self.lab.clock.sleep(step)
            self.look()

    def run_due(self, back_up: BackUp | None = None) -> None:
        simply(self.lab, due(*self.policies) if back_up is None else due(*self.policies, back_up=back_up))


def host(folder: Path, *policies: Policy, **changes: Any) -> Host:
    lab = FakeWorld(folder)
    return Host(lab=lab, somebody=Somebody(lab), policies=policies or (policy(),), **changes)


def test_a_guest_without_a_fresh_backup_is_found_at_the_next_tick(tmp_path: Path) -> None:
    mine = host(tmp_path, policy(every=6 * HOUR))
    mine.run_due()
    (snapshot,) = mine.lab.store.snapshots("db")
    deadline = snapshot.manifest.captured + 6 * HOUR + HOUR
    mine.tick_until(deadline - 2 * MINUTE, step=MINUTE)
    assert mine.somebody.told == []
    mine.tick_until(deadline + 5 * MINUTE)
    ((when, message),) = mine.somebody.told
    assert deadline <= when <= deadline + TICK + SECOND
    assert "db: no fresh backup" in message.title
    assert "vmsnap backup db" in message.body


def test_a_missed_window_is_found_at_the_next_tick(tmp_path: Path) -> None:
    mine = host(tmp_path, policy(at=("04:00",), windows=("03:00-05:00",), overdue_after=DAY))
    mine.run_due()  # the simulated clock begins at 02:00, before the window
    assert mine.lab.store.snapshots("db") == ()
    mine.look()
    closing = mine.lab.clock.now().replace(hour=5, minute=0, second=0, microsecond=0)
    mine.tick_until(closing - 3 * MINUTE, step=MINUTE)
    assert mine.somebody.told == []
    mine.tick_until(closing + 5 * MINUTE)
    ((when, message),) = mine.somebody.told
    assert closing <= when <= closing + TICK + SECOND
    assert "db: missed its window" in message.title


def test_a_guest_that_is_new_is_waited_for_from_when_it_was_first_seen(tmp_path: Path) -> None:
    mine = host(tmp_path, policy(every=DAY))
    first = mine.lab.clock.now()
    mine.look()
    mine.tick_until(first + 55 * MINUTE, step=5 * MINUTE)
    assert mine.somebody.told == []
    mine.tick_until(first + HOUR + 2 * MINUTE)
    assert mine.somebody.titles == ["db: no fresh backup"]


def test_a_failure_is_told_once_with_what_to_do_and_so_is_the_recovery(tmp_path: Path) -> None:
    mine = host(tmp_path, policy(every=DAY, overdue_after=3 * DAY))
    for _ in range(8):
        mine.run_due(failing_with(NoSpaceError("the store is full", remedy="prune")))
        mine.look()
        mine.lab.clock.sleep(HOUR)
    assert mine.somebody.titles == ["db: backup failed"]
    assert "the store is full" in mine.somebody.told[0][1].body
    assert "What to do: " in mine.somebody.told[0][1].body
    mine.lab.clock.sleep(DAY)
    mine.run_due()
    assert len(mine.lab.store.snapshots("db")) == 1
    mine.look()
    mine.tick_until(mine.lab.clock.now() + HOUR, step=5 * MINUTE)
    assert mine.somebody.titles == ["db: backup failed", "db: recovered"]


def test_a_failure_of_a_real_run_is_told_with_its_own_remedy(tmp_path: Path) -> None:
    mine = host(tmp_path, policy(overdue_after=3 * DAY))
    guest = mine.lab.host.machines["db"].guest
    assert guest is not None
    guest.clusters[0].stop_fails = True
    mine.run_due()
    mine.look()
    assert mine.somebody.titles == ["db: backup failed"]
    history = mine.lab.process().history.runs(guest="db", limit=1)
    mine.lab.end()
    assert history[0].result is not None
    assert history[0].result.remedy
    assert f"What to do: {history[0].result.remedy[:100]}" in mine.somebody.told[0][1].body


def test_reminders_come_as_long_as_it_lasts(tmp_path: Path) -> None:
    mine = host(tmp_path, policy(overdue_after=30 * DAY), rules=Rules(remind_after=DAY))
    mine.run_due(failing_with(NoSpaceError("full")))
    mine.look()
    mine.tick_until(mine.lab.clock.now() + 3 * DAY + MINUTE, step=30 * MINUTE)
    assert mine.somebody.titles == ["db: backup failed", *["still: db: backup failed"] * 3]


def test_a_hundred_guests_that_fail_are_one_message(tmp_path: Path) -> None:
    names = [f"vm{number:03}" for number in range(100)]
    mine = host(tmp_path, *(policy(name, overdue_after=DAY) for name in names))
    world = mine.lab.process()
    for name in names:
        began = mine.lab.clock.now()
        world.attempts.replace(
            name, failures=(FailedAttempt(began=began, ended=began, exit_code=7, brief="libvirt is down"),)
        )
    mine.lab.end()
    mine.look()
    mine.tick_until(mine.lab.clock.now() + HOUR, step=MINUTE)
    assert mine.somebody.titles == ["vm000: backup failed, and 99 more"]


# Isolation


def breach_of(mine: Host) -> News:
    breach = Breach(at=mine.lab.clock.now(), text="a frame of the clone on br0", remedy="look at the bridge")
    return News(breaches=(("db", breach),))


def test_a_breach_is_told_at_once_and_until_a_snapshot_is_made_again(tmp_path: Path) -> None:
    mine = host(tmp_path, policy(overdue_after=9 * DAY, every=MINUTE))
    mine.run_due(failing_with(NotCleanError("not clean")))
    mine.look()
    mine.look(news=breach_of(mine))
    assert mine.somebody.titles == ["db: backup failed", "db: ISOLATION BREACH"]
    assert "look at the bridge" in mine.somebody.told[1][1].body
    assert mine.lab.state.alarms.load().breaches["db"].count == 1
    mine.lab.clock.sleep(DAY - HOUR)
    mine.run_due()
    mine.look()
    assert mine.somebody.titles[2:] == ["db: recovered"]


def test_a_breach_is_known_even_if_the_process_dies_before_it_could_look(tmp_path: Path) -> None:
    mine = host(tmp_path, policy(overdue_after=9 * DAY))
    news = breach_of(mine)

    def die(*_: object) -> Facts:
        raise ProcessDied

    world = mine.lab.process()
    outlets = Outlets(host="host", channels=mine.somebody)
    lookout = Lookout(die, outlets=outlets, book=mine.lab.state.alarms, locks=world.locks, clock=world.clock)
    with pytest.raises(ProcessDied):
        lookout.look(Subject(policies=mine.policies), news=news, ping=False)
    mine.lab.end()
    mine.look()
    assert mine.somebody.titles == ["db: ISOLATION BREACH"]


# What goes wrong with telling


def test_what_could_not_be_told_is_told_when_it_can_and_nothing_is_pinged_meanwhile(tmp_path: Path) -> None:
    mine = host(tmp_path, policy(overdue_after=9 * DAY))
    mine.look()
    assert len(mine.somebody.pings) == 1
    mine.run_due(failing_with(NoSpaceError("full")))
    mine.somebody.deaf = True
    mine.tick_until(mine.lab.clock.now() + HOUR, step=MINUTE)
    assert len(mine.somebody.pings) == 1
    mine.somebody.deaf = False
    mine.tick_until(mine.lab.clock.now() + HOUR, step=MINUTE)
    assert mine.somebody.titles == ["db: backup failed"]
    assert len(mine.somebody.pings) > 50


def test_what_waits_for_its_turn_does_not_stop_the_pings(tmp_path: Path) -> None:
    mine = host(tmp_path, policy(overdue_after=9 * DAY))
    mine.run_due(failing_with(NoSpaceError("full")))
    mine.look()
    problem = Problem(about="chore: reconcile", error=DriverError("libvirt is gone"))
    mine.look(problem)
    assert (len(mine.somebody.told), len(mine.somebody.pings)) == (1, 2)


def test_only_a_round_pings(tmp_path: Path) -> None:
    mine = host(tmp_path)
    mine.look(ping=False)
    assert mine.somebody.pings == []


def test_a_store_that_is_gone_is_a_problem_and_no_recovery(tmp_path: Path) -> None:
    mine = host(tmp_path, policy(overdue_after=9 * DAY))
    mine.run_due(failing_with(NoSpaceError("full")))
    mine.look()
    pings = len(mine.somebody.pings)

    def blind(_subject: Subject, _ledger: Ledger) -> Facts:
        world = mine.lab.process()

        def gone() -> tuple[str, ...]:
            raise DriverError("the store is gone", remedy="mount it")

        world.store.guests = gone  # type: ignore[method-assign]
        try:
            return gather(world, policies=mine.policies, ledger=Ledger(), stock=Stock(world), room=lambda: None)
        finally:
            del world.store.guests

    mine.lab.clock.sleep(HOUR)
    world = mine.lab.process()
    outlets = Outlets(host="host", channels=mine.somebody, ping=Pinger(mine.somebody))
    lookout = Lookout(blind, outlets=outlets, book=mine.lab.state.alarms, locks=world.locks, clock=world.clock)
    assert lookout.look(Subject(policies=mine.policies), news=News(), ping=True)
    mine.lab.end()
    assert mine.somebody.titles == ["db: backup failed", "this host: cannot be looked after"]
    assert len(mine.somebody.pings) == pings
    mine.lab.clock.sleep(HOUR)
    mine.look()
    assert mine.somebody.titles[2:] == ["this host: recovered"]


def test_a_policy_file_that_is_wrong_is_told_and_its_guest_stays_known(tmp_path: Path) -> None:
    mine = host(tmp_path, policy(every=DAY))
    first = mine.lab.clock.now()
    mine.look()
    problem = Problem(about="policy: db.toml", guest="db", error=ConfigError("db.toml:1: wrong", remedy="correct it"))
    policies, mine.policies = mine.policies, ()
    mine.lab.clock.sleep(10 * MINUTE)
    mine.look(problem)
    assert mine.somebody.titles == ["db: cannot be looked after"]
    mine.policies = policies
    mine.tick_until(first + HOUR + 2 * MINUTE)
    assert mine.somebody.titles[1:] == ["db: recovered", "db: no fresh backup"]


class Unwritable:
    """A book of alarms on a full disk."""

    def __init__(self, book: AlarmBook) -> None:
        self._book = book

    def load(self) -> Ledger:
        return self._book.load()

    def replace(self, ledger: Ledger) -> None:
        raise NoSpaceError("no space left")


def test_a_full_disk_makes_no_storm_and_no_ping(tmp_path: Path) -> None:
    mine = host(tmp_path, policy(overdue_after=9 * DAY))
    mine.run_due(failing_with(NoSpaceError("full")))
    lookout = mine.lookout(mine.lab.process(), book=Unwritable(mine.lab.state.alarms))
    for _ in range(60):
        lookout.look(Subject(policies=mine.policies), news=News(), ping=True)
        mine.lab.clock.sleep(MINUTE)
    assert mine.somebody.titles == ["db: backup failed"]
    assert mine.somebody.pings == []


def test_while_one_process_tells_another_does_not_tell_the_same(tmp_path: Path) -> None:
    mine = host(tmp_path, policy(overdue_after=9 * DAY))
    mine.run_due(failing_with(NoSpaceError("full")))
    world = mine.lab.process()
    other = mine.lookout(world)

    def meanwhile() -> None:
        mine.somebody.while_sending = lambda: None
        assert other.look(Subject(policies=mine.policies), news=News(), ping=False)

    mine.somebody.while_sending = meanwhile
    mine.lookout(world).look(Subject(policies=mine.policies), news=News(), ping=False)
    mine.lab.end()
    assert mine.somebody.titles == ["db: backup failed"]
    assert all(item.told is not None for item in mine.lab.state.alarms.load().raised)


def test_a_ledger_that_another_process_holds_for_long_is_left_to_it(tmp_path: Path) -> None:
    mine = host(tmp_path)
    world = mine.lab.process()
    lookout = mine.lookout(world)
    with world.locks.alarms():
        assert not lookout.look(Subject(policies=mine.policies), news=News(), ping=True)
    assert lookout.look(Subject(policies=mine.policies), news=News(), ping=True)
    assert len(mine.somebody.pings) == 1


@pytest.mark.parametrize("mode", [*Mode], ids=lambda mode: mode.replace(" ", "-"))
def test_whatever_happens_at_any_call_it_is_told_and_not_twice_at_once(tmp_path: Path, mode: Mode) -> None:
    """A look goes wrong at each call in turn; later looks, by other processes, tell what is to be told."""
    calls = 0
    number = 0
    while number <= calls:
        mine = host(tmp_path / str(number), policy(overdue_after=9 * DAY))
        mine.run_due(failing_with(NoSpaceError("full")))
        faults = Faults(Fault(call=number, mode=mode), on_death=mine.lab.state.die)
        world = mine.lab.process(faults)
        lookout = mine.lookout(
            world,
            book=faults.wrap(mine.lab.state.alarms, name="alarms"),
            channels=faults.wrap(mine.somebody, name="channels"),
        )
        died = False
        try:
            lookout.look(Subject(policies=mine.policies), news=News(), ping=False)
        except ProcessDied:
            died = True
        except (VmsnapError, RuntimeError):
            pass  # the monitor's thread logs it
        assert died == (mode in DEATHS and bool(faults.hit))
        calls = max(calls, len(faults.calls))
        faults.end()
        mine.lab.end()
        mine.tick_until(mine.lab.clock.now() + HOUR, step=MINUTE)
        moments = [when for when, message in mine.somebody.told if "db: backup failed" in message.title]
        assert 1 <= len(moments) <= 2, (number, faults.hit)
        assert len(moments) == 1 or moments[1] - moments[0] >= mine.rules.at_most_every
        number += 1
    assert calls > 8


# What is gathered


def gathered(mine: Host, ledger: Ledger | None = None) -> Facts:
    world = mine.lab.process()
    try:
        return gather(world, policies=mine.policies, ledger=ledger or Ledger(), stock=Stock(world), room=lambda: None)
    finally:
        mine.lab.end()


def test_what_is_stored_is_gathered(tmp_path: Path) -> None:
    mine = host(tmp_path, policy(every=6 * HOUR), policy("other", enabled=False))
    mine.run_due()
    world = mine.lab.process()
    (snapshot,) = world.store.snapshots("db")
    now = mine.lab.clock.now()
    check = Verification(at=now, blocks=1, bad_blocks=0)
    world.store.mark(snapshot, marks=snapshot.marks.model_copy(update={"verification": check}))
    for name, expires in (("a", now), ("b", now + DAY), ("c", None)):
        world.book.add(
            Environment(
                name=name,
                run=RunId("00000000aa"),
                guest="db",
                snapshot=snapshot.id,
                created=now,
                expires=expires,
                network="x",
            )
        )
    mine.lab.end()
    facts = gathered(mine)
    db, other = facts.guests
    assert (facts.unseen, facts.problems) == (frozenset(), ())
    assert (db.snapshots, db.verified, db.damaged, db.running) == (1, now, 0, False)
    assert db.newest is not None
    assert db.newest.id == snapshot.id
    assert db.due is not None
    assert db.due.at == snapshot.manifest.captured + 6 * HOUR
    assert db.last is not None
    assert db.last.result is not None
    assert {step.name for step in db.last.steps} >= {"capture", "drain", "store", "prune"}
    assert db.pruned == db.last.ended
    assert (db.environments, db.environments_expired) == (3, 1)
    assert (other.due, other.expected, other.watched) == (None, None, False)
    later = gathered(mine, Ledger(pruned={"": now + DAY})).guests[0]
    assert later.pruned == now + DAY


def test_damage_that_verification_found_is_gathered(tmp_path: Path) -> None:
    mine = host(tmp_path)
    mine.run_due()
    world = mine.lab.process()
    (snapshot,) = world.store.snapshots("db")
    check = Verification(at=mine.lab.clock.now(), blocks=9, bad_blocks=2)
    world.store.mark(snapshot, marks=snapshot.marks.model_copy(update={"verification": check}))
    mine.lab.end()
    assert (gathered(mine).guests[0].damaged, gathered(mine).guests[0].verified) == (1, None)
    mine.look()
    assert mine.somebody.titles == ["db: damaged snapshots"]


def test_a_backup_that_goes_on_is_seen(tmp_path: Path) -> None:
    mine = host(tmp_path)
    world = mine.lab.process()
    world.journals.begin(RunId("00000000aa"), kind=RunKind.BACKUP, guest="db", at=world.clock.now())
    assert (
        gather(world, policies=mine.policies, ledger=Ledger(), stock=Stock(world), room=lambda: None).guests[0].running
    )
    mine.lab.end()
    assert not gathered(mine).guests[0].running


def test_manifests_are_read_again_only_where_something_changed(tmp_path: Path) -> None:
    mine = host(tmp_path, policy(every=MINUTE))
    mine.run_due()
    faults = Faults()
    world = mine.lab.process(faults)
    stock = Stock(world, every=5 * MINUTE)

    def reads() -> int:
        before = sum(call.name == "store.snapshots" for call in faults.calls)
        facts = gather(world, policies=mine.policies, ledger=Ledger(), stock=stock, room=lambda: None)
        assert facts.guests[0].newest == mine.lab.store.snapshots("db")[-1]
        assert facts.guests[0].snapshots == len(mine.lab.store.snapshots("db"))
        return sum(call.name == "store.snapshots" for call in faults.calls) - before

    assert [reads(), reads()] == [1, 0]
    mine.lab.end()
    mine.lab.clock.sleep(2 * MINUTE)
    mine.run_due()
    world = mine.lab.process(faults)
    assert [reads(), reads()] == [1, 0]
    mine.lab.clock.sleep(5 * MINUTE)
    assert [reads(), reads()] == [1, 0]
    mine.lab.end()


def test_a_guest_without_a_policy_that_has_snapshots_is_shown(tmp_path: Path) -> None:
    mine = host(tmp_path)
    mine.run_due()
    mine.policies = ()
    (facts,) = gathered(mine).guests
    assert (facts.guest, facts.policy, facts.snapshots) == ("db", None, 1)


def test_the_room_for_overlays_is_that_of_guests_that_can_be_described(tmp_path: Path) -> None:
    mine = host(tmp_path)
    found = overlay_room(mine.lab.process(), policies=(policy(), policy("ghost")))
    assert list(found) == ["db"]
    assert found["db"] > 0
