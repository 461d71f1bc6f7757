"""Cmdlets on processors, firmware, controllers and disks of VMs."""

from __future__ import annotations

from dataclasses import dataclass

from vmsnap.testing.hyperv import failures
from vmsnap.testing.hyperv.failures import Code, Reason
from vmsnap.testing.hyperv.files import BadPathError
from vmsnap.testing.hyperv.host import cmdlet
from vmsnap.testing.hyperv.network import Network
from vmsnap.testing.hyperv.values import Controller, HardDiskDrive, VirtualMachine, VMState
from vmsnap.testing.hyperv.vhd import NotAVhdError, read_facts

_IDE_PLACES = 2


@dataclass(frozen=True, kw_only=True)
class VMFirmware:
    """``Get-VMFirmware``. ``secure_boot`` is On or Off."""

    secure_boot: str
    secure_boot_template: str


@dataclass(frozen=True, kw_only=True)
class VMSecurity:
    """``Get-VMSecurity``."""

    tpm_enabled: bool
    shielded: bool


@dataclass(frozen=True, kw_only=True)
class VMScsiController:
    """``Get-VMScsiController``."""

    controller_number: int


@dataclass(frozen=True, kw_only=True)
class Device:
    """``Get-VMAssignableDevice`` and ``Get-VMFibreChannelHba``: that there is one is all that is asked."""

    instance_id: str


class Hardware(Network):
    """What a VM is made of."""

    @cmdlet("Get-VMFirmware")
    def get_vm_firmware(self, *, vm: VirtualMachine) -> VMFirmware:
        """Return the firmware of a VM of generation 2; the first generation has none."""
        self._need_second("Get-VMFirmware", vm)
        return VMFirmware(secure_boot="On" if vm.secure_boot else "Off", secure_boot_template=vm.secure_boot_template)

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
        self._need_second("Set-VMFirmware", vm)
        self._need_off("Set-VMFirmware", vm)
        if enable_secure_boot not in (None, "On", "Off"):
            self.bad_argument("Set-VMFirmware", "EnableSecureBoot")
        if first_boot_device is not None and first_boot_device not in vm.hard_drives:
            self.bad_argument("Set-VMFirmware", "FirstBootDevice")
        vm.secure_boot = vm.secure_boot if enable_secure_boot is None else enable_secure_boot == "On"
        vm.secure_boot_template = secure_boot_template or vm.secure_boot_template
        if first_boot_device is not None:
            vm.first_boot_device = first_boot_device.path

    def _need_second(self, cmdlet: str, vm: VirtualMachine) -> None:
        self.chosen(cmdlet, vm=vm, name=None)
        if vm.generation != 2:
            self.bad_argument(cmdlet, "Generation")

    def _need_off(self, cmdlet: str, vm: VirtualMachine) -> None:
        if vm.state is not VMState.OFF or self.is_busy(vm):
            self.wrong_state(cmdlet, vm=vm)

    @cmdlet("Get-VMSecurity")
    def get_vm_security(self, *, vm: VirtualMachine) -> VMSecurity:
        """Return what protects a VM of generation 2."""
        self._need_second("Get-VMSecurity", vm)
        return VMSecurity(tpm_enabled=vm.tpm_enabled, shielded=vm.shielded)

    @cmdlet("Set-VMProcessor")
    def set_vm_processor(self, *, vm: VirtualMachine, count: int) -> None:
        """Give a VM that is off another number of processors."""
        self.chosen("Set-VMProcessor", vm=vm, name=None)
        self._need_off("Set-VMProcessor", vm)
        if not 1 <= count <= 240:
            self.bad_argument("Set-VMProcessor", "Count")
        vm.processor_count = count

    @cmdlet("Get-VMAssignableDevice")
    def get_vm_assignable_device(self, *, vm: VirtualMachine) -> list[Device]:
        """Return the devices of the host that are assigned to a VM."""
        self.chosen("Get-VMAssignableDevice", vm=vm, name=None)
        return [Device(instance_id=f"PCIP\\{index}") for index in range(vm.assigned_devices)]

    @cmdlet("Get-VMFibreChannelHba")
    def get_vm_fibre_channel_hba(self, *, vm: VirtualMachine) -> list[Device]:
        """Return the virtual Fibre Channel adapters of a VM."""
        self.chosen("Get-VMFibreChannelHba", vm=vm, name=None)
        return [Device(instance_id=f"FC\\{index}") for index in range(vm.fibre_channel)]

    @cmdlet("Get-VMScsiController")
    def get_vm_scsi_controller(self, *, vm: VirtualMachine) -> list[VMScsiController]:
        """Return the SCSI controllers of a VM."""
        self.chosen("Get-VMScsiController", vm=vm, name=None)
        return [VMScsiController(controller_number=number) for number in range(vm.scsi_controllers)]

    @cmdlet("Add-VMScsiController")
    def add_vm_scsi_controller(self, *, vm: VirtualMachine) -> None:
        """Add a SCSI controller to a VM that is off: four at most."""
        self.chosen("Add-VMScsiController", vm=vm, name=None)
        self._need_off("Add-VMScsiController", vm)
        if vm.scsi_controllers == 4:
            self.bad_argument("Add-VMScsiController", "VM")
        vm.scsi_controllers += 1

    @cmdlet("Get-VMHardDiskDrive")
    def get_vm_hard_disk_drive(
        self,
        *,
        vm: VirtualMachine | None = None,
        vm_name: str | None = None,
        controller_type: Controller | None = None,
        controller_number: int | None = None,
        controller_location: int | None = None,
    ) -> list[HardDiskDrive]:
        """Return the disks of a VM: all, or those in a place."""
        return [
            one
            for vm in self.chosen("Get-VMHardDiskDrive", vm=vm, name=vm_name)
            for one in vm.hard_drives
            if controller_type in (None, one.controller_type)
            and controller_number in (None, one.controller_number)
            and controller_location in (None, one.controller_location)
        ]

    @cmdlet("Add-VMHardDiskDrive")
    def add_vm_hard_disk_drive(
        self,
        *,
        path: str,
        vm: VirtualMachine | None = None,
        vm_name: str | None = None,
        controller_type: Controller | None = None,
        controller_number: int | None = None,
        controller_location: int | None = None,
    ) -> None:
        """Attach a disk: by SCSI at any time, by IDE (generation 1 alone) while the VM is off."""
        for one in self.chosen("Add-VMHardDiskDrive", vm=vm, name=vm_name):
            kind = controller_type or (Controller.IDE if one.generation == 1 else Controller.SCSI)
            if one.state is VMState.SAVED or (kind is Controller.IDE and one.state is not VMState.OFF):
                self.wrong_state("Add-VMHardDiskDrive", vm=one)
            if kind is Controller.IDE and one.generation == 2:
                self.bad_argument("Add-VMHardDiskDrive", "ControllerType")
            drive = self.drive_for("Add-VMHardDiskDrive", vm=one, path=path, kind=kind)
            if controller_number is not None:
                drive.controller_number = controller_number
            if controller_location is not None:
                drive.controller_location = controller_location
            missing = kind is Controller.SCSI and drive.controller_number >= one.scsi_controllers
            if missing or any(_slot(other) == _slot(drive) for other in one.hard_drives):
                self.bad_argument("Add-VMHardDiskDrive", "ControllerLocation")
            one.hard_drives.append(drive)
            self.bind(adapter_of=one)

    def drive_for(self, cmdlet: str, *, vm: VirtualMachine, path: str, kind: Controller) -> HardDiskDrive:
        """Return a new drive of a VM for a disk, in the first free place."""
        try:
            facts = read_facts(self.files.local(path))
        except (OSError, BadPathError):
            self.refuse(
                cmdlet, text=failures.NO_FILE, about=(path,), reason=Reason.INVALID_PARAMETER, code=Code.FILE_NOT_FOUND
            )
        except NotAVhdError:
            self.refuse(
                cmdlet, text=failures.NOT_A_VHD, about=(path,), reason=Reason.OPERATION_FAILED, code=Code.CORRUPT
            )
        if vm.generation == 2 and facts.vhd_format == "VHD":
            self.bad_argument(cmdlet, "VHD")
        taken = {_slot(drive) for drive in vm.hard_drives}
        wide = _IDE_PLACES if kind is Controller.IDE else 64
        places = ((number, location) for number in range(4) for location in range(wide))
        number, location = next((one, two) for one, two in places if (kind, one, two) not in taken)
        return HardDiskDrive(controller_type=kind, controller_number=number, controller_location=location, path=path)


def _slot(drive: HardDiskDrive) -> tuple[Controller, int, int]:
    return (drive.controller_type, drive.controller_number, drive.controller_location)
