"""Cmdlets that start and stop VMs."""

from __future__ import annotations

from typing import NoReturn

from vmsnap.testing.hyperv import failures
from vmsnap.testing.hyperv.failures import Code, Reason
from vmsnap.testing.hyperv.host import cmdlet
from vmsnap.testing.hyperv.looking import SHUTDOWN, Looking
from vmsnap.testing.hyperv.values import (
    ALIVE,
    SavedState,
    VirtualMachine,
    VMState,
)
from vmsnap.testing.hyperv.vhd import NotAVhdError, read_facts


class Power(Looking):
    """Running, and not running."""

    @cmdlet("Start-VM")
    def start_vm(self, *, vm: VirtualMachine | None = None, name: str | None = None) -> None:
        """Boot a VM that is off, resume one that is saved or paused. A running VM is left alone, with a warning."""
        for one in self.chosen("Start-VM", vm=vm, name=name):
            self._start(one)

    def _start(self, vm: VirtualMachine) -> None:
        if vm.state is VMState.RUNNING:
            return
        if vm.truth.planned or self.is_busy(vm) or vm.state not in {VMState.OFF, VMState.SAVED, VMState.PAUSED}:
            self.wrong_state("Start-VM", vm=vm)
        if vm.state is not VMState.PAUSED:
            self._check_memory(vm)
            self._check_disks(vm)
            self._check_ports(vm)
            saved = vm.truth.saved if vm.state is VMState.SAVED else None
            if saved is not None and not _fits(saved, vm=vm):
                self.refuse(
                    "Start-VM",
                    text=failures.BAD_STATE_FILE,
                    about=(vm.name,),
                    reason=Reason.OPERATION_FAILED,
                    code=Code.STATE_INCOMPATIBLE,
                )
            before, vm.state = vm.state, VMState.STARTING
            try:
                self.between("Start-VM")
            finally:
                # The host starts it whatever becomes of the client.
                if vm in self.vms and vm.state is VMState.STARTING:
                    vm.state = VMState.RUNNING
                    vm.truth.inside = vm.truth.inside.booted() if saved is None else saved.inside
                    vm.truth.saved = None if before is VMState.SAVED else vm.truth.saved
            if vm not in self.vms or vm.state is not VMState.RUNNING:
                self.wrong_state("Start-VM", vm=vm)
        vm.state = VMState.RUNNING

    def _check_memory(self, vm: VirtualMachine) -> None:
        if vm.memory_startup > self.memory_bytes - sum(one.memory_assigned for one in self.vms):
            self.refuse(
                "Start-VM",
                text=failures.NO_MEMORY,
                about=(vm.name,),
                reason=Reason.OUT_OF_MEMORY,
                code=Code.OUT_OF_MEMORY,
            )

    def _check_disks(self, vm: VirtualMachine) -> None:
        others = {path.casefold() for one in self.vms if one.state in ALIVE for path in self.opened_by(one)}
        for drive in vm.hard_drives:
            if not drive.path:
                continue
            why = self._broken(drive.path)
            if why is not None:
                about = (vm.name, drive.path)
                self.refuse(
                    "Start-VM", text=failures.NOT_STARTED, about=about, reason=Reason.OPERATION_FAILED, code=why
                )
            if drive.path.casefold() in others and not drive.support_persistent_reservations:
                self.refuse(
                    "Start-VM",
                    text=failures.NOT_STARTED,
                    about=(vm.name, drive.path),
                    reason=Reason.OPERATION_FAILED,
                    code=Code.SHARING_VIOLATION,
                )

    def _broken(self, path: str) -> Code | None:
        """Return what is wrong with a disk or its parents."""
        expected = ""
        while path:
            if not self.files.exists(path):
                return Code.FILE_NOT_FOUND
            try:
                facts = read_facts(self.files.local(path))
            except NotAVhdError:
                return Code.CORRUPT
            if expected and facts.linkage != expected:
                return Code.IDENTIFIERS_MISMATCH
            path, expected = facts.parent_path, facts.parent_linkage
        return None

    def _check_ports(self, vm: VirtualMachine) -> None:
        """Refuse a MAC that is in use: a static one anywhere on the host, a dynamic one on the same switch.

        The second is what the switch does; that the first is refused on another switch too is the stricter of what users
        report.
        """
        for mine in vm.network_adapters:
            for other in self.vms:
                for theirs in other.network_adapters if other is not vm and other.state in ALIVE else []:
                    same = mine.connected and theirs.connected and mine.mac_address == theirs.mac_address
                    if same and (not mine.dynamic_mac_address_enabled or mine.switch_id == theirs.switch_id):
                        self.refuse(
                            "Start-VM",
                            text=failures.SAME_MAC,
                            about=(vm.name,),
                            reason=Reason.OPERATION_FAILED,
                            code=Code.DUPLICATE_NAME,
                        )

    def wrong_state(self, cmdlet: str, *, vm: VirtualMachine) -> NoReturn:
        """Raise what a VM in the wrong state makes of a cmdlet."""
        self.refuse(cmdlet, text=failures.WRONG_STATE, about=(vm.name,), reason=Reason.INVALID_STATE)

    @cmdlet("Stop-VM")
    def stop_vm(
        self,
        *,
        vm: VirtualMachine | None = None,
        name: str | None = None,
        turn_off: bool = False,
        save: bool = False,
        force: bool = False,
    ) -> None:
        """Pull the plug, save, or ask the guest; without its answer a plain stop asks back, and ``force`` pulls the plug."""
        for one in self.chosen("Stop-VM", vm=vm, name=name):
            if one.state is VMState.OFF:
                continue
            if self.is_busy(one) or one.truth.planned:
                self.wrong_state("Stop-VM", vm=one)
            if save:
                self._save(one)
            elif turn_off or one.state is VMState.SAVED:
                self.end(one, in_order=False)
            elif SHUTDOWN in one.disabled_services or not one.truth.inside.heartbeat:
                if not force:
                    self.refuse("Stop-VM", text=failures.ASKS_BACK, about=(one.name,), reason=Reason.OPERATION_FAILED)
                self.end(one, in_order=False)
            else:
                self.end(one, in_order=one.truth.inside.ends_in_order)

    def _save(self, vm: VirtualMachine) -> None:
        if vm.state is not VMState.RUNNING:
            self.wrong_state("Stop-VM", vm=vm)
        vm.truth.saved = saved_state(vm)
        vm.state = VMState.SAVED

    @cmdlet("Remove-VMSavedState")
    def remove_vm_saved_state(self, *, vm: VirtualMachine | None = None, vm_name: str | None = None) -> None:
        """Throw a saved state away: the VM is off then."""
        for one in self.chosen("Remove-VMSavedState", vm=vm, name=vm_name):
            if one.state is not VMState.SAVED:
                self.wrong_state("Remove-VMSavedState", vm=one)
            one.truth.saved, one.state = None, VMState.OFF


def saved_state(vm: VirtualMachine) -> SavedState:
    """Freeze a running VM's memory and devices."""
    return SavedState(
        inside=vm.truth.inside.captured(),
        macs=tuple(adapter.mac_address for adapter in vm.network_adapters),
        memory_bytes=vm.memory_startup,
        processors=vm.processor_count,
        drives=len(vm.hard_drives),
    )


def _fits(saved: SavedState, *, vm: VirtualMachine) -> bool:
    there = (tuple(adapter.mac_address for adapter in vm.network_adapters), vm.memory_startup, vm.processor_count)
    return (*there, len(vm.hard_drives)) == (saved.macs, saved.memory_bytes, saved.processors, saved.drives)
