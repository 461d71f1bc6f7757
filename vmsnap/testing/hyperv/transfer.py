"""Export, comparison and import."""

from __future__ import annotations

import copy
import functools
import uuid
from collections.abc import Callable
from pathlib import PureWindowsPath

from vmsnap.testing.hyperv import failures
from vmsnap.testing.hyperv.config import Config
from vmsnap.testing.hyperv.failures import Code, Reason
from vmsnap.testing.hyperv.files import FORBIDDEN
from vmsnap.testing.hyperv.host import Exported, Job, cmdlet
from vmsnap.testing.hyperv.inventory import VMCX_BYTES
from vmsnap.testing.hyperv.power import saved_state
from vmsnap.testing.hyperv.values import (
    SETTLED,
    CompatibilityReport,
    Incompatibility,
    SavedState,
    Truth,
    VirtualMachine,
    VMState,
)

_CAPTURES = frozenset({"CaptureSavedState", "CaptureDataConsistentState", "CaptureCrashConsistentState"})
_MISSING_SWITCH = 33012
_STATE_BYTES = (
    1 << 20
)  # a saved state takes as much as the VM's memory on a real host; the room for it is charged whole


class Transfer(Config):
    """VMs that leave the host as files and come back as others."""

    @cmdlet("Export-VM")
    def export_vm(
        self,
        *,
        path: str,
        vm: VirtualMachine | None = None,
        name: str | None = None,
        capture_live_state: str = "CaptureSavedState",
    ) -> None:
        r"""Write a VM into ``PATH\NAME``: configuration, memory where it is asked for, and whole copies of its disks.

        What is there already is not written over. What a failed export wrote stays.
        """
        if capture_live_state not in _CAPTURES:
            self.bad_argument("Export-VM", "CaptureLiveState")
        for one in self.chosen("Export-VM", vm=vm, name=name):
            self._export(one, path=path, memory=capture_live_state == "CaptureSavedState")

    def _export(self, vm: VirtualMachine, *, path: str, memory: bool) -> None:
        if self.is_busy(vm) or vm.state not in SETTLED:
            self.wrong_state("Export-VM", vm=vm)
        for drive in vm.hard_drives:
            why = "pass-through" if drive.disk_number is not None else ""
            why = "shared" if drive.support_persistent_reservations else why
            if why:
                about = (vm.name, why)
                self.refuse("Export-VM", text=failures.NOT_EXPORTABLE, about=about, reason=Reason.OPERATION_FAILED)
        if FORBIDDEN & set(vm.name):
            self.refuse(
                "Export-VM",
                text=failures.BAD_NAME,
                about=(vm.name,),
                reason=Reason.OPERATION_FAILED,
                code=Code.INVALID_NAME,
            )
        folder = f"{path}\\{vm.name}"
        configuration = f"{folder}\\Virtual Machines\\{vm.id.upper()}.vmcx"
        disks = [one for drive in vm.hard_drives for one in self.chain(drive.path)]
        # Nobody wrote down what becomes of two disks of one name in different folders. Here the second is in the way.
        targets = tuple(f"{folder}\\Virtual Hard Disks\\{PureWindowsPath(disk).name}" for disk in disks)
        alive = vm.state in {VMState.RUNNING, VMState.PAUSED}
        exported = Exported(vm=_description(vm), vhds=targets[: len(vm.hard_drives)], saved=None)

        def configure() -> None:
            self.write("Export-VM", path=configuration, size_bytes=VMCX_BYTES)
            self.exports[configuration.casefold()] = exported
            if memory and alive:
                exported.saved = saved_state(vm)
                exported.vm.state = VMState.SAVED
            elif vm.truth.saved is not None and vm.state is VMState.SAVED:
                exported.saved = vm.truth.saved

        def remember() -> None:
            if exported.saved is not None:
                self._charge("Export-VM", path=configuration, size_bytes=vm.memory_startup)
                self.write("Export-VM", path=configuration[:-4] + "vmrs", size_bytes=_STATE_BYTES)

        copies: list[tuple[str, Callable[[], None]]] = [
            (f"Export-VM: disk {index}", functools.partial(self._copy, "Export-VM", disk, target))
            for index, (disk, target) in enumerate(zip(disks, targets, strict=True))
        ]
        self.run_job(
            self._job(
                f"export of {vm.name}",
                vm=vm,
                holds=folder,
                left=[
                    ("Export-VM: begin", configure),
                    *copies,
                    ("Export-VM: memory", remember),
                    ("Export-VM: end", _done),
                ],
            )
        )

    def _job(self, name: str, *, vm: VirtualMachine, holds: str, left: list[tuple[str, Callable[[], None]]]) -> Job:
        before, vm.status = vm.status, name

        def undo() -> None:
            vm.status = before

        return Job(name=name, vm=vm, left=left, holds=(holds,), undo=undo)

    def _copy(self, cmdlet: str, source: str, target: str) -> None:
        self.put(cmdlet, path=target, make=lambda: self.files.copy(source, target=target))

    def _charge(self, cmdlet: str, *, path: str, size_bytes: int) -> None:
        """Look whether there is room for something that is written smaller than it really is."""
        volume = self.files.volumes.get(path[0].upper())
        if volume is not None and volume.free_bytes < size_bytes:
            self.refuse(cmdlet, text=failures.FULL, about=(path,), reason=Reason.OPERATION_FAILED, code=Code.DISK_FULL)

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
        """Plan the import of an exported VM, or look at a plan again, and say what stands against it."""
        if compatibility_report is not None:
            self._look_at(compatibility_report)
            return compatibility_report
        if path is None or copy == register or (register and (generate_new_id or vhd_destination_path is not None)):
            self.bad_argument("Compare-VM", "Path, Copy, Register, GenerateNewId")
        del snapshot_file_path, smart_paging_file_path
        report = self._plan(
            "Compare-VM",
            path=path or "",
            copy=copy,
            generate_new_id=generate_new_id,
            folders=(virtual_machine_path, vhd_destination_path),
        )
        self._look_at(report)
        self.between("Compare-VM: planned")
        return report

    def _plan(
        self, cmdlet: str, *, path: str, copy: bool, generate_new_id: bool, folders: tuple[str | None, str | None]
    ) -> CompatibilityReport:
        self.need_rights(cmdlet)
        exported = self.exports.get(path.casefold())
        if exported is None or not self.files.exists(path):
            self.refuse(
                cmdlet, text=failures.NO_FILE, about=(path,), reason=Reason.OPERATION_FAILED, code=Code.FILE_NOT_FOUND
            )
        if self.is_open(path):
            self.refuse(
                cmdlet, text=failures.IN_USE, about=(path,), reason=Reason.OPERATION_FAILED, code=Code.SHARING_VIOLATION
            )
        vm = _description(exported.vm)
        vm.truth = Truth(planned=True, origin=exported.vm.id, saved=_thawable(exported.saved))
        vm.state = VMState.SAVED if exported.saved is not None else VMState.OFF
        if exported.saved is not None and not self.files.exists(path[:-4] + "vmrs"):
            vm.truth.saved, vm.state = None, VMState.OFF
        if generate_new_id:
            vm.id = str(uuid.uuid4())
        export = str(PureWindowsPath(path).parent.parent)
        vm.path = vm.configuration_location = (folders[0] or self.default_folder) if copy else export
        vhds: list[tuple[str, str]] = []
        for drive, source in zip(vm.hard_drives, exported.vhds, strict=True):
            target_folder = folders[1] or f"{self.default_folder}\\Virtual Hard Disks"
            target = f"{target_folder}\\{PureWindowsPath(source).name}" if copy else source
            vhds.append((source, target))
            drive.path = target
        # A switch of that name is taken, as on the host that the VM came from.
        for adapter in vm.network_adapters:
            match = [one for one in self.switches if one.name == adapter.switch_name]
            adapter.switch_id = match[0].id if match else ""
        self.bind(adapter_of=vm)
        self.planned.append(vm)
        return CompatibilityReport(vm=vm, vhds=vhds, exported=path, copy=copy)

    def _look_at(self, report: CompatibilityReport) -> None:
        report.incompatibilities = [
            Incompatibility(
                message_id=_MISSING_SWITCH,
                message=failures.NO_SWITCH.fill(self.speech.language, adapter.switch_name),
                source=adapter,
            )
            for adapter in report.vm.network_adapters
            if adapter.switch_name and not any(one.id == adapter.switch_id for one in self.switches)
        ]

    @cmdlet("Import-VM")
    def import_vm(
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
    ) -> VirtualMachine:
        """Make a planned VM a real one, copying its files. Without a report the VM comes as it was exported."""
        report = compatibility_report
        if report is None:
            if path is None:
                self.bad_argument("Import-VM", "Path")
            del snapshot_file_path, smart_paging_file_path, register
            report = self._plan(
                "Import-VM",
                path=path or "",
                copy=copy,
                generate_new_id=generate_new_id,
                folders=(virtual_machine_path, vhd_destination_path),
            )
        self._look_at(report)
        vm = report.vm
        if report.incompatibilities:
            self.refuse("Import-VM", text=failures.NEEDS_REPAIR, reason=Reason.CONFIGURATION)
        if vm not in self.planned or any(one.id == vm.id for one in self.vms):
            self.refuse("Import-VM", text=failures.TAKEN_ID, about=(vm.id,), reason=Reason.OPERATION_FAILED)
        self._import(report)
        return vm

    def _import(self, report: CompatibilityReport) -> None:
        vm = report.vm
        file = f"{vm.path}\\Virtual Machines\\{vm.id.upper()}.vmcx"
        saved = f"{file[:-4]}vmrs"
        written: list[str] = []

        def copy_disk(source: str, target: str) -> None:
            self._copy("Import-VM", source, target)
            written.append(target)

        def configure() -> None:
            if not report.copy:
                return
            if vm.truth.saved is not None:
                self._charge("Import-VM", path=saved, size_bytes=vm.memory_startup)
                self.write("Import-VM", path=saved, size_bytes=_STATE_BYTES)
                written.append(saved)
            self.write("Import-VM", path=file, size_bytes=VMCX_BYTES)

        def realise() -> None:
            vm.truth.planned = False
            self.planned.remove(vm)
            vm.truth.files = (file, saved) if vm.truth.saved is not None else (file,)
            self.bind(adapter_of=vm)
            self.vms.append(vm)

        copies = [
            (f"Import-VM: disk {index}", functools.partial(copy_disk, source, target))
            for index, (source, target) in enumerate(report.vhds)
            if report.copy
        ]
        job = self._job(
            f"import of {vm.name}",
            vm=vm,
            holds=vm.path,
            left=[*copies, ("Import-VM: configuration", configure), ("Import-VM: realise", realise)],
        )
        job.undo = functools.partial(self._undo_import, vm, written, job.undo)
        self.run_job(job)

    def _undo_import(self, vm: VirtualMachine, written: list[str], undo: Callable[[], None]) -> None:
        """Remove what a failed import copied, as Hyper-V does; its folders stay."""
        undo()
        if vm.truth.planned:
            for path in written:
                self.files.remove(path)


def _done() -> None:
    """Do nothing: a last moment in which the job still goes on."""


def _description(vm: VirtualMachine) -> VirtualMachine:
    """Return a copy of what a configuration file says: no state of the host, nothing of the guest."""
    description = copy.copy(vm)
    description.network_adapters = [copy.copy(adapter) for adapter in vm.network_adapters]
    description.hard_drives = [copy.copy(drive) for drive in vm.hard_drives]
    description.snapshots = []
    description.disabled_services = set(vm.disabled_services)
    description.truth = Truth()
    description.status = "Operating normally"
    description.is_clustered = False
    if vm.state is not VMState.SAVED:
        description.state = VMState.OFF
    return description


def _thawable(saved: SavedState | None) -> SavedState | None:
    """Return a saved state of its own for each import of one export."""
    if saved is None:
        return None
    thawed = copy.copy(saved)
    thawed.inside = saved.inside.captured()
    return thawed
