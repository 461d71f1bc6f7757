"""Returning the source to its own disks: commit what it wrote since the capture, pivot, check, delete the overlays.

Works from the journal's entry or from the overlays' names alone, in every state a dead run can leave: overlays never
used, a capture still going on, a block job half done, the guest shut off or renamed meanwhile. An overlay may hold the
only copy of what production wrote, so it is deleted only when nothing refers to it, no process has it open, and what it
holds is known to be on the guest's own disk.
"""

from __future__ import annotations

import logging
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import libvirt

from vmsnap.errors import BusyError, DeadlineError, DriverError, SafetyError, VmsnapError
from vmsnap.hypervisors.libvirt import background, definitions, offline, overlays, processes, vcpulimits
from vmsnap.hypervisors.libvirt.connection import Connection, translated
from vmsnap.hypervisors.libvirt.inspect import disk_source, find_disk
from vmsnap.hypervisors.libvirt.overlays import OverlayDetail, OverlaysDetail
from vmsnap.hypervisors.libvirt.stopped import StoppedHere
from vmsnap.hypervisors.libvirt.xml import devices, parse
from vmsnap.model.ids import RunId

_LOG = logging.getLogger(__name__)
_POLL_SECONDS = 0.05
_ABORT_AFTER = timedelta(seconds=5)
_CLOSING = timedelta(seconds=5)
# The kernel tells the time it booted at to a second.
_CLOCK_SLACK_SECONDS = 2.0
_COMMIT = "active-commit"


class SourceReturn:
    """Puts one guest back on its own disks."""

    def __init__(
        self,
        connection: Connection,
        *,
        run: RunId,
        guest: str,
        detail: OverlaysDetail,
        stopped: StoppedHere | None = None,
    ) -> None:
        """Make one. ``stopped``: the run's note that it stops the guest itself."""
        self._connection = connection
        self._run = run
        self._guest = guest
        self._detail = detail
        self._stopped = stopped
        self._owed: VmsnapError | None = None

    def run(self, *, deadline: timedelta) -> None:
        """Return the guest to its disks and delete the overlays. May be repeated.

        Raises DeadlineError, BusyError, DriverError, SafetyError; the overlays then stay, and the guest runs on.
        """
        until = time.monotonic() + deadline.total_seconds()
        self._attempt(lambda: vcpulimits.give_back(self._detail.vcpu_limits))
        self._bring_home(until)
        if self._owed is not None:
            raise self._owed

    def _attempt(self, give_back: Callable[[], None]) -> None:
        """Give something back. Where that fails, it must not keep production on its overlay: it is raised at the end."""
        try:
            give_back()
        except VmsnapError as error:
            _LOG.error("%s", error.brief)
            self._owed = self._owed or error

    def _bring_home(self, until: float) -> None:
        domain = self._connection.find_by_uuid(self._detail.uuid)
        if domain is None:
            self._without_domain()
            return
        if self._is_active(domain):
            self._end_capture(domain, until)
        # Asked again: the job that was waited for may have been a save or a migration, which ends the guest here.
        if self._is_active(domain):
            self._attempt(lambda: background.give_back(domain, detail=self._detail.background, until=until))
            self._resume_if_left_paused(domain)
            self._attempt(lambda: self._give_back_downtime(domain))
            self._commit_live(domain, until)
            offline.mend_definition(domain, guest=self._guest, detail=self._detail)
        else:
            offline.merge(domain, guest=self._guest, detail=self._detail, until=until)
        self._require_unused(domain, until)
        definitions.settle()
        overlays.delete(self._detail)

    def _is_active(self, domain: Any) -> bool:
        with translated(f"look at {self._guest!r}"):
            return bool(domain.isActive())

    def _without_domain(self) -> None:
        """Handle a guest that is gone: overlays that hold data are its only copy of it, so they stay."""
        for disk in self._detail.disks:
            self._require_closed(disk)
            if overlays.holds_data(disk.overlay):
                raise DriverError(
                    f"the guest {self._guest!r} is gone, and {disk.overlay} holds what it wrote last",
                    remedy=f"if the guest is not coming back, remove the file; "
                    f"otherwise merge it first: qemu-img commit -f qcow2 {disk.overlay}",
                )
        overlays.delete(self._detail)

    def _end_capture(self, domain: Any, until: float) -> None:
        """End a capture that its dead process left going on in libvirtd, and wait until no job is left."""
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
        """Abort the snapshot job that a dead process of this run left in libvirtd. Another's is left alone."""
        try:
            operation = domain.jobStats().get("operation")
            if operation == libvirt.VIR_DOMAIN_JOB_OPERATION_SNAPSHOT and processes.is_written_for(self._run):
                domain.abortJob()
        except libvirt.libvirtError as error:
            _LOG.debug("abortJob on %s: %s", self._guest, error)

    def _resume_if_left_paused(self, domain: Any) -> None:
        """Let the guest run where a capture left it paused. A pause for another reason is its operator's.

        So is one that libvirt puts down to him, unless the run noted that it stops the guest itself.
        After a migration the guest may run on another host: resuming it here as well would ruin its disks.
        """
        reasons: tuple[int, ...] = (libvirt.VIR_DOMAIN_PAUSED_SNAPSHOT, libvirt.VIR_DOMAIN_PAUSED_SAVE)
        if self._detail.storage:
            # So libvirt leaves a guest whose storage is to take the snapshots.
            reasons += (libvirt.VIR_DOMAIN_PAUSED_UNKNOWN,)
        if self._stopped is None or not self._stopped.is_noted():
            self._resume_from(domain, reasons=reasons)
            return
        # UNKNOWN: QEMU stopped the guest once more for its memory.
        reasons += (libvirt.VIR_DOMAIN_PAUSED_UNKNOWN, libvirt.VIR_DOMAIN_PAUSED_USER)
        self._resume_from(domain, reasons=reasons)
        self._stopped.over()

    def _resume_from(self, domain: Any, *, reasons: tuple[int, ...]) -> None:
        with translated(f"resume {self._guest!r}"):
            state, reason = domain.state()
            if state == libvirt.VIR_DOMAIN_PAUSED and reason in reasons:
                _LOG.warning("%r was left paused (reason %d); resuming it", self._guest, reason)
                domain.resume()

    def _give_back_downtime(self, domain: Any) -> None:
        """Allow a migration the pause it was allowed before a capture that died: a busy guest needs it to converge."""
        before = self._detail.max_downtime_ms
        if before is None:
            return
        with translated(f"give back the longest pause of {self._guest!r}"):
            if domain.migrateGetMaxDowntime() != before:
                domain.migrateSetMaxDowntime(before, 0)

    def _commit_live(self, domain: Any, until: float) -> None:
        """Commit all disks: start all, wait for all, pivot all, so that they change over close together."""
        pending = [disk for disk in self._detail.disks if self._is_on_overlay(domain, disk)]
        for disk in pending:
            if self._mirror(domain, disk) is None:
                with translated(f"commit {disk.target} of {self._guest!r}"):
                    domain.blockCommit(disk.target, disk.base, disk.overlay, 0, libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE)
        for disk in pending:
            self._wait_ready(domain, disk, until)
        for disk in pending:
            with translated(f"pivot {disk.target} of {self._guest!r} back to its own disk"):
                domain.blockJobAbort(disk.target, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
        for disk in pending:
            self._wait_pivoted(domain, disk, until)
        if pending:
            # A full file system of the overlays stops the guest; on its own disks it can go on.
            self._resume_from(domain, reasons=(libvirt.VIR_DOMAIN_PAUSED_IOERROR,))

    def _is_on_overlay(self, domain: Any, disk: OverlayDetail) -> bool:
        """Tell whether a disk is on its overlay and has to be committed; refuse whatever is not ours to change."""
        element = self._live_disk(domain, disk)
        if element is None:
            self._require_empty(disk, why=f"disk {disk.target} was taken from {self._guest!r} meanwhile")
            return False
        mirror = element.find("mirror")
        on_overlay = disk_source(element) == disk.overlay
        if mirror is not None and not (
            on_overlay and mirror.get("job") == _COMMIT and disk_source(mirror) == disk.base
        ):
            raise BusyError(
                f"another block job runs on {disk.target} of {self._guest!r}",
                remedy="wait for it, or end it with 'virsh blockjob'; then run 'vmsnap reconcile'",
            )
        if not on_overlay and disk_source(element) != disk.base:
            below = {source.get("file") for source in element.iter("source")}
            if disk.overlay in below or overlays.holds_data(disk.overlay):
                offline.refuse_foreign(disk, guest=self._guest, source=disk_source(element))
        elif not on_overlay:
            self._require_merged(disk)
        return on_overlay

    def _require_merged(self, disk: OverlayDetail) -> None:
        """Refuse an overlay with data that the running guest never left for its disk.

        QEMU leaves an overlay only by merging it. A QEMU that was started after the overlay was last written to was
        started on the disk: the definition that named the overlay was lost, in a power cut or with libvirtd.
        """
        try:
            written_at = Path(disk.overlay).stat().st_mtime
        except OSError:
            return
        pid = processes.pid_of(self._guest)
        started_at = None if pid is None else processes.started_at(pid)
        if started_at is not None and started_at > written_at + _CLOCK_SLACK_SECONDS:
            self._require_empty(disk, why=f"{self._guest!r} was started on {disk.base} without it")

    def _require_empty(self, disk: OverlayDetail, *, why: str) -> None:
        self._require_closed(disk)
        if overlays.holds_data(disk.overlay):
            raise SafetyError(
                f"{why}, and {disk.overlay} holds what the guest wrote to it", remedy=offline.way_out(disk)
            )

    def _require_closed(self, disk: OverlayDetail) -> None:
        if overlays.is_open(disk.overlay):
            raise SafetyError(
                f"a process has {disk.overlay} open, although libvirt knows of no guest that uses it",
                remedy="libvirtd may have died in mid-capture: shut the guest down from inside, keep it off, "
                f"merge the file with 'qemu-img commit -f qcow2 {disk.overlay}', then run 'vmsnap reconcile'",
            )

    def _live_disk(self, domain: Any, disk: OverlayDetail) -> ET.Element | None:
        with translated(f"describe {self._guest!r}"):
            return find_disk(parse(domain.XMLDesc(0)), disk.target)

    def _mirror(self, domain: Any, disk: OverlayDetail) -> ET.Element | None:
        element = self._live_disk(domain, disk)
        return None if element is None else element.find("mirror")

    def _wait_ready(self, domain: Any, disk: OverlayDetail, until: float) -> None:
        """Wait until libvirt took QEMU's READY event into the XML; ``cur == end`` of the job is not ready yet."""
        while True:
            mirror = self._mirror(domain, disk)
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
            if element is not None and element.find("mirror") is None:
                if disk_source(element) == disk.base:
                    return
                raise DriverError(
                    f"disk {disk.target} of {self._guest!r} did not change over, it is on {disk_source(element)}",
                    remedy="see the guest's log in /var/log/libvirt/qemu, then run 'vmsnap reconcile'",
                )
            if element is None or time.monotonic() > until:
                raise DeadlineError(
                    f"disk {disk.target} of {self._guest!r} did not change over", remedy="run 'vmsnap reconcile'"
                )
            time.sleep(_POLL_SECONDS)

    def _require_unused(self, domain: Any, until: float) -> None:
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
        self._wait_closed(until)

    def _wait_closed(self, until: float) -> None:
        """Wait until QEMU has let go of the overlays: libvirt tells of the pivot a little earlier."""
        until = min(until, time.monotonic() + _CLOSING.total_seconds())
        while any(overlays.is_open(disk.overlay) for disk in self._detail.disks) and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)
        for disk in self._detail.disks:
            self._require_closed(disk)


def is_home(connection: Connection, *, guest: str, sources: dict[str, str]) -> bool:
    """Tell whether a guest has each disk (by target) on the given source, and neither definition names an overlay.

    An operator may have a change pending in the persistent definition; that is no business of vmsnap's.
    """
    domain = connection.domain(guest)
    with translated(f"describe {guest!r}"):
        live = parse(domain.XMLDesc(0))
        texts = [live]
        if domain.isPersistent():
            texts.append(parse(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)))
    for target, source in sources.items():
        element = find_disk(live, target)
        if element is None or disk_source(element) != source or element.find("mirror") is not None:
            return False
    named = {source.get("file", "") for root in texts for source in devices(root).iter("source")}
    return not any(overlays.parse_name(path) for path in named)
