"""The daemon's duties over a fake host: what is due is done, what hangs or fails stops nobody, and memory stays flat."""

from __future__ import annotations

import functools
import gc
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.workflow.invocations import Work, invoke, order, provision, simply, succeed
from vmsnap.config.settings import DaemonSettings, LimitSettings, Settings, StoreSettings
from vmsnap.daemon.configuration import Loaded, Refused
from vmsnap.daemon.duties import Duties
from vmsnap.daemon.workers import ThreadWorkers, Workers
from vmsnap.errors import ConfigError, ToolError
from vmsnap.model.due import DueEntry, Outcome
from vmsnap.model.ids import RunId
from vmsnap.model.journal import RunKind
from vmsnap.model.manifest import Marks, Snapshot
from vmsnap.model.policy import Policy, VerifyPolicy
from vmsnap.model.report import DaemonReport
from vmsnap.model.retention_policy import RetentionPolicy
from vmsnap.model.schedule_policy import SchedulePolicy
from vmsnap.ports.clock import Cancel
from vmsnap.ports.observer import ChoreDone, Observer, Tick
from vmsnap.stores.packs.repository import initialise, open_repository
from vmsnap.stores.packs.upkeep import PackedUpkeep
from vmsnap.testing.faults import DEATHS, Fault, Mode
from vmsnap.testing.memory_objects import MemoryBucket, MemoryObjects
from vmsnap.testing.world import START, FakeWorld
from vmsnap.workflow.world import World

MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)


def policy(guest: str = "db", *, every: timedelta = HOUR, keep: int = 3, **sections: Any) -> Policy:
    return Policy(
        guest=guest, schedule=SchedulePolicy(every=every), retention=RetentionPolicy(keep_last=keep), **sections
    )


def loaded(*policies: Policy, per_host: int = 1, refused: tuple[Refused, ...] = ()) -> Loaded:
    settings = Settings(
        store=StoreSettings(path=Path("/srv")), limits=LimitSettings(runs_per_host=per_host), daemon=DaemonSettings()
    )
    by_path = {Path(f"/policies/{one.guest}.toml"): one for one in policies}
    return Loaded(settings=settings, by_path=by_path, refused=refused)


class AtOnce:
    """Workers that do it before they return."""

    def start(self, work: Callable[[], None], *, name: str) -> None:
        work()


@dataclass
class Listener:
    """An Observer that remembers."""

    ticks: list[Tick] = field(default_factory=list)
    runs: list[DueEntry] = field(default_factory=list)
    chores: list[ChoreDone] = field(default_factory=list)

    def start(self) -> None:
        pass

    def ticked(self, tick: Tick) -> None:
        self.ticks.append(tick)

    def run_ended(self, entry: DueEntry) -> None:
        self.runs.append(entry)

    def chore_done(self, done: ChoreDone) -> None:
        self.chores.append(done)

    def close(self) -> None:
        pass

    def failures(self, name: str) -> list[str]:
        return [done.error.brief for done in self.chores if done.name == name and done.error is not None]


class Installation:
    """Duties over a fake world."""

    def __init__(
        self,
        folder: Path,
        *policies: Policy,
        workers: Workers | None = None,
        per_host: int = 1,
        observers: Sequence[Observer] = (),
        change: Callable[[World], World] = lambda world: world,
    ) -> None:
        self.lab = FakeWorld(folder)
        for one in policies:
            if one.guest not in self.lab.host.machines and one.guest != "ghost":
                self.lab.add_guest(one.guest)
        self.listener = Listener()
        self.duties = Duties(
            loaded(*policies, per_host=per_host),
            open_world=lambda _settings: change(self.lab.process()),
            observers=(self.listener, *observers),
            workers=workers or AtOnce(),
            wake=lambda: None,
        )

    def begin(self) -> None:
        """The first round, as the ticker makes it."""
        self.duties.reconcile()
        self.duties.tick()
        self.duties.take_news()

    def pass_by(self, duration: timedelta) -> None:
        self.lab.clock.sleep(duration)
        self.duties.tick()
        self.duties.take_news()

    def until_idle(self, *, but: Sequence[str] = ()) -> None:
        end = time.monotonic() + 20
        while set(self.duties.going) - set(but):
            assert time.monotonic() < end, self.duties.going
            self.duties.take_news()
            time.sleep(0.002)

    def snapshots(self, guest: str = "db") -> int:
        return len(self.lab.store.snapshots(guest))


def test_what_is_due_is_backed_up_and_observers_hear_of_it(tmp_path: Path) -> None:
    one = Installation(tmp_path, policy())
    one.begin()
    assert one.snapshots() == 1
    (entry,) = one.listener.runs
    assert (entry.guest, entry.outcome) == ("db", Outcome.DONE)
    (tick,) = one.listener.ticks
    assert tick.running == ("db",)
    one.pass_by(MINUTE)
    assert one.snapshots() == 1
    (waiting,) = one.listener.ticks[-1].entries
    assert waiting.outcome is Outcome.NOT_DUE
    assert waiting.following is not None
    assert one.duties.status() == f"1 guest; next db at {waiting.following.at:%Y-%m-%d %H:%MZ}"
    one.pass_by(HOUR)
    assert one.snapshots() == 2
    assert order(one.lab) == []
    report = one.duties.report()
    assert (report.backups, report.failures) == (2, 0)


def test_nothing_starts_before_what_dead_runs_left_is_in_order(tmp_path: Path) -> None:
    one = Installation(tmp_path, policy())
    one.duties.tick()
    (entry,) = one.listener.ticks[-1].entries
    assert (entry.outcome, entry.note) == (Outcome.SKIPPED, "the daemon puts in order what dead runs left")
    assert one.snapshots() == 0
    one.duties.reconcile()
    assert one.duties.take_news()
    one.duties.tick()
    assert one.snapshots() == 1


def test_what_a_dead_run_left_is_undone_at_the_start(tmp_path: Path) -> None:
    one = Installation(tmp_path, policy("other", every=DAY))
    journal = one.lab.state.journals.begin(RunId("00000000f1"), kind=RunKind.BACKUP, guest="db", at=START)
    journal.close()
    one.begin()
    assert one.lab.unfinished() == ()


def test_failures_stop_no_other_guest(tmp_path: Path) -> None:
    one = Installation(tmp_path, policy("ghost"), policy("db"), policy("other"), per_host=2)
    one.begin()
    one.pass_by(MINUTE)
    assert one.snapshots("db") == one.snapshots("other") == 1
    outcomes = {entry.guest: entry.outcome for entry in one.listener.runs}
    assert outcomes == {"ghost": Outcome.FAILED, "db": Outcome.DONE, "other": Outcome.DONE}
    (entry,) = [entry for entry in one.listener.ticks[-1].entries if entry.guest == "ghost"]
    assert entry.following is not None
    assert "an attempt failed" in entry.following.reason
    assert one.duties.report().failures == 1


def test_a_broken_policy_is_told_at_each_tick(tmp_path: Path) -> None:
    one = Installation(tmp_path, policy("db"))
    bad = Refused(path=Path("/policies/x.toml"), guest="x", error=ConfigError("wrong"), kept=False)
    kept = Refused(path=Path("/policies/db.toml"), guest="db", error=ConfigError("wrong too"), kept=True)
    one.duties.use(loaded(policy("db"), refused=(bad, kept)), observers=(one.listener,))
    one.begin()
    assert one.snapshots() == 1
    tick = one.listener.ticks[-1]
    assert [(entry.guest, entry.outcome) for entry in tick.entries] == [("x", Outcome.FAILED)]
    assert [str(problem) for problem in tick.problems] == ["wrong", "wrong too"]
    assert "refused x.toml, db.toml" in one.duties.status()


def test_who_only_listens_can_fail_without_harm(tmp_path: Path) -> None:
    class Broken(Listener):
        def ticked(self, tick: Tick) -> None:
            raise ZeroDivisionError

        def run_ended(self, entry: DueEntry) -> None:
            raise ZeroDivisionError

        def chore_done(self, done: ChoreDone) -> None:
            raise ZeroDivisionError

    one = Installation(tmp_path, policy(), observers=(Broken(),))
    one.begin()
    assert one.snapshots() == 1
    assert len(one.listener.runs) == 1


class Hanging:
    """A world in which the backup of one guest hangs where it is inspected, until it is let go."""

    def __init__(self, guest: str) -> None:
        self.guest = guest
        self.go_on = threading.Event()
        self.entered = threading.Event()

    def __call__(self, world: World) -> World:
        hypervisor, real, hanging = world.hypervisor, world.hypervisor.inspect, self

        class Slow:
            def __getattr__(self, name: str) -> Any:
                return getattr(hypervisor, name)

            def inspect(self, guest: str) -> Any:
                if guest == hanging.guest:
                    hanging.entered.set()
                    assert hanging.go_on.wait(20)
                return real(guest)

        slow: Any = Slow()
        return replace(world, hypervisor=slow)


def test_a_run_that_hangs_stops_neither_ticks_nor_others(tmp_path: Path) -> None:
    hanging = Hanging("db")
    one = Installation(tmp_path, policy("db"), policy("other"), workers=ThreadWorkers(), per_host=2, change=hanging)
    one.duties.reconcile()
    one.until_idle()
    one.duties.tick()
    assert hanging.entered.wait(10)
    one.until_idle(but=["backup of db"])
    assert (one.snapshots("db"), one.snapshots("other")) == (0, 1)
    one.lab.clock.sleep(HOUR)
    one.duties.tick()
    assert "db" in one.listener.ticks[-1].running
    one.until_idle(but=["backup of db"])
    assert one.snapshots("other") == 2
    assert one.duties.going == ("backup of db",)
    hanging.go_on.set()
    one.until_idle()
    assert one.snapshots("db") == 1


def test_limits_hold_back_what_is_due_and_take_it_when_there_is_room(tmp_path: Path) -> None:
    hanging = Hanging("db")
    one = Installation(tmp_path, policy("db"), policy("other"), workers=ThreadWorkers(), change=hanging)
    one.duties.reconcile()
    one.until_idle()
    one.duties.tick()
    assert hanging.entered.wait(10)
    one.duties.tick()
    (entry,) = one.listener.ticks[-1].entries
    assert (entry.guest, entry.outcome) == ("other", Outcome.SKIPPED)
    assert entry.note == "a run of 'db' goes on, and at most 1 may at a time on this host"
    hanging.go_on.set()
    one.until_idle()
    one.duties.tick()
    one.until_idle()
    assert (one.snapshots("db"), one.snapshots("other")) == (1, 1)


def test_a_stop_undoes_what_goes_on_and_begins_nothing(tmp_path: Path) -> None:
    hanging = Hanging("db")
    one = Installation(tmp_path, policy("db"), policy("other"), workers=ThreadWorkers(), change=hanging)
    one.duties.reconcile()
    one.until_idle()
    one.duties.tick()
    assert hanging.entered.wait(10)
    one.duties.stop()
    one.duties.tick()
    one.duties.prune()
    hanging.go_on.set()
    one.until_idle()
    one.duties.close()
    assert [(entry.guest, entry.outcome) for entry in one.listener.runs] == [("db", Outcome.STOPPED)]
    assert one.lab.state.attempts.failures("db") == ()
    assert (one.snapshots("db"), one.snapshots("other")) == (0, 0)
    assert order(one.lab) == []
    assert one.lab.state.held == {}


def test_who_starts_due_runs_by_hand_is_waited_for(tmp_path: Path) -> None:
    one = Installation(tmp_path, policy())
    with one.lab.state.locks.schedule():
        one.begin()
        (entry,) = one.listener.ticks[-1].entries
        assert entry.note == "the starting of due runs is held by process 1 for run --due"
    one.pass_by(MINUTE)
    assert one.snapshots() == 1
    assert one.lab.state.held == {"the starting of due runs": "daemon"}
    one.duties.close()
    assert one.lab.state.held == {}


def test_a_guest_that_somebody_holds_is_not_tried_again_before_the_next_tick(tmp_path: Path) -> None:
    one = Installation(tmp_path, policy())
    with one.lab.state.locks.guest("db", purpose="provision"):
        one.duties.reconcile()
        assert one.duties.take_news()
        one.duties.tick()
        assert not one.duties.take_news()
    (entry,) = one.listener.runs
    assert entry.outcome is Outcome.SKIPPED
    one.duties.tick()
    assert one.duties.take_news()
    assert one.snapshots() == 1


def test_environments_expire_and_one_that_cannot_go_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, logger="vmsnap")
    one = Installation(tmp_path, policy(every=30 * DAY))
    one.begin()
    succeed(one.lab, provision(name="test"))
    succeed(one.lab, provision(name="held"))
    one.pass_by(HOUR)
    assert len(one.lab.state.environments.all()) == 2
    (held,) = (item for item in one.lab.state.environments.all() if item.name == "held")
    journal = one.lab.state.journals.reopen(held.run)
    one.pass_by(DAY)
    one.pass_by(MINUTE)
    assert [item.name for item in one.lab.state.environments.all()] == ["held"]
    assert caplog.text.count("expire of db failed") == 1
    one.pass_by(MINUTE)
    assert [problem.about for problem in one.listener.ticks[-1].chores] == ["chore: expire db"]
    journal.close()
    one.pass_by(MINUTE)
    assert one.lab.state.environments.all() == ()
    one.pass_by(MINUTE)
    assert one.listener.ticks[-1].chores == ()
    assert order(one.lab) == []


def test_retention_is_applied_to_each_guest_whatever_becomes_of_another(tmp_path: Path) -> None:
    def broken(world: World) -> World:
        store = world.store

        class Broken:
            def __getattr__(self, name: str) -> Any:
                return getattr(store, name)

            def lock(self, guest: str, *, timeout: timedelta) -> Any:
                if guest == "aaa":
                    raise ToolError("the store's lock is stuck")
                return store.lock(guest, timeout=timeout)

        odd: Any = Broken()
        return replace(world, store=odd)

    one = Installation(tmp_path, policy("db", keep=5))
    for _ in range(4):
        one.begin() if not one.listener.ticks else one.pass_by(HOUR)
    assert one.snapshots() == 4
    less = loaded(policy("aaa"), policy("db", keep=2))
    other = Duties(
        less,
        open_world=lambda _settings: broken(one.lab.process()),
        observers=(one.listener,),
        workers=AtOnce(),
        wake=lambda: None,
    )
    other.prune()
    other.take_news()
    assert one.snapshots() == 2
    assert one.listener.failures("prune") == ["the store's lock is stuck"]


def test_the_replicas_garbage_is_collected_and_a_failure_is_told(tmp_path: Path) -> None:
    bucket = MemoryBucket()
    initialise(MemoryObjects(bucket), key=None, now=START)
    MemoryObjects(bucket).put(f"packs/ab/{'ab' * 32}", data=b"left by somebody")
    bare = Installation(tmp_path / "bare", policy())
    bare.duties.collect()
    assert bare.duties.going == ()

    def with_replica(world: World) -> World:
        opened = functools.partial(open_repository, MemoryObjects(bucket), key=None)
        return replace(world, upkeep=PackedUpkeep(opened, clock=world.clock, locks=False))

    one = Installation(tmp_path / "one", policy(), change=with_replica)
    for _ in range(2):
        one.duties.collect()
        one.duties.take_news()
        one.lab.clock.sleep(DAY)
    assert not [name for name in bucket.objects if name.startswith("packs/")]
    entries = [entry for entry in one.lab.state.history.trail(guest=None, limit=None) if entry.action == "collect"]
    assert entries[0].detail.startswith("removed 1 objects of 16 bytes")
    MemoryObjects(bucket).put("snapshots/db/0000000001.json", data=b"damage")
    one.duties.collect()
    one.duties.take_news()
    (failure,) = one.listener.failures("collect")
    assert failure.startswith("garbage cannot be told from what is needed: the object snapshots/db/0000000001.json")


def test_snapshots_are_read_again_in_their_time_and_damage_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, logger="vmsnap")
    one = Installation(tmp_path, policy(every=300 * DAY, verify=VerifyPolicy(every=7 * DAY)))
    one.begin()

    def verified() -> Marks:
        one.duties.verify()
        one.duties.take_news()
        (snapshot,) = one.lab.store.snapshots("db")
        return snapshot.marks

    first = verified().verification
    assert first is not None
    assert first.bad_blocks == 0
    one.pass_by(7 * DAY - HOUR)
    assert verified().verification == first
    one.pass_by(HOUR)
    again = verified().verification
    assert again is not None
    assert again.at >= first.at + 7 * DAY
    one.lab.store.damage(snapshot_of(one), target="vda")
    one.pass_by(7 * DAY)
    second = verified().verification
    assert second is not None
    assert second.bad_blocks
    assert caplog.text.count("is damaged") == 1


def snapshot_of(one: Installation) -> Snapshot:
    (snapshot,) = one.lab.store.snapshots("db")
    return snapshot


def test_never_means_never(tmp_path: Path) -> None:
    one = Installation(tmp_path, policy(every=300 * DAY, verify=VerifyPolicy(every=None)))
    one.begin()
    one.pass_by(1000 * DAY)
    one.duties.verify()
    one.duties.take_news()
    assert all(snapshot.marks.verification is None for snapshot in one.lab.store.snapshots("db"))


def one_round(*policies: Policy) -> Work:
    """A whole daemon's first round in one process, chores and all."""

    def work(world: World, _cancel: Cancel) -> DaemonReport:
        duties = Duties(
            loaded(*policies), open_world=lambda _settings: world, observers=(), workers=AtOnce(), wake=lambda: None
        )
        duties.reconcile()
        duties.tick()
        duties.prune()
        duties.verify()
        duties.take_news()
        duties.close()
        return duties.report()

    return work


@pytest.mark.parametrize("mode", [Mode.DIE_BEFORE, Mode.DIE_AFTER, Mode.FAIL_AFTER])
def test_whenever_the_daemon_dies_the_next_one_puts_everything_right(tmp_path: Path, mode: Mode) -> None:
    work = one_round(policy("db"))
    good = invoke(FakeWorld(tmp_path / "good"), work)
    assert isinstance(good.result, DaemonReport)
    assert good.result.backups == 1
    calls = [call for call in good.calls if not call.inside or mode in DEATHS]
    problems = []
    for call in calls[::4]:  # each of the backup's calls has its turn in the tests of the backup
        lab = FakeWorld(tmp_path / f"{call.number}")
        invoke(lab, work, Fault(call=call.number, mode=mode))
        lab.clock.sleep(16 * MINUTE)
        simply(lab, work)
        if len(lab.store.snapshots("db")) != 1:
            problems.append(f"{call.name}: {len(lab.store.snapshots('db'))} snapshots")
        problems += [f"{call.name}: {text}" for text in order(lab)]
    assert len(calls) > 100
    assert not problems, "\n".join(problems)


def test_memory_stays_flat_over_a_month_of_runs(tmp_path: Path) -> None:
    """In a process of its own: what counts the lines that tests have run takes memory too, and more with each."""
    script = "import sys; from pathlib import Path; from tests.workflow import test_daemon as here; "
    script += "print(here.pieces_grown_in_a_month(Path(sys.argv[1])))"
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout)
    assert grown < 1000, f"{grown / 240:.1f} pieces of memory a backup"


def pieces_grown_in_a_month(folder: Path) -> int:
    """360 backups with ticks, pruning, verification and reconciling, and a guest that always fails: one daemon."""
    one = Installation(folder / "0", policy("db", every=2 * HOUR, verify=VerifyPolicy(every=DAY)), policy("ghost"))
    one.begin()
    blocks = []
    for day in range(1, 31):
        # The fakes remember all that a guest ever wrote. A day's guest goes with its day; store, state and daemon stay.
        fresh = FakeWorld(folder / f"{day}")
        fresh.store, fresh.state, fresh.clock = one.lab.store, one.lab.state, one.lab.clock
        one.lab = fresh
        for run in [run for run, known in fresh.state.runs.items() if known.closed]:
            del fresh.state.runs[run]  # as the journal does with its files in time
        fresh.state.history.entries.clear()  # the real one is a file
        fresh.state.history.audited.clear()
        one.duties.use(one.duties.loaded, observers=())
        for _ in range(24):
            one.pass_by(HOUR)
            one.duties.verify()
        one.duties.prune()
        one.duties.reconcile()
        one.duties.take_news()
        blocks.append(_pieces_of_memory())
    report = one.duties.report()
    assert report.backups > 350
    assert report.failures > 30
    assert one.snapshots() == 3
    return blocks[-1] - blocks[9]


def _pieces_of_memory() -> int:
    """Return how many pieces of memory are in use. Caches, which have limits, are emptied before."""
    gc.collect()
    for item in gc.get_objects():
        if isinstance(item, functools._lru_cache_wrapper):
            item.cache_clear()
    return sys.getallocatedblocks()
