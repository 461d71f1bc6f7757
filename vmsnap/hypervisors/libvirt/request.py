"""The request for a capture: which memory file, which overlay for which disk."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

from vmsnap.errors import SafetyError
from vmsnap.hypervisors.libvirt.inspect import disk_source, disk_target, is_writable_disk
from vmsnap.hypervisors.libvirt.overlays import OverlaysDetail
from vmsnap.hypervisors.libvirt.xml import devices, unparse


def snapshot_xml(domain: ET.Element, *, detail: OverlaysDetail, image: Path) -> str:
    """Return the request for libvirt: the memory file, an overlay for each writable disk, nothing for the others.

    Raises SafetyError where the disks are not those that the overlays were made over.
    """
    ours = {disk.target: disk for disk in detail.disks}
    root = ET.Element("domainsnapshot")
    ET.SubElement(root, "memory", {"snapshot": "external", "file": str(image)})
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
        entry = ET.SubElement(disks, "disk", {"name": target, "snapshot": "external", "type": "file"})
        ET.SubElement(entry, "driver", {"type": "qcow2"})
        ET.SubElement(entry, "source", {"file": mine.overlay})
    if ours:
        raise SafetyError(
            f"disk {', '.join(sorted(ours))} was taken from the guest after the run began",
            remedy="start the backup again",
        )
    return unparse(root)
