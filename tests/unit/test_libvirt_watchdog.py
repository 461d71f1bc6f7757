"""The watchdog lets a guest go on where its agent died or hangs, and leaves every other pause alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import libvirt
import pytest

from tests.unit.libvirt_fakes import RUNNING, FakeDomain, disk_xml, domain_of
from vmsnap.errors import DriverError
from vmsnap.hypervisors.libvirt import watchdog
from vmsnap.hypervisors.libvirt.stopped import StoppedHere
from vmsnap.hypervisors.libvirt.watchdog import Guardian, Watchdog

LEFT = (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_UNKNOWN)
BY_USER = (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_USER)
SNAPSHOT = libvirt.VIR_DOMAIN_JOB_OPERATION_SNAPSHOT


@pytest.fixture
def domain() -> FakeDomain:
    xml = domain_of(disk_xml("vda", "/srv/images/db1.qcow2"))
    return FakeDomain(live=xml, definition=xml)


def guardian(domain: FakeDomain, *, limit_seconds: float = 10) -> Guardian:
    return Guardian(lambda: domain, limit_seconds=limit_seconds, folder=Path("/"))


def test_a_pause_within_the_limit_is_its_agents(domain: FakeDomain) -> None:
    watching = guardian(domain)
    domain.states = LEFT
    assert all(watching.look(now=second) for second in (0.0, 5.0, 10.0))
    assert domain.calls == []
    assert watching.look(now=10.1)
    assert domain.calls == ["resume"]


def test_each_pause_has_the_whole_limit(domain: FakeDomain) -> None:
    watching = guardian(domain)
    for begins in (0.0, 20.0):
        domain.states = LEFT
        watching.look(now=begins)
        watching.look(now=begins + 9)
        domain.states = RUNNING
        watching.look(now=begins + 10)
    assert domain.calls == []


def test_a_dead_agents_guest_goes_on_at_once(domain: FakeDomain) -> None:
    watching = guardian(domain)
    domain.states = LEFT
    watching.look(now=1.0)
    watching.orphaned(now=1.1)
    assert watching.look(now=1.1)
    assert domain.calls == ["resume"]


def test_a_request_that_a_dead_agent_sent_last_is_undone_too(domain: FakeDomain) -> None:
    """The memory is still read when the agent dies: the job is aborted, and what it leaves paused goes on."""
    watching = guardian(domain)
    watching.orphaned(now=0.0)
    domain.job = SNAPSHOT
    assert watching.look(now=0.1)
    assert domain.calls == ["abort job"]
    domain.states = LEFT
    assert watching.look(now=0.2)
    assert domain.calls == ["abort job", "resume"]
    assert watching.look(now=14.9)
    assert not watching.look(now=15.1)


def test_a_job_that_runs_is_left_alone_while_the_agent_lives(domain: FakeDomain) -> None:
    watching = guardian(domain, limit_seconds=1)
    domain.job, domain.states = SNAPSHOT, LEFT
    assert all(watching.look(now=float(second)) for second in range(10))
    assert domain.calls == []


def test_another_tools_snapshot_is_not_aborted(domain: FakeDomain) -> None:
    watching = Guardian(lambda: domain, limit_seconds=10, folder=Path("/"), is_capturing=lambda: False)
    domain.job = SNAPSHOT
    watching.orphaned(now=0.0)
    assert watching.look(now=60.0)
    assert domain.calls == []


def test_another_tools_job_is_not_aborted(domain: FakeDomain) -> None:
    watching = guardian(domain)
    domain.job = libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT
    watching.orphaned(now=0.0)
    assert watching.look(now=60.0)
    assert domain.calls == []


def test_an_operators_pause_is_left_alone(domain: FakeDomain) -> None:
    watching = guardian(domain, limit_seconds=1)
    domain.states = BY_USER
    watching.look(now=0.0)
    watching.look(now=100.0)
    watching.orphaned(now=100.0)
    watching.look(now=100.1)
    assert domain.calls == []


def test_a_claimed_pause_is_the_agents_and_the_next_one_is_not(domain: FakeDomain) -> None:
    watching = guardian(domain)
    watching.claimed(now_on=True)
    domain.states = BY_USER
    watching.look(now=0.0)
    assert domain.calls == []
    watching.orphaned(now=0.1)
    watching.look(now=0.1)
    assert domain.calls == ["resume"]
    domain.states = RUNNING
    watching.look(now=0.2)
    domain.states = BY_USER
    watching.look(now=0.3)
    assert domain.calls == ["resume"]


def test_a_claimed_pause_that_it_ends_is_noted_no_more(domain: FakeDomain, tmp_path: Path) -> None:
    stopped = StoppedHere(tmp_path)
    stopped.note()
    (tmp_path / "memory").mkdir()
    watching = Guardian(lambda: domain, limit_seconds=10, folder=tmp_path / "memory")
    watching.claimed(now_on=True)
    watching.orphaned(now=0.0)
    watching.look(now=0.0)
    assert stopped.is_noted(), "what the agent asked last may still come"
    domain.states = BY_USER
    watching.look(now=0.1)
    assert domain.calls == ["resume"]
    assert not stopped.is_noted()


def test_after_the_claimed_pause_an_operators_is_left_alone(domain: FakeDomain) -> None:
    """The claimed one may be too short to be seen."""
    watching = guardian(domain, limit_seconds=1)
    watching.claimed(now_on=True)
    watching.claimed(now_on=False)
    domain.states = BY_USER
    watching.look(now=0.0)
    watching.look(now=100.0)
    watching.orphaned(now=100.0)
    watching.look(now=100.1)
    assert domain.calls == []


def test_a_claimed_pause_has_the_limit_too(domain: FakeDomain) -> None:
    watching = guardian(domain, limit_seconds=1)
    watching.claimed(now_on=True)
    domain.states = BY_USER
    for now in (0.0, 1.0):
        watching.look(now=now)
    assert domain.calls == []
    watching.look(now=1.1)
    assert domain.calls == ["resume"]


def test_it_ends_with_the_guest(domain: FakeDomain) -> None:
    domain.live = None
    assert not guardian(domain).look(now=0.0)
    assert not Guardian(lambda: None, limit_seconds=1, folder=Path("/")).look(now=0.0)


def test_it_ends_once_its_run_was_undone(domain: FakeDomain, tmp_path: Path) -> None:
    """The next run's capture is none of its business."""
    folder = tmp_path / "memory"
    folder.mkdir()
    watching = Guardian(lambda: domain, limit_seconds=10, folder=folder)
    watching.orphaned(now=0.0)
    assert watching.look(now=0.1)
    folder.rmdir()
    domain.job = SNAPSHOT
    assert not watching.look(now=0.2)
    assert domain.calls == []


def test_it_outlives_libvirtd(domain: FakeDomain) -> None:
    answers: list[Any] = [libvirt.libvirtError("broken"), domain]

    def find() -> Any:
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    watching = Guardian(find, limit_seconds=1, folder=Path("/"))
    watching.orphaned(now=0.0)
    domain.states = LEFT
    assert watching.look(now=0.1)
    assert watching.look(now=0.2)
    assert domain.calls == ["resume"]


def test_it_does_not_wait_for_a_libvirtd_that_never_comes_back() -> None:
    def find() -> Any:
        raise libvirt.libvirtError("no libvirtd")

    watching = Guardian(find, limit_seconds=1, folder=Path("/"))
    assert watching.look(now=10_000.0), "its agent lives, and will tell it when to end"
    watching.orphaned(now=10_000.0)
    assert watching.look(now=10_500.0)
    assert not watching.look(now=10_601.0)


def test_no_guest_is_stopped_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_START_SECONDS", 10)
    with (
        pytest.raises(DriverError, match="did not start"),
        Watchdog("nonsense:///", uuid="0b0f1e4c-7d2d-4f0e-8a3e-2f6f2d9d3c11", limit_seconds=1, folder=Path("/")),
    ):
        pytest.fail("it began without a watchdog")
