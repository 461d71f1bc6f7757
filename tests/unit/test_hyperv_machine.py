"""The simulated host refuses what a real one refuses, and notices what must never be."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.hyperv_hosts import DISK_BYTES, EXPORTS, add_guest, clone, export, fence_switch, make_host
from vmsnap.testing.hyperv.cmdlets import CMDLETS, HYPER_V, UnknownCmdletError, check_call, snake_case
from vmsnap.testing.hyperv.failures import CmdletError, Language, ModuleGeneration, Speech
from vmsnap.testing.hyperv.machine import HyperVHost
from vmsnap.testing.hyperv.values import Silent, SwitchType, VirtualMachine, VMState

FAILED = "OperationFailed,Microsoft.HyperV.PowerShell.Commands."


@pytest.fixture
def host(tmp_path: Path) -> HyperVHost:
    return make_host(tmp_path)


def shut_down(host: HyperVHost, vm: VirtualMachine) -> int:
    (component,) = host.get_cim_instance(
        class_name="Msvm_ShutdownComponent", namespace="root/virtualization/v2", filter=f"SystemName='{vm.id.upper()}'"
    )
    return host.invoke_cim_method(
        input_object=component, method_name="InitiateShutdown", arguments={"Force": False, "Reason": "a test"}
    )


def test_methods_are_cmdlets_with_parameters_that_these_have() -> None:
    by_method = {snake_case(name): name for name in CMDLETS}
    methods = {name: method for name, method in inspect.getmembers(HyperVHost, callable) if name in by_method}
    assert len(methods) > 30
    for name, method in methods.items():
        real = {snake_case(parameter) for parameter in CMDLETS[by_method[name]]}
        ours = set(inspect.signature(method).parameters) - {"self"}
        assert ours <= real, name


@pytest.mark.parametrize(
    ("cmdlet", "parameter"),
    [("Get-VMM", "Name"), ("Start-VM", "Id"), ("Get-VM", "ComputerName"), ("Format-Volume", "DriveLetter")],
)
def test_an_unknown_cmdlet_or_parameter_is_refused(cmdlet: str, parameter: str) -> None:
    with pytest.raises(UnknownCmdletError):
        check_call(cmdlet, parameters=[parameter])


def test_names_are_compared_without_case_and_common_parameters_are_known() -> None:
    check_call("hyper-v\\get-vm", parameters=["-id", "ErrorAction:"])
    assert "Export-VM" in HYPER_V


def test_a_clone_is_made_runs_shuts_down_and_is_removed(host: HyperVHost) -> None:
    vm = clone(host)
    assert (vm.state, vm.name, vm.notes) == (VMState.SAVED, "vmsnap-clone-1", "vmsnap 1")
    assert vm.id != host.vm("db").id
    switch = fence_switch(host)
    host.connect_vm_network_adapter(vm_network_adapter=vm.network_adapters[0], vm_switch=switch)
    host.start_vm(vm=vm)
    assert (vm.state, vm.heartbeat) == (VMState.RUNNING, "OkApplicationsUnknown")
    assert shut_down(host, vm) == 0
    while host.get_vm(id=vm.id)[0].state is not VMState.OFF:
        assert vm.state is VMState.STOPPING
    assert host.test_vhd(path=vm.hard_drives[0].path)
    assert host.get_vhd(path=vm.hard_drives[0].path)[0].size == DISK_BYTES
    host.remove_vm(vm=vm, force=True)
    host.remove_vm_switch(vm_switch=switch, force=True)
    for item in host.get_child_item(literal_path=EXPORTS):
        host.remove_item(literal_path=item.full_name, recurse=True)
    assert host.leftovers() == []
    assert host.harm() == []
    assert {volume.free_bytes for volume in host.files.volumes.values()} <= {100 << 30, (100 << 30) - 65536}


def test_a_bare_import_puts_the_clone_on_the_production_switch(host: HyperVHost) -> None:
    """Nothing stands against it, on the same host: this is the trap that the rule exists for."""
    host.import_vm(path=export(host), copy=True, generate_new_id=True, vhd_destination_path=f"{EXPORTS}\\x")
    assert any("could reach production" in text for text in host.violations)
    assert host.harm() != []


def test_a_clone_on_a_switch_with_others_breaks_the_rule(host: HyperVHost) -> None:
    switch = host.add_switch("backstage", switch_type=SwitchType.PRIVATE)
    other = add_guest(host, "web")
    vm = clone(host)
    host.connect_vm_network_adapter(vm_network_adapter=vm.network_adapters[0], vm_switch=switch)
    assert host.violations == []
    host.connect_vm_network_adapter(vm_network_adapter=other.network_adapters[0], vm_switch=switch)
    assert any("shares the switch" in text for text in host.violations)


def test_a_disk_of_production_in_another_vm_breaks_the_rule(host: HyperVHost) -> None:
    host.new_vm(name="thief", generation=2, vhd_path=host.vm("db").hard_drives[0].path)
    assert any("can be written by" in text for text in host.violations)


def refused(error: pytest.ExceptionInfo[CmdletError]) -> tuple[str, str]:
    """Return the id of an error, and Windows' code in its message."""
    return error.value.error_id, error.value.message.rpartition("(")[2].rstrip(").")


def test_leftovers_are_in_the_way_of_an_export(host: HyperVHost) -> None:
    host.export_vm(name="db", path=EXPORTS)
    with pytest.raises(CmdletError) as error:
        host.export_vm(name="db", path=EXPORTS)
    assert refused(error) == (FAILED + "ExportVM", "0x80070050")


def test_a_full_volume_leaves_what_was_written(host: HyperVHost) -> None:
    host.files.volumes["D"].free_bytes = 100_000
    with pytest.raises(CmdletError) as error:
        host.export_vm(name="db", path=f"{EXPORTS}\\x")
    assert refused(error) == (FAILED + "ExportVM", "0x80070070")
    assert host.leftovers() != []
    assert host.vm("db").status == "Operating normally"


def test_an_export_goes_on_without_its_client(host: HyperVHost) -> None:
    def die(place: str) -> None:
        if place == "Export-VM: disk 0":
            raise KeyboardInterrupt

    host.between = die
    with pytest.raises(KeyboardInterrupt):
        host.export_vm(name="db", path=f"{EXPORTS}\\x")
    with pytest.raises(CmdletError) as error:
        host.remove_item(literal_path=f"{EXPORTS}\\x", recurse=True)
    assert error.value.error_id.startswith("RemoveFileSystemItemIOError,")
    for _ in range(3):
        host.get_vm()
    assert host.jobs == []
    host.between = lambda _place: None
    host.remove_item(literal_path=f"{EXPORTS}\\x", recurse=True)
    assert host.leftovers() == []


def test_a_missing_switch_stands_against_an_import(host: HyperVHost) -> None:
    path = export(host)
    host.disconnect_vm_network_adapter(vm_network_adapter=host.vm("db").network_adapters[0])
    host.remove_vm_switch(name="LAN", force=True)
    report = host.compare_vm(path=path, copy=True, generate_new_id=True)
    assert [one.message_id for one in report.incompatibilities] == [33012]
    with pytest.raises(CmdletError) as error:
        host.import_vm(compatibility_report=report)
    assert error.value.error_id == FAILED + "ImportVM"


def test_a_copy_with_the_same_id_is_refused(host: HyperVHost) -> None:
    report = host.compare_vm(path=export(host), register=True)
    with pytest.raises(CmdletError, match="already exists"):
        host.import_vm(compatibility_report=report)


def test_a_planned_vm_is_no_vm(host: HyperVHost) -> None:
    report = host.compare_vm(path=export(host), copy=True, generate_new_id=True)
    assert [vm.name for vm in host.get_vm()] == ["db"]
    with pytest.raises(CmdletError) as error:
        host.start_vm(vm=report.vm)
    assert error.value.error_id == "InvalidState,Microsoft.HyperV.PowerShell.Commands.StartVM"


def test_a_saved_vm_keeps_its_hardware(host: HyperVHost) -> None:
    vm = clone(host)
    changes: tuple[Callable[[], None], ...] = (
        lambda: host.set_vm(vm=vm, processor_count=2),
        lambda: host.set_vm(vm=vm, memory_startup_bytes=1 << 30),
        lambda: host.remove_vm_network_adapter(vm_network_adapter=vm.network_adapters[0]),
        lambda: host.set_vm_network_adapter(vm_network_adapter=vm.network_adapters[0], static_mac_address="0" * 12),
    )
    for change in changes:
        with pytest.raises(CmdletError) as error:
            change()
        assert error.value.error_id.startswith("InvalidState,")
    host.set_vm(vm=vm, notes="words are free")


def test_a_static_mac_cannot_be_on_the_host_twice(host: HyperVHost) -> None:
    host.vm("db").network_adapters[0].dynamic_mac_address_enabled = False
    vm = clone(host)
    host.connect_vm_network_adapter(vm_network_adapter=vm.network_adapters[0], vm_switch=fence_switch(host))
    with pytest.raises(CmdletError) as error:
        host.start_vm(vm=vm)
    assert refused(error) == (FAILED + "StartVM", "0x80070034")


def test_a_disk_is_open_to_one(host: HyperVHost) -> None:
    path = host.vm("db").hard_drives[0].path
    vm = host.new_vm(name="thief", generation=2, vhd_path=path)
    with pytest.raises(CmdletError) as error:
        host.start_vm(vm=vm)
    assert refused(error) == (FAILED + "StartVM", "0x80070020")
    with pytest.raises(CmdletError):
        host.test_vhd(path=path)
    with pytest.raises(CmdletError, match="being used"):
        host.remove_item(literal_path=path)


def test_memory_runs_out(host: HyperVHost) -> None:
    vm = clone(host)
    host.memory_bytes = (1 << 30) + 1
    with pytest.raises(CmdletError) as error:
        host.start_vm(vm=vm)
    assert refused(error) == ("OutOfMemory,Microsoft.HyperV.PowerShell.Commands.StartVM", "0x8007000E")


def test_a_chain_breaks_where_its_parent_is_another(host: HyperVHost) -> None:
    parent, child = f"{EXPORTS}\\parent.vhdx", f"{EXPORTS}\\child.vhdx"
    host.new_vhd(path=parent, size_bytes=DISK_BYTES, dynamic=True)
    disk = host.new_vhd(path=child, parent_path=parent, differencing=True)
    assert (disk.parent_path, disk.size, disk.vhd_type) == (parent, DISK_BYTES, "Differencing")
    assert host.test_vhd(path=child)
    host.remove_item(literal_path=parent)
    host.new_vhd(path=parent, size_bytes=DISK_BYTES, dynamic=True)
    with pytest.raises(CmdletError) as error:
        host.test_vhd(path=child)
    assert refused(error)[1] == "0xC03A000E"


@pytest.mark.parametrize("state", [VMState.SAVING, VMState.RUNNING_CRITICAL, VMState.STARTING, VMState.OFF_CRITICAL])
def test_unsettled_states_allow_neither_export_nor_start(host: HyperVHost, state: VMState) -> None:
    vm = host.vm("db")
    vm.state = state
    with pytest.raises(CmdletError):
        host.export_vm(vm=vm, path=EXPORTS)
    with pytest.raises(CmdletError):
        host.start_vm(vm=vm)


@pytest.mark.parametrize("what", ["disk_number", "support_persistent_reservations"])
def test_storage_of_others_is_not_exported(host: HyperVHost, what: str) -> None:
    setattr(host.vm("db").hard_drives[0], what, True)
    with pytest.raises(CmdletError) as error:
        host.export_vm(name="db", path=EXPORTS)
    assert error.value.error_id == FAILED + "ExportVM"


def test_nobody_answers_questions(host: HyperVHost) -> None:
    vm = clone(host)
    with pytest.raises(CmdletError, match="prompts"):
        host.remove_vm(vm=vm)


def test_names_are_not_unique_and_take_wildcards(host: HyperVHost) -> None:
    add_guest(host, "DB")
    assert len(host.get_vm(name="db")) == 2
    assert len(host.get_vm(name="d[ab]")) == 2
    assert host.get_vm(name="[x]") == []
    with pytest.raises(CmdletError) as error:
        host.get_vm(name="nobody")
    assert error.value.error_id == "InvalidParameter,Microsoft.HyperV.PowerShell.Commands.GetVM"


def test_the_first_generation_has_other_ids_and_says_less(tmp_path: Path) -> None:
    host = make_host(tmp_path, speech=Speech(generation=ModuleGeneration.FIRST))
    with pytest.raises(CmdletError) as error:
        host.get_vm(name="nobody")
    assert error.value.error_id == "InvalidParameter,Microsoft.HyperV.PowerShell.Commands.GetVMCommand"
    host.rights = False
    assert host.get_vm() == []


def test_another_language_changes_all_words_and_no_id(tmp_path: Path) -> None:
    hosts = [make_host(tmp_path / lang, speech=Speech(language=lang)) for lang in Language]
    errors = []
    for host in hosts:
        host.files.volumes["D"].free_bytes = 0
        with pytest.raises(CmdletError) as error:
            host.export_vm(name="db", path=EXPORTS)
        errors.append(error.value)
    english, german = errors
    assert english.error_id == german.error_id
    assert english.message != german.message
    assert english.message.endswith("(0x80070070).")
    assert german.message.endswith("(0x80070070).")
    names = [{service.name for service in host.get_vm_integration_service(vm_name="db")} for host in hosts]
    assert len(names[0] & names[1]) == 1  # VSS


@pytest.mark.parametrize("name", ['a"b', "a/b", "a:b", "what?"])
def test_a_vm_whose_name_is_no_file_name_cannot_be_exported(host: HyperVHost, name: str) -> None:
    vm = add_guest(host, name)
    with pytest.raises(CmdletError) as error:
        host.export_vm(vm=vm, path=EXPORTS)
    assert refused(error)[1] == "0x8007007B"


@pytest.mark.parametrize("name", ["it's", "$(Remove-Item x)", "`whoami`", "two  words"])
def test_other_awkward_names_are_names(host: HyperVHost, name: str) -> None:
    add_guest(host, name)
    clone(host, name=name)
    assert host.violations == []


def test_what_was_planned_and_never_made_stays_until_it_is_destroyed(host: HyperVHost) -> None:
    path = export(host)
    report = host.compare_vm(path=path, copy=True, generate_new_id=True)
    host.remove_item(literal_path=path[: path.index("\\db")], recurse=True)
    assert host.leftovers() == ["planned VM db"]
    service, planned = (
        host.get_cim_instance(class_name=f"Msvm_{name}", namespace="root/virtualization/v2")[0]
        for name in ("VirtualSystemManagementService", "PlannedComputerSystem")
    )
    assert planned.properties["Name"] == report.vm.id.upper()
    answer = host.invoke_cim_method(
        input_object=service, method_name="DestroySystem", arguments={"AffectedSystem": planned}
    )
    assert answer == 0
    assert host.leftovers() == []


def test_others_may_call_while_an_export_goes_on(host: HyperVHost) -> None:
    host.step_seconds = 0.05
    states: list[str] = []
    watcher = threading.Thread(target=lambda: states.extend(host.get_vm(name="db")[0].status for _ in range(3)))
    host.between = lambda place: watcher.start() if place == "Export-VM: disk 0" else None
    host.export_vm(name="db", path=f"{EXPORTS}\\x")
    watcher.join()
    assert states[0] == "export of db"


def test_a_guest_that_does_not_obey_runs_on(tmp_path: Path) -> None:
    host = make_host(tmp_path)
    host.vm("db").truth.inside = Stubborn()
    vm = clone(host)
    host.start_vm(vm=vm)
    assert shut_down(host, vm) == 0
    assert [host.get_vm(id=vm.id)[0].state for _ in range(5)] == [VMState.RUNNING] * 5
    host.stop_vm(vm=vm, turn_off=True)
    assert host.get_vm(id=vm.id)[0].state is VMState.OFF


class Stubborn(Silent):
    obeys = False

    def captured(self) -> Stubborn:
        return Stubborn()
