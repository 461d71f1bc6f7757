"""Mode ``live``: RAM to a tmpfs while the guest runs, and all disks switched to overlays at the instant it stands still.

The pause holds the last pass over RAM, the device state, the disk transaction and the resume. Plain libvirt allows the
last pass 300 ms; a small max downtime set beforehand is what makes the pause short. A watcher raises it in steps, up
to the policy's ``max_pause``, for a guest that writes memory faster than it can be copied.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import libvirt

from vmsnap.errors import (
    CancelledError,
    DeadlineError,
    DriverError,
    NoSpaceError,
    NotConvergingError,
    PreconditionError,
    SafetyError,
    VmsnapError,
)
from vmsnap.hypervisors.libvirt import memory, overlays
from vmsnap.hypervisors.libvirt.connection import Connection, translate, translated
from vmsnap.hypervisors.libvirt.convergence import Convergence
from vmsnap.hypervisors.libvirt.events import PauseRecorder
from vmsnap.hypervisors.libvirt.request import snapshot_xml
from vmsnap.hypervisors.libvirt.xml import parse
from vmsnap.model.capture import Capture, CaptureMode, CapturePlan, CaptureSettings, OnNoConvergence
from vmsnap.ports.clock import Cancel, Clock

_LOG = logging.getLogger(__name__)
_POLL_SECONDS = 0.1
_ABORT_POLL_SECONDS = 0.1
_RECONNECT_SECONDS = 30
_STREAM_LIMIT = 0.97
_FLAGS = (
    libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_LIVE
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT
)


class LiveCapture:
    """One capture in mode ``live``."""

    def __init__(self, connection: Connection, *, plan: CapturePlan, memory_folder: Path, clock: Clock) -> None:
        self._connection = connection
        self._plan = plan
        self._folder = memory_folder
        self._clock = clock
        self._detail = overlays.describe(plan, role="source")
        self._failure: libvirt.libvirtError | None = None

    def run(self, *, cancel: Cancel) -> Capture:
        """Capture. The guest runs when this returns or raises; see ports.hypervisor for the errors."""
        name = self._plan.guest.name
        domain = self._connection.domain(name)
        xml = self._request(domain)
        convergence = Convergence.for_settings(self._plan.settings)
        started = self._clock.monotonic()
        with self._short_downtime(domain, convergence), PauseRecorder(self._connection.get(), domain) as recorder:
            worker = threading.Thread(target=self._snapshot, args=(domain, xml), name="vmsnap-capture")
            worker.start()
            try:
                reason = self._watch(domain, worker=worker, convergence=convergence, cancel=cancel)
            finally:
                # The watch ends before the worker only by an error of its own; nobody would abort the job then.
                self._abort_until_over(domain, worker)
                self._ensure_running()
            if self._failure is not None:
                raise reason or self._translate_failure() from self._failure
            if isinstance(reason, CancelledError):
                # The cancellation came too late to abort: all is taken, and will be undone with the overlays.
                raise reason
            pause = recorder.pause(timeout_seconds=5)
        if pause is None:
            raise DriverError("QEMU did not say when the guest stopped and went on, so the pause is unknown")
        length = pause.resumed - pause.stopped
        if length > self._plan.settings.max_pause:
            _LOG.warning("the pause took %s, the policy wishes %s at most", length, self._plan.settings.max_pause)
        return Capture(
            mode=CaptureMode.LIVE,
            reason=self._plan.choice.reason,
            captured=pause.stopped,
            resumed=pause.resumed,
            pause_ms=length.total_seconds() * 1000,
            ram_bytes=(self._folder / memory.IMAGE_NAME).stat().st_size,
            seconds=self._clock.monotonic() - started,
        )

    def _request(self, domain: Any) -> str:
        """Return the request, after a last look whether the guest still is what the overlays were made for."""
        name = self._plan.guest.name
        with translated(f"describe {name!r}"):
            state, reason = domain.state()
            xml = snapshot_xml(parse(domain.XMLDesc(0)), detail=self._detail, image=self._folder / memory.IMAGE_NAME)
            sizes = {disk.target: domain.blockInfo(disk.target)[0] for disk in self._detail.disks}
        if state != libvirt.VIR_DOMAIN_RUNNING:
            raise PreconditionError(
                f"{name!r} is not running any more (state {state}, reason {reason})",
                remedy="only a running guest can be cloned; see 'virsh domstate --reason'",
            )
        for disk in self._detail.disks:
            if sizes[disk.target] != disk.size_bytes:
                raise SafetyError(
                    f"disk {disk.target} was resized from {disk.size_bytes} to {sizes[disk.target]} bytes after the run began",
                    remedy="start the backup again",
                )
        return xml

    @contextmanager
    def _short_downtime(self, domain: Any, convergence: Convergence) -> Iterator[None]:
        """Allow QEMU only a short last pass, and give back what it was allowed before: migrations need it."""
        name = self._plan.guest.name
        with translated(f"set the longest pause of {name!r}"):
            before = domain.migrateGetMaxDowntime()
            domain.migrateSetMaxDowntime(convergence.downtime_ms, 0)
        try:
            yield
        finally:
            try:
                self._connection.domain(name).migrateSetMaxDowntime(before, 0)
            except (libvirt.libvirtError, VmsnapError) as error:
                _LOG.warning(
                    "the longest pause of %r in a migration could not be set back to %d ms: %s", name, before, error
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
                return None
            now = self._clock.monotonic()
            reason = self._reason_to_stop(now > deadline, cancel=cancel)
            if reason is None and suspended_until is not None and now > suspended_until:
                reason = self._not_converging(convergence)
            if reason is None and suspended_until is None:
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
                        reason = self._not_converging(convergence)
            if reason is not None:
                _LOG.warning("aborting the capture: %s", reason.brief)
                self._abort_until_over(domain, worker)
                return reason

    def _reason_to_stop(self, late: bool, *, cancel: Cancel) -> VmsnapError | None:  # noqa: FBT001
        settings = self._plan.settings
        if cancel.is_set():
            return CancelledError("the capture was cancelled; the guest runs on")
        if late:
            return DeadlineError(
                f"the capture did not end within {settings.timeout}",
                remedy="raise capture.timeout in the policy, or capture at a quieter time",
            )
        if memory.used_share(self._folder) > _STREAM_LIMIT:
            return self._outgrown()
        if overlays.free_bytes(self._detail) < settings.min_overlay_free_bytes // 2:
            return NoSpaceError(
                "the file system of the overlays is running full; the capture was given up",
                remedy="make room, or set capture.overlay_dir",
            )
        return None

    def _outgrown(self) -> NotConvergingError:
        return NotConvergingError(
            "the memory stream outgrew its tmpfs: the guest rewrites its memory while it is read",
            remedy="capture at a quieter time, or raise capture.max_pause",
        )

    def _not_converging(self, convergence: Convergence) -> NotConvergingError:
        return NotConvergingError(
            f"the guest writes memory faster than it can be copied with a pause of {self._plan.settings.max_pause}",
            details=f"the last pass was allowed {convergence.downtime_ms} ms",
            remedy="raise capture.max_pause, or capture at a quieter time",
        )

    def _translate_failure(self) -> VmsnapError:
        assert self._failure is not None  # noqa: S101 - the caller looked
        # The stream may fill the tmpfs between two looks at it.
        if memory.used_share(self._folder) > _STREAM_LIMIT:
            return self._outgrown()
        return translate(self._failure, doing=f"capture {self._plan.guest.name!r}")

    def _abort_until_over(self, domain: Any, worker: threading.Thread) -> None:
        """Abort the job until the worker has ended. Once may not do: libvirt refuses while the job is not set up."""
        while worker.is_alive():
            try:
                domain.abortJob()
            except libvirt.libvirtError as error:
                # The job may have ended by itself in this moment; the worker's result tells.
                _LOG.debug("abortJob: %s", error)
            worker.join(timeout=_ABORT_POLL_SECONDS)

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
        try:
            domain.suspend()
        except libvirt.libvirtError as error:
            _LOG.debug("suspend: %s", error)

    def _ensure_running(self) -> None:
        """Let the guest run, whatever happened. Raises SafetyError where it does not.

        libvirtd may just be starting again: it then ends the job and resumes the guest by itself, so wait for it.
        """
        until = time.monotonic() + _RECONNECT_SECONDS
        while True:
            try:
                state, detail = self._resumed_state()
                break
            except (libvirt.libvirtError, VmsnapError) as error:
                if time.monotonic() > until:
                    raise SafetyError(
                        f"it is not known whether {self._plan.guest.name!r} runs: {error}",
                        remedy="look with 'virsh domstate --reason', and 'virsh resume' it if it is paused; "
                        "then 'vmsnap reconcile'",
                    ) from error
                time.sleep(_POLL_SECONDS)
        if state != libvirt.VIR_DOMAIN_RUNNING:
            raise SafetyError(
                f"{self._plan.guest.name!r} is not running after the capture (state {state}, reason {detail})",
                remedy="look with 'virsh domstate --reason'; then 'vmsnap reconcile'",
            )

    def _resumed_state(self) -> tuple[int, int]:
        domain = self._connection.domain(self._plan.guest.name)
        state, detail = domain.state()
        if state == libvirt.VIR_DOMAIN_PAUSED:
            _LOG.warning("the guest was still paused (reason %d) after the capture; resuming it", detail)
            domain.resume()
            state, detail = domain.state()
        return state, detail


def _job_stats(domain: Any) -> dict[str, int]:
    try:
        stats: dict[str, int] = domain.jobStats()
    except libvirt.libvirtError:
        return {}
    return stats


def _passes(domain: Any) -> int:
    """Return how many passes over RAM the running job has begun (QEMU's dirty-sync count)."""
    return int(_job_stats(domain).get("memory_iteration", 0))
