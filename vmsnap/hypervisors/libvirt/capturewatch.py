"""Watching a capture in mode ``live``: what to allow a guest that does not converge, and when the promised pause is over.

It goes by QEMU's events. Nothing is asked of QEMU while the guest may be standing still: each answer would lengthen the pause.
"""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime
from typing import Any

import libvirt

from vmsnap.errors import DriverError, NotConvergingError, PreconditionError, VmsnapError
from vmsnap.hypervisors.libvirt.convergence import Convergence
from vmsnap.hypervisors.libvirt.events import PauseRecorder
from vmsnap.hypervisors.libvirt.flushing import FlushedDisks
from vmsnap.hypervisors.libvirt.vcpulimits import SlowedVcpus
from vmsnap.model.capture import CapturePlan, OnNoConvergence

_LOG = logging.getLogger(__name__)
_LONGEST_WAIT_SECONDS = 0.05
_SHORTEST_WAIT_SECONDS = 0.002
# A guest that is stopped by libvirt for the last pass has no reason yet; one that somebody suspends has.
_SUSPENDED = (libvirt.VIR_DOMAIN_PAUSED_USER, libvirt.VIR_DOMAIN_PAUSED_SNAPSHOT)


def suspended_by_others(guest: str) -> PreconditionError:
    """Return the error for a guest that its operator suspended while it was captured."""
    return PreconditionError(
        f"{guest!r} was suspended by somebody else during the capture, which was given up; it stays suspended",
        remedy=f"start the backup again when it runs: virsh resume {guest}",
    )


class CaptureWatch:
    """Looks after one capture. ``slowed`` is given where the guest's vCPUs may be slowed down."""

    def __init__(
        self,
        domain: Any,
        *,
        plan: CapturePlan,
        convergence: Convergence,
        recorder: PauseRecorder,
        slowed: SlowedVcpus | None,
        disks: FlushedDisks,
    ) -> None:
        self.domain = domain
        self.stopped_by_others = False
        self._plan = plan
        self._settings = plan.settings
        self._convergence = convergence
        self._recorder = recorder
        self._slowed = slowed
        self._disks = disks
        self._passes = 0
        self._suspended_until: float | None = None
        self._slowed_until: float | None = None
        self._seen_stopped = False

    def wait(self) -> None:
        """Wait for QEMU's next event, or for a moment."""
        left = self._seconds_left()
        seconds = _LONGEST_WAIT_SECONDS if left is None else min(_LONGEST_WAIT_SECONDS, left)
        self._recorder.wait_for_news(timeout_seconds=max(seconds, _SHORTEST_WAIT_SECONDS))

    def look(self) -> VmsnapError | None:
        """Decide by what has happened. Returns why the capture has to be given up, or None."""
        if self._suspended_until is not None:
            return self._not_converging() if time.monotonic() > self._suspended_until else None
        left = self._seconds_left()
        if left is not None:
            return self._standing_still(left)
        if self._recorder.memory_taken():
            # The guest still stands still, and whatever QEMU or the disks are asked for now makes it stand longer.
            return None
        self._seen_stopped = False
        if self._slowed_until is not None and time.monotonic() > self._slowed_until:
            return self._not_converging()
        passes = self._recorder.passes()
        if passes > self._passes:
            self._passes = passes
            self._disks.flush()
            return self._after_pass(passes)
        return None

    def _standing_still(self, left: float) -> VmsnapError | None:
        if not self._seen_stopped:
            self._seen_stopped = True
            if self._suspended_by_others():
                self.stopped_by_others = True
                return suspended_by_others(self._plan.guest.name)
        if left <= 0:
            return NotConvergingError(
                f"the guest stood still for {self._settings.max_pause} and its memory was not taken yet; it goes on",
                details=f"the last pass was allowed {self._convergence.downtime_ms} ms",
                remedy="capture at a quieter time, or raise capture.max_pause",
            )
        return None

    def _seconds_left(self) -> float | None:
        """Return how much of the promised pause is left; None while the guest runs, or when its memory is taken."""
        stopped = self._recorder.stopped_since()
        if stopped is None:
            return None
        return (self._settings.max_pause - (datetime.now(tz=UTC) - stopped)).total_seconds()

    def _suspended_by_others(self) -> bool:
        try:
            state, reason = self.domain.state()
        except libvirt.libvirtError as error:
            _LOG.debug("state: %s", error)
            return False
        return state == libvirt.VIR_DOMAIN_PAUSED and reason in _SUSPENDED

    def _after_pass(self, number: int) -> VmsnapError | None:
        raised = self._convergence.after_pass(number)
        if raised is not None:
            _LOG.info("pass %d over memory: allowing a last pass of %d ms", number, raised)
            self._set_downtime(raised)
            return None
        if self._slowed_until is not None:
            return self._slow_down()
        if not self._convergence.gave_up(number):
            return None
        if self._slowed is not None:
            self._slowed_until = time.monotonic() + self._settings.throttle_limit.total_seconds()
            return self._slow_down()
        if self._settings.on_no_convergence is OnNoConvergence.SUSPEND and self._fits():
            self._suspended_until = time.monotonic() + self._settings.max_pause.total_seconds()
            self._suspend()
            return None
        return self._not_converging()

    def _slow_down(self) -> VmsnapError | None:
        assert self._slowed is not None  # noqa: S101 - the callers looked
        try:
            self._slowed.slow_down()
        except DriverError as error:
            return error
        _LOG.warning(
            "the guest's vCPUs are slowed down by %d %% so that its memory can be copied", self._slowed.percent
        )
        return None

    def _not_converging(self) -> NotConvergingError:
        slowed = f", its vCPUs slowed down by {self._slowed.percent} %" if self._slowed and self._slowed.percent else ""
        return NotConvergingError(
            f"the guest writes memory faster than it can be copied with a pause of {self._settings.max_pause}{slowed}",
            details=f"the last pass was allowed {self._convergence.downtime_ms} ms",
            remedy='raise capture.max_pause, capture at a quieter time, or set capture.on_no_convergence = "instant"',
        )

    def _set_downtime(self, downtime_ms: int) -> None:
        try:
            self.domain.migrateSetMaxDowntime(downtime_ms, 0)
        except libvirt.libvirtError as error:
            _LOG.debug("migrateSetMaxDowntime: %s", error)

    def _fits(self) -> bool:
        """Tell whether what is left can be copied within the promised pause, at the speed seen so far."""
        try:
            stats = self.domain.jobStats()
        except libvirt.libvirtError:
            return False
        remaining, speed = stats.get("memory_remaining", 0), stats.get("memory_bps", 0)
        return bool(speed) and remaining / speed < self._settings.max_pause.total_seconds()

    def _suspend(self) -> None:
        _LOG.info("stopping the guest for the rest of the capture")
        try:
            self.domain.suspend()
        except libvirt.libvirtError as error:
            _LOG.debug("suspend: %s", error)
