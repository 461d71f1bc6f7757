"""What libvirt's XML says about a guest, as model values."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from ipaddress import IPv4Interface

from vmsnap.hypervisors.libvirt.xml import devices, text_of
from vmsnap.model.guest import Disk, DiskKind, Guest, GuestState, Nic

_UNITS = {"b": 1, "bytes": 1, "kb": 1000, "k": 1024, "kib": 1024, "mb": 10**6, "m": 1 << 20, "mib": 1 << 20, "gb": 10**9,
          "g": 1 << 30, "gib": 1 << 30, "tb": 10**12, "t": 1 << 40, "tib": 1 << 40}  # fmt: skip
_AGENT_CHANNEL = "org.qemu.guest_agent.0"


def is_writable_disk(disk: ET.Element) -> bool:
    """Tell whether a ``<disk>`` can change: neither a CD-ROM nor read-only, and with a medium."""
    return disk.get("device", "disk") != "cdrom" and disk.find("readonly") is None and disk.find("source") is not None


def disk_target(disk: ET.Element) -> str:
    """Return the target name of a ``<disk>``, such as ``vda``."""
    target = disk.find("target")
    return "" if target is None else target.get("dev", "")


def disk_source(disk: ET.Element) -> str:
    """Return the path a file or block ``<disk>`` is on, or an empty text for any other kind."""
    source = disk.find("source")
    if source is None:
        return ""
    return source.get("file") or source.get("dev") or ""


def disk_format(disk: ET.Element) -> str:
    """Return the image format of a ``<disk>``; libvirt assumes raw where none is given."""
    driver = disk.find("driver")
    return "raw" if driver is None else driver.get("type", "raw")


def writable_disks(domain: ET.Element) -> tuple[ET.Element, ...]:
    """Return the ``<disk>`` elements that a capture has to take."""
    return tuple(disk for disk in devices(domain).findall("disk") if is_writable_disk(disk))


def find_disk(domain: ET.Element, target: str) -> ET.Element | None:
    """Return the ``<disk>`` of that target, or None."""
    for disk in devices(domain).findall("disk"):
        if disk_target(disk) == target:
            return disk
    return None


def nvram_path(domain: ET.Element) -> str:
    """Return the file of the firmware variables, or an empty text.

    libvirt writes it as the text of ``<nvram>``, or (since 8.5, where it was given so) as a ``<source>`` like a disk's.
    """
    nvram = domain.find("os/nvram")
    if nvram is None:
        return ""
    source = nvram.find("source")
    return (nvram.text or "").strip() if source is None else source.get("file", "")


def memory_bytes(domain: ET.Element) -> int:
    """Return the guest's memory in bytes."""
    element = domain.find("memory")
    if element is None or not element.text:
        return 0
    return int(element.text) * _UNITS[element.get("unit", "KiB").lower()]


def has_agent_channel(domain: ET.Element) -> bool:
    """Tell whether the guest has a channel for the QEMU guest agent."""
    return _agent_target(domain) is not None


def agent_is_connected(domain: ET.Element) -> bool:
    """Tell whether, in a live XML, an agent has opened the guest's end of the channel."""
    target = _agent_target(domain)
    return target is not None and target.get("state") == "connected"


def _agent_target(domain: ET.Element) -> ET.Element | None:
    for target in devices(domain).findall("channel/target"):
        if target.get("name") == _AGENT_CHANNEL:
            return target
    return None


def nic_mac(interface: ET.Element) -> str:
    """Return the MAC of an ``<interface>``."""
    mac = interface.find("mac")
    return "" if mac is None else mac.get("address", "").lower()


def nic_attached_to(interface: ET.Element) -> str:
    """Return the bridge or network an ``<interface>`` is on, or the kind of interface where it is neither."""
    source = interface.find("source")
    if source is not None:
        for attribute in ("bridge", "network", "dev"):
            if value := source.get(attribute):
                return value
    return interface.get("type", "unknown")


def guest_from_xml(
    domain: ET.Element,
    *,
    state: GuestState,
    sizes: Mapping[str, int],
    addresses: Mapping[str, tuple[IPv4Interface, ...]],
) -> Guest:
    """Return the guest that a domain XML describes.

    ``sizes`` are the virtual sizes of the disks in bytes by target, ``addresses`` IPv4 addresses by MAC.
    """
    disks = []
    for disk in writable_disks(domain):
        target = disk_target(disk)
        kind = DiskKind.BLOCK if disk.get("type") == "block" else DiskKind.FILE
        disks.append(
            Disk(
                target=target,
                kind=kind,
                source=disk_source(disk),
                image_format=disk_format(disk),
                size_bytes=sizes.get(target, 0),
            )
        )
    return Guest(
        name=text_of(domain, "name"),
        uuid=text_of(domain, "uuid"),
        state=state,
        memory_bytes=memory_bytes(domain),
        vcpus=int(text_of(domain, "vcpu", default="1")),
        disks=tuple(disks),
        nics=nics_from_xml(domain, addresses=addresses),
        has_agent_channel=has_agent_channel(domain),
        nvram=nvram_path(domain) or None,
    )


def nics_from_xml(domain: ET.Element, *, addresses: Mapping[str, tuple[IPv4Interface, ...]]) -> tuple[Nic, ...]:
    """Return the NICs that a domain XML describes, in its order. ``addresses`` are IPv4 addresses by MAC."""
    nics = []
    for index, interface in enumerate(devices(domain).findall("interface")):
        tap = interface.find("target")
        mtu = interface.find("mtu")
        nics.append(
            Nic(
                index=index,
                mac=nic_mac(interface),
                attached_to=nic_attached_to(interface),
                tap=None if tap is None else tap.get("dev"),
                mtu=None if mtu is None else int(mtu.get("size", "0")) or None,
                addresses=addresses.get(nic_mac(interface), ()),
            )
        )
    return tuple(nics)
