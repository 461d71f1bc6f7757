"""Cmdlets on firmware and devices of VMs, and what WMI knows besides: planned VMs, which no cmdlet lists."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vmsnap.testing.hyperv import failures
from vmsnap.testing.hyperv.folders import Folders
from vmsnap.testing.hyperv.host import COMPUTER, cmdlet
from vmsnap.testing.hyperv.looking import CimInstance, VolumeInformation
from vmsnap.testing.hyperv.values import (
    CompatibilityReport,
    HardDiskDrive,
    ReturnValue,
    VirtualMachine,
    VMNetworkAdapter,
    VMState,
)

_PLANNED = "Msvm_PlannedComputerSystem"
_SETTINGS = "Msvm_VirtualSystemSettingData"
_MANAGEMENT = "Msvm_VirtualSystemManagementService"
_MOST_SCSI = 4


@dataclass(kw_only=True)
class Firmware:
    """``Get-VMFirmware``, and ``Get-VMSecurity``. ``devices`` and ``fibre_channel``: how many of those there are."""

    secure_boot: str = "On"
    secure_boot_template: str = "MicrosoftWindows"
    tpm_enabled: bool = False
    first_boot_device: HardDiskDrive | None = None
    scsi_controllers: int = 1
    devices: int = 0
    fibre_channel: int = 0


@dataclass(frozen=True, kw_only=True)
class HostAdapter:
    """``Get-VMNetworkAdapter -ManagementOS``: the host itself on one of its switches."""

    mac_address: str
    switch_name: str
    switch_id: str


class Hardware(Folders):
    """What VMs are made of. ``firmware`` is by the id of a VM."""

    def __init__(
        self,
        root: Path,
        *,
        speech: failures.Speech | None = None,
        volumes: dict[str, int] | None = None,
        memory_bytes: int = 64 << 30,
    ) -> None:
        super().__init__(root, speech=speech, volumes=volumes, memory_bytes=memory_bytes)
        self.firmware: dict[str, Firmware] = {}
        self.planned: list[VirtualMachine] = []

    def leftovers(self) -> list[str]:
        """Return everything on the host that was not there when the test began."""
        return super().leftovers() + [f"planned VM {vm.name}" for vm in self.planned_now()]

    def planned_now(self) -> list[VirtualMachine]:
        """Return the VMs that are planned and no more."""
        return [vm for vm in self.planned if vm.truth.planned]

    def hardware_of(self, vm: VirtualMachine) -> Firmware:
        """Return a VM's firmware, which a test may change."""
        return self.firmware.setdefault(vm.id, Firmware())

    @cmdlet("Compare-VM")
    def compare_vm(
        self,
        *,
        path: str | None = None,
        compatibility_report: CompatibilityReport | None = None,
        copy: bool = False,
        register: bool = False,
        generate_new_id: bool = False,
        virtual_machine_path: str | None = None,
        snapshot_file_path: str | None = None,
        smart_paging_file_path: str | None = None,
        vhd_destination_path: str | None = None,
    ) -> CompatibilityReport:
        """Plan an import. The plan stays in the host until it is made real or destroyed, whatever becomes of the client."""
        report = super().compare_vm(
            path=path,
            compatibility_report=compatibility_report,
            copy=copy,
            register=register,
            generate_new_id=generate_new_id,
            virtual_machine_path=virtual_machine_path,
            snapshot_file_path=snapshot_file_path,
            smart_paging_file_path=smart_paging_file_path,
            vhd_destination_path=vhd_destination_path,
        )
        if report.vm not in self.planned:
            self.planned.append(report.vm)
            self.between("Compare-VM: planned")
        return report

    @cmdlet("Get-VMNetworkAdapter")
    def get_all_network_adapters(self) -> list[VMNetworkAdapter | HostAdapter]:
        """Return the adapters of all VMs, and of the host (``-All``)."""
        self.need_rights("Get-VMNetworkAdapter")
        own: list[VMNetworkAdapter | HostAdapter] = [
            HostAdapter(mac_address=f"00155DFFFF{index:02X}", switch_name=switch.name, switch_id=switch.id)
            for index, switch in enumerate(self.switches)
            if switch.allow_management_os
        ]
        return own + [adapter for vm in self.vms for adapter in vm.network_adapters]

    @cmdlet("Get-VMFirmware")
    def get_vm_firmware(self, *, vm: VirtualMachine) -> Firmware:
        """Describe the firmware of a VM of generation 2."""
        (one,) = self.chosen("Get-VMFirmware", vm=vm, name=None)
        if one.generation != 2:
            self.bad_argument("Get-VMFirmware", "VM")
        return self.hardware_of(one)

    @cmdlet("Set-VMFirmware")
    def set_vm_firmware(
        self,
        *,
        vm: VirtualMachine,
        enable_secure_boot: str | None = None,
        secure_boot_template: str | None = None,
        first_boot_device: HardDiskDrive | None = None,
    ) -> None:
        """Change the firmware of a VM of generation 2 that is off."""
        firmware = self.get_vm_firmware(vm=vm)
        if vm.state is not VMState.OFF:
            self.wrong_state("Set-VMFirmware", vm=vm)
        firmware.secure_boot = enable_secure_boot or firmware.secure_boot
        firmware.secure_boot_template = secure_boot_template or firmware.secure_boot_template
        firmware.first_boot_device = first_boot_device or firmware.first_boot_device

    @cmdlet("Get-VMSecurity")
    def get_vm_security(self, *, vm: VirtualMachine) -> Firmware:
        """Tell whether a VM has a virtual TPM."""
        (one,) = self.chosen("Get-VMSecurity", vm=vm, name=None)
        return self.hardware_of(one)

    @cmdlet("Get-VMAssignableDevice")
    def get_vm_assignable_device(self, *, vm: VirtualMachine) -> list[str]:
        """Return the devices of the host that a VM has."""
        return [f"PCI {index}" for index in range(self.hardware_of(vm).devices)]

    @cmdlet("Get-VMFibreChannelHba")
    def get_vm_fibre_channel_hba(self, *, vm: VirtualMachine) -> list[str]:
        """Return the virtual Fibre Channel adapters of a VM."""
        return [f"HBA {index}" for index in range(self.hardware_of(vm).fibre_channel)]

    @cmdlet("Set-VMProcessor")
    def set_vm_processor(self, *, vm: VirtualMachine, count: int) -> None:
        """Give a VM that is off a number of processors."""
        if vm.state is not VMState.OFF:
            self.wrong_state("Set-VMProcessor", vm=vm)
        vm.processor_count = count

    @cmdlet("Get-VMScsiController")
    def get_vm_scsi_controller(self, *, vm: VirtualMachine) -> list[int]:
        """Return the SCSI controllers of a VM by number."""
        return list(range(self.hardware_of(vm).scsi_controllers))

    @cmdlet("Add-VMScsiController")
    def add_vm_scsi_controller(self, *, vm: VirtualMachine) -> None:
        """Give a VM that is off another SCSI controller."""
        hardware = self.hardware_of(vm)
        if vm.state is not VMState.OFF or hardware.scsi_controllers >= _MOST_SCSI:
            self.wrong_state("Add-VMScsiController", vm=vm)
        hardware.scsi_controllers += 1

    @cmdlet("Get-Volume")
    def get_volume_of(self, *, file_path: str) -> VolumeInformation:
        """Return the volume that a file or folder is on (``-FilePath``)."""
        volume = self.files.volumes.get(file_path[:1].upper())
        if volume is None or not self.files.exists(file_path):
            raise failures.CmdletError(
                f"No MSFT_Volume objects found for '{file_path}'",
                error_id="StorageWMI 4,Get-Volume",
                category=failures.Category.OBJECT_NOT_FOUND,
                exception_type="Microsoft.PowerShell.Cmdletization.Cim.CimJobException",
                target=file_path,
            )
        return VolumeInformation(drive_letter=volume.letter, size=volume.size_bytes, size_remaining=volume.free_bytes)

    @cmdlet("Get-CimInstance")
    def get_cim_instance(
        self,
        *,
        class_name: str,
        namespace: str = "root/cimv2",
        filter: str | None = None,  # noqa: A002
    ) -> list[CimInstance]:
        """Return objects of WMI: planned VMs and the service that destroys them besides those of the cmdlets."""
        if class_name == _PLANNED:
            return [
                CimInstance(class_name=_PLANNED, properties={"Name": vm.id.upper(), "ElementName": vm.name})
                for vm in self.planned_now()
            ]
        if class_name == _MANAGEMENT:
            return [CimInstance(class_name=_MANAGEMENT, properties={"Name": "vmms"})]
        found = super().get_cim_instance(class_name=class_name, namespace=namespace, filter=filter)
        for instance in found:
            if class_name == "Win32_OperatingSystem":
                instance.properties["CSName"] = COMPUTER
        return found

    @cmdlet("Get-CimAssociatedInstance")
    def get_cim_associated_instance(self, *, input_object: CimInstance, result_class_name: str) -> list[CimInstance]:
        """Return the settings of a planned VM."""
        if (input_object.class_name, result_class_name) != (_PLANNED, _SETTINGS):
            raise NotImplementedError(result_class_name)
        return [
            CimInstance(class_name=_SETTINGS, properties={"ConfigurationDataRoot": vm.path, "Notes": vm.notes})
            for vm in self.planned_now()
            if vm.id.upper() == input_object.properties["Name"]
        ]

    @cmdlet("Invoke-CimMethod")
    def destroy_planned_system(self, *, input_object: CimInstance, affected_system: CimInstance) -> ReturnValue:
        """Destroy a planned VM (``DestroySystem`` of the management service)."""
        if input_object.class_name != _MANAGEMENT or affected_system.class_name != _PLANNED:
            raise NotImplementedError(affected_system.class_name)
        gone = affected_system.properties["Name"]
        for vm in self.planned_now():
            if vm.id.upper() == gone:
                if self.is_busy(vm):
                    return ReturnValue.INVALID_STATE
                self.planned.remove(vm)
        return ReturnValue.DONE
