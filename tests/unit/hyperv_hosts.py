"""Hosts and guests for tests of what is done on them."""

from __future__ import annotations

import uuid
from pathlib import Path

from vmsnap.testing.hyperv.failures import Speech
from vmsnap.testing.hyperv.machine import HyperVHost
from vmsnap.testing.hyperv.values import (
    Controller,
    HardDiskDrive,
    Inside,
    SwitchType,
    VirtualMachine,
    VMNetworkAdapter,
    VMState,
    VMSwitch,
)
from vmsnap.testing.hyperv.vhd import write_headers

DISK_BYTES = 256 << 20
EXPORTS = "D:\\vmsnap"


def make_host(
    folder: Path, *, speech: Speech | None = None, disks: int = 1, inside: Inside | None = None
) -> HyperVHost:
    """Return a host with a switch of production and the running VM ``db``."""
    host = HyperVHost(folder, speech=speech)
    host.add_switch("LAN")
    host.files.make_folder(EXPORTS)
    host.files.share("vmsnap", path=EXPORTS)
    add_guest(host, "db", disks=disks, inside=inside)
    return host


def add_guest(
    host: HyperVHost, name: str, *, disks: int = 1, inside: Inside | None = None, generation: int = 2, folder: str = ""
) -> VirtualMachine:
    """Put a running VM of production on a host."""
    place = folder or f"C:\\VMs\\{len(host.vms)}"
    host.files.make_folder(place)
    drives = []
    for index in range(disks):
        path = f"{place}\\disk{index}.vhdx"
        write_headers(host.files.local(path), size_bytes=DISK_BYTES)
        kind = Controller.IDE if generation == 1 and index < 4 else Controller.SCSI
        drives.append(HardDiskDrive(path=path, controller_location=index, controller_type=kind))
    vm = VirtualMachine(
        name=name,
        id=str(uuid.uuid5(uuid.NAMESPACE_OID, f"{name}{len(host.vms)}")),
        state=VMState.RUNNING,
        generation=generation,
        hard_drives=drives,
        network_adapters=[VMNetworkAdapter(mac_address=f"00155D0000{len(host.vms) + 1:02X}", switch_name="LAN")],
    )
    if inside is not None:
        vm.truth.inside = inside
    return host.add_vm(vm)


def fence_switch(host: HyperVHost) -> VMSwitch:
    """Return a switch for one clone."""
    return host.new_vm_switch(name="vmsnap-1", switch_type=SwitchType.PRIVATE, notes="vmsnap 1")


def export(host: HyperVHost, *, name: str = "db") -> str:
    """Export a VM into a fresh folder; return its configuration's path."""
    (vm,) = host.get_vm(name=name)
    folder = f"{EXPORTS}\\{uuid.uuid4()}"
    host.new_item(path=folder)
    host.export_vm(vm=vm, path=folder)
    return f"{folder}\\{name}\\Virtual Machines\\{vm.id.upper()}.vmcx"


def clone(host: HyperVHost, *, name: str = "db") -> VirtualMachine:
    """Bring a VM back as a clone, as the design has it: planned, cut off, renamed, and only then made real."""
    path = export(host, name=name)
    folder = f"{EXPORTS}\\clone"
    report = host.compare_vm(
        path=path, copy=True, generate_new_id=True, virtual_machine_path=folder, vhd_destination_path=folder
    )
    for adapter in report.vm.network_adapters:
        host.disconnect_vm_network_adapter(vm_network_adapter=adapter)
    host.rename_vm(vm=report.vm, new_name="vmsnap-clone-1")
    host.set_vm(vm=report.vm, notes="vmsnap 1", automatic_start_action="Nothing", automatic_checkpoints_enabled=False)
    report = host.compare_vm(compatibility_report=report)
    assert report.incompatibilities == []
    return host.import_vm(compatibility_report=report)
