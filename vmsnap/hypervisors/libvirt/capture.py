"""Mode ``live``: RAM to a tmpfs while the guest runs, and all disks switched to overlays at the instant it stands still.

The pause holds the last pass over RAM, the device state, the disk transaction and the resume. Plain libvirt allows the
last pass 300 ms; a small max downtime set beforehand is what makes the pause short. A watcher raises it in steps, up
to the policy's ``max_pause``, for a guest that writes memory faster than it can be copied.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import libvirt

from vmsnap.errors import (
    BusyError,
    CancelledError,
    DeadlineError,
    DriverError,
    NoSpaceError,
    NotConvergingError,
    PreconditionError,
    SafetyError,
    VmsnapError,
)
from vmsnap.hypervisors.libvirt import memory, overlays, pauses, vcpulimits
from vmsnap.hypervisors.libvirt.capturewatch import CaptureWatch, suspended_by_others
from vmsnap.hypervisors.libvirt.connection import Connection, translate, translated
from vmsnap.hypervisors.libvirt.convergence import Convergence
from vmsnap.hypervisors.libvirt.events import PauseRecorder
from vmsnap.hypervisors.libvirt.filewatch import FileWatch
from vmsnap.hypervisors.libvirt.flushing import FlushedDisks
from vmsnap.hypervisors.libvirt.request import request_for
from vmsnap.hypervisors.libvirt.tools import translated_os
from vmsnap.hypervisors.libvirt.vcpulimits import SlowedVcpus
from vmsnap.hypervisors.libvirt.watchdog import Watchdog
from vmsnap.model.capture import Capture, CaptureMode, CapturePlan, OnNoConvergence
from vmsnap.ports.clock import Cancel, Clock

_LOG = logging.getLogger(__name__)
_POLL_SECONDS = 0.1
_ABORT_POLL_SECONDS = 0.1
_RECONNECT_SECONDS = 30
_STREAM_LIMIT = 0.97
# An operator's, and those of a migration: a guest that may run on another host by now must not run here as well.
_OTHERS_PAUSES = (
    libvirt.VIR_DOMAIN_PAUSED_USER,
    libvirt.VIR_DOMAIN_PAUSED_MIGRATION,
    libvirt.VIR_DOMAIN_PAUSED_POSTCOPY,
    libvirt.VIR_DOMAIN_PAUSED_POSTCOPY_FAILED,
)
_FLAGS = (
    libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_LIVE
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT
)


class LiveCapture:
    """One capture in mode ``live``."""

    def __init__(
        self,
        connection: Connection,
        *,
        plan: CapturePlan,
        memory_folder: Path,
        clock: Clock,
        at_rest: Callable[[Any, PauseRecorder], None] | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        """Make a capture. ``at_rest``: what takes the disks and resumes the guest, where libvirt shall leave both to it.

        ``watchdog``: who watches over the guest, where the policy lets it be suspended for the rest.
        """
        self._at_rest = at_rest
        self._watchdog = watchdog
        self._connection = connection
        self._plan = plan
        self._folder = memory_folder
        self._clock = clock
        self._detail = overlays.describe(plan, role="source")
        self._failure: libvirt.libvirtError | VmsnapError | None = None

    def run(self, *, cancel: Cancel) -> Capture:
        """Capture. The guest runs when this returns or raises; see ports.hypervisor for the errors."""
        name = self._plan.guest.name
        domain = self._connection.domain(name)
        image = self._folder / memory.IMAGE_NAME
        xml = request_for(domain, detail=self._detail, image=image, manual=self._at_rest is not None)
        self._require_no_job(domain)
        convergence = Convergence.for_plan(self._plan)
        slowed = self._slowed()
        self._image_is_empty()
        started = self._clock.monotonic()
        with (
            self._short_downtime(domain, convergence),
            FileWatch(self._files()) as files,
            PauseRecorder(self._connection.get(), domain) as recorder,
            FlushedDisks(tuple(disk.base for disk in self._detail.disks)) as disks,
        ):
            worker = threading.Thread(target=self._snapshot, args=(xml, recorder), name="vmsnap-capture")
            watch = CaptureWatch(
                domain,
                plan=self._plan,
                convergence=convergence,
                recorder=recorder,
                slowed=slowed,
                disks=disks,
                watchdog=self._watchdog,
            )
            worker.start()
            try:
                reason = self._watch(watch, worker=worker, cancel=cancel)
                if self._at_rest is not None and reason is None and self._failure is None:
                    self._at_rest(domain, recorder)
            finally:
                # The watch ends before the worker only by an error of its own; nobody would abort the job then.
                self._abort_until_over(watch, worker)
                self._give_back_vcpus(slowed)
                self._leave_as_found(watch)
            if self._failure is not None:
                raise reason or self._translate_failure() from self._failure
            if isinstance(reason, CancelledError | PreconditionError):
                # It came too late to abort: all is taken, and will be undone with the overlays.
                raise reason
            pause = recorder.pause(timeout_seconds=5)
        if pause is None:
            raise DriverError("QEMU did not say when the guest stopped and went on, so the pause is unknown")
        length = pause.resumed - pause.stopped
        if length > self._plan.settings.max_pause:
            _LOG.warning("the pause took %s, the policy promises %s at most", length, self._plan.settings.max_pause)
        return Capture(
            mode=CaptureMode.LIVE,
            reason=self._plan.choice.reason,
            captured=pause.stopped,
            resumed=pause.resumed,
            pause_ms=length.total_seconds() * 1000,
            ram_bytes=(self._folder / memory.IMAGE_NAME).stat().st_size,
            seconds=self._clock.monotonic() - started,
            parts=pauses.parts_of(stopped=pause.stopped, resumed=pause.resumed, marks=(*pause.marks, *files.marks())),
        )

    def _require_no_job(self, domain: Any) -> None:
        """Raise BusyError where somebody else's migration or snapshot goes on: it may have begun after the preflight."""
        with translated(f"look at jobs of {self._plan.guest.name!r}"):
            kind = domain.jobInfo()[0]
        if kind != libvirt.VIR_DOMAIN_JOB_NONE:
            raise BusyError(
                f"another job goes on with {self._plan.guest.name!r}",
                remedy="see 'virsh domjobinfo'; try again when it ended",
            )

    def _image_is_empty(self) -> None:
        """Empty the image of an earlier attempt: it tells whether the job that goes on is this capture's."""
        with translated_os("empty the memory image"):
            os.truncate(self._folder / memory.IMAGE_NAME, 0)

    def _has_begun(self) -> bool:
        """Tell whether libvirt has begun this capture; until then it may wait for somebody else's job to end."""
        return (self._folder / memory.IMAGE_NAME).stat().st_size > 0

    def _files(self) -> dict[str, str]:
        """Return the files whose opening and closing tell the parts of a pause that QEMU sends no events of."""
        found = {str(self._folder / memory.IMAGE_NAME): pauses.IMAGE}
        for disk in self._detail.disks:
            found |= {disk.overlay: pauses.DISKS, disk.base: pauses.DISKS}
        return found

    def _slowed(self) -> SlowedVcpus | None:
        settings = self._plan.settings
        if settings.on_no_convergence is not OnNoConvergence.THROTTLE:
            return None
        limits = vcpulimits.find_limits(self._plan.guest.name)
        return SlowedVcpus(limits, limit_seconds=settings.throttle_limit.total_seconds())

    def _give_back_vcpus(self, slowed: SlowedVcpus | None) -> None:
        if slowed is None:
            return
        try:
            slowed.let_go()
        except DriverError as error:
            # The guard gave back already, or will; the release of the overlays tries as well, and raises.
            _LOG.error("%s", error.brief)

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

    def _snapshot(self, xml: str, recorder: PauseRecorder) -> None:
        # A connection of its own: on one that waits in a long call, libvirt may answer others, and send events, late.
        connection = Connection(self._connection.uri)
        try:
            connection.domain(self._plan.guest.name).snapshotCreateXML(xml, _FLAGS)
        except (libvirt.libvirtError, VmsnapError) as error:
            self._failure = error
        finally:
            connection.close()
            recorder.wake()

    def _watch(self, watch: CaptureWatch, *, worker: threading.Thread, cancel: Cancel) -> VmsnapError | None:
        """Watch until the capture ends. Returns why it was aborted, or None."""
        deadline = self._clock.monotonic() + self._plan.settings.timeout.total_seconds()
        while True:
            watch.wait()
            if not worker.is_alive():
                return None
            reason = self._reason_to_stop(self._clock.monotonic() > deadline, cancel=cancel)
            if reason is None and self._has_begun():
                reason = watch.look()
            if reason is not None:
                _LOG.warning("aborting the capture: %s", reason.brief)
                self._abort_until_over(watch, worker)
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
        if memory.is_short():
            return NoSpaceError(
                "the host runs out of memory; the capture was given up before a guest is ended for it",
                remedy="run fewer guests or clones at a time, or add memory",
            )
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

    def _translate_failure(self) -> VmsnapError:
        assert self._failure is not None  # noqa: S101 - the caller looked
        # The stream may fill the tmpfs between two looks at it.
        if memory.used_share(self._folder) > _STREAM_LIMIT:
            return self._outgrown()
        if isinstance(self._failure, VmsnapError):
            return self._failure
        return translate(self._failure, doing=f"capture {self._plan.guest.name!r}")

    def _abort_until_over(self, watch: CaptureWatch, worker: threading.Thread) -> None:
        """Abort the job until the worker has ended. Once may not do: libvirt refuses while the job is not set up.

        A job that is not this capture's is left alone: libvirt gives up waiting for it after half a minute.
        """
        while worker.is_alive():
            try:
                if self._has_begun():
                    watch.domain.abortJob()
            except (libvirt.libvirtError, OSError) as error:
                # The job may have ended by itself in this moment; the worker's result tells.
                _LOG.debug("abortJob: %s", error)
            if watch.stopped_by_others and not watch.suspended_again:
                watch.suspend_again(timeout_seconds=_ABORT_POLL_SECONDS)
            else:
                worker.join(timeout=_ABORT_POLL_SECONDS)

    def _leave_as_found(self, watch: CaptureWatch) -> None:
        """Let the guest run, or stand still where somebody else stopped it: libvirt lets it go on after a capture."""
        if watch.suspended_again:
            return
        if not watch.stopped_by_others:
            self._ensure_running(watch)
            return
        with translated(f"suspend {self._plan.guest.name!r} again"):
            domain = self._connection.domain(self._plan.guest.name)
            if domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING:
                domain.suspend()

    def _ensure_running(self, watch: CaptureWatch) -> None:
        """Let the guest run, whatever happened. Raises SafetyError where it does not.

        libvirtd may just be starting again: it then ends the job and resumes the guest by itself, so wait for it.
        """
        until = time.monotonic() + _RECONNECT_SECONDS
        while True:
            try:
                state, detail = self._resumed_state(watch)
                break
            except (libvirt.libvirtError, VmsnapError) as error:
                if time.monotonic() > until:
                    raise SafetyError(
                        f"it is not known whether {self._plan.guest.name!r} runs: {error}",
                        remedy="look with 'virsh domstate --reason', and 'virsh resume' it if it is paused; "
                        "then 'vmsnap reconcile'",
                    ) from error
                time.sleep(_POLL_SECONDS)
        if (state, detail) == (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_USER):
            raise suspended_by_others(self._plan.guest.name, again=False)
        if state != libvirt.VIR_DOMAIN_RUNNING:
            raise SafetyError(
                f"{self._plan.guest.name!r} is not running after the capture (state {state}, reason {detail})",
                remedy="look with 'virsh domstate --reason'; then 'vmsnap reconcile'",
            )
        if watch.suspended_here and self._watchdog is not None:
            self._watchdog.pause_is_over()

    def _resumed_state(self, watch: CaptureWatch) -> tuple[int, int]:
        domain = self._connection.domain(self._plan.guest.name)
        state, detail = domain.state()
        stopped_here = detail == libvirt.VIR_DOMAIN_PAUSED_USER and watch.suspended_here
        if state == libvirt.VIR_DOMAIN_PAUSED and (stopped_here or detail not in _OTHERS_PAUSES):
            _LOG.warning("the guest was still paused (reason %d) after the capture; resuming it", detail)
            domain.resume()
            state, detail = domain.state()
        return state, detail
