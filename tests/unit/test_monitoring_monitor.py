"""The monitor's thread: it hears, looks and ends, and nothing that hangs or fails in it holds up whoever it hears from."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from ipaddress import IPv4Address
from pathlib import Path
from urllib.request import urlopen

import pytest

from tests.unit.listener import Listener, listening, threads_ended
from vmsnap.errors import ConfigError, DriverError, IsolationError, PreconditionError, ToolError, VmsnapError
from vmsnap.model.alarms import Ledger
from vmsnap.model.due import DueEntry, Outcome
from vmsnap.model.facts import Facts, GuestFacts, chore_problem
from vmsnap.model.policy import Policy
from vmsnap.model.schedule import FailedAttempt
from vmsnap.monitoring.channels import Channels
from vmsnap.monitoring.exposition import Endpoint, Shelf
from vmsnap.monitoring.lookout import Lookout, Outlets, Subject
from vmsnap.monitoring.monitor import Monitor
from vmsnap.monitoring.ping import DeadManPing
from vmsnap.monitoring.probe import Probe
from vmsnap.ports.observer import ChoreDone, Tick
from vmsnap.state.alarms import FileAlarmBook
from vmsnap.state.clock import SystemClock
from vmsnap.state.locks import FileLocks

SECOND = timedelta(seconds=1)
DB = Policy(guest="db")
CLOCK = SystemClock()
IPV4 = IPv4Address("127.0.0.1")


def until(true: Callable[[], bool], *, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


@dataclass
class Scene:
    """A monitor over files, with a real listener for notifications and pings, and facts that a test decides on."""

    state: Path
    listener: Listener
    failing: set[str] = field(default_factory=set)
    seen: list[Subject] = field(default_factory=list)
    look: Callable[[], None] = lambda: None
    timeout: timedelta = 5 * SECOND

    def gather(self, subject: Subject, ledger: Ledger) -> Facts:
        del ledger
        self.seen.append(subject)
        self.look()
        now = CLOCK.now()
        failed = (FailedAttempt(began=now, ended=now, exit_code=7, brief="no agent"),)
        guests = (
            GuestFacts(guest=policy.guest, policy=policy, failures=failed if policy.guest in self.failing else ())
            for policy in subject.policies
        )
        return Facts(at=now, guests=tuple(guests))

    def monitor(self, *, listen: Callable[[Shelf], Endpoint] | None = None) -> Monitor:
        outlets = Outlets(
            host="host",
            channels=Channels([self.listener.url()], timeout=self.timeout),
            ping=DeadManPing(self.listener.ping_url(), method="GET", timeout=self.timeout),
        )
        locks = FileLocks(self.state, clock=CLOCK)
        lookout = Lookout(self.gather, outlets=outlets, book=FileAlarmBook(self.state), locks=locks, clock=CLOCK)
        return Monitor(lookout, subject=lambda: Subject(policies=(DB,)), clock=CLOCK, listen=listen)

    @property
    def titles(self) -> list[str]:
        return [message["title"] for message in self.listener.messages]


@pytest.fixture(autouse=True)
def _no_thread_goes_on() -> Iterator[None]:
    with threads_ended():
        yield


@pytest.fixture
def scene(tmp_path: Path, _no_thread_goes_on: None) -> Iterator[Scene]:
    with listening() as listener:
        yield Scene(state=tmp_path / "state", listener=listener)
        listener.freed.set()


def tick(*policies: Policy, problems: tuple[VmsnapError, ...] = ()) -> Tick:
    return Tick(at=CLOCK.now(), policies=policies or (DB,), entries=(), running=(), problems=problems)


def test_each_tick_is_a_look_and_a_ping(scene: Scene) -> None:
    monitor = scene.monitor()
    monitor.start()
    monitor.ticked(tick())
    until(lambda: len(scene.listener.pings) == 1)
    scene.failing = {"db"}
    monitor.ticked(tick())
    until(lambda: len(scene.listener.pings) == 2)
    assert scene.titles == ["vmsnap on host: db: backup failed"]
    monitor.close()
    assert scene.seen[0].policies == (DB,)


def test_a_run_that_ends_is_looked_at_without_a_tick(scene: Scene) -> None:
    monitor = scene.monitor()
    monitor.start()
    scene.failing = {"db"}
    monitor.run_ended(DueEntry(guest="db", outcome=Outcome.FAILED, error=ToolError("no agent")))
    until(lambda: bool(scene.titles))
    monitor.close()
    assert scene.listener.pings == []


def test_a_breach_is_heard(scene: Scene) -> None:
    monitor = scene.monitor()
    monitor.start()
    error = IsolationError("a frame of the clone on br0", remedy="look at br0")
    monitor.run_ended(DueEntry(guest="db", outcome=Outcome.FAILED, error=error))
    until(lambda: bool(scene.titles))
    monitor.ticked(tick())
    until(lambda: len(scene.listener.pings) == 1)
    monitor.close()
    assert scene.titles == ["vmsnap on host: db: ISOLATION BREACH"]
    assert "look at br0" in scene.listener.messages[0]["message"]
    assert FileAlarmBook(scene.state).load().breaches["db"].count == 1


def test_what_is_wrong_by_a_chore_is_a_problem_for_as_long_as_ticks_say_so(scene: Scene) -> None:
    monitor = scene.monitor()
    monitor.start()
    wrong = chore_problem("reconcile", guest="", error=DriverError("libvirt is gone", remedy="start it"))
    pruned = CLOCK.now()
    monitor.chore_done(ChoreDone(name="prune", at=pruned, guest="db"))
    monitor.chore_done(ChoreDone(name="prune", at=CLOCK.now(), guest="x", error=DriverError("stuck")))
    monitor.chore_done(ChoreDone(name="prune", at=CLOCK.now(), whole=False))
    monitor.ticked(replace(tick(problems=(ConfigError("x.toml:1: wrong"),)), chores=(wrong,)))
    until(lambda: bool(scene.titles))
    assert scene.titles == ["vmsnap on host: this host: cannot be looked after"]
    body = scene.listener.messages[0]["message"]
    assert "libvirt is gone" in body
    assert "start it" in body
    assert "x.toml:1" in body
    book = FileAlarmBook(scene.state)
    monitor.ticked(tick())
    until(lambda: len(scene.listener.pings) == 2)
    assert {item.alarm.about for item in book.load().raised if item.over is None} == {"chore: reconcile"}
    monitor.ticked(replace(tick(), heard=frozenset({"reconcile"})))
    until(lambda: all(item.over is not None for item in book.load().raised))
    assert book.load().pruned == {"db": pruned}
    monitor.close()


def test_a_policy_that_was_refused_is_its_guests_problem(scene: Scene) -> None:
    monitor = scene.monitor()
    monitor.start()
    error = ConfigError("new.toml:1: wrong", remedy="correct it")
    refused = DueEntry(guest="new", outcome=Outcome.FAILED, error=error)
    monitor.ticked(Tick(at=CLOCK.now(), policies=(DB,), entries=(refused,), running=(), problems=(error,)))
    until(lambda: bool(scene.titles))
    monitor.close()
    assert scene.titles == ["vmsnap on host: new: cannot be looked after"]
    assert set(FileAlarmBook(scene.state).load().known) == {"db", "new"}


def test_what_hangs_holds_up_neither_ticks_nor_runs_nor_the_end(scene: Scene) -> None:
    free = threading.Event()

    def hang() -> None:
        free.wait(30)

    scene.look = hang
    monitor = scene.monitor()
    began = time.monotonic()
    monitor.start()
    for _ in range(100):
        monitor.ticked(tick())
        monitor.run_ended(DueEntry(guest="db", outcome=Outcome.DONE))
    assert time.monotonic() - began < 1
    monitor.close()
    assert time.monotonic() - began < 3
    free.set()


def test_a_notifier_that_hangs_does_not_keep_a_command(scene: Scene) -> None:
    scene.failing = {"db"}
    scene.listener.hangs.set()
    monitor = scene.monitor()
    began = time.monotonic()
    monitor.start()
    monitor.heard("db", error=ToolError("no agent"))
    monitor.conclude(healthy=True, patience=SECOND / 2)
    assert time.monotonic() - began < 3


def test_a_command_ends_with_a_look_and_pings_only_if_it_went_well(scene: Scene) -> None:
    monitor = scene.monitor()
    monitor.start()
    monitor.conclude(healthy=False, patience=10 * SECOND)
    assert (len(scene.seen), scene.listener.pings) == (1, [])
    monitor = scene.monitor()
    monitor.start()
    monitor.conclude(healthy=True, patience=10 * SECOND)
    assert (len(scene.seen), len(scene.listener.pings)) == (2, 1)


@pytest.mark.parametrize("error", [PreconditionError("the state cannot be read"), RuntimeError("a bug")])
def test_a_look_that_fails_is_logged_and_the_next_one_works(
    scene: Scene, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        scene.look = lambda: None
        raise error

    scene.look = fail
    monitor = scene.monitor()
    monitor.start()
    breach = IsolationError("a frame")
    monitor.heard("db", error=breach)
    until(lambda: str(error) in caplog.text)
    assert scene.listener.pings == []
    monitor.ticked(tick())
    until(lambda: len(scene.listener.pings) == 1)
    monitor.close()
    assert scene.titles == ["vmsnap on host: db: ISOLATION BREACH"]


def test_prometheus_is_answered_and_a_port_that_is_taken_is_tried_again(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    ports: list[int] = []
    taken = [True, True]

    def listen(shelf: Shelf) -> Endpoint:
        if taken:
            taken.pop()
            raise PreconditionError("cannot listen", remedy="give another port")
        opened = Endpoint(IPV4, port=0, shelf=shelf)
        ports.append(opened.port)
        return opened

    monitor = scene.monitor(listen=listen)
    monitor.start()
    monitor.ticked(tick())
    assert ports == []
    monitor.ticked(tick())
    monitor.ticked(tick())
    assert len(ports) == 1
    until(lambda: bool(scene.listener.pings))
    with urlopen(f"http://127.0.0.1:{ports[0]}/metrics", timeout=10) as answer:
        assert b'vmsnap_guest_enabled{guest="db"} 1.0' in answer.read()
    monitor.close()
    assert caplog.text.count("cannot listen") == 1
    with pytest.raises(OSError, match="refused"):
        urlopen(f"http://127.0.0.1:{ports[0]}/metrics", timeout=10)


def test_closing_what_never_began_is_no_error(scene: Scene) -> None:
    scene.monitor().close()


def test_restarts_repeat_nothing(scene: Scene) -> None:
    scene.failing = {"db"}
    for number in range(1, 6):
        monitor = scene.monitor()
        monitor.start()
        monitor.ticked(tick())
        until(lambda: len(scene.listener.pings) == number)  # noqa: B023 - used at once
        monitor.close()
    assert len(scene.titles) == 1


# A look that may hang


def test_a_probe_that_hangs_keeps_nobody_waiting_and_is_not_begun_twice() -> None:
    free = threading.Event()
    began: list[int] = []

    def look() -> Mapping[str, int]:
        began.append(1)
        free.wait(30)
        return {"db": 5}

    probe = Probe(look, every=timedelta(0))
    for _ in range(3):
        assert probe.seen(patience=timedelta(0)) == {}
    until(lambda: bool(began))
    assert len(began) == 1
    free.set()
    assert probe.seen(patience=10 * SECOND) == {"db": 5}


def test_a_probe_looks_seldom_and_forgets_what_it_can_no_longer_see(caplog: pytest.LogCaptureFixture) -> None:
    answers: list[Mapping[str, int] | Exception] = [{"db": 1}, RuntimeError("libvirt is gone")]

    def look() -> Mapping[str, int]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    seldom = Probe(look, every=timedelta(hours=1))
    assert seldom.seen(patience=10 * SECOND) == seldom.seen(patience=10 * SECOND) == {"db": 1}
    often = Probe(look, every=timedelta(0))
    with caplog.at_level(logging.INFO, logger="vmsnap.monitoring.probe"):
        assert often.seen(patience=10 * SECOND) == {}
    assert "libvirt is gone" in caplog.text
