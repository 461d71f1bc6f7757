"""What is done about a capture by the events that QEMU sends of it: waited, allowed more, slowed down, given up."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import libvirt
import pytest

from tests.unit.libvirt_domains import domain_xml, plan_of
from vmsnap.errors import DriverError, NotConvergingError, PreconditionError
from vmsnap.hypervisors.libvirt.capturewatch import CaptureWatch
from vmsnap.hypervisors.libvirt.convergence import Convergence
from vmsnap.hypervisors.libvirt.events import PauseRecorder
from vmsnap.hypervisors.libvirt.flushing import FlushedDisks
from vmsnap.hypervisors.libvirt.vcpulimits import SlowedVcpus
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
    events: Events, domain: Domain, *, then: OnNoConvergence = OnNoConvergence.ABORT, vcpus: Vcpus | None = None
) -> CaptureWatch:
    settings = CaptureSettings(
        max_pause=timedelta(milliseconds=100), on_no_convergence=then, throttle_limit=timedelta(seconds=0.2)
    )
    plan = replace(plan_of(domain_xml()), settings=settings)
    return CaptureWatch(
        domain,
        plan=plan,
        convergence=Convergence.for_plan(plan),
        recorder=events.recorder,
        slowed=vcpus,
        disks=FlushedDisks(()),
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


def test_vcpus_are_slowed_down_pass_by_pass_and_for_a_while(events: Events) -> None:
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
def test_it_is_stopped_for_the_rest_only_where_that_fits(events: Events, remaining: int, *, suspended: bool) -> None:
    domain = Domain(stats={"memory_remaining": remaining, "memory_bps": 10**6})
    watch = watch_of(events, domain, then=OnNoConvergence.SUSPEND)
    reason = go_round(watch, events)
    assert domain.suspended is suspended
    assert isinstance(reason, NotConvergingError) is not suspended
    if suspended:
        time.sleep(0.12)
        assert isinstance(watch.look(), NotConvergingError)


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
    watch = watch_of(events, Domain(now=SUSPENDED))
    events.send("STOP")
    assert isinstance(watch.look(), PreconditionError)
    assert watch.stopped_by_others


def test_disks_are_flushed_before_the_guest_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"x")
    flushed: list[int] = []
    monkeypatch.setattr("os.fdatasync", flushed.append)
    with FlushedDisks((str(disk), str(tmp_path / "gone"))) as disks:
        disks.flush()
        until = time.monotonic() + 10
        while not flushed:
            assert time.monotonic() < until
            time.sleep(0.005)
    assert len(set(flushed)) == 1
