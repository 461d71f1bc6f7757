"""Cmdlets on adapters and switches."""

from __future__ import annotations

import uuid
from typing import NoReturn

from vmsnap.testing.hyperv import failures
from vmsnap.testing.hyperv.cim import Cim
from vmsnap.testing.hyperv.failures import Reason
from vmsnap.testing.hyperv.host import cmdlet
from vmsnap.testing.hyperv.leases import ask
from vmsnap.testing.hyperv.values import (
    ALIVE,
    DhcpClient,
    SwitchType,
    VirtualMachine,
    VMNetworkAdapter,
    VMState,
    VMSwitch,
)


class Network(Cim):
    """Virtual cables."""

    @cmdlet("Connect-VMNetworkAdapter")
    def connect_vm_network_adapter(
        self, *, vm_network_adapter: VMNetworkAdapter, switch_name: str | None = None, vm_switch: VMSwitch | None = None
    ) -> None:
        """Put an adapter on a switch, whatever state its VM is in."""
        self.need_rights("Connect-VMNetworkAdapter")
        switch = vm_switch or self.switch_of("Connect-VMNetworkAdapter", switch_name or "")
        if switch not in self.switches:
            self._no_switch("Connect-VMNetworkAdapter", switch.name)
        plug(vm_network_adapter, switch=switch)
        if vm_network_adapter.client is DhcpClient.SENSES_LINK:
            ask(self.vms, vm_network_adapter)

    @cmdlet("Disconnect-VMNetworkAdapter")
    def disconnect_vm_network_adapter(self, *, vm_network_adapter: VMNetworkAdapter) -> None:
        """Take an adapter off its switch."""
        self.need_rights("Disconnect-VMNetworkAdapter")
        vm_network_adapter.switch_name = vm_network_adapter.switch_id = ""

    @cmdlet("Add-VMNetworkAdapter")
    def add_vm_network_adapter(
        self,
        *,
        vm: VirtualMachine,
        name: str = "Network Adapter",
        switch_name: str | None = None,
        static_mac_address: str | None = None,
        is_legacy: bool = False,
    ) -> None:
        """Add an adapter to a VM that is off, or of generation 2 and running."""
        for one in self.chosen("Add-VMNetworkAdapter", vm=vm, name=None):
            self._may_change("Add-VMNetworkAdapter", vm=one)
            if static_mac_address is not None and not _is_mac(static_mac_address):
                self.bad_argument("Add-VMNetworkAdapter", static_mac_address)
            adapter = VMNetworkAdapter(
                name=name,
                mac_address=(static_mac_address or "000000000000").replace("-", "").replace(":", "").upper(),
                dynamic_mac_address_enabled=static_mac_address is None,
                is_legacy=is_legacy,
            )
            if switch_name is not None:
                plug(adapter, switch=self.switch_of("Add-VMNetworkAdapter", switch_name))
            one.network_adapters.append(adapter)
            self.bind(adapter_of=one)

    @cmdlet("Remove-VMNetworkAdapter")
    def remove_vm_network_adapter(self, *, vm_network_adapter: VMNetworkAdapter) -> None:
        """Remove an adapter of a VM that is off, or of generation 2 and running."""
        for one in self.vms:
            if any(adapter is vm_network_adapter for adapter in one.network_adapters):
                self._may_change("Remove-VMNetworkAdapter", vm=one)
                one.network_adapters = [mine for mine in one.network_adapters if mine is not vm_network_adapter]

    @cmdlet("Set-VMNetworkAdapter")
    def set_vm_network_adapter(self, *, vm_network_adapter: VMNetworkAdapter, static_mac_address: str) -> None:
        """Give an adapter a MAC of twelve digits while its VM is off."""
        for one in self.vms:
            if one.id == vm_network_adapter.vm_id and one.state is not VMState.OFF:
                self.wrong_state("Set-VMNetworkAdapter", vm=one)
        if not _is_mac(static_mac_address):
            self.bad_argument("Set-VMNetworkAdapter", static_mac_address)
        vm_network_adapter.mac_address = static_mac_address.replace("-", "").replace(":", "").upper()
        vm_network_adapter.dynamic_mac_address_enabled = False

    @cmdlet("New-VMSwitch")
    def new_vm_switch(
        self,
        *,
        name: str,
        switch_type: SwitchType,
        notes: str = "",
        id: str | None = None,  # noqa: A002
    ) -> VMSwitch:
        """Make a switch without an uplink. Its name may be taken; its id may not."""
        self.need_rights("New-VMSwitch")
        if switch_type is SwitchType.EXTERNAL:
            self.bad_argument("New-VMSwitch", "SwitchType")
        identity = (id or str(uuid.uuid4())).lower()
        if any(one.id == identity for one in self.switches):
            self.refuse("New-VMSwitch", text=failures.TAKEN_ID, about=(identity,), reason=Reason.OPERATION_FAILED)
        internal = switch_type is SwitchType.INTERNAL
        switch = VMSwitch(name=name, switch_type=switch_type, notes=notes, id=identity, allow_management_os=internal)
        self.switches.append(switch)
        return switch

    @cmdlet("Remove-VMSwitch")
    def remove_vm_switch(
        self, *, name: str | None = None, vm_switch: VMSwitch | None = None, force: bool = False
    ) -> None:
        """Remove switches that no running VM is on: all of that name. Adapters of other VMs are on none then."""
        self.need_rights("Remove-VMSwitch")
        found = [one for one in self.switches if one is vm_switch or (name is not None and one.name == name)]
        if not found:
            self._no_switch("Remove-VMSwitch", name or (vm_switch.name if vm_switch else ""))
        for switch in found:
            if not force:
                self.refuse("Remove-VMSwitch", text=failures.ASKS_BACK, about=(name,), reason=Reason.OPERATION_FAILED)
            used = [
                (vm, adapter) for vm in self.vms for adapter in vm.network_adapters if adapter.switch_id == switch.id
            ]
            if any(vm.state in ALIVE for vm, _ in used):
                self.refuse(
                    "Remove-VMSwitch",
                    text=failures.SWITCH_USED,
                    about=(switch.name,),
                    reason=Reason.OPERATION_FAILED,
                )
            for _, adapter in used:
                adapter.switch_name = adapter.switch_id = ""
            self.switches.remove(switch)

    def switch_of(self, cmdlet: str, name: str) -> VMSwitch:
        """Return the switch of a name, which must be the only one."""
        found = [one for one in self.switches if one.name.casefold() == name.casefold()]
        if len(found) != 1:
            self._no_switch(cmdlet, name)
        return found[0]

    def _no_switch(self, cmdlet: str, name: str) -> NoReturn:
        self.refuse(cmdlet, text=failures.NO_SWITCH, about=(name,), reason=Reason.INVALID_PARAMETER)

    def bad_argument(self, cmdlet: str, what: str) -> NoReturn:
        """Raise what arguments that do not go together make of a cmdlet."""
        self.refuse(cmdlet, text=failures.BAD_ARGUMENT, about=(what,), reason=Reason.INVALID_PARAMETER)

    def _may_change(self, cmdlet: str, *, vm: VirtualMachine) -> None:
        hot = vm.generation == 2 and vm.state is VMState.RUNNING
        if self.is_busy(vm) or not (vm.state is VMState.OFF or hot):
            self.wrong_state(cmdlet, vm=vm)


def plug(adapter: VMNetworkAdapter, *, switch: VMSwitch) -> None:
    """Put an adapter on a switch."""
    adapter.switch_name, adapter.switch_id = switch.name, switch.id


def _is_mac(text: str) -> bool:
    digits = text.replace("-", "").replace(":", "")
    return len(digits) == 12 and all(digit in "0123456789abcdefABCDEF" for digit in digits)
