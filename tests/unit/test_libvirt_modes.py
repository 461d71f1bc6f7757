"""Which mode suits a guest, and what mode ``instant`` needs: versions, the kind of memory, room, permission."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.libvirt_domains import domain_xml, guest_of
from tests.unit.test_libvirt_background import Qemu, qemu
from vmsnap.hypervisors.libvirt import background, modes, processes, unprotect
from vmsnap.hypervisors.libvirt.connection import Connection
from vmsnap.hypervisors.libvirt.inspect import memory_bytes
from vmsnap.hypervisors.libvirt.modes import HostFacts
from vmsnap.hypervisors.libvirt.xml import parse
from vmsnap.model.capture import (
    CaptureChoice,
    CaptureMode,
    CaptureSettings,
    DiskSnapshot,
    ModeChoice,
    OnNoConvergence,
)
from vmsnap.model.guest import Finding, Severity

__all__ = ["qemu"]
SETTINGS = CaptureSettings()
PID = 77


class Host:
    """A host whose ``/proc`` is a folder, and on which the guest's QEMU runs as user 64055, group 109."""

    def __init__(self, folder: Path) -> None:
        self.proc = folder / "proc"
        self.process = self.proc / str(PID)
        (self.proc / "sys/vm").mkdir(parents=True)
        (self.process / "root/dev").mkdir(parents=True)
        (self.proc / "self").mkdir()
        (self.proc / "self/status").write_text(f"CapEff:\t{1 << 19:016x}\n")
        self.allow_everybody(yes=False)
        self.capabilities(0)

    def allow_everybody(self, *, yes: bool) -> None:
        (self.proc / "sys/vm/unprivileged_userfaultfd").write_text(f"{int(yes)}\n")

    def capabilities(self, effective: int) -> None:
        (self.process / "status").write_text(
            f"Uid:\t1\t64055\t1\t1\nGid:\t109\t109\t109\t109\nCapEff:\t{effective:016x}\nGroups:\t109 \n"
        )

    def device(self, mode: int) -> None:
        device = self.process / "root/dev/userfaultfd"
        device.touch()
        device.chmod(mode)

    def facts(self, **changes: int) -> HostFacts:
        known = HostFacts(qemu_version=7_002_022, libvirt_version=9_000_000, available_bytes=99 << 30, proc=self.proc)
        wish: dict[str, Any] = changes
        return replace(known, **wish)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setattr(modes, "pid_of", lambda _guest: PID)
    assert processes.pid_of("none", pid_files=tmp_path) is None
    return Host(tmp_path)


def refusals(host: Host, *, extra: str = "", settings: CaptureSettings = SETTINGS, **facts: int) -> list[Finding]:
    domain = parse(domain_xml().replace("<devices>", f"{extra}<devices>", 1))
    found = modes.check(domain, facts=host.facts(**facts), settings=settings)
    return [finding for finding in found if finding.severity is Severity.REFUSAL]


def test_permission_is_asked_in_the_narrowest_way_there_is(host: Host) -> None:
    (old,) = refusals(host)
    assert "userfaultfd" in old.message
    assert "vm.unprivileged_userfaultfd=1" in (old.remedy or "")
    (new,) = refusals(host, qemu_version=8_000_000)
    assert (new.remedy or "").index("udev rule") < (new.remedy or "").index("vm.unprivileged_userfaultfd=1")


def test_any_way_of_permission_will_do(host: Host) -> None:
    host.capabilities(1 << 19)
    assert refusals(host) == []
    host.capabilities(0)
    host.allow_everybody(yes=True)
    assert refusals(host) == []


@pytest.mark.parametrize(("mode", "allowed"), [(0o666, True), (0o600, False), (0o060, False)])
def test_the_device_serves_whoever_may_open_it(host: Host, mode: int, allowed: bool) -> None:  # noqa: FBT001
    host.device(mode)
    assert (refusals(host, qemu_version=8_000_000) == []) is allowed
    assert refusals(host, qemu_version=7_002_022) != []


@pytest.mark.parametrize(
    ("extra", "facts", "said"),
    [
        ("", {"qemu_version": 5_002_000}, "QEMU 5.2.0 has no background snapshots"),
        ("", {"libvirt_version": 8_001_000}, "libvirt 8.1.0 cannot hand QEMU a file"),
        ("", {"available_bytes": 1 << 20}, "the clone needs"),
        ("<memoryBacking><hugepages/></memoryBacking>", {}, "in huge pages"),
        ("<memoryBacking><source type='memfd'/></memoryBacking>", {}, "in a memfd"),
        ("<memoryBacking><access mode='shared'/></memoryBacking>", {}, "shared with other programs"),
    ],
)
def test_what_is_missing_is_named(host: Host, extra: str, facts: dict[str, int], said: str) -> None:
    host.allow_everybody(yes=True)
    (found,) = refusals(host, extra=extra, settings=SETTINGS, **facts)
    assert said in found.message
    assert found.remedy


def test_storage_snapshots_need_another_mode(host: Host) -> None:
    host.allow_everybody(yes=True)
    assert len(refusals(host, settings=CaptureSettings(disk_snapshot=DiskSnapshot.STORAGE))) == 1


@pytest.mark.parametrize(
    ("allowed", "available", "passthrough", "mode", "said"),
    [
        (True, 99 << 30, False, CaptureMode.LIVE, "instant where it does not converge"),
        (False, 99 << 30, False, CaptureMode.LIVE, "instant is not to be had: QEMU may not watch"),
        (True, None, False, CaptureMode.INSTANT, "live needs"),
        (False, None, False, CaptureMode.LIVE, "instant is not to be had"),
        (True, 99 << 30, True, CaptureMode.BOOT, "its memory cannot be taken: the guest cannot be cloned"),
    ],
)
def test_auto_chooses_and_says_why(
    host: Host,
    allowed: bool,  # noqa: FBT001
    available: int | None,
    passthrough: bool,  # noqa: FBT001
    mode: CaptureMode,
    said: str,
) -> None:
    host.allow_everybody(yes=allowed)
    domain = parse(domain_xml())
    if passthrough:
        domain.find("devices").append(parse("<hostdev mode='subsystem' type='pci'/>"))  # type: ignore[union-attr]
    enough_for_instant = modes.instant_bytes(memory_bytes(domain))
    facts = host.facts(available_bytes=available or enough_for_instant)
    choice = modes.suitable(domain, facts=facts, settings=SETTINGS)
    assert choice.mode is mode
    assert said in choice.reason
    assert choice.reason.startswith("auto: ")


def test_a_capability_left_on_is_refused_for_every_mode(qemu: Qemu) -> None:
    assert list(modes.check_left_on(qemu, guest="db1")) == []
    qemu.capability = True
    (found,) = modes.check_left_on(qemu, guest="db1")
    assert found.severity is Severity.REFUSAL
    assert "background-snapshot off" in (found.remedy or "")
    qemu.monitor_used = False
    assert list(modes.check_left_on(qemu, guest="db1")) == []


class OneGuest(Connection):
    """A libvirtd with one guest."""

    def __init__(self, domain: Qemu) -> None:
        super().__init__("fake:///")
        self._domain = domain

    def domain(self, name: str) -> Any:
        assert name == self._domain.name()
        return self._domain


@pytest.mark.parametrize(
    ("mode", "otherwise", "chosen"),
    [(CaptureChoice.AUTO, OnNoConvergence.ABORT, CaptureMode.INSTANT),
     (CaptureChoice.LIVE, OnNoConvergence.INSTANT, CaptureMode.INSTANT),
     (CaptureChoice.LIVE, OnNoConvergence.ABORT, CaptureMode.LIVE),
     (CaptureChoice.BOOT, OnNoConvergence.INSTANT, CaptureMode.BOOT)],
)  # fmt: skip
def test_a_guest_that_qemu_cannot_migrate_any_more_is_taken_instantly(
    host: Host,
    qemu: Qemu,
    monkeypatch: pytest.MonkeyPatch,
    mode: CaptureChoice,
    otherwise: OnNoConvergence,
    chosen: CaptureMode,
) -> None:
    """QEMU before 8.1, after a background snapshot that failed: only one that succeeds ends it."""
    settings = CaptureSettings(mode=mode, on_no_convergence=otherwise)
    guest = guest_of(domain_xml())
    qemu.live, qemu.status = domain_xml(), "failed"
    left_open = True
    monkeypatch.setattr(background, "pid_of", lambda _guest: PID)
    monkeypatch.setattr(unprotect, "is_left_open", lambda pid: left_open and pid == PID)
    monkeypatch.setattr(modes, "facts_of", lambda _connection: host.facts())

    def choice() -> ModeChoice:
        return modes.choose(OneGuest(qemu), guest=guest, settings=settings)

    # Where QEMU may not take it instantly either, there is nothing better than what the policy says.
    assert choice().mode is not CaptureMode.INSTANT
    host.allow_everybody(yes=True)
    assert choice().mode is chosen
    assert ("fails every migration" in choice().reason) is (chosen is CaptureMode.INSTANT)
    (finding,) = modes.check_left_by_a_failure(qemu)
    assert finding.severity is Severity.WARNING
    device = "<hostdev mode='subsystem' type='pci'><source/></hostdev>"
    qemu.live = domain_xml().replace("</devices>", f"{device}</devices>", 1)
    # Its memory cannot be taken in any mode, so the guest is not taken instantly for want of another.
    assert (choice().mode is CaptureMode.BOOT) is (mode in (CaptureChoice.AUTO, CaptureChoice.BOOT))
    qemu.live = domain_xml()
    left_open = False
    assert choice().mode is not CaptureMode.INSTANT
    assert list(modes.check_left_by_a_failure(qemu)) == []
