"""The persistent definition of a source, and its overlays while it is off."""

from __future__ import annotations

import logging
import time
import xml.etree.ElementTree as ET
from typing import Any, NoReturn

import libvirt

from vmsnap.errors import DriverError, SafetyError
from vmsnap.hypervisors.libvirt import overlays
from vmsnap.hypervisors.libvirt.connection import translated
from vmsnap.hypervisors.libvirt.inspect import disk_source, find_disk
from vmsnap.hypervisors.libvirt.overlays import OverlayDetail, OverlaysDetail
from vmsnap.hypervisors.libvirt.tools import run_tool
from vmsnap.hypervisors.libvirt.xml import child, drop, parse, unparse
from vmsnap.model.guest import DiskKind

_LOG = logging.getLogger(__name__)


def way_out(disk: OverlayDetail) -> str:
    """Return what an operator can do with an overlay that vmsnap dares not judge."""
    return (
        f"look at both files; merge with 'qemu-img commit -f qcow2 {disk.overlay}' only where nothing was written to "
        f"{disk.base} since, else remove the overlay; then run 'vmsnap reconcile'"
    )


def refuse_foreign(disk: OverlayDetail, *, guest: str, source: str) -> NoReturn:
    """Raise SafetyError for a disk that somebody else moved meanwhile: the overlay may be below what it is on."""
    raise SafetyError(
        f"disk {disk.target} of {guest!r} is on {source!r}, which neither this run made nor the guest had before",
        remedy=f"if somebody took another snapshot meanwhile, merge it down to {disk.overlay}; then run 'vmsnap reconcile'",
    )


def set_source(element: ET.Element, disk: OverlayDetail) -> None:
    """Put a ``<disk>`` back on the disk that the overlay is over."""
    drop(element, "source", "backingStore", "mirror")
    kind = "block" if disk.base_kind is DiskKind.BLOCK else "file"
    element.set("type", kind)
    child(element, "driver").set("type", disk.base_format)
    ET.SubElement(element, "source", {"dev" if kind == "block" else "file": disk.base})


def mend_definition(domain: Any, *, guest: str, detail: OverlaysDetail) -> None:
    """Put the persistent definition back on the disks where it names an overlay; nothing else in it is touched.

    What the overlays hold must be on the disks already. Raises DriverError.
    """
    definition = _definition(domain, guest)
    if definition is None:
        return
    for disk in detail.disks:
        element = find_disk(definition, disk.target)
        if element is not None and disk_source(element) == disk.overlay:
            set_source(element, disk)
            with translated(f"write {disk.target} into the persistent definition of {guest!r}"):
                domain.updateDeviceFlags(unparse(element), libvirt.VIR_DOMAIN_AFFECT_CONFIG)


def merge(domain: Any, *, guest: str, detail: OverlaysDetail, until: float) -> None:
    """Merge the overlays of a guest that is off into its disks, and mend its definition. May be repeated.

    ``until`` is a time of the monotonic clock. Image locks keep the guest from being started in the middle of it.
    Raises DriverError, DeadlineError, and SafetyError where it is not certain where an overlay's data belongs.
    """
    definition = _definition(domain, guest)
    if definition is None:
        raise DriverError(f"{guest!r} ended while it was looked at", remedy="run 'vmsnap reconcile'")
    for disk in detail.disks:
        element = find_disk(definition, disk.target)
        source = "" if element is None else disk_source(element)
        if source == disk.overlay:
            _merge_one(domain, guest=guest, disk=disk, until=until)
        elif element is not None and source != disk.base:
            if overlays.holds_data(disk.overlay) or overlays.is_below(source, overlay=disk.overlay):
                refuse_foreign(disk, guest=guest, source=source)
        elif overlays.holds_data(disk.overlay):
            raise SafetyError(
                f"{guest!r} is off and {disk.target} is not on {disk.overlay}, which holds data; "
                "whether that was merged before cannot be told",
                remedy=way_out(disk),
            )
    mend_definition(domain, guest=guest, detail=detail)


def _merge_one(domain: Any, *, guest: str, disk: OverlayDetail, until: float) -> None:
    with translated(f"ask for a saved state of {guest!r}"):
        saved = bool(domain.hasManagedSaveImage(0))
    if saved:
        raise DriverError(
            f"{guest!r} was saved while it was on {disk.overlay}, and its saved state needs that file",
            remedy=f"virsh start {guest}; then run 'vmsnap reconcile'",
        )
    _LOG.warning("%r is off; merging %s into %s", guest, disk.overlay, disk.base)
    seconds = max(1.0, until - time.monotonic())
    # It empties the overlay after it has copied everything, so an interrupted merge can be done again.
    run_tool(("qemu-img", "commit", "-q", "-f", "qcow2", disk.overlay), timeout_seconds=seconds)


def _definition(domain: Any, guest: str) -> ET.Element | None:
    with translated(f"describe {guest!r}"):
        if not domain.isPersistent():
            return None
        return parse(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE))
