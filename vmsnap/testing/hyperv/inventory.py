"""What is on a host: what was there when the test began, what came since, and the rule that no copy reaches production."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vmsnap.testing.hyperv.files import HostFiles
from vmsnap.testing.hyperv.values import HardDiskDrive, SwitchType, VirtualMachine, VMSwitch
from vmsnap.testing.hyperv.vhd import NotAVhdError, read_facts

VMCX_BYTES = 64 << 10
DEFAULT_FOLDER = "C:\\ProgramData\\Microsoft\\Windows\\Hyper-V"


@dataclass(kw_only=True)
class _AsItWas:
    """A VM of production, as it was when the test began."""

    vm: VirtualMachine
    said: tuple[object, ...]
    files: dict[str, tuple[int, int]] = field(default_factory=dict)


class Inventory:
    """VMs, switches and files. Tests set it up with ``add_vm`` and ``add_switch``.

    ``violations`` lists every moment in which a copy of a guest could have reached production: running, or startable
    without further change, with an adapter on a switch that is not its own; and every disk of production that two VMs could
    write.
    """

    def __init__(self, files: HostFiles) -> None:
        self.files = files
        self.vms: list[VirtualMachine] = []
        self.planned: list[VirtualMachine] = []
        self.switches: list[VMSwitch] = []
        self.violations: list[str] = []
        self.default_folder = DEFAULT_FOLDER
        self._production: list[_AsItWas] = []
        self._given: set[str] = set()
        self._production_switches: dict[str, VMSwitch] = {}

    # Setting up

    def add_switch(self, name: str, *, switch_type: SwitchType = SwitchType.EXTERNAL) -> VMSwitch:
        """Put a switch of production on the host."""
        switch = VMSwitch(name=name, switch_type=switch_type, allow_management_os=switch_type is SwitchType.EXTERNAL)
        self.switches.append(switch)
        self._production_switches[switch.id] = switch
        return switch

    def add_vm(self, vm: VirtualMachine) -> VirtualMachine:
        """Put a VM of production on the host. Its disks must be in their places."""
        for adapter in vm.network_adapters:
            self.bind(adapter_of=vm)
            switch = next((one for one in self.switches if one.name == adapter.switch_name), None)
            adapter.switch_id = switch.id if switch else ""
        self.bind(adapter_of=vm)
        folder = vm.path or f"{self.default_folder}\\{vm.name if vm.name.isalnum() else vm.id}"
        vm.path = vm.configuration_location = folder
        vm.truth.files = (f"{folder}\\Virtual Machines\\{vm.id.upper()}.vmcx",)
        for path in vm.truth.files:
            self.files.write(path, content=bytes(VMCX_BYTES))
        self.vms.append(vm)
        self.remember()
        return vm

    def remember(self) -> None:
        """Take what is on the host now for what has to be there in the end."""
        self._production = [_AsItWas(vm=vm, said=_said(vm), files=self._stamps(vm)) for vm in self.vms]
        self._given = {self.files.windows(path) for path in self.files.root.rglob("*") if self._is_on_a_volume(path)}

    def _is_on_a_volume(self, path: Path) -> bool:
        return path.parent != self.files.root

    def _stamps(self, vm: VirtualMachine) -> dict[str, tuple[int, int]]:
        places = {drive.path: self.files.local(drive.path) for drive in vm.hard_drives if drive.path}
        return {path: (at.stat().st_size, at.stat().st_mtime_ns) for path, at in places.items() if at.exists()}

    def bind(self, *, adapter_of: VirtualMachine) -> None:
        """Let a VM's parts bear its name and id."""
        vm = adapter_of
        for index, part in enumerate(vm.network_adapters):
            part.vm_id, part.vm_name = vm.id, vm.name
            part.id = f"Microsoft:{vm.id.upper()}\\{index:08X}-0000-0000-0000-000000000000"
        for drive in vm.hard_drives:
            drive.vm_id, drive.vm_name = vm.id, vm.name

    def opened_by(self, vm: VirtualMachine) -> Iterator[str]:
        """Yield the disks of a VM with all their parents."""
        for drive in vm.hard_drives:
            if drive.path:
                yield from self.chain(drive.path)

    def chain(self, path: str) -> Iterator[str]:
        """Yield a virtual hard disk and its parents, as far as they are there."""
        seen: set[str] = set()
        while path and path.casefold() not in seen:
            seen.add(path.casefold())
            yield path
            try:
                path = read_facts(self.files.local(path)).parent_path
            except (NotAVhdError, OSError):
                return

    # The rule

    def look(self) -> None:
        """Record what is wrong now: a copy that can reach production, or a disk of production that two can write."""
        for vm in self.vms:
            if vm.truth.origin is not None:
                for wrong in self._reaches(vm):
                    self._violate(f"{vm.name} ({vm.state}), a copy of a guest, {wrong}")
            if vm.truth.serves and (where := self._beyond_fences(vm)):
                self._violate(f"the responder {vm.name} is on the switch {where!r}")
        for path, users in self._writers().items():
            if len(users) > 1 and any(as_it_was.vm in users for as_it_was in self._production):
                names = " and ".join(sorted(vm.name for vm in users))
                self._violate(f"{path} can be written by {names}")

    def _reaches(self, vm: VirtualMachine) -> Iterator[str]:
        if vm.automatic_start_action != "Nothing":
            yield f"would start with the host ({vm.automatic_start_action})"
        for adapter in vm.network_adapters:
            switch = next((one for one in self.switches if one.id == adapter.switch_id), None)
            if not adapter.switch_name:
                continue
            if switch is None or switch.switch_type is not SwitchType.PRIVATE:
                yield f"is on the switch {adapter.switch_name!r}: it could reach production"
            elif any(other.truth.origin is None and not _leads_nowhere(other) for other in self._on(switch)):
                yield f"shares the switch {adapter.switch_name!r} with a VM that is no copy: it could reach production"

    def _beyond_fences(self, vm: VirtualMachine) -> str:
        """Return the switch that a VM is on and that is not private, or an empty text."""
        private = {switch.id for switch in self.switches if switch.switch_type is SwitchType.PRIVATE}
        away = [one.switch_name for one in vm.network_adapters if one.connected and one.switch_id not in private]
        return away[0] if away else ""

    def _on(self, switch: VMSwitch) -> Iterator[VirtualMachine]:
        return (vm for vm in self.vms if any(adapter.switch_id == switch.id for adapter in vm.network_adapters))

    def _writers(self) -> dict[str, list[VirtualMachine]]:
        writers: dict[str, list[VirtualMachine]] = {}
        for vm in self.vms:
            for drive in vm.hard_drives:
                if drive.path and not drive.support_persistent_reservations:
                    writers.setdefault(drive.path.casefold(), []).append(vm)
        return writers

    def _violate(self, text: str) -> None:
        if text not in self.violations:
            self.violations.append(text)

    # What tests ask

    def harm(self) -> list[str]:
        """Return everything that is wrong with production now: violations, VMs, disks and switches not as they were."""
        wrong = list(self.violations)
        for before in self._production:
            vm = before.vm
            if vm not in self.vms:
                wrong.append(f"{vm.name} is gone")
            elif _said(vm) != before.said:
                wrong.append(f"{vm.name} was changed: {_said(vm)} was {before.said}")
            if self._stamps(vm) != before.files:
                wrong.append(f"the disks of {vm.name} were written or removed")
        wrong += [
            f"switch {one.name} is gone" for one in self._production_switches.values() if one not in self.switches
        ]
        return wrong

    def leftovers(self) -> list[str]:
        """Return everything on the host that was not there when the test began."""
        mine = [before.vm for before in self._production]
        left = [f"VM {vm.name}" for vm in self.vms if vm not in mine]
        left += [f"planned VM {vm.name}" for vm in self.planned]
        left += [f"responder {vm.name} on a switch" for vm in self.vms if vm.truth.serves and _is_plugged(vm)]
        left += [f"switch {one.name}" for one in self.switches if one.id not in self._production_switches]
        there = {self.files.windows(path) for path in self.files.root.rglob("*") if self._is_on_a_volume(path)}
        return left + sorted(there - self._given)

    def vm(self, name: str) -> VirtualMachine:
        """Return the VM of that name. Raises LookupError."""
        for vm in self.vms:
            if vm.name == name:
                return vm
        raise LookupError(name)


def _leads_nowhere(vm: VirtualMachine) -> bool:
    """Tell whether a VM that is no copy may be beside one: it has one adapter, so it is on no other switch."""
    return bool(vm.truth.serves) and len(vm.network_adapters) == 1


def _is_plugged(vm: VirtualMachine) -> bool:
    return any(adapter.connected for adapter in vm.network_adapters)


def _said(vm: VirtualMachine) -> tuple[object, ...]:
    return (
        vm.name,
        vm.state,
        vm.notes,
        vm.automatic_start_action,
        # The cable of a responder is moved; where it is, ``look`` and ``leftovers`` tell.
        tuple((adapter.mac_address, vm.truth.serves or adapter.switch_name) for adapter in vm.network_adapters),
        tuple(_place(drive) for drive in vm.hard_drives),
        tuple(snapshot.id for snapshot in vm.snapshots),
        vm.processor_count,
        vm.memory_startup,
    )


def _place(drive: HardDiskDrive) -> tuple[object, ...]:
    return (drive.controller_type, drive.controller_number, drive.controller_location, drive.path)
