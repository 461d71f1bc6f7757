"""Turning a guest's XML into the XML of a clone or an environment: nothing of production stays reachable.

A clone's XML may differ from the original's only where the guest cannot see it, because RAM and device state of the
original are loaded into it: models, addresses, queues and MACs stay.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass

from vmsnap.hypervisors.libvirt.inspect import disk_target, is_writable_disk
from vmsnap.hypervisors.libvirt.xml import Tag, child, devices, drop, set_tag

_CHARACTER_DEVICES = ("serial", "console", "parallel", "channel")
# Back ends that belong to the guest alone and are made anew for each domain.
_PRIVATE_CHANNELS = ("unix",)
# Values of a disk's ``cache`` with which the guest sees a write cache, and flushes it.
_FLUSHING = ("default", "none", "writeback")
_PRODUCTION_PARTS_OF_NIC = (
    "source", "target", "bandwidth", "filterref", "vlan", "virtualport", "port", "backend", "guest", "script",
    "downscript", "ip", "route", "portOptions", "actual",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class NicAttachment:
    """Where one NIC goes: a bridge with a tap of this name, or a libvirt network. ``mac`` None keeps the original's."""

    bridge: str | None = None
    tap: str | None = None
    network: str | None = None
    mac: str | None = None


@dataclass(frozen=True, kw_only=True)
class Identity:
    """The new name, UUID and tag of a domain."""

    name: str
    uuid: str
    tag: Tag


def set_identity(domain: ET.Element, identity: Identity) -> None:
    """Rename the domain. ``sysinfo`` has to agree with the UUID; the guest of a clone saw the old one in its RAM."""
    child(domain, "name").text = identity.name
    child(domain, "uuid").text = identity.uuid
    drop(domain, "title", "description")
    for entry in domain.findall("sysinfo/system/entry"):
        if entry.get("name") == "uuid":
            entry.text = identity.uuid
    domain.attrib.pop("id", None)
    set_tag(domain, identity.tag)


def set_disks(domain: ET.Element, overlays: Mapping[str, str]) -> None:
    """Put every writable disk on its overlay (by target). Raises KeyError for a disk without one.

    ``<backingStore/>`` goes: kept, it tells libvirt that the chain ends there and the guest reads zeroes.
    """
    for disk in devices(domain).findall("disk"):
        if not is_writable_disk(disk):
            continue
        overlay = overlays[disk_target(disk)]
        drop(disk, "source", "backingStore", "mirror", "iotune", "transient")
        disk.set("type", "file")
        disk.attrib.pop("snapshot", None)
        driver = child(disk, "driver")
        driver.set("name", "qemu")
        driver.set("type", "qcow2")
        # The element's place among its siblings does not matter to libvirt.
        ET.SubElement(disk, "source", {"file": overlay})


def keep_flushes_back(domain: ET.Element) -> None:
    """Let nothing wait for the host's disks when the guest flushes: for a clone, which ends with its host in any case.

    What it wrote is flushed once, when it has ended (``overlays.require_whole``). A guest that sees no write cache never flushes,
    and would see one; its disks stay as they are. libvirt: formatdomain, ``driver``'s ``cache``.
    """
    for disk in devices(domain).findall("disk"):
        driver = disk.find("driver")
        if driver is None or not is_writable_disk(disk) or driver.get("cache", "default") not in _FLUSHING:
            continue
        driver.set("cache", "unsafe")
        if driver.get("io") == "native":
            # It is for files past the page cache, and libvirt refuses it for others.
            del driver.attrib["io"]


def set_served(domain: ET.Element, *, socket: str, reconnect_seconds: int | None) -> None:
    """Say what every writable disk's overlay is over: the export of its name at an NBD socket.

    libvirt would find the export in the overlay's header, but not for how long to try to reach it again when it is lost.
    """
    for disk in devices(domain).findall("disk"):
        if not is_writable_disk(disk):
            continue
        drop(disk, "backingStore")
        backing = ET.SubElement(disk, "backingStore", {"type": "network"})
        ET.SubElement(backing, "format", {"type": "raw"})
        source = ET.SubElement(backing, "source", {"protocol": "nbd", "name": disk_target(disk)})
        ET.SubElement(source, "host", {"transport": "unix", "socket": socket})
        if reconnect_seconds is not None:
            ET.SubElement(source, "reconnect", {"delay": str(reconnect_seconds)})
        ET.SubElement(backing, "backingStore")


def set_local(disk: ET.Element, *, overlay: str, image: str) -> None:
    """Put a disk on an overlay over a raw image."""
    drop(disk, "source", "backingStore", "mirror")
    ET.SubElement(disk, "source", {"file": overlay})
    backing = ET.SubElement(disk, "backingStore", {"type": "file"})
    ET.SubElement(backing, "format", {"type": "raw"})
    ET.SubElement(backing, "source", {"file": image})
    ET.SubElement(backing, "backingStore")


def set_nics(domain: ET.Element, attachments: tuple[NicAttachment, ...]) -> None:
    """Move the NICs, in their order. Raises ValueError where the counts differ: a NIC left over would be production's."""
    interfaces = devices(domain).findall("interface")
    for interface, attachment in zip(interfaces, attachments, strict=True):
        drop(interface, *_PRODUCTION_PARTS_OF_NIC)
        if attachment.network is not None:
            interface.set("type", "network")
            ET.SubElement(interface, "source", {"network": attachment.network})
        elif attachment.bridge is not None:
            interface.set("type", "bridge")
            ET.SubElement(interface, "source", {"bridge": attachment.bridge})
        if attachment.tap is not None:
            ET.SubElement(interface, "target", {"dev": attachment.tap})
        if attachment.mac is not None:
            child(interface, "mac").set("address", attachment.mac)


def privatise_host_ends(domain: ET.Element) -> None:
    """Cut every other tie to the host: consoles, channels, graphics, audio, security labels, pinning."""
    parts = devices(domain)
    for tag in _CHARACTER_DEVICES:
        for device in parts.findall(tag):
            _privatise_character_device(device)
    for graphics in parts.findall("graphics"):
        _privatise_graphics(graphics)
    for audio in parts.findall("audio"):
        if audio.get("type") != "spice":
            number = audio.get("id", "1")
            audio.clear()
            audio.attrib.update({"id": number, "type": "none"})
    for disk in parts.findall("disk"):
        for source in disk.findall("source"):
            drop(source, "seclabel", "reservations")
    for watchdog in parts.findall("watchdog"):
        watchdog.set("action", "none")
    for backend in parts.findall("tpm/backend"):
        # libvirt keeps the state under the domain's UUID, and removes it with the domain unless told to keep it.
        backend.attrib.pop("persistent_state", None)
    for backing in domain.findall("memoryBacking"):
        # Where RAM comes from is no part of the machine: the host's huge pages are for production.
        drop(backing, "hugepages")
    drop(domain, "seclabel", "blkiotune", "numatune", "resource")
    for tune in domain.findall("cputune"):
        drop(tune, "vcpupin", "emulatorpin", "iothreadpin", "vcpusched", "iothreadsched", "emulatorsched")
        # Cache and memory bandwidth are partitioned for the whole host; the guest's own part stays the guest's.
        drop(tune, "cachetune", "memorytune")


def _privatise_character_device(device: ET.Element) -> None:
    kind = device.get("type", "")
    drop(device, "log", "protocol")
    if kind in _PRIVATE_CHANNELS and device.tag == "channel":
        # libvirt makes a socket of this domain's own where no source is given.
        drop(device, "source")
    elif kind == "pty":
        device.attrib.pop("tty", None)
        drop(device, "source")
    elif kind not in ("null", "spicevmc"):
        drop(device, "source")
        device.set("type", "null")


def _privatise_graphics(graphics: ET.Element) -> None:
    """No port and no address: SPICE listens nowhere, anything else on a socket in the domain's own folder."""
    for attribute in ("port", "tlsPort", "autoport", "listen", "websocket", "socket", "passwd", "passwdValidTo"):
        graphics.attrib.pop(attribute, None)
    drop(graphics, "listen", "gl")
    ET.SubElement(graphics, "listen", {"type": "none" if graphics.get("type") == "spice" else "socket"})


def set_life(domain: ET.Element, *, reboot: str, crash: str) -> None:
    """Say what happens when the guest reboots or crashes."""
    child(domain, "on_poweroff").text = "destroy"
    child(domain, "on_reboot").text = reboot
    child(domain, "on_crash").text = crash


def set_nvram(domain: ET.Element, path: str | None) -> None:
    """Give the firmware a variable store of the domain's own."""
    os_element = child(domain, "os")
    if path is None:
        drop(os_element, "nvram")
        return
    # A definition that leaves the choice of firmware to libvirt may not name the store.
    nvram = child(os_element, "nvram")
    drop(nvram, "source")
    for attribute in ("template", "templateFormat", "type"):
        nvram.attrib.pop(attribute, None)
    nvram.text = path
