"""WMI, the cluster's cmdlets and the host itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vmsnap.testing.hyperv.failures import Category, CmdletError
from vmsnap.testing.hyperv.host import COMPUTER, cmdlet
from vmsnap.testing.hyperv.looking import KEY_VALUE_PAIRS, SHUTDOWN
from vmsnap.testing.hyperv.power import Power
from vmsnap.testing.hyperv.values import ALIVE, ReturnValue, VMState

_WQL = re.compile(r"""\s*(?P<name>\w+)\s*=\s*(?P<quote>['"])(?P<value>[^'"]*)(?P=quote)\s*\Z""")
_NAMESPACE = "root/virtualization/v2"
_PLANNED = "Msvm_PlannedComputerSystem"
_SERVICE = "Msvm_VirtualSystemManagementService"
_SHUTDOWN_COMPONENT = "Msvm_ShutdownComponent"
_EXCHANGE = "Msvm_KvpExchangeComponent"
_ITEM = (
    '<INSTANCE CLASSNAME="Msvm_KvpExchangeDataItem">'
    '<PROPERTY NAME="Data" TYPE="string"><VALUE>{data}</VALUE></PROPERTY>'
    '<PROPERTY NAME="Name" TYPE="string"><VALUE>{name}</VALUE></PROPERTY>'
    '<PROPERTY NAME="Source" TYPE="uint16"><VALUE>2</VALUE></PROPERTY></INSTANCE>'
)
_COMMANDS = "Microsoft.Management.Infrastructure.CimCmdlets."


@dataclass(frozen=True, kw_only=True)
class CimInstance:
    """An object of WMI: its class, and the properties that scripts ask for. ``texts``: its one property that is a list."""

    class_name: str
    properties: Mapping[str, str | int]
    texts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ClusterGroup:
    """``Get-ClusterGroup``."""

    name: str
    state: str = "Online"
    group_type: str = "VirtualMachine"


@dataclass(frozen=True, kw_only=True)
class Volume:
    """``Get-Volume``. Sizes in bytes."""

    drive_letter: str
    size: int
    size_remaining: int
    file_system_type: str = "NTFS"


class Cim(Power):
    """What is asked of WMI and not of the Hyper-V module."""

    @cmdlet("Get-ClusterGroup")
    def get_cluster_group(self, *, vm_id: str) -> list[ClusterGroup]:
        """Return the cluster's group of a VM. A host without the cluster's tools knows no such cmdlet."""
        if not self.is_clustered_host:
            raise CmdletError(
                "The term 'Get-ClusterGroup' is not recognized as the name of a cmdlet",
                error_id="CommandNotFoundException",
                category=Category.OBJECT_NOT_FOUND,
                exception_type="System.Management.Automation.CommandNotFoundException",
                target="Get-ClusterGroup",
            )
        return [ClusterGroup(name=vm.name) for vm in self.vms if vm.id == vm_id.lower() and vm.is_clustered]

    @cmdlet("Get-Volume")
    def get_volume(self, *, drive_letter: str | None = None, file_path: str | None = None) -> list[Volume]:
        """Return the host's volumes: all, one, or the one that a file is on."""
        letter = file_path[:1] if file_path is not None else drive_letter
        found = [
            Volume(drive_letter=one, size=volume.size_bytes, size_remaining=volume.free_bytes)
            for one, volume in self.files.volumes.items()
            if letter is None or one == letter.upper()
        ]
        if not found or (file_path is not None and not self.files.exists(file_path)):
            raise CmdletError(
                f"No MSFT_Volume objects found for {file_path or drive_letter!r}",
                error_id="CmdletizationQuery_NotFound_DriveLetter,Get-Volume",
                category=Category.OBJECT_NOT_FOUND,
                exception_type="Microsoft.PowerShell.Cmdletization.Cim.CimJobException",
                target=file_path or drive_letter or "",
            )
        return found

    @cmdlet("Get-CimInstance")
    def get_cim_instance(
        self,
        *,
        class_name: str,
        namespace: str = "root/cimv2",
        filter: str | None = None,  # noqa: A002
    ) -> list[CimInstance]:
        """Return objects of WMI. A filter compares one property with one quoted text."""
        known: dict[str, Callable[[], list[dict[str, str | int]]]] = {
            "Win32_OperatingSystem": self._operating_system,
            "Msvm_ComputerSystem": self._systems,
            _SHUTDOWN_COMPONENT: self._shutdown_components,
            _PLANNED: self._planned_systems,
            _EXCHANGE: self._exchanges,
            _SERVICE: lambda: [{"Name": "vmms"}],
        }
        there = _NAMESPACE if class_name.startswith("Msvm_") else "root/cimv2"
        wanted = _WQL.match(filter) if filter is not None else None
        if class_name not in known or namespace.replace("\\", "/").lower() != there or (filter and wanted is None):
            raise _no_such("GetCimInstanceCommand", code="0x80041010", what=f"{namespace} {class_name} {filter}")
        if not self.rights and there == _NAMESPACE:
            return []
        return [
            CimInstance(class_name=class_name, properties=properties, texts=self._texts(class_name, properties))
            for properties in known[class_name]()
            if wanted is None or str(properties.get(wanted["name"], "")).casefold() == wanted["value"].casefold()
        ]

    def _operating_system(self) -> list[dict[str, str | int]]:
        free = (self.memory_bytes - sum(vm.memory_assigned for vm in self.vms)) >> 10
        return [{"CSName": COMPUTER, "FreePhysicalMemory": free, "TotalVisibleMemorySize": self.memory_bytes >> 10}]

    def _systems(self) -> list[dict[str, str | int]]:
        return [{"Name": vm.id.upper(), "ElementName": vm.name} for vm in self.vms]

    def _planned_systems(self) -> list[dict[str, str | int]]:
        return [{"Name": vm.id.upper(), "ElementName": vm.name} for vm in self.planned]

    def _shutdown_components(self) -> list[dict[str, str | int]]:
        running = [vm for vm in self.vms if vm.state in ALIVE and SHUTDOWN not in vm.disabled_services]
        return [{"SystemName": vm.id.upper(), "EnabledState": 2} for vm in running]

    def _exchanges(self) -> list[dict[str, str | int]]:
        running = [vm for vm in self.vms if vm.state in ALIVE and KEY_VALUE_PAIRS not in vm.disabled_services]
        return [{"SystemName": vm.id.upper()} for vm in running]

    def _texts(self, class_name: str, properties: Mapping[str, str | int]) -> tuple[str, ...]:
        """Return ``GuestIntrinsicExchangeItems``: what a guest tells of itself, each item an instance in CIM-XML."""
        if class_name != _EXCHANGE:
            return ()
        (vm,) = (vm for vm in self.vms if vm.id.upper() == properties["SystemName"])
        told = {"OSName": "Windows Server 2022", "ProductType": str(vm.product_type)}
        return tuple(_ITEM.format(name=name, data=data) for name, data in told.items())

    @cmdlet("Get-CimAssociatedInstance")
    def get_cim_associated_instance(self, *, input_object: CimInstance, result_class_name: str) -> list[CimInstance]:
        """Return the settings of a planned VM or a VM."""
        if result_class_name != "Msvm_VirtualSystemSettingData":
            raise _no_such("GetCimAssociatedInstanceCommand", code="0x80041010", what=result_class_name)
        named = [vm for vm in (*self.vms, *self.planned) if vm.id.upper() == input_object.properties.get("Name")]
        return [
            CimInstance(
                class_name=result_class_name,
                properties={"ConfigurationDataRoot": vm.path, "ElementName": vm.name, "Notes": vm.notes},
            )
            for vm in named
        ]

    @cmdlet("Invoke-CimMethod")
    def invoke_cim_method(
        self, *, input_object: CimInstance, method_name: str, arguments: Mapping[str, object]
    ) -> ReturnValue:
        """Call a method of WMI: to ask a guest to shut down, which returns before it obeys, or to forget a planned VM."""
        asked = (input_object.class_name, method_name, frozenset(arguments))
        if asked == (_SHUTDOWN_COMPONENT, "InitiateShutdown", frozenset({"Force", "Reason"})):
            return self._shut_down(str(input_object.properties["SystemName"]), force=arguments["Force"] is True)
        if asked == (_SERVICE, "DestroySystem", frozenset({"AffectedSystem"})):
            return self._destroy(arguments["AffectedSystem"])
        raise _no_such("InvokeCimMethodCommand", code="0x8004102F", what=f"{input_object.class_name}.{method_name}")

    def _shut_down(self, identity: str, *, force: bool) -> ReturnValue:
        if not self.rights:
            return ReturnValue.ACCESS_DENIED
        vm = next((one for one in self.vms if one.id.upper() == identity), None)
        if vm is None or vm.state is not VMState.RUNNING or self.is_busy(vm):
            return ReturnValue.INVALID_STATE
        if not vm.truth.inside.heartbeat:
            return ReturnValue.NOT_READY
        if vm.truth.inside.obeys or force:
            vm.truth.shutdown_left = vm.truth.inside.shutdown_takes
            vm.state = VMState.STOPPING
        return ReturnValue.DONE

    def _destroy(self, system: object) -> ReturnValue:
        if not isinstance(system, CimInstance) or not self.rights:
            return ReturnValue.FAILED
        found = [vm for vm in self.planned if vm.id.upper() == system.properties.get("Name")]
        if system.class_name != _PLANNED or not found or any(self.is_busy(vm) for vm in found):
            return ReturnValue.INVALID_STATE
        self.planned.remove(found[0])
        return ReturnValue.DONE


def _no_such(command: str, *, code: str, what: str) -> CmdletError:
    return CmdletError(
        f"Invalid class, method or query: {what}",
        error_id=f"HRESULT {code},{_COMMANDS}{command}",
        category=Category.INVALID_ARGUMENT,
        exception_type="Microsoft.Management.Infrastructure.CimException",
        target=what,
    )
