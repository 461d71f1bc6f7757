"""What a Hyper-V host says about a guest, as model values."""

from __future__ import annotations

from ipaddress import IPv4Interface
from pathlib import PureWindowsPath

from pydantic import BaseModel, ConfigDict, ValidationError

from vmsnap.errors import GuestNotFoundError, PreconditionError
from vmsnap.hypervisors.hyperv.host import Host
from vmsnap.hypervisors.hyperv.rows import Adapter, Description, Machine, state_of
from vmsnap.model.guest import Disk, DiskKind, Guest, Nic
from vmsnap.model.manifest import MachineRecord

HYPERVISOR = "hyper-v"
_FORMATS = {"VHDX": "vhdx", "VHD": "vpc"}


class DiskPlace(BaseModel):
    """Where a disk is plugged in."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: str
    controller: str
    number: int
    location: int


class MachineDefinition(BaseModel):
    """What is needed to make such a VM again: the text of ``MachineRecord.definition``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    generation: int
    secure_boot: bool
    secure_boot_template: str
    disks: tuple[DiskPlace, ...]


def find_guest(host: Host, name: str) -> Machine:
    """Return the VM of that name. Names are compared as they are: Hyper-V's own look-up takes wildcards.

    Raises GuestNotFoundError, PreconditionError for one that vmsnap made, and where two bear the name.
    """
    named = [machine for machine in host.machines() if machine.name == name]
    if not named:
        raise GuestNotFoundError(
            f"the Hyper-V host has no VM {name!r}", remedy="see Get-VM there; capital and small letters count"
        )
    guests = [machine for machine in named if host.run_of(machine) is None]
    if not guests:
        raise PreconditionError(
            f"{name!r} is a clone or an environment that vmsnap made, not a guest to back up",
            remedy="name the guest that it was made from",
        )
    if len(guests) > 1:
        raise PreconditionError(
            f"the Hyper-V host has {len(guests)} VMs of the name {name!r}",
            details="\n".join(f"{machine.id} in {machine.folder}" for machine in guests),
            remedy="Hyper-V allows that, a policy cannot tell them apart: rename one (Rename-VM)",
        )
    return guests[0]


def guest_of(description: Description) -> Guest:
    """Return the guest that a description is of."""
    return Guest(
        name=description.machine.name,
        uuid=description.machine.id,
        state=state_of(description.machine.state),
        memory_bytes=max(description.memory_bytes, description.assigned_bytes),
        vcpus=description.processors,
        disks=tuple(
            Disk(
                target=drive.target,
                kind=DiskKind.BLOCK if drive.physical else DiskKind.FILE,
                source=drive.path,
                image_format=image_format(drive.vhd_format),
                size_bytes=drive.size_bytes,
            )
            for drive in description.drives
        ),
        nics=nics_of(description.adapters),
        # PowerShell Direct needs nothing in the guest but Windows itself.
        has_agent_channel=True,
    )


def image_format(vhd_format: str) -> str:
    """Return QEMU's word for a format of virtual disks, or Hyper-V's where QEMU has none."""
    return _FORMATS.get(vhd_format.upper(), vhd_format.lower() or "none")


def nics_of(adapters: tuple[Adapter, ...]) -> tuple[Nic, ...]:
    """Return adapters as NICs, in their order."""
    return tuple(
        Nic(
            index=index,
            mac=adapter.mac,
            attached_to=adapter.switch or "none",
            addresses=tuple(IPv4Interface(address) for address in adapter.addresses),
        )
        for index, adapter in enumerate(adapters)
    )


def record_of(description: Description) -> MachineRecord:
    """Return what is needed to make such a VM again."""
    definition = MachineDefinition(
        generation=description.generation,
        secure_boot=description.secure_boot,
        secure_boot_template=description.secure_boot_template,
        disks=tuple(
            DiskPlace(target=drive.target, controller=drive.controller, number=drive.number, location=drive.location)
            for drive in description.drives
        ),
    )
    return MachineRecord(
        hypervisor=HYPERVISOR,
        definition=definition.model_dump_json(),
        uuid=description.machine.id,
        memory_bytes=description.memory_bytes,
        vcpus=description.processors,
        macs=tuple(adapter.mac for adapter in description.adapters),
    )


def definition_of(machine: MachineRecord) -> MachineDefinition:
    """Return the definition in a record. Raises PreconditionError for one of another hypervisor, or damaged."""
    if machine.hypervisor != HYPERVISOR:
        raise PreconditionError(
            f"the snapshot is of a guest of {machine.hypervisor}; Hyper-V cannot make a VM of its definition",
            remedy=f"provision it where {machine.hypervisor} is",
        )
    try:
        return MachineDefinition.model_validate_json(machine.definition)
    except ValidationError as error:
        raise PreconditionError(
            "the definition of the VM in the snapshot makes no sense",
            details=str(error),
            remedy="'vmsnap verify' tells whether the snapshot is damaged",
        ) from error


def disk_sources(description: Description) -> dict[str, PureWindowsPath]:
    """Return the files that a VM's disks are on now, by target; paths of Windows compare without regard to case."""
    return {drive.target: PureWindowsPath(drive.path) for drive in description.drives}
