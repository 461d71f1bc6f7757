"""A guest without an operating system: two empty disks and a running QEMU, there within a second.

Its disks are written through QEMU's monitor, as its devices would write them.
"""

from __future__ import annotations

import secrets
import xml.etree.ElementTree as ET
from pathlib import Path
from types import TracebackType
from typing import Self

import libvirt
import libvirt_qemu

from integration.lab.commands import run
from integration.lab.lab import Lab
from integration.lab.services import URI

BLOCK_KIB = 64
DISK_MIB = 64
MEMORY_MIB = 48


class BareGuest:
    """A running guest with a qcow2 disk ``vda`` and a raw disk ``vdb``, on the lab's file system with reflinks."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self.name = f"bare-{secrets.token_hex(4)}"
        self.folder = lab.reflink / self.name
        self.connection = libvirt.open(URI)

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True)
        for target, kind in (("vda", "qcow2"), ("vdb", "raw")):
            run(["qemu-img", "create", "-q", "-f", kind, self.disk(target), f"{DISK_MIB}M"])
        self.connection.defineXML(self._xml())
        self.domain.create()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for checkpoint in self.domain.listAllCheckpoints():
            checkpoint.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)
        if self.domain.isActive():
            self.domain.destroy()
        self.domain.undefine()
        self.connection.close()
        for file in self.folder.iterdir():
            file.unlink()
        self.folder.rmdir()

    @property
    def domain(self) -> libvirt.virDomain:
        return self.connection.lookupByName(self.name)

    def disk(self, target: str) -> Path:
        """Where a disk lies."""
        return self.folder / {"vda": "vda.qcow2", "vdb": "vdb.raw"}[target]

    def write(self, target: str, *, block: int, pattern: int = 1) -> None:
        """Fill a block of 64 KiB with a byte."""
        device = {"vda": "virtio-disk0", "vdb": "virtio-disk1"}[target]
        written = f"write -P {pattern} {block * BLOCK_KIB}k {BLOCK_KIB}k"
        answer = libvirt_qemu.qemuMonitorCommand(
            self.domain, f'qemu-io -d /machine/peripheral/{device}/virtio-backend "{written}"', 1
        )
        assert "rror" not in answer, answer

    def start_anew(self) -> None:
        """Power it off and on."""
        self.domain.destroy()
        self.domain.create()

    def _xml(self) -> str:
        domain = ET.Element("domain", type="qemu")
        for tag, text in (("name", self.name), ("memory", str(MEMORY_MIB * 1024)), ("vcpu", "1")):
            ET.SubElement(domain, tag).text = text
        system = ET.SubElement(ET.SubElement(domain, "os"), "type", machine="q35")
        system.text = "hvm"
        devices = ET.SubElement(domain, "devices")
        ET.SubElement(devices, "emulator").text = str(self._lab.emulator)
        for target, kind in (("vda", "qcow2"), ("vdb", "raw")):
            disk = ET.SubElement(devices, "disk", type="file", device="disk")
            ET.SubElement(disk, "driver", name="qemu", type=kind, discard="unmap")
            ET.SubElement(disk, "source", file=str(self.disk(target)))
            ET.SubElement(disk, "target", dev=target, bus="virtio")
        return ET.tostring(domain, encoding="unicode")
