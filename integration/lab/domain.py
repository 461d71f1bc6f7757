"""The libvirt domain of a lab guest, as XML."""

from __future__ import annotations

import secrets
import uuid
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from integration.lab.lab import Lab

OVMF_CODE = "/usr/share/OVMF/OVMF_CODE_4M.fd"
OVMF_VARS = "/usr/share/OVMF/OVMF_VARS_4M.fd"
DiskFormat = Literal["qcow2", "raw", "block"]
DiskContent = Literal["root", "data", "blank"]
DiskBus = Literal["virtio", "scsi", "sata", "usb"]


@dataclass(frozen=True)
class DiskSpec:
    """One disk: what is on it, and how the host keeps it ('block' is a loop device over a raw file)."""

    content: DiskContent = "root"
    format: DiskFormat = "qcow2"
    folder: Path | None = None  # where its file goes; default: `lab.guests`. `lab.reflink / ...` for reflinks
    blank_mib: int = 256  # the size of a 'blank' disk
    bus: DiskBus = "virtio"  # the guest's kernel sees virtio and scsi; others its firmware alone


def random_mac() -> str:
    """A random address in QEMU's range 52:54:00."""
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in secrets.token_bytes(3))


@dataclass(frozen=True)
class GuestSpec:
    """Everything about a guest that a test may choose. The first disk must be a 'root' disk."""

    name: str = field(default_factory=lambda: f"lab-{secrets.token_hex(4)}")
    memory_mib: int = 1024
    vcpus: int = 1
    disks: tuple[DiskSpec, ...] = (DiskSpec(),)
    macs: tuple[str, ...] = field(default_factory=lambda: (random_mac(),))  # one NIC each, all on the production bridge
    static_address: str | None = None  # '10.77.0.5/24': eth0 does not use DHCP
    nvram: bool = False  # boot through OVMF with a variable store of its own
    agent: bool = True
    machine: str = "q35"
    extra_devices: tuple[str, ...] = ()  # XML fragments for <devices>
    extra_domain: tuple[str, ...] = ()  # XML fragments for <domain>
    uuid: str = field(default_factory=lambda: str(uuid.uuid4()))


@dataclass(frozen=True)
class AttachedDisk:
    """Where a disk of the guest lies on the host."""

    spec: DiskSpec
    file: Path  # the file to copy from or to remove
    source: Path  # what the guest's XML names: the file or the loop device
    target: str  # 'vda', 'vdb', ..., or 'sda', ... where the bus is not virtio


def domain_xml(lab: Lab, spec: GuestSpec, disks: tuple[AttachedDisk, ...]) -> str:
    """The `<domain>` of `spec`. Names are escaped; the extra fragments are parsed, and must be well-formed."""
    domain = ET.Element("domain", type="kvm" if lab.accelerator == "kvm" else "qemu")
    _text(domain, "name", spec.name)
    _text(domain, "uuid", spec.uuid)
    _text(domain, "memory", str(spec.memory_mib), unit="MiB")
    _text(domain, "vcpu", str(spec.vcpus))
    _boot(domain, lab, spec)
    features = ET.SubElement(domain, "features")
    ET.SubElement(features, "acpi")
    ET.SubElement(features, "apic")
    if lab.accelerator == "kvm":
        ET.SubElement(domain, "cpu", mode="host-model")
    ET.SubElement(domain, "clock", offset="utc")
    devices = ET.SubElement(domain, "devices")
    _text(devices, "emulator", str(lab.emulator))
    for disk in disks:
        _disk(devices, disk)
    for mac in spec.macs:
        interface = ET.SubElement(devices, "interface", type="bridge")
        ET.SubElement(interface, "mac", address=mac)
        ET.SubElement(interface, "source", bridge=lab.bridge)
        ET.SubElement(interface, "model", type="virtio")
    serial = ET.SubElement(devices, "serial", type="file")
    ET.SubElement(serial, "source", path=str(console_log(lab, spec)), append="on")
    ET.SubElement(serial, "target", port="0")
    if spec.agent:
        channel = ET.SubElement(devices, "channel", type="unix")
        ET.SubElement(channel, "target", type="virtio", name="org.qemu.guest_agent.0")
    rng = ET.SubElement(devices, "rng", model="virtio")
    _text(rng, "backend", "/dev/urandom", model="random")
    devices.extend(ET.fromstring(fragment) for fragment in spec.extra_devices)  # noqa: S314 - written by the tests
    domain.extend(ET.fromstring(fragment) for fragment in spec.extra_domain)  # noqa: S314
    return ET.tostring(domain, encoding="unicode")


def console_log(lab: Lab, spec: GuestSpec) -> Path:
    """Where the guest's serial console is written. Named by UUID: a guest's name may hold anything."""
    return lab.log / f"console-{spec.uuid}.log"


def _boot(domain: ET.Element, lab: Lab, spec: GuestSpec) -> None:
    os_element = ET.SubElement(domain, "os")
    _text(os_element, "type", "hvm", arch="x86_64", machine=spec.machine)
    if spec.nvram:
        _text(os_element, "loader", OVMF_CODE, readonly="yes", type="pflash")
        ET.SubElement(os_element, "nvram", template=OVMF_VARS)
    _text(os_element, "kernel", str(lab.kernel))
    _text(os_element, "initrd", str(lab.initrd))
    words = ["root=/dev/vda", "rootfstype=ext4", "rootflags=noatime", "rw", "console=ttyS0", "loglevel=4"]
    words += ["net.ifnames=0", "mitigations=off"]
    words += [f"systemd.machine_id={uuid.UUID(spec.uuid).hex}", f"systemd.hostname=guest-{spec.uuid[:8]}"]
    if spec.static_address is not None:
        words.append(f"lab.ip={spec.static_address},{lab.gateway.split('/')[0]}")
    _text(os_element, "cmdline", " ".join(words))


def _disk(devices: ET.Element, disk: AttachedDisk) -> None:
    block = disk.spec.format == "block"
    element = ET.SubElement(devices, "disk", type="block" if block else "file", device="disk")
    kind = "qcow2" if disk.spec.format == "qcow2" else "raw"
    ET.SubElement(element, "driver", name="qemu", type=kind, discard="unmap")
    if block:
        ET.SubElement(element, "source", dev=str(disk.source))
    else:
        ET.SubElement(element, "source", file=str(disk.source))
    ET.SubElement(element, "target", dev=disk.target, bus=disk.spec.bus)


def _text(parent: ET.Element, tag: str, text: str, **attributes: str) -> None:
    ET.SubElement(parent, tag, attributes).text = text
