"""What every implementation of the ports in ``vmsnap.ports.state`` must do.

A test module subclasses ``StateContract`` and gives it a fixture ``world``.
"""
# ruff: noqa: S101, D102 - this module is a test suite; its tests are named by sentences

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from typing import Protocol

import pytest

from vmsnap.errors import BugError, BusyError, DriverError, EnvironmentNotFoundError, PreconditionError
from vmsnap.model.admission import HostMemory, Place
from vmsnap.model.environment import Environment
from vmsnap.model.ids import RunId, SnapshotId
from vmsnap.model.isolation import Exchange, Rung
from vmsnap.model.journal import Resource, ResourceKind, RunKind, RunRecord
from vmsnap.model.schedule import FailedAttempt
from vmsnap.ports.state import Admissions, AttemptBook, EnvironmentBook, Exchanges, Journals, Locks, RungMemory

AT = datetime(2026, 11, 21, 2, 0, tzinfo=UTC)
HOUR = timedelta(hours=1)
ONE = RunId("00000000a1")
TWO = RunId("00000000b2")
HARD_NAMES = (
    "db",
    "two words",
    "../../etc/passwd",
    "a/b",
    ".hidden",
    "..",
    "qu\"ote's",
    "new\nline",
    "<name>&amp;</name>",
    "datenb\N{LATIN SMALL LETTER A WITH DIAERESIS}nk",
    "\N{SNOWMAN}" * 80,
    "x" * 255,
)


class StateWorld(Protocol):
    """One state directory, seen from a living process."""

    @property
    def journals(self) -> Journals:
        """Return the journals."""

    @property
    def locks(self) -> Locks:
        """Return the locks."""

    @property
    def environments(self) -> EnvironmentBook:
        """Return the book of environments."""

    @property
    def exchanges(self) -> Exchanges:
        """Return the DHCP exchanges."""

    @property
    def attempts(self) -> AttemptBook:
        """Return the book of attempts."""

    @property
    def admissions(self) -> Admissions:
        """Return the places for clones, of which there are four."""

    @property
    def rungs(self) -> RungMemory:
        """Return the memory of rungs."""

    def run_and_die(self, work: Callable[[StateWorld], None]) -> None:
        """Do the work in a process that is then killed, without any of its code running again."""


def resource(kind: ResourceKind, *, name: str, run: RunId = ONE, detail: str = "") -> Resource:
    """Return a resource for tests."""
    return Resource(kind=kind, run=run, guest="db", name=name, detail=detail)


def environment(name: str) -> Environment:
    """Return an environment for tests."""
    return Environment(
        name=name,
        run=ONE,
        guest="db",
        snapshot=SnapshotId(TWO),
        created=AT,
        expires=AT + timedelta(days=1),
        network=None,
    )


def only(records: tuple[RunRecord, ...]) -> RunRecord:
    """Return the one record there is."""
    assert len(records) == 1
    return records[0]


def exchange(mac: str) -> Exchange:
    """Return an exchange for tests."""
    return Exchange(
        mac=mac,
        address=IPv4Address("192.0.2.7"),
        server=IPv4Address("192.0.2.1"),
        xid=0xFFFFFFFF,
        seen=AT,
        nonce=bytes(range(16)),
        client="dhcpcd-9.4.1:Linux",
        vlan=100,
    )


class StateContract:
    """Tests of journals, locks and environments together: they share one notion of a process."""

    def test_nothing_is_known_at_first(self, world: StateWorld) -> None:
        assert world.journals.records() == ()
        assert world.environments.all() == ()

    def test_what_is_intended_is_unreleased_in_order(self, world: StateWorld) -> None:
        journal = world.journals.begin(ONE, kind=RunKind.BACKUP, guest="db", at=AT)
        memory = resource(ResourceKind.MEMORY, name="m", detail='{"size": 1}\n"x"')
        fence = resource(ResourceKind.FENCE, name="f")
        clone = resource(ResourceKind.CLONE, name="c")
        for item in (memory, fence, clone):
            journal.intend(item)
        journal.released(fence)
        journal.state("captured")
        record = only(world.journals.records())
        assert record == RunRecord(
            run=ONE,
            kind=RunKind.BACKUP,
            guest="db",
            started=AT,
            alive=True,
            kept_for=None,
            closed=False,
            unreleased=(memory, clone),
            state="captured",
        )
        journal.close()

    def test_intending_again_replaces_the_detail_only(self, world: StateWorld) -> None:
        journal = world.journals.begin(ONE, kind=RunKind.BACKUP, guest="db", at=AT)
        journal.intend(resource(ResourceKind.CLONE, name="c"))
        journal.intend(resource(ResourceKind.FENCE, name="f"))
        journal.intend(resource(ResourceKind.CLONE, name="c", detail="more"))
        journal.close()
        unreleased = only(world.journals.records()).unreleased
        assert [(item.name, item.detail) for item in unreleased] == [("c", "more"), ("f", "")]

    def test_releasing_what_was_never_intended_is_no_error(self, world: StateWorld) -> None:
        journal = world.journals.begin(ONE, kind=RunKind.BACKUP, guest="db", at=AT)
        journal.released(resource(ResourceKind.CLONE, name="c"))
        journal.close()
        assert only(world.journals.records()).unreleased == ()

    def test_closing_without_finishing_leaves_a_dead_run(self, world: StateWorld) -> None:
        journal = world.journals.begin(ONE, kind=RunKind.PROVISION, guest="db", at=AT)
        journal.close()
        journal.close()
        record = only(world.journals.records())
        assert (record.alive, record.closed, record.kind) == (False, False, RunKind.PROVISION)

    def test_a_finished_run_is_closed(self, world: StateWorld) -> None:
        journal = world.journals.begin(ONE, kind=RunKind.BACKUP, guest="db", at=AT)
        clone = resource(ResourceKind.CLONE, name="c")
        journal.intend(clone)
        journal.released(clone)
        journal.finish()
        journal.close()
        record = only(world.journals.records())
        assert record.closed
        assert not record.alive

    def test_a_run_that_left_something_cannot_finish(self, world: StateWorld) -> None:
        journal = world.journals.begin(ONE, kind=RunKind.BACKUP, guest="db", at=AT)
        journal.intend(resource(ResourceKind.CLONE, name="the-clone"))
        with pytest.raises(BugError, match="the-clone"):
            journal.finish()
        journal.close()
        assert not only(world.journals.records()).closed

    def test_a_closed_journal_takes_nothing(self, world: StateWorld) -> None:
        journal = world.journals.begin(ONE, kind=RunKind.BACKUP, guest="db", at=AT)
        journal.close()
        with pytest.raises(BugError):
            journal.state("captured")

    def test_keeping_and_no_longer_keeping(self, world: StateWorld) -> None:
        journal = world.journals.begin(ONE, kind=RunKind.PROVISION, guest="db", at=AT)
        journal.keep("test env")
        journal.close()
        assert only(world.journals.records()).kept_for == "test env"
        again = world.journals.reopen(ONE)
        again.unkeep()
        again.close()
        assert only(world.journals.records()).kept_for is None

    def test_finishing_ends_the_keeping(self, world: StateWorld) -> None:
        journal = world.journals.begin(ONE, kind=RunKind.PROVISION, guest="db", at=AT)
        journal.keep("env")
        journal.finish()
        journal.close()
        record = only(world.journals.records())
        assert (record.closed, record.kept_for) == (True, None)

    def test_a_run_begins_once(self, world: StateWorld) -> None:
        journal = world.journals.begin(ONE, kind=RunKind.BACKUP, guest="db", at=AT)
        with pytest.raises(BugError):
            world.journals.begin(ONE, kind=RunKind.BACKUP, guest="db", at=AT)
        journal.close()

    def test_a_run_needs_a_run_id(self, world: StateWorld) -> None:
        with pytest.raises(BugError):
            world.journals.begin(RunId("../../tmp/x"), kind=RunKind.BACKUP, guest="db", at=AT)
        with pytest.raises(BugError):
            world.journals.reopen(RunId(""))

    def test_records_are_oldest_first(self, world: StateWorld) -> None:
        world.journals.begin(ONE, kind=RunKind.BACKUP, guest="db", at=AT).close()
        world.journals.begin(TWO, kind=RunKind.BACKUP, guest="db", at=AT - timedelta(minutes=1)).close()
        assert [record.run for record in world.journals.records()] == [TWO, ONE]

    def test_a_living_run_is_not_taken_over(self, world: StateWorld) -> None:
        journal = world.journals.begin(ONE, kind=RunKind.BACKUP, guest="db", at=AT)
        with pytest.raises(BusyError, match=ONE):
            world.journals.reopen(ONE)
        journal.close()
        again = world.journals.reopen(ONE)
        assert again.run == ONE
        assert only(world.journals.records()).alive
        with pytest.raises(BusyError):
            world.journals.reopen(ONE)
        again.close()

    def test_an_unknown_run_is_not_taken_over(self, world: StateWorld) -> None:
        with pytest.raises(PreconditionError, match=TWO):
            world.journals.reopen(TWO)

    @pytest.mark.parametrize("name", HARD_NAMES)
    def test_any_name_of_a_guest_comes_back(self, world: StateWorld, name: str) -> None:
        journal = world.journals.begin(ONE, kind=RunKind.BACKUP, guest=name, at=AT)
        item = Resource(kind=ResourceKind.CLONE, run=ONE, guest=name, name=name, detail=name)
        journal.intend(item)
        journal.close()
        record = only(world.journals.records())
        assert (record.guest, record.unreleased) == (name, (item,))

    def test_death_frees_the_run_and_keeps_what_was_written(self, world: StateWorld) -> None:
        def work(mine: StateWorld) -> None:
            journal = mine.journals.begin(ONE, kind=RunKind.BACKUP, guest="db", at=AT)
            journal.intend(resource(ResourceKind.CLONE, name="c"))

        world.run_and_die(work)
        record = only(world.journals.records())
        assert (record.alive, record.closed) == (False, False)
        journal = world.journals.reopen(ONE)
        journal.released(resource(ResourceKind.CLONE, name="c"))
        journal.finish()
        journal.close()
        assert only(world.journals.records()).closed

    def test_death_frees_locks(self, world: StateWorld) -> None:
        held = []  # a forgotten context manager would free its lock before the death does

        def work(mine: StateWorld) -> None:
            held.extend([mine.locks.guest("db", purpose="backup"), mine.locks.reconcile()])
            for lock in held:
                lock.__enter__()
            with pytest.raises(BusyError), mine.locks.guest("db", purpose="backup"):
                pytest.fail("held twice")

        world.run_and_die(work)
        with world.locks.guest("db", purpose="provision"), world.locks.reconcile():
            pass

    def test_death_keeps_environments(self, world: StateWorld) -> None:
        world.run_and_die(lambda mine: mine.environments.add(environment("kept")))
        assert world.environments.all() == (environment("kept"),)

    def test_a_guest_is_held_once_and_the_message_says_what_for(self, world: StateWorld) -> None:
        with (
            world.locks.guest("db", purpose="backup of tonight"),
            pytest.raises(BusyError, match=r"guest 'db' is held by .*backup of tonight"),
            world.locks.guest("db", purpose="provision"),
        ):
            pytest.fail("held twice")
        with world.locks.guest("db", purpose="provision"):
            pass

    def test_other_guests_are_free_meanwhile(self, world: StateWorld) -> None:
        with (
            world.locks.guest("a/b", purpose="backup"),
            world.locks.guest("a", purpose="backup"),
            world.locks.guest("a%2Fb", purpose="backup"),
            world.locks.reconcile(),
        ):
            pass

    def test_an_error_inside_frees_the_lock(self, world: StateWorld) -> None:
        with pytest.raises(KeyError), world.locks.guest("db", purpose="backup"):
            raise KeyError
        with world.locks.guest("db", purpose="backup"):
            pass

    def test_one_reconcile_at_a_time(self, world: StateWorld) -> None:
        with world.locks.reconcile(), pytest.raises(BusyError), world.locks.reconcile():
            pytest.fail("held twice")

    def test_due_runs_are_started_by_one_process_at_a_time(self, world: StateWorld) -> None:
        with (
            world.locks.schedule(),
            world.locks.reconcile(),
            world.locks.guest("db", purpose="backup"),
            pytest.raises(BusyError, match=r"the starting of due runs is held by .*run --due"),
            world.locks.schedule(),
        ):
            pytest.fail("held twice")
        with world.locks.schedule():
            pass

    def test_there_is_one_daemon_and_it_may_start_due_runs(self, world: StateWorld) -> None:
        with (
            world.locks.daemon(),
            world.locks.schedule(purpose="daemon"),
            pytest.raises(BusyError, match=r"the place of the daemon is held by .* for daemon"),
            world.locks.daemon(),
        ):
            pytest.fail("held twice")
        with world.locks.daemon(), world.locks.schedule():
            pass

    @pytest.mark.parametrize("name", HARD_NAMES)
    def test_any_guests_attempts_come_back(self, world: StateWorld, name: str) -> None:
        died = FailedAttempt(began=AT)
        failed = FailedAttempt(began=AT + HOUR, ended=AT + 2 * HOUR, exit_code=7, brief=f"no {name}\n")
        assert world.attempts.failures(name) == ()
        world.attempts.replace(name, failures=[died])
        world.attempts.replace(name, failures=[died, failed])
        assert world.attempts.failures(name) == (died, failed)
        assert world.attempts.failures(f"{name} ") == ()
        for _ in range(2):
            world.attempts.replace(name, failures=[])
            assert world.attempts.failures(name) == ()

    def test_death_keeps_attempts(self, world: StateWorld) -> None:
        world.run_and_die(lambda mine: mine.attempts.replace("db", failures=[FailedAttempt(began=AT)]))
        assert world.attempts.failures("db") == (FailedAttempt(began=AT),)

    @pytest.mark.parametrize("name", HARD_NAMES)
    def test_any_guest_can_be_held(self, world: StateWorld, name: str) -> None:
        with (
            world.locks.guest(name, purpose="backup"),
            pytest.raises(BusyError),
            world.locks.guest(name, purpose="backup"),
        ):
            pytest.fail("held twice")

    @pytest.mark.parametrize("name", HARD_NAMES)
    def test_an_environment_comes_back_as_it_was(self, world: StateWorld, name: str) -> None:
        world.environments.add(environment(name))
        assert world.environments.get(name) == environment(name)
        assert world.environments.all() == (environment(name),)

    def test_an_environment_without_end_on_a_network(self, world: StateWorld) -> None:
        kept = Environment(
            name="e", run=ONE, guest="db", snapshot=SnapshotId(TWO), created=AT, expires=None, network="default"
        )
        world.environments.add(kept)
        assert world.environments.get("e") == kept

    def test_an_environments_name_is_taken_once(self, world: StateWorld) -> None:
        world.environments.add(environment("e"))
        with pytest.raises(PreconditionError, match="'e' exists already"):
            world.environments.add(environment("e"))

    def test_an_unknown_environment_names_those_that_exist(self, world: StateWorld) -> None:
        world.environments.add(environment("one"))
        with pytest.raises(EnvironmentNotFoundError) as caught:
            world.environments.get("tow")
        assert "'tow'" in caught.value.brief
        assert "'one'" in (caught.value.remedy or "")

    def test_environments_are_listed_by_name_and_forgotten(self, world: StateWorld) -> None:
        for name in ("b", "c", "a"):
            world.environments.add(environment(name))
        assert [item.name for item in world.environments.all()] == ["a", "b", "c"]
        world.environments.remove("b")
        world.environments.remove("b")
        assert [item.name for item in world.environments.all()] == ["a", "c"]
        world.environments.add(environment("b"))

    def test_an_environment_is_replaced(self, world: StateWorld) -> None:
        world.environments.add(environment("e"))
        later = Environment(
            name="e", run=ONE, guest="db", snapshot=SnapshotId(TWO), created=AT, expires=None, network=None
        )
        world.environments.replace(later)
        assert world.environments.all() == (later,)
        with pytest.raises(EnvironmentNotFoundError):
            world.environments.replace(environment("other"))

    def test_a_note_changes_nothing_that_is_known_of_a_run(self, world: StateWorld) -> None:
        journal = world.journals.begin(ONE, kind=RunKind.BACKUP, guest="db", at=AT)
        journal.state("running")
        before = only(world.journals.records())
        journal.note("rung link-flap began\n\N{SNOWMAN}")
        assert only(world.journals.records()) == before
        journal.finish()
        journal.close()
        assert only(world.journals.records()).closed

    def test_the_last_exchange_of_a_nic_comes_back_whatever_the_spelling(self, world: StateWorld) -> None:
        assert world.exchanges.get("52:54:00:aa:00:01") is None
        first = exchange("52:54:00:aa:00:01")
        world.exchanges.put(first)
        world.exchanges.put(exchange("52:54:00:aa:00:02"))
        assert world.exchanges.get("52:54:00:AA:00:01") == first
        plain = replace(first, nonce=None, vlan=None, client="")
        world.exchanges.put(plain)
        assert world.exchanges.get("52-54-00-aa-00-01") == plain
        world.exchanges.forget("52:54:00:AA:00:01")
        world.exchanges.forget("52:54:00:AA:00:01")
        assert world.exchanges.get("52:54:00:aa:00:01") is None
        assert world.exchanges.get("52:54:00:aa:00:02") is not None

    def test_what_is_no_mac_has_no_exchange(self, world: StateWorld) -> None:
        with pytest.raises(BugError):
            world.exchanges.get("../../etc/passwd")
        with pytest.raises(BugError):
            world.exchanges.put(exchange("52:54"))

    @pytest.mark.parametrize("name", HARD_NAMES)
    def test_the_rung_that_worked_last_is_remembered(self, world: StateWorld, name: str) -> None:
        assert world.rungs.recall(name) is None
        for rung in (Rung.LINK_FLAP, Rung.OLD_ADDRESS):
            world.rungs.remember(name, rung=rung)
            assert world.rungs.recall(name) is rung
        assert world.rungs.recall(f"{name} ") is None

    def test_death_keeps_exchanges_and_rungs(self, world: StateWorld) -> None:
        def work(mine: StateWorld) -> None:
            mine.exchanges.put(exchange("52:54:00:aa:00:01"))
            mine.rungs.remember("db", rung=Rung.AGENT)

        world.run_and_die(work)
        assert world.exchanges.get("52:54:00:aa:00:01") == exchange("52:54:00:aa:00:01")
        assert world.rungs.recall("db") is Rung.AGENT

    def test_places_for_clones_are_counted(self, world: StateWorld) -> None:
        with ExitStack() as held:
            for number in range(4):
                held.enter_context(world.admissions.admitted(place(number), look=plenty))
            with pytest.raises(BusyError, match="at most 4"), world.admissions.admitted(place(4), look=plenty):
                pass
        with world.admissions.admitted(place(4), look=plenty):
            pass

    def test_two_clones_are_not_promised_the_same_memory(self, world: StateWorld) -> None:
        def look() -> HostMemory:
            return HostMemory(available_bytes=150)

        def look_again() -> HostMemory:
            return HostMemory(available_bytes=100, taken_bytes={place(1).run: 50})

        with world.admissions.admitted(place(1), look=look):
            with pytest.raises(BusyError, match="promised"), world.admissions.admitted(place(2), look=look):
                pass
            with pytest.raises(BusyError), world.admissions.admitted(place(2), look=look_again):
                pass
        with world.admissions.admitted(place(2), look=look):
            pass

    def test_a_failed_look_takes_no_place(self, world: StateWorld) -> None:
        def fail() -> HostMemory:
            raise DriverError("nobody knows")

        with pytest.raises(DriverError), world.admissions.admitted(place(1), look=fail):
            pass
        with world.admissions.admitted(place(1), look=plenty):
            pass

    def test_death_frees_a_place(self, world: StateWorld) -> None:
        kept: list[ExitStack] = []

        def work(mine: StateWorld) -> None:
            kept.append(ExitStack())
            for number in range(4):
                kept[-1].enter_context(mine.admissions.admitted(place(number), look=plenty))

        world.run_and_die(work)
        with world.admissions.admitted(place(1), look=plenty):
            pass
        for stack in kept:
            stack.pop_all()


def place(number: int) -> Place:
    """Return a place of a hundred bytes."""
    return Place(run=RunId(f"0000000c{number:02x}"), guest=f"db{number}", memory_bytes=100)


def plenty() -> HostMemory:
    """Return a host with memory for all."""
    return HostMemory(available_bytes=1 << 40)
