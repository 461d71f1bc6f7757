"""Whether a guest of a Hyper-V host can be captured now, and why not. Pure: over what the host said."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PureWindowsPath

from vmsnap.hypervisors.hyperv.rows import Description, Room, Service
from vmsnap.model.capture import CaptureSettings
from vmsnap.model.guest import Finding, Severity

# The GUIDs of integration services are the same in every language: virtualization/hyper-v of Microsoft's documentation.
SHUTDOWN = "9F8233AC-BE49-4C79-8EE3-E7E1985B2077"
HEARTBEAT = "84EAAE65-2F2E-45F5-9BB5-0E857DC8EB47"

_GIB = 1 << 30
# Folders of Windows may not be called so; Export-VM makes one of the VM's name.
_NOT_IN_NAMES = frozenset('<>:"/\\|?*')
# winnt.h, VER_NT_DOMAIN_CONTROLLER.
_DOMAIN_CONTROLLER = 2
_REPLICATION_OFF = frozenset({"Disabled", ""})


def findings_of(description: Description, *, room: Room, settings: CaptureSettings) -> tuple[Finding, ...]:
    """Return what stands against a capture, what an operator should know, and last that the guest was looked at."""
    found = (
        *_state(description),
        *_disks(description),
        *_adapters(description),
        *_devices(description),
        *_services(description),
        *_role(description),
        *_room(description, room=room, settings=settings),
    )
    if any(finding.severity is Severity.REFUSAL for finding in found):
        return found
    name = description.machine.name
    return (*found, _finding("hyper-v", Severity.OK, f"{name!r} on {room.computer} can be captured"))


def _finding(check: str, severity: Severity, message: str, remedy: str | None = None) -> Finding:
    return Finding(check=check, severity=severity, message=message, remedy=remedy)


def _refusal(check: str, message: str, remedy: str) -> Finding:
    return _finding(check, Severity.REFUSAL, message, remedy)


def _warning(check: str, message: str, remedy: str) -> Finding:
    return _finding(check, Severity.WARNING, message, remedy)


def _state(description: Description) -> Iterator[Finding]:
    machine = description.machine
    if machine.state != "Running":
        yield _refusal(
            "state",
            f"the guest is {machine.state}; only a running one can be captured",
            "start it, or leave it out of the schedule while it does not run",
        )
    if description.clustered:
        yield _refusal(
            "cluster",
            "the guest is owned by a failover cluster, which may move it to another host in the middle of a run",
            "vmsnap backs up guests of a single host; take the role out of the cluster, or back it up by other means",
        )
    if description.checkpoints:
        yield _refusal(
            "checkpoints",
            f"the guest has {description.checkpoints} checkpoints; its disks are chains, and would be exported as such",
            "remove them (Remove-VMCheckpoint) and wait until they are merged; turn automatic checkpoints off",
        )
    if description.replication not in _REPLICATION_OFF:
        yield _warning(
            "replication",
            f"the guest is replicated by Hyper-V Replica ({description.replication}); its clone is not",
            "nothing to do; replication goes on while the guest is exported",
        )
    bad = sorted(_NOT_IN_NAMES & set(machine.name))
    if bad or machine.name != machine.name.strip(" .") or not machine.name.isprintable():
        yield _refusal(
            "name",
            f"Export-VM makes a folder of the guest's name, and {machine.name!r} cannot be one",
            f"rename it without {' '.join(bad) or 'spaces and dots at its ends, and control characters'}",
        )


def _disks(description: Description) -> Iterator[Finding]:
    if not description.drives:
        yield _refusal("disks", "the guest has no disks", "there is nothing to back up")
    names = [PureWindowsPath(drive.path).name.lower() for drive in description.drives if drive.path]
    if len(set(names)) != len(names):
        yield _refusal(
            "disks",
            "two of the guest's disks have files of one name; Export-VM puts all of them into one folder",
            "give them different file names: stop the guest, rename one, and Set-VMHardDiskDrive",
        )
    for drive in description.drives:
        check = f"disk {drive.target}"
        if drive.physical:
            yield _refusal(check, "it is a disk of the host passed through", "move its data to a virtual disk")
        elif not drive.path:
            yield _refusal(check, "the drive has no disk in it", "remove the empty drive")
        elif drive.shared or drive.vhd_format.upper() not in ("VHD", "VHDX"):
            yield _refusal(
                check,
                f"it is shared with other VMs ({drive.vhd_format or 'no format'}): a clone would write it too",
                "a guest with shared disks cannot be captured; back up the cluster that shares it by its own means",
            )
        elif drive.parent:
            yield _refusal(
                check,
                f"it stands on another disk, {drive.parent}",
                "remove checkpoints and wait until they are merged; convert a differencing disk (Convert-VHD)",
            )


def _adapters(description: Description) -> Iterator[Finding]:
    for adapter in description.adapters:
        check = f"adapter {adapter.mac}"
        if adapter.iov_weight:
            yield _refusal(
                check,
                "it uses SR-IOV, which goes past the virtual switch",
                "turn it off: Set-VMNetworkAdapter -IovWeight 0",
            )
        if not adapter.dynamic:
            yield _warning(
                check,
                "its MAC is fixed: with the guest's memory it is in the clone as well, and Hyper-V may refuse to start two "
                "VMs with one MAC on a host; the clone is then started with this adapter unplugged",
                "give it a dynamic MAC where the guest allows that; this was not tried on a real host yet",
            )


def _devices(description: Description) -> Iterator[Finding]:
    if description.devices:
        yield _refusal(
            "devices",
            f"{description.devices} devices of the host are assigned to the guest",
            "a guest with assigned devices cannot be captured",
        )
    if description.fibre_channel:
        yield _refusal(
            "fibre channel",
            "the guest has virtual Fibre Channel adapters: a clone would reach the same storage",
            "a guest with storage of its own on a fabric cannot be captured",
        )
    if description.shielded:
        yield _refusal(
            "shielded",
            "the guest is shielded from its host: PowerShell Direct reaches neither it nor its clone",
            "a shielded guest cannot be captured",
        )
    if description.tpm:
        yield _warning(
            "tpm",
            "the guest has a virtual TPM; test VMs get none, so disks that BitLocker encrypts cannot be opened in them",
            "back up recovery keys",
        )


def _role(description: Description) -> Iterator[Finding]:
    if description.product_type == _DOMAIN_CONTROLLER:
        yield _refusal(
            "role",
            "the guest is a domain controller: a clone has another VM generation id, by which it knows itself for a copy, and "
            "writes that into its directory",
            "back up the directory by Windows Server Backup; databases belong on another guest",
        )


def _services(description: Description) -> Iterator[Finding]:
    by_guid: dict[str, Service] = {service.guid: service for service in description.services}
    shutdown = by_guid.get(SHUTDOWN)
    if shutdown is None or not shutdown.enabled:
        yield _refusal(
            "integration services",
            "the service that shuts a guest down is off; its clone is never turned off instead",
            "Enable-VMIntegrationService for the guest's shutdown service",
        )
    elif description.machine.state == "Running" and shutdown.status.lower() not in ("ok", ""):
        yield _warning(
            "integration services",
            f"the guest's shutdown service does not answer ({shutdown.status})",
            "are the integration services running in the guest?",
        )
    heartbeat = by_guid.get(HEARTBEAT)
    if heartbeat is not None and not heartbeat.enabled:
        yield _warning("integration services", "the guest's heartbeat is off", "turn it on, so that its state is known")


def _room(description: Description, *, room: Room, settings: CaptureSettings) -> Iterator[Finding]:
    memory = max(description.memory_bytes, description.assigned_bytes)
    if room.free_memory_bytes < memory:
        yield _refusal(
            "memory",
            f"the clone needs {memory / _GIB:.1f} GiB of memory; {room.computer} has {room.free_memory_bytes / _GIB:.1f} left",
            "stop VMs, or move some to another host",
        )
    # The export and the clone made of it; saved memory in both.
    needed = 2 * (sum(drive.file_bytes for drive in description.drives) + memory) + settings.min_overlay_free_bytes
    if room.free_bytes < needed:
        yield _refusal(
            "export folder",
            f"export and clone need {needed / _GIB:.1f} GiB; {room.free_bytes / _GIB:.1f} are left in the folder of exports",
            "make room on that volume, or set hyperv.export_folder to another one",
        )
