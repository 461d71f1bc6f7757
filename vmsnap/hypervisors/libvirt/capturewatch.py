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
from vmsnap.hypervisors.libvirt.watchdog import Watchdog
from vmsnap.model.capture import CapturePlan

_LOG = logging.getLogger(__name__)
_LONGEST_WAIT_SECONDS = 0.05
_SHORTEST_WAIT_SECONDS = 0.002
_FLUSH_EVERY_SECONDS = 0.15
_FIRST_PASSES = 2
_SHORT_PASS_SECONDS = 0.5
# As long as between two raised limits: QEMU and the guest have to feel the last step first.
_SLOWER_EVERY_SECONDS = 0.3
# A guest that is stopped by libvirt for the last pass has no reason yet; one that somebody suspends has.
_SUSPENDED = (libvirt.VIR_DOMAIN_PAUSED_USER, libvirt.VIR_DOMAIN_PAUSED_SNAPSHOT)


def suspended_by_others(guest: str, *, again: bool) -> PreconditionError:
    """Return the error for a guest that its operator suspended while it was captured. ``again``: it was let go on meanwhile."""
    how = "libvirt let it go on, and vmsnap suspended it again" if again else "it stays suspended"
    return PreconditionError(
        f"{guest!r} was suspended by somebody else during the capture, which was given up; {how}",
        details="a 'virsh resume' before the end of the capture has no effect" if again else None,
        remedy=f"if it is to run: virsh resume {guest}; then start the backup again",
    )


class CaptureWatch:
    """Looks after one capture.

    ``slowed`` is given where the guest's vCPUs may be slowed down, ``watchdog`` where it may be suspended for the rest.
    """

    def __init__(
        self,
        domain: Any,
        *,
        plan: CapturePlan,
        convergence: Convergence,
        recorder: PauseRecorder,
        slowed: SlowedVcpus | None,
        disks: FlushedDisks,
        watchdog: Watchdog | None = None,
    ) -> None:
        self.domain = domain
        self.stopped_by_others = False
        self.suspended_again = False
        self.suspended_here = False
        self._plan = plan
        self._settings = plan.settings
        self._convergence = convergence
        self._recorder = recorder
        self._slowed = slowed
        self._disks = disks
        self._watchdog = watchdog
        self._passes = 0
        self._flushed_at = 0.0
        self._slower_at = 0.0
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
            self._flush(passes)
            return self._after_pass(passes)
        return None

    def _flush(self, passes: int) -> None:
        """Flush the disks, and drop their cache when the guest is about to stop: QEMU would do both in the pause.

        A guest may stop when its memory was copied once. The longer a later pass takes, the less is the guest about to
        stop, and it reads from that cache: it is left alone until passes are short.
        """
        now = time.monotonic()
        since = now - self._flushed_at
        if passes > 1 and since < _FLUSH_EVERY_SECONDS:
            return
        self._flushed_at = now
        self._disks.flush(drop_cache=passes <= _FIRST_PASSES or since < _SHORT_PASS_SECONDS)

    def suspend_again(self, *, timeout_seconds: float) -> None:
        """Wait, that long at most, until libvirt lets a guest go on that its operator suspended, and suspend it again at once.

        So whoever lets it go on after that is obeyed: do not suspend it once more when ``suspended_again`` is set.
        """
        if not self._recorder.wait_for_resume(timeout_seconds=timeout_seconds):
            return
        try:
            self.domain.suspend()
        except libvirt.libvirtError as error:
            _LOG.debug("suspend: %s", error)
        else:
            self.suspended_again = True

    def _standing_still(self, left: float) -> VmsnapError | None:
        if not self._seen_stopped:
            self._seen_stopped = True
            if self._suspended_by_others():
                self.stopped_by_others = True
                return suspended_by_others(self._plan.guest.name, again=True)
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
        now = time.monotonic()
        raised = self._convergence.after_pass(number, at=now)
        if raised is not None:
            _LOG.info("pass %d over memory: allowing a last pass of %d ms", number, raised)
            self._set_downtime(raised)
            return None
        if self._slowed_until is not None:
            return self._slow_down()
        if not self._convergence.gave_up(number, at=now):
            return None
        if self._slowed is not None:
            self._slowed_until = time.monotonic() + self._settings.throttle_limit.total_seconds()
            return self._slow_down()
        if self._watchdog is not None and self._fits():
            return self._suspend(self._watchdog)
        return self._not_converging()

    def _slow_down(self) -> VmsnapError | None:
        assert self._slowed is not None  # noqa: S101 - the callers looked
        if self._slowed.is_slowest or time.monotonic() < self._slower_at:
            return None
        self._slower_at = time.monotonic() + _SLOWER_EVERY_SECONDS
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

    def _suspend(self, watchdog: Watchdog) -> VmsnapError | None:
        """Stop the guest for the rest. Returns why that cannot be done safely, or None.

        Where the memory is taken at this moment, libvirt keeps the request until its job is over, lets the guest go on, and
        stops it then: whoever ends the capture has to know that it was stopped from here.
        """
        if self._recorder.stopped_since() is not None or self._recorder.memory_taken():
            return None
        _LOG.info("stopping the guest for the rest of the capture")
        try:
            watchdog.claim_next_pause()
        except VmsnapError as error:
            return error
        self.suspended_here = True
        self._suspended_until = time.monotonic() + self._settings.max_pause.total_seconds()
        try:
            self.domain.suspend()
        except libvirt.libvirtError as error:
            _LOG.debug("suspend: %s", error)
        return None
