"""The request for a capture: which memory file, which overlay for which disk."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import libvirt

from vmsnap.errors import PreconditionError, SafetyError
from vmsnap.hypervisors.libvirt.connection import translated
from vmsnap.hypervisors.libvirt.inspect import disk_source, disk_target, is_writable_disk
from vmsnap.hypervisors.libvirt.overlays import OverlaysDetail
from vmsnap.hypervisors.libvirt.xml import devices, parse, unparse


def request_for(domain: Any, *, detail: OverlaysDetail, image: Path | None, manual: bool = False) -> str:
    """Return the request, after a last look whether the guest still is what the overlays were made for.

    Raises PreconditionError where it does not run, SafetyError where its disks were changed.
    """
    with translated("describe the guest"):
        name = domain.name()
        state, reason = domain.state()
        xml = snapshot_xml(parse(domain.XMLDesc(0)), detail=detail, image=image, manual=manual)
        sizes = {disk.target: domain.blockInfo(disk.target)[0] for disk in detail.disks}
    if state != libvirt.VIR_DOMAIN_RUNNING:
        raise PreconditionError(
            f"{name!r} is not running any more (state {state}, reason {reason})",
            remedy="only a running guest can be cloned; see 'virsh domstate --reason'",
        )
    for disk in detail.disks:
        if sizes[disk.target] != disk.size_bytes:
            raise SafetyError(
                f"disk {disk.target} was resized from {disk.size_bytes} to {sizes[disk.target]} bytes after the run began",
                remedy="start the backup again",
            )
    return xml


def snapshot_xml(domain: ET.Element, *, detail: OverlaysDetail, image: Path | None, manual: bool = False) -> str:
    """Return the request for libvirt: the memory file if any, an overlay for each writable disk, nothing for the others.

    ``manual``: no overlay, the disks' storage takes the snapshots, and libvirt leaves the guest paused for it.

    Raises SafetyError where the disks are not those that the overlays were made over.
    """
    ours = {disk.target: disk for disk in detail.disks}
    root = ET.Element("domainsnapshot")
    memory = {"snapshot": "no"} if image is None else {"snapshot": "external", "file": str(image)}
    ET.SubElement(root, "memory", memory)
    disks = ET.SubElement(root, "disks")
    for disk in devices(domain).findall("disk"):
        target = disk_target(disk)
        if not is_writable_disk(disk):
            ET.SubElement(disks, "disk", {"name": target, "snapshot": "no"})
            continue
        if target not in ours:
            raise SafetyError(
                f"disk {target} was added to the guest after the run began",
                remedy="start the backup again",
            )
        mine = ours.pop(target)
        # The overlay names its base in its own header: over another one, the guest would read a stale disk later.
        if disk_source(disk) != mine.base or disk.find("mirror") is not None:
            raise SafetyError(
                f"disk {target} changed after the run began: it is on {disk_source(disk)}, not just on {mine.base}",
                remedy="start the backup again when no other tool works on the guest's disks",
            )
        if manual:
            ET.SubElement(disks, "disk", {"name": target, "snapshot": "manual"})
            continue
        entry = ET.SubElement(disks, "disk", {"name": target, "snapshot": "external", "type": "file"})
        ET.SubElement(entry, "driver", {"type": "qcow2"})
        ET.SubElement(entry, "source", {"file": mine.overlay})
    if ours:
        raise SafetyError(
            f"disk {', '.join(sorted(ours))} was taken from the guest after the run began",
            remedy="start the backup again",
        )
    return unparse(root)
