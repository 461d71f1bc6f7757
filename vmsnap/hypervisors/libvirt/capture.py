"""Mode ``live``: RAM to a tmpfs while the guest runs, and all disks switched to overlays at the instant it stands still.

The pause holds the last pass over RAM, the device state, the disk transaction and the resume. Plain libvirt allows the
last pass 300 ms; a small max downtime set beforehand is what makes the pause short. A watcher raises it in steps, up
to the policy's ``max_pause``, for a guest that writes memory faster than it can be copied.
"""

from __future__ import annotations

import logging
import threading
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libvirt

from vmsnap.errors import (
    CancelledError,
    DeadlineError,
    DriverError,
    NoSpaceError,
    NotConvergingError,
    SafetyError,
    VmsnapError,
)
from vmsnap.hypervisors.libvirt import memory, overlays
from vmsnap.hypervisors.libvirt.connection import Connection, translate, translated
from vmsnap.hypervisors.libvirt.events import PauseRecorder
from vmsnap.hypervisors.libvirt.inspect import disk_target, is_writable_disk
from vmsnap.hypervisors.libvirt.xml import devices, parse, unparse
from vmsnap.model.capture import Capture, CaptureMode, CapturePlan, CaptureSettings, OnNoConvergence
from vmsnap.ports.clock import Cancel, Clock

_LOG = logging.getLogger(__name__)
_FIRST_DOWNTIME_MS = 10
# What a pause costs beside the last pass: device state, disk transaction, resume (20 to 60 ms were measured).
_RESERVE_MS = 60
_POLL_SECONDS = 0.1
_PASSES_BEFORE_RAISING = 3
_PASSES_AT_CEILING = 5
_STREAM_LIMIT = 0.97
_FLAGS = (
    libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_LIVE
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT
)


def snapshot_xml(domain: ET.Element, *, detail: overlays.OverlaysDetail, image: Path) -> str:
    """Return the request for libvirt: the memory file, an overlay for each writable disk, nothing for the others."""
    files = {disk.target: disk.overlay for disk in detail.disks}
    root = ET.Element("domainsnapshot")
    ET.SubElement(root, "memory", {"snapshot": "external", "file": str(image)})
    disks = ET.SubElement(root, "disks")
    for disk in devices(domain).findall("disk"):
        target = disk_target(disk)
        if not is_writable_disk(disk):
            ET.SubElement(disks, "disk", {"name": target, "snapshot": "no"})
            continue
        if target not in files:
            raise SafetyError(
                f"disk {target} was added to the guest after the run began",
                remedy="start the backup again",
            )
        entry = ET.SubElement(disks, "disk", {"name": target, "snapshot": "external", "type": "file"})
        ET.SubElement(entry, "driver", {"type": "qcow2"})
        ET.SubElement(entry, "source", {"file": files[target]})
    return unparse(root)


@dataclass
class Convergence:
    """Decides, pass by pass, how long the guest may be stopped for the rest. Knows no libvirt.

    ``ceiling_ms`` is the longest last pass that keeps the promised pause.
    """

    ceiling_ms: int
    downtime_ms: int = _FIRST_DOWNTIME_MS
    raised_at_pass: int = _PASSES_BEFORE_RAISING - 1

    @staticmethod
    def for_settings(settings: CaptureSettings) -> Convergence:
        """Return the decider for a policy's promise."""
        promised = round(settings.max_pause.total_seconds() * 1000)
        ceiling = max(1, promised - _RESERVE_MS, promised // 2)
        return Convergence(ceiling_ms=ceiling, downtime_ms=min(_FIRST_DOWNTIME_MS, ceiling))

    def after_pass(self, number: int) -> int | None:
        """Return the downtime to allow from now on, after RAM was read ``number`` times; None where nothing changes."""
        if number <= self.raised_at_pass or self.downtime_ms >= self.ceiling_ms:
            return None
        self.raised_at_pass = number
        self.downtime_ms = min(self.downtime_ms * 2, self.ceiling_ms)
        return self.downtime_ms

    def gave_up(self, number: int) -> bool:
        """Tell whether the promise cannot be kept: several passes went by at the longest downtime allowed."""
        return self.downtime_ms >= self.ceiling_ms and number > self.raised_at_pass + _PASSES_AT_CEILING


class LiveCapture:
    """One capture in mode ``live``."""

    def __init__(self, connection: Connection, *, plan: CapturePlan, memory_folder: Path, clock: Clock) -> None:
        self._connection = connection
        self._plan = plan
        self._folder = memory_folder
        self._clock = clock
        self._detail = overlays.describe(plan, role="source")
        self._failure: libvirt.libvirtError | None = None
        self._stopped_by_us = False

    def run(self, *, cancel: Cancel) -> Capture:
        """Capture. The guest runs when this returns or raises; see ports.hypervisor for the errors."""
        name = self._plan.guest.name
        domain = self._connection.domain(name)
        with translated(f"describe {name!r}"):
            xml = snapshot_xml(parse(domain.XMLDesc(0)), detail=self._detail, image=self._folder / memory.IMAGE_NAME)
        convergence = Convergence.for_settings(self._plan.settings)
        with translated(f"set the longest pause of {name!r}"):
            domain.migrateSetMaxDowntime(convergence.downtime_ms, 0)
        started = self._clock.monotonic()
        with PauseRecorder(self._connection.get(), domain) as recorder:
            worker = threading.Thread(target=self._snapshot, args=(domain, xml), name="vmsnap-capture")
            worker.start()
            try:
                reason = self._watch(domain, worker=worker, convergence=convergence, cancel=cancel)
            finally:
                worker.join()
                self._ensure_running(domain)
            if self._failure is not None:
                raise reason or translate(self._failure, doing=f"capture {name!r}") from self._failure
            pause = recorder.pause(timeout_seconds=5)
        if pause is None:
            raise DriverError("QEMU did not say when the guest stopped and went on, so the pause is unknown")
        return Capture(
            mode=CaptureMode.LIVE,
            captured=pause.stopped,
            resumed=pause.resumed,
            pause_ms=(pause.resumed - pause.stopped).total_seconds() * 1000,
            ram_bytes=(self._folder / memory.IMAGE_NAME).stat().st_size,
            seconds=self._clock.monotonic() - started,
        )

    def _snapshot(self, domain: Any, xml: str) -> None:
        try:
            domain.snapshotCreateXML(xml, _FLAGS)
        except libvirt.libvirtError as error:
            self._failure = error

    def _watch(
        self, domain: Any, *, worker: threading.Thread, convergence: Convergence, cancel: Cancel
    ) -> VmsnapError | None:
        """Watch until the capture ends. Returns why it was aborted, or None."""
        settings = self._plan.settings
        deadline = self._clock.monotonic() + settings.timeout.total_seconds()
        suspended_until: float | None = None
        reason: VmsnapError | None = None
        while True:
            worker.join(timeout=_POLL_SECONDS if suspended_until is None else _POLL_SECONDS / 10)
            if not worker.is_alive():
                return reason
            if reason is not None:
                continue
            now = self._clock.monotonic()
            if suspended_until is not None:
                if now > suspended_until:
                    reason = self._abort(domain, self._not_converging(convergence))
                continue
            reason = self._reason_to_stop(now > deadline, cancel=cancel)
            if reason is not None:
                self._abort(domain, reason)
                continue
            number = _passes(domain)
            raised = convergence.after_pass(number)
            if raised is not None:
                _LOG.info("pass %d over memory: allowing a last pass of %d ms", number, raised)
                self._set_downtime(domain, raised)
            elif convergence.gave_up(number):
                if settings.on_no_convergence is OnNoConvergence.SUSPEND and self._fits(domain, settings):
                    suspended_until = now + settings.max_pause.total_seconds()
                    self._suspend(domain)
                else:
                    reason = self._abort(domain, self._not_converging(convergence))

    def _reason_to_stop(self, late: bool, *, cancel: Cancel) -> VmsnapError | None:  # noqa: FBT001
        settings = self._plan.settings
        if cancel.is_set():
            return CancelledError("the capture was cancelled; the guest runs on as before")
        if late:
            return DeadlineError(
                f"the capture did not end within {settings.timeout}",
                remedy="raise capture.timeout in the policy, or capture at a quieter time",
            )
        if memory.used_share(self._folder) > _STREAM_LIMIT:
            return NotConvergingError(
                "the memory stream outgrew its tmpfs: the guest rewrites its memory while it is read",
                remedy="capture at a quieter time, or raise capture.max_pause",
            )
        if overlays.free_bytes(self._detail) < settings.min_overlay_free_bytes // 2:
            return NoSpaceError(
                "the file system of the overlays is running full; the capture was given up",
                remedy="make room, or set capture.overlay_dir",
            )
        return None

    def _not_converging(self, convergence: Convergence) -> NotConvergingError:
        return NotConvergingError(
            f"the guest writes memory faster than it can be copied with a pause of {self._plan.settings.max_pause}",
            details=f"the last pass was allowed {convergence.downtime_ms} ms",
            remedy="raise capture.max_pause, or capture at a quieter time",
        )

    def _abort(self, domain: Any, reason: VmsnapError) -> VmsnapError:
        _LOG.warning("aborting the capture: %s", reason.brief)
        try:
            domain.abortJob()
        except libvirt.libvirtError as error:
            # The job may have ended by itself in this moment; the worker's result tells.
            _LOG.debug("abortJob: %s", error)
        return reason

    def _set_downtime(self, domain: Any, downtime_ms: int) -> None:
        try:
            domain.migrateSetMaxDowntime(downtime_ms, 0)
        except libvirt.libvirtError as error:
            _LOG.debug("migrateSetMaxDowntime: %s", error)

    def _fits(self, domain: Any, settings: CaptureSettings) -> bool:
        """Tell whether what is left can be copied within the promised pause, at the speed seen so far."""
        stats = _job_stats(domain)
        remaining, speed = stats.get("memory_remaining", 0), stats.get("memory_bps", 0)
        return bool(speed) and remaining / speed < settings.max_pause.total_seconds()

    def _suspend(self, domain: Any) -> None:
        _LOG.info("stopping the guest for the rest of the capture")
        self._stopped_by_us = True
        try:
            domain.suspend()
        except libvirt.libvirtError as error:
            _LOG.debug("suspend: %s", error)

    def _ensure_running(self, domain: Any) -> None:
        """Let the guest run, whatever happened. Raises SafetyError where it does not."""
        try:
            state, detail = domain.state()
            if state == libvirt.VIR_DOMAIN_PAUSED:
                _LOG.warning("the guest was still paused (reason %d) after the capture; resuming it", detail)
                domain.resume()
                state, detail = domain.state()
        except libvirt.libvirtError as error:
            raise SafetyError(
                f"it is not known whether {self._plan.guest.name!r} runs: {error}",
                remedy="look with 'virsh domstate --reason', and 'virsh resume' it if it is paused; then 'vmsnap reconcile'",
            ) from error
        if state != libvirt.VIR_DOMAIN_RUNNING:
            raise SafetyError(
                f"{self._plan.guest.name!r} is not running after the capture (state {state}, reason {detail})",
                remedy="look with 'virsh domstate --reason'; then 'vmsnap reconcile'",
            )


def _job_stats(domain: Any) -> dict[str, int]:
    try:
        stats: dict[str, int] = domain.jobStats()
    except libvirt.libvirtError:
        return {}
    return stats


def _passes(domain: Any) -> int:
    """Return how many passes over RAM the running job has begun (QEMU's dirty-sync count)."""
    return int(_job_stats(domain).get("memory_iteration", 0))
