"""Which mode a guest is captured in, and what mode ``instant`` needs of guest and host."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

from vmsnap.hypervisors.libvirt import background, copies, preflight, unprotect
from vmsnap.hypervisors.libvirt.connection import Connection, translated
from vmsnap.hypervisors.libvirt.inspect import memory_bytes
from vmsnap.hypervisors.libvirt.monitor import BACKGROUND_SNAPSHOT, Monitor, was_used
from vmsnap.hypervisors.libvirt.processes import pid_of
from vmsnap.hypervisors.libvirt.xml import parse
from vmsnap.model.capture import CaptureChoice, CaptureMode, CaptureSettings, DiskSnapshot, ModeChoice, OnNoConvergence
from vmsnap.model.guest import Finding, Guest, Severity

_MIB = 1 << 20
_FIRST_LIBVIRT = 8_002_000
_QEMU_WITH_DEVICE = 8_000_000
_SYS_PTRACE = 1 << 19
_DEVICE = "dev/userfaultfd"
_WIDE = "let every user: sysctl vm.unprivileged_userfaultfd=1 (and a file in /etc/sysctl.d)"
_NARROW = (
    'let QEMU\'s group alone: a udev rule KERNEL=="userfaultfd", GROUP="kvm", MODE="0660", "/dev/userfaultfd" in '
    "cgroup_device_acl of /etc/libvirt/qemu.conf, libvirtd and the guest started anew"
)


@dataclass(frozen=True, kw_only=True)
class HostFacts:
    """What the host offers. ``proc`` is where processes are seen."""

    qemu_version: int
    libvirt_version: int
    available_bytes: int
    proc: Path = Path("/proc")


def facts_of(connection: Connection) -> HostFacts:
    """Return what the host offers now."""
    with translated("ask for versions"):
        libvirtd = connection.get()
        qemu_version, libvirt_version = int(libvirtd.getVersion()), int(libvirtd.getLibVersion())
    meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
    return HostFacts(
        qemu_version=qemu_version,
        libvirt_version=libvirt_version,
        available_bytes=preflight.available_memory_bytes(meminfo),
    )


def choose(connection: Connection, *, guest: Guest, settings: CaptureSettings) -> ModeChoice:
    """Return the mode to capture a guest in: the policy's, or for ``auto`` the one that suits it now, and why."""
    choice = _wished(connection, guest=guest, settings=settings)
    may_go_over = settings.mode is CaptureChoice.AUTO or copies.may_be_instant(settings, choice.mode)
    if choice.mode is not CaptureMode.LIVE or not may_go_over or not _cannot_migrate(connection, guest):
        return choice
    if _obstacles(connection, guest, settings):
        return choice
    return ModeChoice(mode=CaptureMode.INSTANT, reason=f"not live: {background.LEFT_BY_A_FAILURE}")


def _wished(connection: Connection, *, guest: Guest, settings: CaptureSettings) -> ModeChoice:
    if settings.mode is not CaptureChoice.AUTO:
        return ModeChoice(mode=CaptureMode(settings.mode), reason="the policy says so")
    return suitable(_live_xml(connection, guest), facts=facts_of(connection), settings=settings)


def _obstacles(connection: Connection, guest: Guest, settings: CaptureSettings) -> list[str]:
    return _refusals(check(_live_xml(connection, guest), facts=facts_of(connection), settings=settings))


def _cannot_migrate(connection: Connection, guest: Guest) -> bool:
    domain = connection.domain(guest.name)
    with translated(f"look at {guest.name!r}"):
        active = bool(domain.isActive())
    return active and background.is_left_by_a_failure(domain)


def suitable(domain: ET.Element, *, facts: HostFacts, settings: CaptureSettings) -> ModeChoice:
    """Return the mode that suits a guest: ``live`` where it can be had, without its memory only where that cannot be taken."""
    no_memory = [*_refusals(preflight.check_devices(domain)), *_refusals(preflight.check_memory_backing(domain))]
    if no_memory:
        return ModeChoice(mode=CaptureMode.BOOT, reason=f"auto: its memory cannot be taken: {no_memory[0]}")
    obstacles = _refusals(check(domain, facts=facts, settings=settings))
    needed = preflight.peak_bytes(memory_bytes(domain), settings=settings)
    if facts.available_bytes < needed and not obstacles:
        return ModeChoice(
            mode=CaptureMode.INSTANT,
            reason=f"auto: the host has {facts.available_bytes // _MIB} MiB of memory available, and live needs "
            f"{needed // _MIB} MiB",
        )
    otherwise = f"instant is not to be had: {obstacles[0]}" if obstacles else "instant where it does not converge"
    return ModeChoice(mode=CaptureMode.LIVE, reason=f"auto: live as long as it converges; {otherwise}")


def settle(connection: Connection, *, guest: Guest, settings: CaptureSettings) -> CaptureSettings:
    """Let a capture that ``auto`` begins live go over to ``instant``, where that can be had and the policy says no more."""
    if settings.mode is not CaptureChoice.AUTO or settings.on_no_convergence is not OnNoConvergence.ABORT:
        return settings
    if _obstacles(connection, guest, settings):
        return settings
    return replace(settings, on_no_convergence=OnNoConvergence.INSTANT)


def instant_bytes(ram_bytes: int) -> int:
    """Return the memory that has to be free for mode ``instant``: the clone's, and what the host keeps."""
    return ram_bytes + preflight.KEEP_FREE_BYTES


def _live_xml(connection: Connection, guest: Guest) -> ET.Element:
    with translated(f"describe {guest.name!r}"):
        return parse(connection.domain(guest.name).XMLDesc(0))


def _refusals(findings: Iterator[Finding]) -> list[str]:
    return [finding.message for finding in findings if finding.severity is Severity.REFUSAL]


def check(domain: ET.Element, *, facts: HostFacts, settings: CaptureSettings) -> Iterator[Finding]:
    """Check what mode ``instant`` needs: versions, how the guest's RAM is backed, room, and QEMU's permission."""
    if facts.qemu_version < background.FIRST_QEMU:
        yield _refusal(f"QEMU {_version(facts.qemu_version)} has no background snapshots", "install QEMU 6.0 or newer")
        return
    if facts.libvirt_version < _FIRST_LIBVIRT:
        yield _refusal(
            f"libvirt {_version(facts.libvirt_version)} cannot hand QEMU a file", "install libvirt 8.2 or newer"
        )
    backing = _backing(domain)
    if backing is not None:
        yield _refusal(
            f"its memory is {backing}, which QEMU cannot take in the background",
            'let it have memory of its own (no such <memoryBacking>), or set capture.mode = "live"',
        )
    if settings.disk_snapshot is DiskSnapshot.STORAGE:
        yield _refusal(
            "its storage takes the snapshots, which needs mode live", 'set capture.disk_snapshot = "overlay"'
        )
    needed = instant_bytes(memory_bytes(domain))
    if facts.available_bytes < needed:
        yield _refusal(
            f"the host has {facts.available_bytes // _MIB} MiB of memory available; the clone needs {needed // _MIB} MiB",
            "run fewer guests or clones on this host at a time, or add memory",
        )
    privileged = int(_field(_read(facts.proc / "self/status"), "CapEff", default="0"), 16) & _SYS_PTRACE
    if not (privileged and unprotect.is_permitted()):
        yield _refusal(
            "vmsnap may not let a guest go on whose memory stream broke (CAP_SYS_PTRACE, pidfd_getfd)",
            "run it as root; in a unit, CapabilityBoundingSet needs CAP_SYS_PTRACE, and SystemCallFilter pidfd_getfd",
        )
    yield _check_permission(domain.findtext("name") or "", facts=facts)


def _backing(domain: ET.Element) -> str | None:
    if domain.find("memoryBacking/hugepages") is not None:
        return "in huge pages"
    source = domain.find("memoryBacking/source")
    if source is not None and source.get("type") in ("file", "memfd"):
        return f"in a {source.get('type')}"
    access = domain.find("memoryBacking/access")
    cells = [cell.get("memAccess") for cell in domain.findall("cpu/numa/cell")]
    shared = "shared" in (*cells, "" if access is None else access.get("mode", ""))
    return "shared with other programs" if shared else None


def _check_permission(guest: str, *, facts: HostFacts) -> Finding:
    """Check whether QEMU may watch its guest's memory (userfaultfd): Linux, Documentation/admin-guide/mm/userfaultfd.rst."""
    ways = []
    if _read(facts.proc / "sys/vm/unprivileged_userfaultfd").strip() == "1":
        ways.append("every user of the host")
    pid = pid_of(guest)
    status = "" if pid is None else _read(facts.proc / str(pid) / "status")
    if int(_field(status, "CapEff", default="0"), 16) & _SYS_PTRACE:
        ways.append("this QEMU, by CAP_SYS_PTRACE")
    if facts.qemu_version >= _QEMU_WITH_DEVICE and pid is not None and _may_open(facts.proc / str(pid), status):
        ways.append("this QEMU, by /dev/userfaultfd")
    if ways:
        return Finding(check="instant", severity=Severity.OK, message=f"userfaultfd is allowed to {ways[-1]}")
    device = facts.qemu_version >= _QEMU_WITH_DEVICE
    narrow = (
        f"{_NARROW}; or "
        if device
        else "with QEMU 8.0 its group alone could be let, by /dev/userfaultfd; with this one "
    )
    return _refusal("QEMU may not watch the guest's memory (userfaultfd)", narrow + _WIDE)


def _may_open(process: Path, status: str) -> bool:
    """Tell whether a process may open the device, in its own view of ``/dev`` and by the device's owner and mode."""
    try:
        device = (process / "root" / _DEVICE).stat()
    except OSError:
        return False
    users = _field(status, "Uid", default="").split()
    groups = {*_field(status, "Gid", default="").split(), *_field(status, "Groups", default="").split()}
    if str(device.st_uid) in users[1:2]:
        return device.st_mode & 0o600 == 0o600
    return device.st_mode & (0o060 if str(device.st_gid) in groups else 0o006) in (0o060, 0o006)


def check_left_on(domain: Any, *, guest: str) -> Iterator[Finding]:
    """Check that nobody left QEMU's capability on: memory and disks of a capture in another mode would differ."""
    if was_used(domain) and Monitor(domain).is_capable(BACKGROUND_SNAPSHOT):
        command = f"--hmp migrate_set_capability {BACKGROUND_SNAPSHOT} off"
        yield Finding(
            check="migration",
            severity=Severity.REFUSAL,
            message="QEMU's migration capability background-snapshot is on; it belongs to no run that goes on",
            remedy=f"run 'vmsnap reconcile'; if another tool set it: virsh qemu-monitor-command {quote(guest)} {command}",
        )


def check_left_by_a_failure(domain: Any) -> Iterator[Finding]:
    """Check that QEMU can migrate the guest, which a background snapshot that failed may have ended."""
    if background.is_left_by_a_failure(domain):
        # It cannot be told for certain, so this alone refuses nothing.
        yield Finding(
            check="migration",
            severity=Severity.WARNING,
            message=background.LEFT_BY_A_FAILURE,
            remedy=background.LEFT_REMEDY,
        )


def _refusal(message: str, remedy: str) -> Finding:
    return Finding(check="instant", severity=Severity.REFUSAL, message=message, remedy=remedy)


def _version(number: int) -> str:
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def _field(status: str, name: str, *, default: str) -> str:
    match = re.search(rf"^{name}:\s*(.*)$", status, re.MULTILINE)
    return default if match is None else match[1].strip()
