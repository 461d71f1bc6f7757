"""Who stopped a guest during a capture in mode live, its operator or the capture, and how it is left. libvirt is a fake."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import libvirt
import libvirt_qemu
import pytest

from tests.unit.libvirt_domains import UUID, domain_xml, plan_of
from tests.unit.libvirt_fakes import RUNNING, FakeConnection, FakeDomain
from vmsnap.errors import PreconditionError
from vmsnap.hypervisors.libvirt import capture as capture_module
from vmsnap.hypervisors.libvirt import memory
from vmsnap.hypervisors.libvirt.capture import LiveCapture
from vmsnap.hypervisors.libvirt.convergence import Convergence
from vmsnap.hypervisors.libvirt.stopped import StoppedHere
from vmsnap.hypervisors.libvirt.watchdog import Watchdog
from vmsnap.hypervisors.libvirt.xml import parse
from vmsnap.model.capture import Capture, CapturePlan, CaptureSettings, OnNoConvergence
from vmsnap.state.clock import SystemClock

BY_USER = (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_USER)
IN_JOB = (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_SNAPSHOT)
SECONDS = 10


class NeverCancelled:
    def is_set(self) -> bool:
        return False

    def check(self) -> None:
        return


class Dog(Watchdog):
    """A watchdog without a process."""

    def _say(self, word: bytes) -> None:
        assert word


class Libvirt(FakeDomain):
    """A domain whose capture goes as a test's ``script`` says, in the thread that asks for it."""

    def __init__(self, plan: CapturePlan) -> None:
        super().__init__(live=domain_xml(), definition=domain_xml())
        self.plan = plan
        self.script: Callable[[], None] = lambda: None
        self.record: Callable[..., None] = lambda *_arguments: None
        self.aborted = threading.Event()
        self.suspend_asked = threading.Event()
        self.suspended = threading.Event()
        self.job_over = threading.Event()

    def blockInfo(self, target: str) -> list[int]:  # noqa: N802 - libvirt's names
        return [disk.size_bytes for disk in self.plan.guest.disks if disk.target == target]

    def jobStats(self) -> dict[str, int]:  # noqa: N802
        return {"memory_remaining": 1, "memory_bps": 10**9}

    def send(self, name: str, details: str | None = None) -> None:
        now = datetime.now(tz=UTC)
        self.record(None, None, name, int(now.timestamp()), now.microsecond, details, None)

    def snapshotCreateXML(self, xml: str, flags: int) -> None:  # noqa: N802
        assert xml
        assert flags
        (image,) = (element.get("file", "") for element in parse(xml).iter("memory"))
        Path(image).write_bytes(b"memory")
        try:
            self.script()
        finally:
            self.job_over.set()

    def abortJob(self) -> None:  # noqa: N802
        self.aborted.set()

    def suspend(self) -> None:
        """As libvirt does where the job does not allow it any more, or is just ending: when the job is over."""
        self.suspend_asked.set()
        assert self.job_over.wait(SECONDS)
        self.calls.append("suspend")
        self.states = BY_USER
        self.send("STOP")
        self.suspended.set()

    def resume(self) -> None:
        super().resume()
        self.send("RESUME")


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Libvirt]:
    settings = CaptureSettings(
        max_pause=timedelta(seconds=5),
        on_no_convergence=OnNoConvergence.SUSPEND,
        overlay_dir=str(tmp_path),
        min_overlay_free_bytes=0,
    )
    domain = Libvirt(replace(plan_of(domain_xml()), settings=settings))

    def register(_connection: Any, _domain: Any, _event: str, callback: Callable[..., None], *_rest: Any) -> int:
        domain.record = callback
        return 1

    monkeypatch.setattr(libvirt_qemu, "qemuMonitorEventRegister", register)
    monkeypatch.setattr(libvirt_qemu, "qemuMonitorEventDeregister", lambda *_arguments: None)
    monkeypatch.setattr(capture_module, "Connection", lambda _uri: FakeConnection(domain))
    monkeypatch.setattr(Convergence, "gave_up", lambda *_self, **_pass: True)
    monkeypatch.setattr(Convergence, "after_pass", lambda *_self, **_pass: None)
    yield domain
    assert not domain.job_over.is_set() or domain.states in (RUNNING, BY_USER)


def run(guest: Libvirt, folder: Path) -> Capture:
    place = folder / "memory"
    place.mkdir()
    (place / memory.IMAGE_NAME).touch()
    watchdog = Dog("fake:///", uuid=UUID, limit_seconds=1, folder=place)
    live = LiveCapture(
        FakeConnection(guest), plan=guest.plan, memory_folder=place, clock=SystemClock(), watchdog=watchdog
    )
    return live.run(cancel=NeverCancelled())


def test_a_guest_that_is_stopped_too_late_goes_on(guest: Libvirt, tmp_path: Path) -> None:
    """QEMU converges while libvirt is asked to suspend the guest, so that is done when the capture is over."""

    def script() -> None:
        guest.send("MIGRATION_PASS", '{"pass": 1}')
        assert guest.suspend_asked.wait(SECONDS)
        assert StoppedHere(tmp_path).is_noted()
        guest.send("STOP")
        guest.send("MIGRATION", '{"status": "completed"}')
        guest.send("RESUME")
        guest.job_over.set()
        assert guest.suspended.wait(SECONDS)

    guest.script = script
    assert run(guest, tmp_path).pause_ms > 0
    assert guest.calls == ["suspend", "resume"]
    assert guest.states == RUNNING
    assert not StoppedHere(tmp_path).is_noted()


def abort(guest: Libvirt) -> None:
    """An operator suspends the guest, the capture is given up, and libvirt lets the guest go on."""
    guest.states = IN_JOB
    guest.send("STOP")
    assert guest.aborted.wait(SECONDS)
    guest.states = RUNNING
    guest.job_over.set()
    guest.send("RESUME")


def test_a_guest_that_its_operator_suspended_is_suspended_again(guest: Libvirt, tmp_path: Path) -> None:
    def script() -> None:
        abort(guest)
        assert guest.suspended.wait(SECONDS)
        raise libvirt.libvirtError("the job was aborted")

    guest.script = script
    with pytest.raises(PreconditionError, match="vmsnap suspended it again") as caught:
        run(guest, tmp_path)
    assert caught.value.remedy is not None
    assert "virsh resume" in caught.value.remedy
    assert guest.states == BY_USER
    assert not StoppedHere(tmp_path).is_noted()


def test_an_operator_who_lets_it_go_on_is_obeyed(guest: Libvirt, tmp_path: Path) -> None:
    """A script's suspend and resume: the latter waits for the capture's end, and comes right after it."""

    def script() -> None:
        abort(guest)
        assert guest.suspended.wait(SECONDS)
        guest.resume()
        raise libvirt.libvirtError("the job was aborted")

    guest.script = script
    with pytest.raises(PreconditionError):
        run(guest, tmp_path)
    assert guest.calls == ["suspend", "resume"]
    assert guest.states == RUNNING


def test_a_guest_that_was_not_seen_to_go_on_is_suspended_again_all_the_same(guest: Libvirt, tmp_path: Path) -> None:
    def script() -> None:
        guest.states = IN_JOB
        guest.send("STOP")
        assert guest.aborted.wait(SECONDS)
        guest.states = RUNNING
        raise libvirt.libvirtError("the job was aborted")

    guest.script = script
    with pytest.raises(PreconditionError):
        run(guest, tmp_path)
    assert guest.calls == ["suspend"]
    assert guest.states == BY_USER
