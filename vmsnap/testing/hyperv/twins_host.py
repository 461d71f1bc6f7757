"""Twins of the scripts on the host itself: folders, disks, switches. See ``vmsnap.testing.hyperv.twins``."""

from __future__ import annotations

import re
from collections.abc import Iterator

from vmsnap.testing.hyperv.machine import HyperVHost
from vmsnap.testing.hyperv.twins import Emitted, Values, one_switch, text, texts, thrown, twin
from vmsnap.testing.hyperv.values import SwitchType

_RUN_FOLDER = re.compile(r"vmsnap-[0-9a-f]{10}\Z")
_PART = re.compile(r"[a-z]+\Z")


@twin("describe_host", sha256="9466a6db2b6d793e17e578f5cee6249554d4620ec3291f927df5cc08c71bf5df")
def _describe_host(host: HyperVHost, values: Values) -> Iterator[Emitted]:
    (system,) = host.get_cim_instance(class_name="Win32_OperatingSystem")
    (volume,) = host.get_volume(file_path=text(values, "Folder"))
    yield {
        "Computer": system.properties["CSName"],
        "FreeMemoryBytes": int(system.properties["FreePhysicalMemory"]) * 1024,
        "FreeBytes": volume.size_remaining,
        "FileSystem": volume.file_system_type,
    }


@twin("list_folders", sha256="334c05bc35b4053814e9633937e667dc2b366af1714d9c70139072cd94254ea8")
def _list_folders(host: HyperVHost, values: Values) -> Iterator[Emitted]:
    root = text(values, "Root")
    if not host.test_path(literal_path=root, path_type="Container"):
        return
    for folder in host.get_child_item(literal_path=root, directory=True):
        if _RUN_FOLDER.match(folder.name):
            parts = host.get_child_item(literal_path=folder.full_name, directory=True)
            yield {"Name": folder.name, "Parts": " ".join(part.name for part in parts)}


@twin("make_folder", sha256="b3388f46745f57f9893e99aab8612ccd761a12ca00212c057e0a7d6f92fffc28")
def _make_folder(host: HyperVHost, values: Values) -> Iterator[Emitted]:
    name, part = text(values, "Name"), text(values, "Part")
    if not _RUN_FOLDER.match(name) or not _PART.match(part):
        raise thrown("VmsnapNoFolderOfARun")
    host.new_item(path=f"{text(values, 'Root')}\\{name}\\{part}", item_type="Directory", force=True)
    yield from ()


@twin("remove_folder", sha256="dc18e6335e120882ea3a57a207289d39e862c926f52051a6a3428d7ee8614159")
def _remove_folder(host: HyperVHost, values: Values) -> Iterator[Emitted]:
    name, part = text(values, "Name"), text(values, "Part")
    if not _RUN_FOLDER.match(name) or (part and not _PART.match(part)):
        raise thrown("VmsnapNoFolderOfARun")
    folder = f"{text(values, 'Root')}\\{name}"
    if part:
        inside = f"{folder}\\{part}"
        if host.test_path(literal_path=inside):
            host.remove_item(literal_path=inside, recurse=True, force=True)
        if host.test_path(literal_path=folder) and not host.get_child_item(literal_path=folder):
            host.remove_item(literal_path=folder, force=True)
    elif host.test_path(literal_path=folder):
        host.remove_item(literal_path=folder, recurse=True, force=True)
    yield from ()


@twin("describe_export", sha256="bad8c41047421ec6173e2be5710839686db162b6a1e49c0145e9849afe92a9dd")
def _describe_export(host: HyperVHost, values: Values) -> Iterator[Emitted]:
    for file in host.get_child_item(literal_path=text(values, "Folder"), recurse=True, file=True):
        _, dot, extension = file.name.rpartition(".")
        yield {"Path": file.full_name, "Extension": f"{dot}{extension}".lower(), "SizeBytes": file.length}


@twin("check_disks", sha256="642c1bcbdb50475434f77199661eb7657108d0f97fbfcbcce80f0ffdbc4247cb")
def _check_disks(host: HyperVHost, values: Values) -> Iterator[Emitted]:
    for path in texts(values, "Paths"):
        sound = host.test_vhd(path=path)
        (vhd,) = host.get_vhd(path=path)
        yield {
            "Path": path,
            "Sound": sound,
            "Format": vhd.vhd_format,
            "Parent": vhd.parent_path,
            "SizeBytes": vhd.size,
        }


@twin("make_environment_disk", sha256="b867e632d1df1eb163bdaa4e334c9edc2899807c09651af72ece90b08c43f4da")
def _make_environment_disk(host: HyperVHost, values: Values) -> Iterator[Emitted]:
    host.new_vhd(path=text(values, "Path"), parent_path=text(values, "Parent"), differencing=True)
    yield from ()


@twin("make_switch", sha256="5a9a81f20b1cc17023fa7ce83c32468a35736f3d34a0d33842ff8191e543351a")
def _make_switch(host: HyperVHost, values: Values) -> Iterator[Emitted]:
    name = text(values, "Name")
    if any(switch.name.lower() == name.lower() for switch in host.get_vm_switch()):
        raise thrown("VmsnapSwitchExists")
    host.new_vm_switch(name=name, switch_type=SwitchType.PRIVATE, notes=text(values, "Notes"))
    yield from ()


@twin("list_switches", sha256="b7fde78470183c49855a5d2206cedee7d086eb8fa69634b45442f744d1e71aab")
def _list_switches(host: HyperVHost, _: Values) -> Iterator[Emitted]:
    for switch in host.get_vm_switch():
        yield {
            "Id": switch.id,
            "Name": switch.name,
            "Type": switch.switch_type.value,
            "Notes": switch.notes,
            "Uplinks": " ".join(switch.net_adapter_interface_descriptions),
            "WithHost": switch.allow_management_os,
        }


@twin("list_adapters", sha256="a3b4d3332ae7f05622731fd1a042ad1e4b32b64b78102f8630b2c0968b65d46d")
def _list_adapters(host: HyperVHost, _: Values) -> Iterator[Emitted]:
    for adapter in host.get_vm_network_adapter(all=True):
        yield {
            "MachineId": adapter.vm_id,
            "Machine": adapter.vm_name,
            "OfHost": adapter.is_management_os,
            "Mac": adapter.mac_address,
            "SwitchId": adapter.switch_id,
            "Switch": adapter.switch_name,
        }


@twin("remove_switch", sha256="0654d55d52e739b8d5b5ecc0afddd1aa5d6a128a761b6204e7b933a73b0d82ed")
def _remove_switch(host: HyperVHost, values: Values) -> Iterator[Emitted]:
    switch = one_switch(host, text(values, "Id"))
    if not switch.notes.startswith(text(values, "Tag")):
        raise thrown("VmsnapNotOurs")
    if switch.switch_type is SwitchType.EXTERNAL:
        raise thrown("VmsnapHasUplink")
    host.remove_vm_switch(vm_switch=switch, force=True)
    yield from ()
