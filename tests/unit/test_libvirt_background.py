"""What a background snapshot sets in QEMU, and that it is given back in every state."""

from __future__ import annotations

import errno
import json
import time
from pathlib import Path
from typing import Any

import libvirt
import libvirt_qemu
import pytest

from tests.unit.libvirt_fakes import FakeDomain
from vmsnap.errors import DeadlineError, PreconditionError
from vmsnap.hypervisors.libvirt import background, unprotect
from vmsnap.hypervisors.libvirt.background import UNLIMITED, BackgroundDetail
from vmsnap.hypervisors.libvirt.monitor import Monitor, MonitorError

DETAIL = BackgroundDetail(max_bandwidth=1 << 25)


class Qemu(FakeDomain):
    """A domain with a monitor that knows what this mode asks."""

    monitor_used = True

    def __init__(self) -> None:
        super().__init__(live=None, definition=None)
        self.capability = False
        self.max_bandwidth = DETAIL.max_bandwidth
        self.status: str | None = None
        self.pages = 0
        self.files: set[str] = set()
        self.refuses: str | None = None
        self.ends_when_cancelled = True
        self.asked: list[str] = []
        self.at = [libvirt.VIR_DOMAIN_RUNNING, 0]

    def state(self) -> list[int]:
        return list(self.at)

    def resume(self) -> None:
        self.at = [libvirt.VIR_DOMAIN_RUNNING, 0]

    def name(self) -> str:
        return "db1"

    def answer(self, request: str) -> str:
        command = json.loads(request)
        self.asked.append(command["execute"])
        if self.refuses == command["execute"]:
            return json.dumps({"error": {"class": "GenericError", "desc": "Userfaultfd not available"}})
        found = getattr(self, "do_" + command["execute"].replace("-", "_"))(**_named(command.get("arguments", {})))
        return json.dumps(found if isinstance(found, dict) and "error" in found else {"return": found})

    def do_query_migrate_capabilities(self) -> list[dict[str, Any]]:
        return [
            {"capability": "events", "state": True},
            {"capability": "background-snapshot", "state": self.capability},
        ]

    def do_migrate_set_capabilities(self, *, capabilities: list[dict[str, Any]]) -> dict[str, Any]:
        if self.status in ("setup", "active"):
            return {"error": {"class": "GenericError", "desc": "There's a migration process in progress"}}
        (wish,) = capabilities
        assert wish["capability"] == "background-snapshot"
        self.capability = wish["state"]
        return {}

    def do_query_migrate_parameters(self) -> dict[str, Any]:
        return {"max-bandwidth": self.max_bandwidth}

    def do_migrate_set_parameters(self, *, max_bandwidth: int) -> dict[str, Any]:
        self.max_bandwidth = max_bandwidth
        return {}

    def do_query_migrate(self) -> dict[str, Any]:
        if self.status is None:
            return {}
        return {"status": self.status, **({"ram": {"normal": self.pages, "duplicate": 0}} if self.pages else {})}

    def do_migrate_cancel(self) -> dict[str, Any]:
        if self.ends_when_cancelled:
            self.status = "cancelled"
        return {}

    def do_closefd(self, *, fdname: str) -> dict[str, Any]:
        if fdname not in self.files:
            return {"error": {"class": "GenericError", "desc": f"File descriptor named '{fdname}' not found"}}
        self.files.discard(fdname)
        return {}


def _named(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("-", "_"): value for name, value in arguments.items()}


@pytest.fixture
def qemu(monkeypatch: pytest.MonkeyPatch) -> Qemu:
    monkeypatch.setattr(libvirt_qemu, "qemuMonitorCommand", lambda domain, request, _flags: domain.answer(request))
    return Qemu()


def give_back(qemu: Qemu, *, detail: BackgroundDetail | None = DETAIL, seconds: float = 5) -> None:
    background.give_back(qemu, detail=detail, until=time.monotonic() + seconds)


def as_it_was(qemu: Qemu) -> bool:
    return (qemu.capability, qemu.max_bandwidth, qemu.files) == (False, DETAIL.max_bandwidth, set())


def test_what_is_allowed_is_given_back(qemu: Qemu) -> None:
    assert background.describe(qemu) == DETAIL
    background.allow(Monitor(qemu))
    assert (qemu.capability, qemu.max_bandwidth) == (True, UNLIMITED)
    give_back(qemu)
    assert as_it_was(qemu)
    give_back(qemu)
    assert as_it_was(qemu)


@pytest.mark.parametrize("status", ["setup", "active", "failed", "cancelled", "completed", None])
def test_whatever_a_dead_run_left_is_ended_and_given_back(qemu: Qemu, status: str | None) -> None:
    background.allow(Monitor(qemu))
    qemu.files.add(background.STREAM)
    qemu.status = status
    give_back(qemu)
    assert as_it_was(qemu)
    assert qemu.status not in ("setup", "active")


@pytest.mark.parametrize("status", ["setup", "active", "completed", "failed"])
@pytest.mark.parametrize("pages", [0, 7])
@pytest.mark.parametrize("reason", [libvirt.VIR_DOMAIN_PAUSED_USER, libvirt.VIR_DOMAIN_PAUSED_IOERROR])
def test_nothing_that_qemu_says_tells_whose_pause_it_is(qemu: Qemu, status: str, pages: int, reason: int) -> None:
    """The counters may be those of the capture before, or be gone with a broken stream."""
    stopped = [libvirt.VIR_DOMAIN_PAUSED, reason]
    background.allow(Monitor(qemu))
    qemu.status, qemu.pages, qemu.at = status, pages, stopped
    give_back(qemu)
    assert qemu.state() == stopped
    assert as_it_was(qemu)


def test_a_snapshot_that_does_not_end_is_reported(qemu: Qemu) -> None:
    background.allow(Monitor(qemu))
    qemu.status, qemu.ends_when_cancelled = "active", False
    with pytest.raises(DeadlineError, match="does not end"):
        give_back(qemu, seconds=0.1)


def test_without_a_journal_only_a_used_monitor_is_looked_at(qemu: Qemu) -> None:
    background.allow(Monitor(qemu))
    give_back(qemu, detail=None)
    assert not qemu.capability
    qemu.monitor_used = False
    qemu.asked.clear()
    give_back(qemu, detail=None)
    assert qemu.asked == []


def test_what_qemu_refuses_is_said(qemu: Qemu) -> None:
    qemu.refuses = "migrate-set-capabilities"
    with pytest.raises(PreconditionError, match="Userfaultfd not available") as caught:
        background.allow(Monitor(qemu))
    assert "doctor" in str(caught.value.remedy)
    qemu.refuses = "closefd"
    with pytest.raises(MonitorError):
        Monitor(qemu).take_file_back("x")


@pytest.mark.parametrize(
    ("comm", "wchan", "found"),
    [("bg_snapshot", "anon_pipe_write", True), ("bg_snapshot", "0", False), ("CPU 0/KVM", "pipe_write", None)],
)
def test_qemu_waiting_for_its_reader_is_seen(tmp_path: Path, comm: str, wchan: str, found: bool | None) -> None:  # noqa: FBT001
    (tmp_path / "db1.pid").write_text("77")
    task = tmp_path / "77" / "task" / "78"
    task.mkdir(parents=True)
    (task / "comm").write_text(comm + "\n")
    (task / "wchan").write_text(wchan)
    assert background.waits_for_reader("db1", pid_files=tmp_path, proc=tmp_path) is found
    assert background.waits_for_reader("db2", pid_files=tmp_path, proc=tmp_path) is None


def test_qemu_is_kept_waiting_only_where_its_lock_is_free() -> None:
    assert background.can_be_held(7_002_022)
    assert background.can_be_held(8_001_005)
    assert not background.can_be_held(8_002_000)


@pytest.fixture
def _left_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "pid_of", lambda _guest: 77)
    monkeypatch.setattr(unprotect, "is_left_open", lambda _pid: True)
    monkeypatch.setattr(unprotect, "let_go_on", lambda _pid, seconds: seconds > 0)


@pytest.mark.usefixtures("_left_open")
@pytest.mark.parametrize(
    ("status", "left"), [("failed", True), ("cancelled", True), ("completed", False), (None, False)]
)
def test_what_a_failed_snapshot_leaves_in_qemu_is_told(
    qemu: Qemu,
    caplog: pytest.LogCaptureFixture,
    status: str | None,
    left: bool,  # noqa: FBT001
) -> None:
    qemu.status = status
    assert background.is_left_by_a_failure(qemu) is left
    give_back(qemu)
    assert ("fails every migration" in caplog.text) is left
    qemu.monitor_used = False
    assert not background.is_left_by_a_failure(qemu)


def test_what_is_given_back_is_back_though_qemu_cannot_be_looked_at(
    qemu: Qemu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(_pid: int) -> bool:
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(background, "pid_of", lambda _guest: 77)
    monkeypatch.setattr(unprotect, "let_go_on", lambda _pid, seconds: seconds > 0)
    monkeypatch.setattr(unprotect, "is_left_open", refused)
    background.allow(Monitor(qemu))
    qemu.status = "failed"
    give_back(qemu)
    assert as_it_was(qemu)
    assert caplog.text == ""
