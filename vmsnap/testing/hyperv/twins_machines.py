"""Twins of the scripts on VMs. See ``vmsnap.testing.hyperv.twins``."""

from __future__ import annotations

from collections.abc import Iterator
from xml.etree import ElementTree as ET

from vmsnap.testing.hyperv.machine import HyperVHost
from vmsnap.testing.hyperv.twins import (
    Emitted,
    Values,
    number,
    one_switch,
    one_vm,
    our_vm,
    text,
    texts,
    thrown,
    twin,
)
from vmsnap.testing.hyperv.values import Controller, VirtualMachine, VMState

_CIM = "root/virtualization/v2"


@twin("list_machines", sha256="149cc19ead2c17ec08a3399d4423201e2d17cec2baa1f6b091c0ae9a4a59cf16")
def _list_machines(host: HyperVHost, _: Values) -> Iterator[Emitted]:
    for vm in host.get_vm():
        yield {"Id": vm.id, "Name": vm.name, "State": vm.state.value, "Notes": vm.notes, "Folder": vm.path}


@twin("describe_machine", sha256="5280722d5c1dad89e6346cb5f60f0655b2ae2854e590a598ca2a730efef4032f")
def _describe_machine(host: HyperVHost, values: Values) -> Iterator[Emitted]:
    vm = one_vm(host, values)
    machine: Emitted = {
        "Kind": "machine",
        "Id": vm.id,
        "Name": vm.name,
        "State": vm.state.value,
        "Notes": vm.notes,
        "Generation": vm.generation,
        "MemoryBytes": vm.memory_startup,
        "AssignedBytes": vm.memory_assigned,
        "DynamicMemory": vm.dynamic_memory_enabled,
        "Processors": vm.processor_count,
        "Clustered": vm.is_clustered,
        "ReplicationState": vm.replication_state,
        "Folder": vm.path,
        "Checkpoints": len(host.get_vm_snapshot(vm=vm)),
        "AssignedDevices": len(host.get_vm_assignable_device(vm=vm)),
        "FibreChannel": len(host.get_vm_fibre_channel_hba(vm=vm)),
        "SecureBoot": False,
        "SecureBootTemplate": "",
        "Tpm": False,
        "Shielded": False,
        "ProductType": 0,
    }
    for component in host.get_cim_instance(namespace=_CIM, class_name="Msvm_KvpExchangeComponent"):
        if str(component.properties["SystemName"]).lower() == text(values, "Id").lower():
            machine["ProductType"] = max(map(_product_type, component.texts), default=0)
    if vm.generation >= 2:
        firmware = host.get_vm_firmware(vm=vm)
        machine["SecureBoot"] = firmware.secure_boot == "On"
        machine["SecureBootTemplate"] = firmware.secure_boot_template
        security = host.get_vm_security(vm=vm)
        machine["Tpm"] = security.tpm_enabled
        machine["Shielded"] = security.shielded
    yield machine
    for drive in host.get_vm_hard_disk_drive(vm=vm):
        disk: Emitted = {
            "Kind": "disk",
            "Controller": drive.controller_type.value,
            "Number": drive.controller_number,
            "Location": drive.controller_location,
            "Path": drive.path,
            "Physical": drive.disk_number is not None,
            "Shared": drive.support_persistent_reservations,
            "Format": "",
            "Type": "",
            "Parent": "",
            "SizeBytes": 0,
            "FileBytes": 0,
        }
        if drive.disk_number is None and drive.path:
            (vhd,) = host.get_vhd(path=drive.path)
            disk["Format"] = vhd.vhd_format
            disk["Type"] = vhd.vhd_type.value
            disk["Parent"] = vhd.parent_path
            disk["SizeBytes"] = vhd.size
            disk["FileBytes"] = vhd.file_size
        yield disk
    for adapter in host.get_vm_network_adapter(vm=vm):
        yield {
            "Kind": "adapter",
            "Name": adapter.name,
            "Mac": adapter.mac_address,
            "Dynamic": adapter.dynamic_mac_address_enabled,
            "Switch": adapter.switch_name,
            "SwitchId": adapter.switch_id,
            "Legacy": adapter.is_legacy,
            "IovWeight": adapter.iov_weight,
            "Addresses": " ".join(adapter.ip_addresses),
        }
    for service in host.get_vm_integration_service(vm=vm):
        yield {
            "Kind": "service",
            "Service": service.id.split("\\")[-1].upper(),
            "Enabled": service.enabled,
            "Status": service.primary_operational_status or "",
        }


def _product_type(item: str) -> int:
    """Return what an item of the data exchange says of the guest's role; 0 for any other item."""
    properties = {node.attrib["NAME"]: node.findtext("VALUE", "") for node in ET.fromstring(item)}  # noqa: S314
    return int(properties["Data"]) if properties["Name"] == "ProductType" else 0


@twin("sample_machine", sha256="a3c06b88016ea4ee0a6b796bb3799654075fd19e14b97b3d8753b29d6adfbb7e")
def _sample_machine(host: HyperVHost, values: Values) -> Iterator[Emitted]:
    vm = one_vm(host, values)
    yield {"State": vm.state.value, "UptimeMs": float(vm.uptime_ms)}


@twin("export_machine", sha256="44b5d20ad9e3754ba8f541d3b42213434edc23a6da97ace5263e1cf7976f28e4")
def _export_machine(host: HyperVHost, values: Values) -> Iterator[Emitted]:
    vm = one_vm(host, values)
    if vm.state is not VMState.RUNNING:
        raise thrown("VmsnapNotRunning")
    folder = text(values, "Folder")
    if host.get_child_item(literal_path=folder):
        raise thrown("VmsnapFolderNotEmpty")
    host.export_vm(vm=vm, path=folder, capture_live_state=text(values, "LiveState"))
    yield {"State": one_vm(host, values).state.value}


@twin("import_clone", sha256="00c9c06f8d6fa04e194d5e30632cca3deaa7337f8cbb937899e41ad3bc7c94b4")
def _import_clone(host: HyperVHost, values: Values) -> Iterator[Emitted]:
    folder = text(values, "Folder")
    report = host.compare_vm(
        path=text(values, "Configuration"),
        copy=True,
        generate_new_id=True,
        virtual_machine_path=folder,
        snapshot_file_path=folder,
        smart_paging_file_path=folder,
        vhd_destination_path=text(values, "Disks"),
    )
    for adapter in host.get_vm_network_adapter(vm=report.vm):
        host.disconnect_vm_network_adapter(vm_network_adapter=adapter)
    host.set_vm(
        vm=report.vm,
        new_vm_name=text(values, "Name"),
        notes=text(values, "Notes"),
        automatic_start_action="Nothing",
        automatic_checkpoints_enabled=False,
        checkpoint_type="Disabled",
    )
    report = host.compare_vm(compatibility_report=report)
    if report.incompatibilities:
        for incompatibility in report.incompatibilities:
            yield {
                "Kind": "incompatibility",
                "Number": incompatibility.message_id,
                "Message": incompatibility.message,
            }
        return
    if any(adapter.switch_name or adapter.connected for adapter in host.get_vm_network_adapter(vm=report.vm)):
        raise thrown("VmsnapStillConnected")
    vm = host.import_vm(compatibility_report=report)
    yield {"Kind": "machine", "Id": vm.id, "State": vm.state.value}


@twin("list_planned", sha256="704abb38b58379bd3d187705178d7fabb6e34af6dcd8d7b96b47a6189925b252")
def _list_planned(host: HyperVHost, _: Values) -> Iterator[Emitted]:
    for planned in host.get_cim_instance(namespace=_CIM, class_name="Msvm_PlannedComputerSystem"):
        settings = host.get_cim_associated_instance(
            input_object=planned, result_class_name="Msvm_VirtualSystemSettingData"
        )
        yield {
            "Id": planned.properties["Name"],
            "Name": planned.properties["ElementName"],
            "Folder": settings[0].properties["ConfigurationDataRoot"] if settings else "",
        }


@twin("remove_planned", sha256="5bb6a0ec70099101c12620f33c96ac070660375048e4e0e5cbb88f759da861b9")
def _remove_planned(host: HyperVHost, values: Values) -> Iterator[Emitted]:
    (service,) = host.get_cim_instance(namespace=_CIM, class_name="Msvm_VirtualSystemManagementService")
    for planned in host.get_cim_instance(namespace=_CIM, class_name="Msvm_PlannedComputerSystem"):
        if str(planned.properties["Name"]).lower() == text(values, "Id").lower():
            host.invoke_cim_method(
                input_object=service, method_name="DestroySystem", arguments={"AffectedSystem": planned}
            )
    yield from ()


@twin("start_machine", sha256="bc6c92b392be602f6fa744a38607a915d4800947e44dc890a8efe1cfb6e30538")
def _start_machine(host: HyperVHost, values: Values) -> Iterator[Emitted]:
    host.start_vm(vm=our_vm(host, values))
    yield from ()


@twin("request_shutdown", sha256="d9e9f7c8ab82e06b1d0a1459a16490479fb4d4747262fe85f5f9d5f26cea1231")
def _request_shutdown(host: HyperVHost, values: Values) -> Iterator[Emitted]:
    our_vm(host, values)
    components = [
        component
        for component in host.get_cim_instance(namespace=_CIM, class_name="Msvm_ShutdownComponent")
        if str(component.properties["SystemName"]).lower() == text(values, "Id").lower()
    ]
    answer = -1
    if components:
        arguments: dict[str, object] = {"Force": False, "Reason": text(values, "Reason")}
        answer = int(
            host.invoke_cim_method(input_object=components[0], method_name="InitiateShutdown", arguments=arguments)
        )
    yield {"ReturnValue": answer}


def _thrown_away(host: HyperVHost, values: Values) -> VirtualMachine:
    """Return the VM of ``-Id``, which has to bear the tag or to be in the folder of its run."""
    vm = one_vm(host, values)
    inside = vm.path.lower().startswith(f"{text(values, 'Folder')}\\".lower())
    if not (vm.notes.startswith(text(values, "Tag")) or inside):
        raise thrown("VmsnapNotOurs")
    return vm


@twin("turn_off_machine", sha256="1a39b2d6586e5e1d06059c2554eac49869418b384c663282208de7c2fb9972cc")
def _turn_off_machine(host: HyperVHost, values: Values) -> Iterator[Emitted]:
    host.stop_vm(vm=_thrown_away(host, values), turn_off=True)
    yield from ()


@twin("remove_machine", sha256="2329562abf990c6f960dec5e7ae4f1d014694420846ee898e9bd5640c2e612ce")
def _remove_machine(host: HyperVHost, values: Values) -> Iterator[Emitted]:
    host.remove_vm(vm=_thrown_away(host, values), force=True)
    yield from ()


@twin("connect_adapters", sha256="af0a8ba973f1f821d698030d398620f389491fdf0c5dc5c1846578931f34505d")
def _connect_adapters(host: HyperVHost, values: Values) -> Iterator[Emitted]:
    vm = our_vm(host, values)
    switch = one_switch(host, text(values, "SwitchId"))
    switch_tag = text(values, "SwitchTag")
    if switch_tag:
        if switch.switch_type.value != "Private":
            raise thrown("VmsnapNotPrivate")
        if not switch.notes.startswith(switch_tag):
            raise thrown("VmsnapNotOurs")
    macs = {mac.lower() for mac in texts(values, "Macs")}
    for adapter in host.get_vm_network_adapter(vm=vm):
        if adapter.mac_address.lower() in macs:
            host.connect_vm_network_adapter(vm_network_adapter=adapter, vm_switch=switch)
    yield from ()


@twin("disconnect_adapters", sha256="61f1f6c36e2966970fc9f46bfe7f78ab2ddfa79d4ec8d94bcee88b7356c6c864")
def _disconnect_adapters(host: HyperVHost, values: Values) -> Iterator[Emitted]:
    vm = our_vm(host, values)
    macs = {mac.lower() for mac in texts(values, "Macs")}
    for adapter in host.get_vm_network_adapter(vm=vm):
        if not macs or adapter.mac_address.lower() in macs:
            host.disconnect_vm_network_adapter(vm_network_adapter=adapter)
    yield from ()


@twin("make_environment", sha256="b8343ad8499d7f49750605a3d12317cca891e2ecf0ad7d04d5cab9ecc8b6c2f9")
def _make_environment(host: HyperVHost, values: Values) -> Iterator[Emitted]:
    name, generation = text(values, "Name"), number(values, "Generation")
    if any(vm.name.lower() == name.lower() for vm in host.get_vm()):
        raise thrown("VmsnapMachineExists")
    vm = host.new_vm(
        name=name,
        memory_startup_bytes=number(values, "MemoryBytes"),
        generation=generation,
        path=text(values, "Folder"),
        no_vhd=True,
    )
    host.set_vm(
        vm=vm,
        notes=text(values, "Notes"),
        automatic_start_action="Nothing",
        automatic_checkpoints_enabled=False,
        checkpoint_type="Disabled",
    )
    host.set_vm_processor(vm=vm, count=number(values, "Processors"))
    for adapter in host.get_vm_network_adapter(vm=vm):
        host.remove_vm_network_adapter(vm_network_adapter=adapter)
    if generation >= 2:
        template = text(values, "SecureBootTemplate")
        if not values["SecureBoot"]:
            host.set_vm_firmware(vm=vm, enable_secure_boot="Off")
        elif template:
            host.set_vm_firmware(vm=vm, enable_secure_boot="On", secure_boot_template=template)
    yield {"Id": vm.id}


@twin("add_environment_disk", sha256="bd038289410fff3537984b116b6d3d48affcd17826da3db7fed04ab3abcdd472")
def _add_environment_disk(host: HyperVHost, values: Values) -> Iterator[Emitted]:
    vm = our_vm(host, values)
    controller, place = Controller(text(values, "Controller")), number(values, "Number")
    while controller is Controller.SCSI and len(host.get_vm_scsi_controller(vm=vm)) <= place:
        host.add_vm_scsi_controller(vm=vm)
    host.add_vm_hard_disk_drive(
        vm=vm,
        controller_type=controller,
        controller_number=place,
        controller_location=number(values, "Location"),
        path=text(values, "Path"),
    )
    if values["Boots"] and vm.generation >= 2:
        (drive,) = host.get_vm_hard_disk_drive(
            vm=vm, controller_type=controller, controller_number=place, controller_location=number(values, "Location")
        )
        host.set_vm_firmware(vm=vm, first_boot_device=drive)
    yield from ()


@twin("add_environment_adapter", sha256="fd4a60936ca66f56e5b4c318d7b3668bf99fedf8d6ee4c75e5e1a3b01ca8f2d3")
def _add_environment_adapter(host: HyperVHost, values: Values) -> Iterator[Emitted]:
    host.add_vm_network_adapter(
        vm=our_vm(host, values), name=text(values, "Name"), static_mac_address=text(values, "Mac")
    )
    yield from ()
