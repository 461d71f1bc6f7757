"""How a clone ends: what counts as a clean stop, and that nothing but a run's own clone is ever ended."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import libvirt
import libvirt_qemu
import pytest

from tests.unit.libvirt_domains import RUN, domain_xml, plan_of
from vmsnap.errors import BugError, DeadlineError, DriverError, NotCleanError
from vmsnap.hypervisors.libvirt import clones, yielding
from vmsnap.hypervisors.libvirt.clonelimits import cpu_weight
from vmsnap.hypervisors.libvirt.clones import Clones, clone_of
from vmsnap.hypervisors.libvirt.connection import Connection, translate
from vmsnap.hypervisors.libvirt.xml import Tag, parse, set_tag, unparse
from vmsnap.model.capture import CaptureSettings
from vmsnap.model.ids import RunId
from vmsnap.model.isolation import IsolationProof
from vmsnap.testing.cancels import NeverCancelled

CLONE = clone_of(RUN, guest="db1")
SHUTDOWN, STOPPED = libvirt.VIR_DOMAIN_EVENT_SHUTDOWN, libvirt.VIR_DOMAIN_EVENT_STOPPED
BY_GUEST = (SHUTDOWN, libvirt.VIR_DOMAIN_EVENT_SHUTDOWN_GUEST)
ENDED = (STOPPED, libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN)
SECOND = timedelta(seconds=1)


@pytest.mark.parametrize(
    ("shares", "normal", "weight"),
    [(64, 1024, 64), (1024, 1024, 1024), (2, 1024, 2), (262144, 1024, 262144),
     (64, 100, 6), (1024, 100, 100), (2, 100, 2), (262144, 100, 10000)],
)  # fmt: skip
def test_a_cpu_weight_means_the_same_under_both_versions_of_control_groups(
    shares: int, normal: int, weight: int
) -> None:
    assert cpu_weight(shares, normal=normal) == weight


@pytest.mark.parametrize(("shares", "gives_way"), [(64, True), (1023, True), (1024, False), (4096, False)])
def test_only_a_clone_that_is_to_weigh_less_than_others_gives_way(
    shares: int, monkeypatch: pytest.MonkeyPatch, *, gives_way: bool
) -> None:
    made: list[float] = []

    class Recorded(yielding.GivingWay):
        def __init__(self, name: str, *, run: RunId, seconds: float) -> None:
            made.append(seconds)
            super().__init__(name, run=run, seconds=seconds)

    monkeypatch.setattr(clones, "GivingWay", Recorded)
    plan = plan_of(domain_xml(), settings=CaptureSettings(cpu_shares=shares))
    all_clones = Clones(Connection("test:///default"))
    assert all_clones._giving_way(plan) is all_clones._giving_way(plan)
    assert made == [yielding.SECONDS if gives_way else 0]


def error_of(code: int) -> libvirt.libvirtError:
    error = libvirt.libvirtError("no")
    error.err = (code, 10, "no", 2, "", None, None, -1, -1)
    return error


class FakeClone:
    """A domain that, asked to shut down, sends these events and is gone where it stopped.

    ``reasons``: the data of QEMU's own events; None where libvirt does not pass them on.
    """

    def __init__(
        self,
        *,
        events: Sequence[tuple[int, int]] = (),
        tag: Tag | None = None,
        refusal: int | None = None,
        reasons: Sequence[str] | None = None,
    ) -> None:
        self.reasons = reasons
        self.monitor_listener: Callable[..., None] | None = None
        self.events = events
        self.refusal = refusal
        self.modes: list[int] = []
        self.ended: list[str] = []
        self.gone = False
        self.states = [[libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_MIGRATION]]
        self.listener: Callable[..., None] | None = None
        root = parse(domain_xml())
        if tag is not None:
            set_tag(root, tag)
        self.text = unparse(root)

    def name(self) -> str:
        return CLONE.name

    def shutdownFlags(self, mode: int) -> None:  # noqa: N802 - libvirt's names
        self.modes.append(mode)
        assert self.listener is not None, "nobody listens yet"
        for details in self.reasons or ():
            assert self.monitor_listener is not None
            self.monitor_listener(None, self, "SHUTDOWN", 1795249458, 0, details, None)
        for event, detail in self.events:
            self.listener(None, self, event, detail, None)
            self.gone = self.gone or event == STOPPED
        if self.refusal is not None:
            raise error_of(self.refusal)

    def XMLDesc(self, flags: int) -> str:  # noqa: N802
        return self.text

    def state(self) -> list[int]:
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]

    def destroy(self) -> None:
        self.ended.append("destroy")

    def undefineFlags(self, flags: int) -> None:  # noqa: N802
        raise error_of(libvirt.VIR_ERR_NO_DOMAIN)

    def resume(self) -> None:
        self.ended.append("resume")


class FakeConnection(Connection):
    def __init__(self, clone: FakeClone | None) -> None:
        super().__init__("fake:///")
        self._clone = clone

    def get(self) -> Any:
        return self

    def domainEventRegisterAny(self, domain: FakeClone, event: int, call: Callable[..., None], opaque: object) -> int:  # noqa: N802
        assert event == libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE
        domain.listener = call
        return 7

    def domainEventDeregisterAny(self, handle: int) -> None:  # noqa: N802
        assert handle == 7

    def domain(self, name: str) -> Any:
        if self._clone is None or self._clone.gone:
            raise translate(error_of(libvirt.VIR_ERR_NO_DOMAIN), doing="look")
        return self._clone


@pytest.fixture(autouse=True)
def _qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    def register(_connection: object, domain: FakeClone, event: str, call: Callable[..., None], *_rest: object) -> int:
        assert event == "SHUTDOWN"
        if domain.reasons is None:
            raise error_of(libvirt.VIR_ERR_NO_SUPPORT)
        domain.monitor_listener = call
        return 8

    monkeypatch.setattr(libvirt_qemu, "qemuMonitorEventRegister", register)
    monkeypatch.setattr(libvirt_qemu, "qemuMonitorEventDeregister", lambda _connection, _handle: None)


def shut_down(clone: FakeClone | None, *, agent_answers: bool = True, deadline: timedelta = SECOND) -> str:
    return Clones(FakeConnection(clone)).shut_down(
        CLONE, agent_answers=agent_answers, deadline=deadline, cancel=NeverCancelled()
    )


@pytest.mark.parametrize(
    ("agent_answers", "mode", "by"),
    [
        (True, libvirt.VIR_DOMAIN_SHUTDOWN_GUEST_AGENT, "guest agent"),
        (False, libvirt.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN, "ACPI"),
    ],
)
def test_a_guest_that_powers_off_is_clean(*, agent_answers: bool, mode: int, by: str) -> None:
    clone = FakeClone(events=[BY_GUEST, ENDED])
    assert shut_down(clone, agent_answers=agent_answers) == by
    assert clone.modes == [mode]


@pytest.mark.parametrize("code", [libvirt.VIR_ERR_AGENT_UNRESPONSIVE, 112, libvirt.VIR_ERR_OPERATION_INVALID])
def test_an_agent_that_goes_away_while_it_obeys_is_no_failure(code: int) -> None:
    assert shut_down(FakeClone(events=[BY_GUEST, ENDED], refusal=code)) == "guest agent"


@pytest.mark.parametrize(
    "events",
    [
        [ENDED],
        [(STOPPED, libvirt.VIR_DOMAIN_EVENT_STOPPED_DESTROYED)],
        [(STOPPED, libvirt.VIR_DOMAIN_EVENT_STOPPED_CRASHED)],
        [(STOPPED, libvirt.VIR_DOMAIN_EVENT_STOPPED_FAILED)],
        [BY_GUEST, (STOPPED, libvirt.VIR_DOMAIN_EVENT_STOPPED_DESTROYED)],
        [(SHUTDOWN, libvirt.VIR_DOMAIN_EVENT_SHUTDOWN_HOST), ENDED],
        [(SHUTDOWN, libvirt.VIR_DOMAIN_EVENT_SHUTDOWN_FINISHED), ENDED],
        [(SHUTDOWN, libvirt.VIR_DOMAIN_EVENT_SHUTDOWN_HOST), BY_GUEST, ENDED],
    ],
)
def test_any_other_end_is_not_clean(events: list[tuple[int, int]]) -> None:
    with pytest.raises(NotCleanError) as caught:
        shut_down(FakeClone(events=events))
    assert caught.value.details


def qemu(reason: str, *, guest: bool = True) -> str:
    return json.dumps({"guest": guest, "reason": reason})


@pytest.mark.parametrize(
    "reasons",
    [
        [qemu("guest-shutdown")],
        # libvirt ends QEMU once its guest is off.
        [qemu("guest-shutdown"), qemu("host-signal", guest=False)],
        # QEMU before 4.0.
        [json.dumps({"guest": True})],
        [],
    ],
)
def test_a_power_off_is_clean(reasons: list[str]) -> None:
    assert shut_down(FakeClone(events=[BY_GUEST, ENDED], reasons=reasons)) == "guest agent"


@pytest.mark.parametrize("reason", ["guest-reset", "guest-panic", "subsystem-reset", "host-qmp-system-reset"])
def test_a_reset_or_a_panic_late_in_the_shutdown_is_not_clean(reason: str) -> None:
    """To libvirt it is a shutdown by the guest, like any other."""
    clone = FakeClone(events=[BY_GUEST, ENDED], reasons=[qemu(reason), qemu("host-signal", guest=False)])
    with pytest.raises(NotCleanError, match="did not power off") as caught:
        shut_down(clone)
    assert reason in (caught.value.details or "")


def test_a_clone_that_ended_before_is_not_clean() -> None:
    with pytest.raises(NotCleanError, match="before it was asked"):
        shut_down(None)


def test_a_clone_that_stays_is_late() -> None:
    with pytest.raises(DeadlineError) as caught:
        shut_down(FakeClone(events=[BY_GUEST]), deadline=timedelta(0))
    assert caught.value.remedy


def test_libvirts_other_errors_are_told() -> None:
    with pytest.raises(DriverError, match="ask the clone"):
        shut_down(FakeClone(refusal=libvirt.VIR_ERR_INTERNAL_ERROR))


def test_only_a_proof_of_its_own_run_resumes_a_clone() -> None:
    clone = FakeClone()
    clones = Clones(FakeConnection(clone))
    other = IsolationProof(run=RunId("ffffffffff"), made=datetime.now(UTC), points=())
    with pytest.raises(BugError, match="proof"):
        clones.resume(CLONE, proof=other)
    assert clone.ended == []


@pytest.mark.parametrize("tag", [None, Tag(run=RunId("ffffffffff"), kind="clone", guest="db1")])
def test_a_domain_without_the_runs_tag_is_never_ended(tag: Tag | None) -> None:
    clone = FakeClone(tag=tag)
    Clones(FakeConnection(clone)).destroy(CLONE.name, run=RUN)
    assert clone.ended == []


def test_the_runs_own_clone_is_ended_and_may_be_gone_already() -> None:
    clone = FakeClone(tag=Tag(run=RUN, kind="clone", guest="db1"))
    Clones(FakeConnection(clone)).destroy(CLONE.name, run=RUN)
    assert clone.ended == ["destroy"]
    Clones(FakeConnection(None)).destroy(CLONE.name, run=RUN)


STARTING = [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_STARTING_UP]


def test_a_clone_that_libvirt_is_making_is_ended_when_it_is_made() -> None:
    """Ended at the moment when its memory is complete, it takes libvirt 9.0's daemon with it."""
    clone = FakeClone(tag=Tag(run=RUN, kind="clone", guest="db1"))
    made = clone.states[0]
    clone.states = [STARTING, STARTING, made]
    Clones(FakeConnection(clone)).destroy(CLONE.name, run=RUN)
    assert clone.states == [made]
    assert clone.ended == ["destroy"]


def test_a_clone_that_is_never_made_is_ended_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clones, "_STARTING_SECONDS", 0.1)
    clone = FakeClone(tag=Tag(run=RUN, kind="clone", guest="db1"))
    clone.states = [STARTING]
    Clones(FakeConnection(clone)).destroy(CLONE.name, run=RUN)
    assert clone.ended == ["destroy"]


def test_a_clone_has_the_same_name_and_uuid_every_time() -> None:
    assert clone_of(RUN, guest="db1") == CLONE
    assert clone_of(RunId("ffffffffff"), guest="db1").uuid != CLONE.uuid


def test_a_clone_that_is_to_end_gives_way_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is given back by its own threads, so it needs a processor; also where another process made it give way."""
    clone = FakeClone(tag=Tag(run=RUN, kind="clone", guest="db1"))
    monkeypatch.setattr(yielding.GivingWay, "cease", lambda _way: clone.ended.append("cease"))
    Clones(FakeConnection(clone)).destroy(CLONE.name, run=RUN)
    assert clone.ended == ["cease", "destroy"]


def test_somebody_elses_domain_is_not_touched_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clone = FakeClone()
    monkeypatch.setattr(yielding.GivingWay, "cease", lambda _way: clone.ended.append("cease"))
    Clones(FakeConnection(clone)).destroy(CLONE.name, run=RUN)
    assert clone.ended == []
