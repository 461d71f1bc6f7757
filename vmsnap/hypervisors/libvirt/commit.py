"""Returning the source to its own disks: commit what it wrote since the capture, pivot, check, delete the overlays.

Works from the journal's entry or from the overlays' names alone, in every state a dead run can leave: overlays never
used, a capture still going on, a block job half done, the guest shut off meanwhile. An overlay is deleted only when
neither the live nor the persistent definition refers to it: it may hold the only copy of what production wrote.
"""

from __future__ import annotations

import logging
import time
import xml.etree.ElementTree as ET
from datetime import timedelta
from pathlib import Path
from typing import Any

import libvirt

from vmsnap.errors import BusyError, DeadlineError, DriverError, SafetyError
from vmsnap.hypervisors.libvirt import overlays
from vmsnap.hypervisors.libvirt.connection import Connection, translated
from vmsnap.hypervisors.libvirt.inspect import disk_source, disk_target
from vmsnap.hypervisors.libvirt.overlays import OverlayDetail, OverlaysDetail
from vmsnap.hypervisors.libvirt.tools import run_tool
from vmsnap.hypervisors.libvirt.xml import devices, drop, parse, unparse
from vmsnap.model.guest import DiskKind

_LOG = logging.getLogger(__name__)
_POLL_SECONDS = 0.05
_ABORT_AFTER = timedelta(seconds=5)


class SourceReturn:
    """Puts one guest back on its own disks."""

    def __init__(self, connection: Connection, *, guest: str, detail: OverlaysDetail) -> None:
        self._connection = connection
        self._guest = guest
        self._detail = detail

    def run(self, *, deadline: timedelta) -> None:
        """Return the guest to its disks and delete the overlays. May be repeated.

        Raises DeadlineError, DriverError; the overlays then stay, and the guest runs on.
        """
        until = time.monotonic() + deadline.total_seconds()
        domain = self._connection.find_domain(self._guest)
        if domain is None or domain.UUIDString() != self._detail.uuid:
            self._without_domain()
            return
        with translated(f"look at {self._guest!r}"):
            active = bool(domain.isActive())
        if active:
            self._end_foreign_capture(domain, until)
            self._resume_if_left_paused(domain)
            self._commit_live(domain, until)
        self._mend_persistent(domain, active=active, until=until)
        self._require_unused(domain)
        overlays.delete(self._detail)

    def _without_domain(self) -> None:
        """Handle a guest that is gone: overlays that hold data are its only copy of it, so they stay."""
        for disk in self._detail.disks:
            if _holds_data(disk):
                raise DriverError(
                    f"the guest {self._guest!r} is gone, and {disk.overlay} holds what it wrote last",
                    remedy=f"if the guest is not coming back, remove the file; "
                    f"otherwise merge it first: qemu-img commit -f qcow2 {disk.overlay}",
                )
        overlays.delete(self._detail)

    def _end_foreign_capture(self, domain: Any, until: float) -> None:
        """End a capture that its dead process left going on in libvirtd, and wait until it is over."""
        abort_at = time.monotonic()
        while True:
            with translated(f"look at jobs of {self._guest!r}"):
                kind = domain.jobInfo()[0]
            if kind == libvirt.VIR_DOMAIN_JOB_NONE:
                return
            if time.monotonic() > until:
                raise DeadlineError(f"a job on {self._guest!r} does not end", remedy="see 'virsh domjobinfo'")
            if time.monotonic() >= abort_at:
                self._abort_own_capture(domain)
                abort_at = time.monotonic() + _ABORT_AFTER.total_seconds()
            time.sleep(_POLL_SECONDS)

    def _abort_own_capture(self, domain: Any) -> None:
        try:
            operation = domain.jobStats().get("operation")
            if operation == libvirt.VIR_DOMAIN_JOB_OPERATION_SNAPSHOT:
                domain.abortJob()
        except libvirt.libvirtError as error:
            _LOG.debug("abortJob on %s: %s", self._guest, error)

    def _resume_if_left_paused(self, domain: Any) -> None:
        """Let the guest run where a capture left it paused. A pause for another reason is its operator's."""
        ours = (
            libvirt.VIR_DOMAIN_PAUSED_SNAPSHOT,
            libvirt.VIR_DOMAIN_PAUSED_SAVE,
            libvirt.VIR_DOMAIN_PAUSED_MIGRATION,
        )
        with translated(f"resume {self._guest!r}"):
            state, reason = domain.state()
            if state == libvirt.VIR_DOMAIN_PAUSED and reason in ours:
                _LOG.warning("%r was left paused by a capture; resuming it", self._guest)
                domain.resume()

    def _commit_live(self, domain: Any, until: float) -> None:
        """Commit all disks: start all, wait for all, pivot all, so that they change over close together."""
        pending = []
        for disk in self._detail.disks:
            element = self._live_disk(domain, disk)
            if element is None or disk_source(element) == disk.base:
                if element is not None and element.find("mirror") is not None:
                    raise BusyError(
                        f"another block job runs on {disk.target} of {self._guest!r}", remedy="wait for it to end"
                    )
                continue
            if disk_source(element) != disk.overlay:
                self._refuse_foreign_overlay(disk, disk_source(element))
            if element.find("mirror") is None:
                with translated(f"commit {disk.target} of {self._guest!r}"):
                    domain.blockCommit(disk.target, disk.base, disk.overlay, 0, libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE)
            pending.append(disk)
        for disk in pending:
            self._wait_ready(domain, disk, until)
        for disk in pending:
            with translated(f"pivot {disk.target} of {self._guest!r} back to its own disk"):
                domain.blockJobAbort(disk.target, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
        for disk in pending:
            self._wait_pivoted(domain, disk, until)

    def _refuse_foreign_overlay(self, disk: OverlayDetail, source: str) -> None:
        raise SafetyError(
            f"disk {disk.target} of {self._guest!r} is on {source}, which neither this run made nor the guest had before",
            remedy=f"somebody took another snapshot meanwhile; merge it down to {disk.overlay}, then run 'vmsnap reconcile'",
        )

    def _live_disk(self, domain: Any, disk: OverlayDetail) -> ET.Element | None:
        with translated(f"describe {self._guest!r}"):
            return _find_disk(parse(domain.XMLDesc(0)), disk.target)

    def _wait_ready(self, domain: Any, disk: OverlayDetail, until: float) -> None:
        """Wait until libvirt took QEMU's READY event into the XML; ``cur == end`` of the job is not ready yet."""
        while True:
            element = self._live_disk(domain, disk)
            mirror = None if element is None else element.find("mirror")
            if mirror is not None and mirror.get("ready") == "yes":
                return
            if mirror is None:
                raise DriverError(
                    f"the commit of {disk.target} of {self._guest!r} ended before it was ready",
                    remedy="see the guest's log in /var/log/libvirt/qemu, then run 'vmsnap reconcile'",
                )
            if time.monotonic() > until:
                raise DeadlineError(
                    f"the commit of {disk.target} of {self._guest!r} is not ready yet; it goes on by itself",
                    remedy="run 'vmsnap reconcile' when the guest writes less",
                )
            time.sleep(_POLL_SECONDS)

    def _wait_pivoted(self, domain: Any, disk: OverlayDetail, until: float) -> None:
        while True:
            element = self._live_disk(domain, disk)
            if element is None or (element.find("mirror") is None and disk_source(element) == disk.base):
                return
            if time.monotonic() > until:
                raise DeadlineError(
                    f"disk {disk.target} of {self._guest!r} did not change over", remedy="run 'vmsnap reconcile'"
                )
            time.sleep(_POLL_SECONDS)

    def _mend_persistent(self, domain: Any, *, active: bool, until: float) -> None:
        """Put the persistent definition back on the disks; for a guest that is off, merge the overlays first."""
        with translated(f"describe {self._guest!r}"):
            if not domain.isPersistent():
                return
            inactive = parse(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE))
        changed = False
        for disk in self._detail.disks:
            element = _find_disk(inactive, disk.target)
            if element is None or disk_source(element) != disk.overlay:
                continue
            if not active:
                seconds = max(1.0, until - time.monotonic())
                _LOG.warning("%r is off; merging %s into %s", self._guest, disk.overlay, disk.base)
                run_tool(("qemu-img", "commit", "-q", "-f", "qcow2", disk.overlay), timeout_seconds=seconds)
            _set_source(element, disk)
            changed = True
        if changed:
            with translated(f"write the persistent definition of {self._guest!r}"):
                self._connection.get().defineXML(unparse(inactive))

    def _require_unused(self, domain: Any) -> None:
        mine = {disk.overlay for disk in self._detail.disks}
        with translated(f"describe {self._guest!r}"):
            texts = [parse(domain.XMLDesc(0))]
            if domain.isPersistent():
                texts.append(parse(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)))
        for element in texts:
            used = mine & {source.get("file", "") for source in devices(element).iter("source")}
            if used:
                raise DriverError(
                    f"{self._guest!r} still uses {', '.join(sorted(used))}, which therefore stay",
                    remedy="run 'vmsnap reconcile' again; if it does not help, see 'virsh domblklist'",
                )


def _find_disk(domain: ET.Element, target: str) -> ET.Element | None:
    for disk in devices(domain).findall("disk"):
        if disk_target(disk) == target:
            return disk
    return None


def _set_source(element: ET.Element, disk: OverlayDetail) -> None:
    drop(element, "source", "backingStore", "mirror")
    kind = "block" if disk.base_kind is DiskKind.BLOCK else "file"
    element.set("type", kind)
    driver = element.find("driver")
    if driver is not None:
        driver.set("type", disk.base_format)
    ET.SubElement(element, "source", {"dev" if kind == "block" else "file": disk.base})


def _holds_data(disk: OverlayDetail) -> bool:
    """Tell whether anything was written to the overlay; a fresh one maps nothing at its own depth."""
    if not Path(disk.overlay).exists():
        return False
    mapped = run_tool(("qemu-img", "map", "-U", "--output=json", "-f", "qcow2", disk.overlay), timeout_seconds=120)
    return '"depth": 0' in mapped


def is_home(connection: Connection, *, guest: str, sources: dict[str, str]) -> bool:
    """Tell whether a guest's live and persistent definitions have each disk (by target) on the given source."""
    domain = connection.domain(guest)
    with translated(f"describe {guest!r}"):
        texts = [domain.XMLDesc(0)]
        if domain.isPersistent():
            texts.append(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
    for text in texts:
        root = parse(text)
        for target, source in sources.items():
            element = _find_disk(root, target)
            if element is None or disk_source(element) != source or element.find("mirror") is not None:
                return False
    return True
