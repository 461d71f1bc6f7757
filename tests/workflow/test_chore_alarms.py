"""Alarms of the daemon's chores over a fake host: told when they begin, kept over restarts, and over when they are over."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.unit.listener import threads_ended
from tests.workflow.test_alarms import Somebody
from tests.workflow.test_daemon import AtOnce, loaded, policy
from tests.workflow.test_mending import damage_there, read
from tests.workflow.test_replica import Site
from vmsnap.daemon.duties import Duties
from vmsnap.errors import StoreUnreachableError, ToolError
from vmsnap.model.alarms import Ledger
from vmsnap.model.facts import Facts
from vmsnap.model.policy import Policy, ReplicaPolicy, VerifyPolicy
from vmsnap.monitoring.lookout import Lookout, News, Outlets, Subject
from vmsnap.monitoring.monitor import Monitor
from vmsnap.stores.packs.names import PACKS
from vmsnap.testing.world import FakeWorld
from vmsnap.workflow.facts import Stock, gather
from vmsnap.workflow.world import World

MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
ROUND = 6 * MINUTE
BEGUN: list[Monitor] = []


@pytest.fixture(autouse=True)
def _no_thread_goes_on() -> Iterator[None]:
    with threads_ended():
        yield
        for monitor in BEGUN:
            monitor.close()
        BEGUN.clear()


class Line:
    """A replica behind a line that can be cut; it counts what it is asked meanwhile."""

    def __init__(self, replica: Any) -> None:
        self._replica = replica
        self.is_cut = False
        self.asked: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._replica, name)

        def ask(*args: Any, **options: Any) -> Any:
            if self.is_cut and name != "remembered":  # which asks nobody
                self.asked[name] += 1
                raise StoreUnreachableError("the server at s3.example.org did not answer", remedy="look at the server")
            return real(*args, **options)

        return ask


class Watching(Lookout):
    """A lookout that never looks during a tick, and says when it has looked after one: only after those it may ping."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.turn = threading.Lock()
        self.looked = threading.Semaphore(0)

    def look(self, subject: Subject, *, news: News, ping: bool) -> bool:
        with self.turn:
            try:
                return super().look(subject, news=news, ping=ping)
            finally:
                if ping:
                    self.looked.release()


class Scene:
    """A daemon with its monitor, which can be ended and begun again over the same host."""

    def __init__(
        self, lab: FakeWorld, *policies: Policy, change: Callable[[World], World] = lambda world: world
    ) -> None:
        self.lab = lab
        self.policies = policies
        self.change = change
        self.somebody = Somebody(lab)
        for one in policies:
            if one.guest not in lab.host.machines:
                lab.add_guest(one.guest)
        self.start()
        for _ in (*policies, None):
            self.pass_by(MINUTE)
        assert all(lab.store.snapshots(one.guest) for one in policies)

    def start(self) -> None:
        world = self.lab.process()

        def look(subject: Subject, ledger: Ledger) -> Facts:
            return gather(world, policies=subject.policies, ledger=ledger, stock=Stock(world), room=lambda: None)

        self.lookout = Watching(
            look,
            outlets=Outlets(host="host", channels=self.somebody),
            book=self.lab.state.alarms,
            locks=world.locks,
            clock=self.lab.clock,
        )
        self.monitor = Monitor(self.lookout, subject=Subject, clock=self.lab.clock)
        BEGUN.append(self.monitor)
        self.monitor.start()
        self.duties = Duties(
            loaded(*self.policies),
            open_world=lambda _settings: self.change(self.lab.process()),
            observers=(self.monitor,),
            workers=AtOnce(),
            wake=lambda: None,
            monotonic=self.lab.clock.monotonic,
        )
        self.duties.reconcile()

    def end(self) -> None:
        self.monitor.close()
        self.duties.close()
        self.lab.end()

    def restart(self) -> None:
        self.end()
        self.start()

    def pass_by(self, duration: timedelta = ROUND) -> None:
        """A tick, and the look after it. What chores say in it is heard by the next."""
        self.lab.clock.sleep(duration)
        with self.lookout.turn:
            self.duties.tick()
        assert self.lookout.looked.acquire(timeout=20)

    @property
    def titles(self) -> list[str]:
        return self.somebody.titles


def site_of(tmp_path: Path) -> tuple[Site, FakeWorld, Line]:
    site = Site(tmp_path)
    lab = site.host("here")
    line: Any = Line(lab.replica)
    lab.replica = line
    return site, lab, line


def sent(guest: str, **verify: Any) -> Policy:
    return policy(
        guest, every=300 * DAY, replica=ReplicaPolicy(enabled=True), verify=VerifyPolicy(every=None, **verify)
    )


def test_an_outage_of_the_replica_is_one_alarm_and_over_when_it_is_over(tmp_path: Path) -> None:
    _, lab, line = site_of(tmp_path)
    scene = Scene(lab, *(sent(f"vm{number}") for number in range(5)))
    for _ in range(3):
        scene.pass_by()
    assert scene.titles == []
    line.is_cut = True
    for _ in range(6):
        scene.pass_by()
    assert scene.titles == ["this host: cannot be looked after"]
    body = scene.somebody.told[0][1].body
    assert "s3.example.org did not answer (5 guests: vm0, vm1, vm2 and 2 more)" in body
    assert "What to do: look at the server" in body
    assert line.asked["lacking"] <= 6, "once a round, not once a guest"
    line.is_cut = False
    for _ in range(4):
        scene.pass_by()
    assert scene.titles[1:] == ["this host: recovered"]


def test_a_restart_in_an_outage_tells_nothing_twice_and_nothing_wrong(tmp_path: Path) -> None:
    _, lab, line = site_of(tmp_path)
    scene = Scene(lab, sent("vm1"), sent("vm2"))
    line.is_cut = True
    for _ in range(3):
        scene.pass_by()
        scene.pass_by()
        scene.restart()
    assert scene.titles == ["this host: cannot be looked after"]
    line.is_cut = False
    scene.restart()
    for _ in range(3):
        scene.pass_by()
    assert scene.titles[1:] == ["this host: recovered"]


def test_an_outage_that_ended_while_nobody_needs_the_replica_any_more_is_over(tmp_path: Path) -> None:
    _, lab, line = site_of(tmp_path)
    scene = Scene(lab, sent("vm1"))
    line.is_cut = True
    for _ in range(3):
        scene.pass_by()
    scene.duties.use(loaded(policy("vm1", every=300 * DAY)), observers=(scene.monitor,))
    for _ in range(3):
        scene.pass_by()
    assert scene.titles == ["this host: cannot be looked after", "this host: recovered"]


def test_a_command_beside_the_daemon_ends_none_of_its_alarms_and_a_round_without_one_does(tmp_path: Path) -> None:
    _, lab, line = site_of(tmp_path)
    scene = Scene(lab, sent("vm1"))
    line.is_cut = True
    for _ in range(3):
        scene.pass_by()
    scene.end()
    for healthy in (False, False, True):
        lab.clock.sleep(HOUR)
        scene.start()
        scene.monitor.conclude(healthy=healthy, patience=20 * MINUTE)
        scene.duties.close()
        assert scene.titles[1:] == (["this host: recovered"] if healthy else [])


class StuckLock:
    """A world in which the store's lock of one guest is stuck."""

    def __init__(self, guest: str) -> None:
        self.guest: str | None = guest

    def __call__(self, world: World) -> World:
        store, stuck = world.store, self

        class Store:
            def __getattr__(self, name: str) -> Any:
                return getattr(store, name)

            def lock(self, guest: str, *, timeout: timedelta) -> Any:
                if guest == stuck.guest:
                    raise ToolError("the store's lock is stuck")
                return store.lock(guest, timeout=timeout)

        odd: Any = Store()
        return replace(world, store=odd)


def test_what_a_chore_says_of_a_guest_is_over_with_the_pass_that_does_not_say_it_again(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    scene = Scene(lab, policy("a", every=300 * DAY), policy("b", every=300 * DAY))
    stuck = StuckLock("a")
    scene.change = stuck
    scene.duties.use(loaded(*scene.policies), observers=(scene.monitor,))
    for _ in range(3):
        scene.duties.prune()
        scene.pass_by()
    assert scene.titles == ["a: cannot be looked after"]
    stuck.guest = "b"
    scene.duties.prune()
    scene.pass_by()
    assert scene.titles[1:] == ["b: cannot be looked after"]
    assert "Over: a: cannot be looked after" in scene.somebody.told[1][1].body
    scene.duties.use(loaded(scene.policies[0]), observers=(scene.monitor,))  # b's policy is gone
    scene.duties.prune()
    scene.pass_by()
    assert scene.titles[2:] == ["b: recovered"]


def test_damage_at_the_replica_is_wrong_until_somebody_repairs_it_whatever_is_restarted(tmp_path: Path) -> None:
    site, lab, _ = site_of(tmp_path)
    scene = Scene(lab, sent("db", share_per_day=1.0))
    scene.pass_by()
    damage_there(site, PACKS, keep=False)
    scene.pass_by(DAY)
    for _ in range(3):
        scene.duties.verify()
        scene.pass_by()
    scene.restart()
    scene.duties.verify()
    for _ in range(3):
        scene.pass_by()
    assert scene.titles == ["db: cannot be looked after"]
    assert "--replica --repair' repairs it" in scene.somebody.told[0][1].body
    scene.end()
    assert read(lab, replica=True, repair=True).defects == ()
    scene.start()
    scene.duties.verify()
    scene.pass_by()
    assert scene.titles[1:] == ["db: recovered"]


def test_damage_of_a_copy_that_was_removed_there_is_forgotten(tmp_path: Path) -> None:
    site, lab, line = site_of(tmp_path)
    scene = Scene(lab, sent("db", share_per_day=1.0))
    scene.pass_by()
    damage_there(site, PACKS, keep=False)
    scene.pass_by(DAY)
    scene.duties.verify()
    scene.pass_by()
    assert list(lab.state.samples.damaged("db")) == [one.id for one in lab.store.snapshots("db")]
    line.is_cut = True
    scene.duties.verify()
    line.is_cut = False
    scene.pass_by()
    assert lab.state.samples.damaged("db")
    for name in site.names("snapshots/db/"):
        del site.bucket.objects[name]
    scene.duties.verify()
    scene.pass_by()
    assert lab.state.samples.damaged("db") == {}
    assert scene.titles == ["db: cannot be looked after", "db: recovered"]


def test_damage_in_the_store_is_one_alarm_until_it_is_repaired_by_hand(tmp_path: Path) -> None:
    _, lab, _ = site_of(tmp_path)
    scene = Scene(
        lab, policy("db", every=300 * DAY, verify=VerifyPolicy(every=7 * DAY), replica=ReplicaPolicy(enabled=True))
    )
    scene.pass_by()
    (snapshot,) = lab.store.snapshots("db")
    lab.store.damage(snapshot, target="vda")
    scene.pass_by(7 * DAY)
    for _ in range(3):
        scene.duties.verify()
        scene.pass_by()
    assert scene.titles == ["db: damaged snapshots"]
    scene.end()
    assert read(lab, repair=True).defects == ()
    scene.start()
    scene.pass_by()
    assert scene.titles[1:] == ["db: recovered"]


def test_a_snapshot_that_cannot_be_read_is_wrong_for_as_long_as_it_is_not_tried_again(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    broken: Any = None

    def unreadable(world: World) -> World:
        store = world.store

        class Store:
            def __getattr__(self, name: str) -> Any:
                return getattr(store, name)

            def verify(self, *args: Any, **options: Any) -> Any:
                if broken is not None:
                    raise broken
                return store.verify(*args, **options)

        odd: Any = Store()
        return replace(world, store=odd)

    scene = Scene(lab, policy("db", every=300 * DAY, verify=VerifyPolicy(every=7 * DAY)), change=unreadable)
    broken = ToolError("input/output error")
    scene.pass_by(7 * DAY)
    for _ in range(4):
        scene.duties.verify()
        scene.pass_by(HOUR)
    assert scene.titles == ["db: cannot be looked after"]
    broken = None
    scene.pass_by(6 * HOUR)
    scene.duties.verify()
    scene.pass_by()
    assert scene.titles[1:] == ["db: recovered"]


def test_a_collection_that_the_replica_did_not_answer_to_is_tried_again_soon(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    tried: list[object] = []

    def with_upkeep(world: World) -> World:
        class Upkeep:
            locks = False

            def collect(self, *_: object, **__: object) -> Any:
                tried.append(lab.clock.now())
                raise StoreUnreachableError("the server did not answer")

        odd: Any = Upkeep()
        return replace(world, upkeep=odd)

    scene = Scene(lab, policy("db", every=300 * DAY), change=with_upkeep)
    scene.duties.collect()
    for _ in range(9):
        scene.pass_by(10 * MINUTE)
    assert len(tried) == 2
    assert scene.titles == ["this host: cannot be looked after"]


def test_what_goes_on_is_not_logged_with_each_pass(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger="vmsnap")
    _, lab, line = site_of(tmp_path)
    scene = Scene(lab, sent("vm1"))
    line.is_cut = True
    for _ in range(5):
        scene.pass_by()
    assert caplog.text.count("replicate failed") == 1
    line.is_cut = False
    scene.pass_by()
    line.is_cut = True
    scene.pass_by()
    scene.pass_by()
    assert caplog.text.count("replicate failed") == 2
