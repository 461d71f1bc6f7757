"""Everything that is looked at before a guest is captured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from shlex import quote

import libvirt

from vmsnap.hypervisors.libvirt import boot, copies, modes, preflight, storage
from vmsnap.hypervisors.libvirt.connection import Connection, translated
from vmsnap.hypervisors.libvirt.inspect import disk_target, writable_disks
from vmsnap.hypervisors.libvirt.swap import check_swap
from vmsnap.hypervisors.libvirt.vcpulimits import check_limits
from vmsnap.hypervisors.libvirt.xml import parse
from vmsnap.model.capture import CaptureMode, CaptureSettings, DiskSnapshot, OnNoConvergence
from vmsnap.model.guest import Finding, Guest, GuestState, Severity


def findings_of(
    connection: Connection, *, guest: Guest, settings: CaptureSettings, mode: CaptureMode
) -> tuple[Finding, ...]:
    """Look whether a guest can be captured now, in a mode. See ports.hypervisor."""
    domain = connection.domain(guest.name)
    with translated(f"describe {guest.name!r}"):
        root = parse(domain.XMLDesc(0))
        definition = parse(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
        qemu_version = connection.get().getVersion()
        busy = domain.isActive() and domain.jobInfo()[0] != libvirt.VIR_DOMAIN_JOB_NONE
        targets = [disk_target(disk) for disk in writable_disks(root)] if domain.isActive() else []
        pulled = [target for target in targets if domain.blockJobInfo(target)]
    found = []
    if guest.state is not GuestState.RUNNING:
        found.append(
            Finding(
                check="state",
                severity=Severity.REFUSAL,
                message=f"the guest is {guest.state}; only a running guest can be cloned",
                remedy=_how_to_run(guest),
            )
        )
    if busy:
        found.append(
            Finding(
                check="jobs",
                severity=Severity.REFUSAL,
                message="another job (migration, save, backup) runs on the guest",
                remedy="wait for it; see 'virsh domjobinfo'",
            )
        )
    found.extend(
        Finding(
            check=f"disk {target}",
            severity=Severity.REFUSAL,
            message="a block job runs on it",
            remedy=f"wait for it, or end it; see: virsh blockjob {quote(guest.name)} {target}",
        )
        for target in pulled
    )
    meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
    available = preflight.available_memory_bytes(meminfo)
    if mode is CaptureMode.BOOT:
        found.extend(boot.check_devices(root))
        found.append(boot.check_memory(root, settings=settings, available_bytes=available))
    else:
        found.extend(preflight.check_devices(root))
        found.extend(preflight.check_emulation(root, qemu_version=qemu_version, settings=settings))
        found.extend(preflight.check_memory_backing(root))
        found.extend(check_swap(settings.swap))
        if settings.on_no_convergence is OnNoConvergence.THROTTLE and guest.state is GuestState.RUNNING:
            found.append(check_limits(guest.name))
        if mode is CaptureMode.LIVE:
            found.extend(preflight.check_memory(root, meminfo=meminfo, settings=settings))
    if domain.isActive():
        found.extend(modes.check_left_on(domain, guest=guest.name))
        found.extend(modes.check_left_by_a_failure(domain))
        if copies.may_be_instant(settings, mode):
            needs = modes.check(root, facts=modes.facts_of(connection), settings=settings)
            found.extend(needs if mode is CaptureMode.INSTANT else map(_only_warned, needs))
    found.extend(preflight.check_definition(root, definition=definition))
    found.extend(preflight.check_tpm(root))
    found.extend(preflight.check_disks(root, settings=settings))
    if settings.disk_snapshot is DiskSnapshot.STORAGE:
        found.extend(storage.check(guest, settings=settings, mode=mode))
    else:
        found.append(copies.check(guest, settings=settings, mode=mode))
    found.extend(preflight.check_agent(root))
    return tuple(found)


def _only_warned(finding: Finding) -> Finding:
    """Return the finding as a warning: what it is about may not be needed."""
    return replace(finding, severity=Severity.WARNING) if finding.severity is Severity.REFUSAL else finding


def _how_to_run(guest: Guest) -> str:
    if guest.state is GuestState.PAUSED:
        return f"virsh resume {quote(guest.name)}; why it is paused: virsh domstate --reason {quote(guest.name)}"
    return f"virsh start {quote(guest.name)}; a guest that is off is clean as it is: copy its disks"
