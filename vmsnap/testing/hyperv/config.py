"""Cmdlets that change what a VM or a switch is."""

from __future__ import annotations

from vmsnap.testing.hyperv import failures
from vmsnap.testing.hyperv.failures import Reason
from vmsnap.testing.hyperv.hardware import Hardware
from vmsnap.testing.hyperv.host import cmdlet
from vmsnap.testing.hyperv.inventory import VMCX_BYTES
from vmsnap.testing.hyperv.network import plug
from vmsnap.testing.hyperv.values import (
    Controller,
    VirtualMachine,
    VMNetworkAdapter,
    VMState,
)

_START_ACTIONS = frozenset({"Nothing", "StartIfRunning", "Start"})
_STOP_ACTIONS = frozenset({"TurnOff", "Save", "ShutDown"})
_CHECKPOINTS = frozenset({"Disabled", "Production", "ProductionOnly", "Standard"})


class Config(Hardware):
    """Making, changing and removing."""

    # VMs

    @cmdlet("New-VM")
    def new_vm(
        self,
        *,
        name: str,
        memory_startup_bytes: int = 512 << 20,
        generation: int = 1,
        path: str | None = None,
        no_vhd: bool = False,
        vhd_path: str | None = None,
        switch_name: str | None = None,
    ) -> VirtualMachine:
        """Make a VM, off, with one adapter, on the switch or on none. Its name may be taken: names are not unique."""
        self.need_rights("New-VM")
        if no_vhd and vhd_path is not None:
            self.bad_argument("New-VM", "NoVHD, VHDPath")
        switch = self.switch_of("New-VM", switch_name) if switch_name is not None else None
        vm = VirtualMachine(name=name, generation=generation, memory_startup=memory_startup_bytes)
        if vhd_path is not None:
            kind = Controller.IDE if generation == 1 else Controller.SCSI
            vm.hard_drives.append(self.drive_for("New-VM", vm=vm, path=vhd_path, kind=kind))
        vm.network_adapters.append(VMNetworkAdapter(mac_address="000000000000"))
        if switch is not None:
            plug(vm.network_adapters[0], switch=switch)
        self._register("New-VM", vm=vm, folder=f"{path or self.default_folder}\\{name}")
        return vm

    def _register(self, cmdlet: str, *, vm: VirtualMachine, folder: str) -> None:
        """Write a VM's configuration, and let it be a VM."""
        file = f"{folder}\\Virtual Machines\\{vm.id.upper()}.vmcx"
        self.write(cmdlet, path=file, size_bytes=VMCX_BYTES)
        vm.path = vm.configuration_location = folder
        vm.truth.files = (file,)
        self.bind(adapter_of=vm)
        self.vms.append(vm)

    @cmdlet("Set-VM")
    def set_vm(
        self,
        *,
        vm: VirtualMachine | None = None,
        name: str | None = None,
        notes: str | None = None,
        new_vm_name: str | None = None,
        automatic_start_action: str | None = None,
        automatic_stop_action: str | None = None,
        automatic_checkpoints_enabled: bool | None = None,
        checkpoint_type: str | None = None,
        processor_count: int | None = None,
        memory_startup_bytes: int | None = None,
        static_memory: bool = False,
    ) -> None:
        """Change a VM. Hardware changes only while it is off; a planned VM with a saved state counts as saved."""
        for one in self.chosen("Set-VM", vm=vm, name=name):
            hardware = processor_count is not None or memory_startup_bytes is not None or static_memory
            if self.is_busy(one) or (hardware and one.state is not VMState.OFF):
                self.wrong_state("Set-VM", vm=one)
            for value, allowed in (
                (automatic_start_action, _START_ACTIONS),
                (automatic_stop_action, _STOP_ACTIONS),
                (checkpoint_type, _CHECKPOINTS),
            ):
                if value is not None and value not in allowed:
                    self.bad_argument("Set-VM", value)
            one.notes = one.notes if notes is None else notes
            one.name = one.name if new_vm_name is None else new_vm_name
            one.automatic_start_action = automatic_start_action or one.automatic_start_action
            one.automatic_stop_action = automatic_stop_action or one.automatic_stop_action
            one.checkpoint_type = checkpoint_type or one.checkpoint_type
            one.processor_count = processor_count or one.processor_count
            one.memory_startup = memory_startup_bytes or one.memory_startup
            if automatic_checkpoints_enabled is not None:
                one.automatic_checkpoints_enabled = automatic_checkpoints_enabled
            if static_memory:
                one.dynamic_memory_enabled = False
            self.bind(adapter_of=one)

    @cmdlet("Rename-VM")
    def rename_vm(self, *, new_name: str, vm: VirtualMachine | None = None, name: str | None = None) -> None:
        """Give a VM another name. Folders keep theirs."""
        for one in self.chosen("Rename-VM", vm=vm, name=name):
            one.name = new_name
            self.bind(adapter_of=one)

    @cmdlet("Remove-VM")
    def remove_vm(self, *, vm: VirtualMachine | None = None, name: str | None = None, force: bool = False) -> None:
        """Remove a VM that does not run, with its configuration and saved state; its disks and folders stay."""
        for one in self.chosen("Remove-VM", vm=vm, name=name):
            if not force:
                self.refuse("Remove-VM", text=failures.ASKS_BACK, about=(one.name,), reason=Reason.OPERATION_FAILED)
            if self.is_busy(one) or one.state not in {
                VMState.OFF,
                VMState.SAVED,
                VMState.OFF_CRITICAL,
                VMState.SAVED_CRITICAL,
            }:
                self.wrong_state("Remove-VM", vm=one)
            self.between("Remove-VM")
            self.chosen("Remove-VM", vm=one, name=None)
            self.vms.remove(one)
            for path in one.truth.files:
                if self.files.exists(path):
                    self.files.remove(path)

    @cmdlet("Remove-VMSnapshot")
    def remove_vm_snapshot(self, *, vm: VirtualMachine, name: str | None = None) -> None:
        """Remove checkpoints of a VM. What merges on the disks is not played here."""
        for one in self.chosen("Remove-VMSnapshot", vm=vm, name=None):
            one.snapshots = [snapshot for snapshot in one.snapshots if name is not None and snapshot.name != name]
