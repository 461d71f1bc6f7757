"""Cmdlets that only look."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

from vmsnap.testing.hyperv import failures
from vmsnap.testing.hyperv.failures import Code, Language, ModuleGeneration, Reason
from vmsnap.testing.hyperv.files import BadPathError
from vmsnap.testing.hyperv.host import COMPUTER, HostState, cmdlet
from vmsnap.testing.hyperv.values import (
    IntegrationService,
    SwitchType,
    VirtualHardDisk,
    VirtualMachine,
    VMNetworkAdapter,
    VMSnapshot,
    VMState,
    VMSwitch,
)
from vmsnap.testing.hyperv.vhd import NotAVhdError, read_facts

HEARTBEAT = "84EAAE65-2F2E-45F5-9BB5-0E857DC8EB47"
KEY_VALUE_PAIRS = "2A34B1C2-FD73-4043-8A5B-DD2159BC743F"
SHUTDOWN = "9F8233AC-BE49-4C79-8EE3-E7E1985B2077"
_SERVICES = {
    HEARTBEAT: ("Heartbeat", "Takt"),
    SHUTDOWN: ("Shutdown", "Herunterfahren"),
    "2497F4DE-E9FA-4204-80E4-4B75C46419C0": ("Time Synchronization", "Zeitsynchronisierung"),
    KEY_VALUE_PAIRS: ("Key-Value Pair Exchange", "Austausch von Schlüsselwertepaaren"),
    "5CED1297-4598-4915-A5FC-AD21BB4D02A4": ("VSS", "VSS"),
    "6C09BB55-D683-4DA0-8931-C9BF705F6480": ("Guest Service Interface", "Gastdienstschnittstelle"),
}


@dataclass(frozen=True, kw_only=True)
class VMHost:
    """``Get-VMHost``."""

    computer_name: str
    memory_capacity: int
    logical_processor_count: int
    virtual_machine_path: str
    virtual_hard_disk_path: str


class Looking(HostState):
    """What can be asked of a host."""

    @cmdlet("Get-VM")
    def get_vm(self, *, name: str | None = None, id: str | None = None) -> list[VirtualMachine]:  # noqa: A002
        """Return VMs. Names take wildcards, and two VMs may have one; planned VMs are not among them."""
        if not self.rights:
            if self.speech.generation is ModuleGeneration.FIRST:
                return []
            self.need_rights("Get-VM")
        if id is not None:
            found = [vm for vm in self.vms if vm.id.lower() == id.lower().strip("{}")]
        else:
            pattern = "*" if name is None else name
            found = [vm for vm in self.vms if fnmatch.fnmatchcase(vm.name.casefold(), pattern.casefold())]
        if not found and (id is not None or (name is not None and not set("*?[") & set(name))):
            self.refuse(
                "Get-VM",
                text=failures.NO_SUCH_VM,
                about=(id if name is None else name,),
                reason=Reason.INVALID_PARAMETER,
            )
        return found

    def chosen(self, cmdlet: str, *, vm: VirtualMachine | None, name: str | None) -> list[VirtualMachine]:
        """Return the VMs that ``-VM`` or ``-Name`` mean: all of that name."""
        self.need_rights(cmdlet)
        found = [one for one in self.vms if one is vm or (name is not None and one.name.casefold() == name.casefold())]
        if not found and (vm is None or vm not in self.planned):
            about = (vm.name if vm is not None else name,)
            self.refuse(cmdlet, text=failures.NO_SUCH_VM, about=about, reason=Reason.INVALID_PARAMETER)
        return found or ([vm] if vm is not None else [])

    @cmdlet("Get-VMHost")
    def get_vm_host(self) -> VMHost:
        """Describe the host."""
        self.need_rights("Get-VMHost")
        return VMHost(
            computer_name=COMPUTER,
            memory_capacity=self.memory_bytes,
            logical_processor_count=16,
            virtual_machine_path=self.default_folder,
            virtual_hard_disk_path=f"{self.default_folder}\\Virtual Hard Disks",
        )

    @cmdlet("Get-VMNetworkAdapter")
    def get_vm_network_adapter(
        self,
        *,
        vm: VirtualMachine | None = None,
        vm_name: str | None = None,
        all: bool = False,  # noqa: A002
    ) -> list[VMNetworkAdapter]:
        """Return the adapters of a VM, planned ones too; or all of the host, its own among them."""
        if not all:
            return [
                one for vm in self.chosen("Get-VMNetworkAdapter", vm=vm, name=vm_name) for one in vm.network_adapters
            ]
        self.need_rights("Get-VMNetworkAdapter")
        own = [
            VMNetworkAdapter(
                name=switch.name,
                mac_address="00155DFFFF00",
                switch_name=switch.name,
                switch_id=switch.id,
                is_management_os=True,
            )
            for switch in self.switches
            if switch.allow_management_os
        ]
        return own + [adapter for vm in self.vms for adapter in vm.network_adapters]

    @cmdlet("Get-VMSnapshot")
    def get_vm_snapshot(self, *, vm: VirtualMachine | None = None, vm_name: str | None = None) -> list[VMSnapshot]:
        """Return the checkpoints of a VM."""
        return [one for vm in self.chosen("Get-VMSnapshot", vm=vm, name=vm_name) for one in vm.snapshots]

    @cmdlet("Get-VMIntegrationService")
    def get_vm_integration_service(
        self, *, vm: VirtualMachine | None = None, vm_name: str | None = None
    ) -> list[IntegrationService]:
        """Return the integration services of a VM, their names in the host's language."""
        (vm, *_) = self.chosen("Get-VMIntegrationService", vm=vm, name=vm_name)
        german = self.speech.language is Language.GERMAN
        answers = vm.state is VMState.RUNNING and vm.truth.inside.heartbeat
        return [
            IntegrationService(
                name=names[german],
                id=f"Microsoft:{vm.id.upper()}\\{identity}",
                enabled=identity not in vm.disabled_services,
                primary_operational_status="Ok" if answers else None,
                primary_status_description="OK" if answers else None,
            )
            for identity, names in _SERVICES.items()
        ]

    @cmdlet("Get-VMSwitch")
    def get_vm_switch(
        self,
        *,
        name: str | None = None,
        id: str | None = None,  # noqa: A002
        switch_type: SwitchType | None = None,
    ) -> list[VMSwitch]:
        """Return switches. Two may have one name."""
        self.need_rights("Get-VMSwitch")
        found = [
            one
            for one in self.switches
            if (name is None or fnmatch.fnmatchcase(one.name.casefold(), name.casefold()))
            and (id is None or one.id.lower() == id.lower())
            and switch_type in (None, one.switch_type)
        ]
        if not found and (id is not None or (name is not None and not set("*?[") & set(name))):
            about = (id if name is None else name,)
            self.refuse("Get-VMSwitch", text=failures.NO_SWITCH, about=about, reason=Reason.INVALID_PARAMETER)
        return found

    @cmdlet("Get-VHD")
    def get_vhd(self, *, path: str | None = None, vm_id: str | None = None) -> list[VirtualHardDisk]:
        """Describe a virtual hard disk, or those of a VM."""
        if vm_id is not None:
            (vm, *_) = self.get_vm(id=vm_id)
            return [self._vhd(drive.path) for drive in vm.hard_drives if drive.path]
        return [self._vhd(path or "")]

    def _vhd(self, path: str) -> VirtualHardDisk:
        try:
            item = self.files.item(path)
            facts = read_facts(self.files.local(path))
        except (FileNotFoundError, BadPathError):
            self.refuse(
                "Get-VHD",
                text=failures.NO_FILE,
                about=(path,),
                reason=Reason.INVALID_PARAMETER,
                code=Code.FILE_NOT_FOUND,
            )
        except NotAVhdError:
            self.refuse(
                "Get-VHD", text=failures.NOT_A_VHD, about=(path,), reason=Reason.OPERATION_FAILED, code=Code.CORRUPT
            )
        return VirtualHardDisk(
            path=item.full_name,
            vhd_format=facts.vhd_format,
            vhd_type=facts.vhd_type,
            size=facts.size_bytes,
            file_size=item.length,
            parent_path=facts.parent_path,
            attached=self.is_open(path),
            disk_identifier=facts.disk_id.upper(),
        )

    @cmdlet("Test-VHD")
    def test_vhd(self, *, path: str) -> bool:
        """Look whether a virtual hard disk and its parents are whole. Nobody may have it open."""
        for one in self.chain(path):
            if self.is_open(one):
                self.refuse(
                    "Test-VHD",
                    text=failures.IN_USE,
                    about=(one,),
                    reason=Reason.OPERATION_FAILED,
                    code=Code.SHARING_VIOLATION,
                )
        (disk,) = [self._vhd(path)]
        while disk.parent_path:
            child = read_facts(self.files.local(disk.path))
            disk = self._vhd(disk.parent_path)
            if read_facts(self.files.local(disk.path)).linkage != child.parent_linkage:
                self.refuse(
                    "Test-VHD",
                    text=failures.BROKEN_CHAIN,
                    about=(path,),
                    reason=Reason.OPERATION_FAILED,
                    code=Code.IDENTIFIERS_MISMATCH,
                )
        return True
