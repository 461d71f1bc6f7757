"""What is done about a capture by the events that QEMU sends of it: waited, allowed more, slowed down, given up."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import libvirt
import pytest

from tests.unit.libvirt_domains import UUID, domain_xml, plan_of
from vmsnap.errors import DriverError, NotConvergingError, PreconditionError
from vmsnap.hypervisors.libvirt import capturewatch
from vmsnap.hypervisors.libvirt.capturewatch import CaptureWatch
from vmsnap.hypervisors.libvirt.convergence import Convergence
from vmsnap.hypervisors.libvirt.events import PauseRecorder
from vmsnap.hypervisors.libvirt.flushing import FlushedDisks
from vmsnap.hypervisors.libvirt.stopped import StoppedHere
from vmsnap.hypervisors.libvirt.vcpulimits import SlowedVcpus
from vmsnap.hypervisors.libvirt.watchdog import Watchdog
from vmsnap.model.capture import CaptureSettings, OnNoConvergence

OWN_STOP = (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_UNKNOWN)
SUSPENDED = (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_SNAPSHOT)


@dataclass
class Domain:
    """What the watch asks of a domain, and what it told it."""

    now: Sequence[int] = (libvirt.VIR_DOMAIN_RUNNING, 1)
    stats: dict[str, int] = field(default_factory=dict)
    downtimes: list[int] = field(default_factory=list)
    suspended: bool = False

    def state(self) -> Sequence[int]:
        return self.now

    def jobStats(self) -> dict[str, int]:  # noqa: N802 - libvirt's names
        return self.stats

    def migrateSetMaxDowntime(self, milliseconds: int, flags: int) -> None:  # noqa: N802
        assert flags == 0
        self.downtimes.append(milliseconds)

    def suspend(self) -> None:
        self.suspended = True


class Vcpus(SlowedVcpus):
    """vCPUs that are slowed down in the books only."""

    def __init__(self, *, fails: bool = False) -> None:
        super().__init__((), limit_seconds=60)
        self.steps = 0
        self.fails = fails

    def slow_down(self) -> None:
        if self.fails:
            raise DriverError("no such group")
        self.steps += 1


class Dog(Watchdog):
    """A watchdog without a process. ``gone``: nobody hears."""

    def __init__(self, folder: Path, *, gone: bool = False) -> None:
        super().__init__("fake:///", uuid=UUID, limit_seconds=1, folder=folder / "memory")
        self.gone = gone
        self.said: list[bytes] = []

    def _say(self, word: bytes) -> None:
        if self.gone:
            raise BrokenPipeError
        self.said.append(word)


class Events:
    """QEMU's events of one capture, sent by hand."""

    def __init__(self) -> None:
        self.recorder = PauseRecorder(None, None)

    def send(self, name: str, *, at: datetime | None = None, data: dict[str, object] | None = None) -> None:
        moment = (at or datetime.now(tz=UTC)).timestamp()
        seconds, micros = int(moment), int(moment % 1 * 1e6)
        self.recorder._record(None, None, name, seconds, micros, json.dumps(data) if data else None, None)

    def passes(self, number: int) -> None:
        self.send("MIGRATION_PASS", data={"pass": number})


@pytest.fixture
def events() -> Events:
    return Events()


def watch_of(
    events: Events,
    domain: Domain,
    *,
    then: OnNoConvergence = OnNoConvergence.ABORT,
    vcpus: Vcpus | None = None,
    dog: Dog | None = None,
) -> CaptureWatch:
    settings = CaptureSettings(
        max_pause=timedelta(milliseconds=100), on_no_convergence=then, throttle_limit=timedelta(seconds=0.2)
    )
    plan = replace(plan_of(domain_xml()), settings=settings)
    return CaptureWatch(
        domain,
        plan=plan,
        convergence=replace(Convergence.for_plan(plan), seconds_between=0.0),
        recorder=events.recorder,
        slowed=vcpus,
        disks=FlushedDisks(()),
        watchdog=dog,
    )


def go_round(watch: CaptureWatch, events: Events, *, rounds: int = 60) -> object:
    """Let the guest be read again and again; returns why the capture was given up."""
    for number in range(1, rounds):
        events.passes(number)
        reason = watch.look()
        if reason is not None:
            return reason
    return None


def test_a_guest_that_does_not_converge_is_allowed_more_and_more_and_given_up(events: Events) -> None:
    domain = Domain()
    reason = go_round(watch_of(events, domain), events)
    assert isinstance(reason, NotConvergingError)
    assert domain.downtimes == sorted(set(domain.downtimes))
    assert domain.downtimes[-1] < 100
    assert not domain.suspended


def test_nothing_happens_while_no_pass_begins(events: Events) -> None:
    domain = Domain()
    watch = watch_of(events, domain)
    events.passes(3)
    assert [watch.look() for _ in range(50)] == [None] * 50
    assert len(domain.downtimes) == 1


def test_vcpus_are_slowed_down_step_by_step_and_for_a_while(events: Events, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capturewatch, "_SLOWER_EVERY_SECONDS", 0.0)
    vcpus = Vcpus()
    watch = watch_of(events, Domain(), then=OnNoConvergence.THROTTLE, vcpus=vcpus)
    assert go_round(watch, events, rounds=14) is None
    assert vcpus.steps > 1
    time.sleep(0.25)
    assert isinstance(watch.look(), NotConvergingError)


def test_vcpus_that_cannot_be_slowed_down_end_the_capture(events: Events) -> None:
    watch = watch_of(events, Domain(), then=OnNoConvergence.THROTTLE, vcpus=Vcpus(fails=True))
    assert isinstance(go_round(watch, events), DriverError)


@pytest.mark.parametrize(("remaining", "suspended"), [(1000, True), (10**9, False)])
def test_it_is_stopped_for_the_rest_only_where_that_fits(
    events: Events, tmp_path: Path, remaining: int, *, suspended: bool
) -> None:
    domain = Domain(stats={"memory_remaining": remaining, "memory_bps": 10**6})
    dog = Dog(tmp_path)
    watch = watch_of(events, domain, dog=dog)
    reason = go_round(watch, events)
    assert domain.suspended is watch.suspended_here is suspended
    assert (dog.said, StoppedHere(tmp_path).is_noted()) == ([b"claim\n"] if suspended else [], suspended)
    assert isinstance(reason, NotConvergingError) is not suspended
    if suspended:
        time.sleep(0.12)
        assert isinstance(watch.look(), NotConvergingError)


@pytest.mark.parametrize("event", [("STOP", None), ("MIGRATION", {"status": "completed"})])
def test_it_is_not_stopped_where_qemu_converged_meanwhile(
    events: Events, tmp_path: Path, event: tuple[str, dict[str, object] | None]
) -> None:
    """It would stand still when the capture is over."""

    class Converging(Domain):
        def jobStats(self) -> dict[str, int]:  # noqa: N802
            events.send(event[0], data=event[1])
            return {"memory_remaining": 1, "memory_bps": 10**6}

    domain = Converging()
    watch = watch_of(events, domain, dog=Dog(tmp_path))
    assert go_round(watch, events) is None
    assert not domain.suspended
    assert not watch.suspended_here


def test_it_is_not_stopped_where_nobody_watches(events: Events, tmp_path: Path) -> None:
    domain = Domain(stats={"memory_remaining": 1, "memory_bps": 10**6})
    assert isinstance(go_round(watch_of(events, domain, dog=Dog(tmp_path, gone=True)), events), DriverError)
    assert not domain.suspended


def test_the_promised_pause_ends_the_capture_while_memory_is_not_taken(events: Events) -> None:
    domain = Domain(now=OWN_STOP)
    watch = watch_of(events, domain)
    events.passes(1)
    assert watch.look() is None
    events.send("STOP", at=datetime.now(tz=UTC) - timedelta(milliseconds=50))
    assert watch.look() is None
    began = time.monotonic()
    while (reason := watch.look()) is None:
        watch.wait()
        assert time.monotonic() - began < 5
    assert isinstance(reason, NotConvergingError)
    assert "stood still" in reason.brief
    assert not watch.stopped_by_others


def test_once_its_memory_is_taken_nothing_is_given_up(events: Events) -> None:
    watch = watch_of(events, Domain(now=OWN_STOP))
    events.send("STOP", at=datetime.now(tz=UTC) - timedelta(seconds=5))
    events.send("MIGRATION", data={"status": "completed"})
    assert watch.look() is None


def test_nothing_is_asked_of_qemu_for_the_pass_that_was_made_while_the_guest_stood_still(events: Events) -> None:
    domain = Domain(now=OWN_STOP)
    watch = watch_of(events, domain)
    events.passes(2)
    assert watch.look() is None
    events.send("STOP")
    events.passes(3)
    events.send("MIGRATION", data={"status": "completed"})
    assert watch.look() is None
    events.send("RESUME")
    assert watch.look() is None
    assert domain.downtimes == []


def test_whoever_suspended_the_guest_is_obeyed(events: Events) -> None:
    domain = Domain(now=SUSPENDED)
    watch = watch_of(events, domain)
    events.send("STOP")
    assert isinstance(watch.look(), PreconditionError)
    assert watch.stopped_by_others
    watch.suspend_again(timeout_seconds=0.01)
    assert not watch.suspended_again, "it still stands still"
    events.send("RESUME")
    watch.suspend_again(timeout_seconds=10)
    assert watch.suspended_again
    assert domain.suspended


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_disks_are_flushed_before_the_guest_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"x")
    flushed: list[int] = []
    dropped: list[int] = []
    monkeypatch.setattr("os.fdatasync", flushed.append)
    monkeypatch.setattr("os.posix_fadvise", lambda descriptor, *_range_and_advice: dropped.append(descriptor))
    with FlushedDisks((str(disk), str(tmp_path / "gone"))) as disks:
        disks.flush()
        wait_until(lambda: bool(flushed))
        disks.flush(drop_cache=True)
        wait_until(lambda: bool(dropped))
    assert len(set(flushed)) == 1
    assert set(dropped) == set(flushed)
    assert len(dropped) < len(flushed)
