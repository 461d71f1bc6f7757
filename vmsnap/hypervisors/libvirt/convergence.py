"""How long a guest may be stopped for the last pass over its memory: a pure decision, pass by pass."""

from __future__ import annotations

from dataclasses import dataclass

from vmsnap.model.capture import CapturePlan

# A last pass of less than this is over before the rest of the pause counts; most guests converge on it.
FIRST_DOWNTIME_MS = 5
# What a pause costs beside the last pass where it was not measured yet: disks and resume (20 to 60 ms were seen).
_RESERVE_MS = 60
# How much longer than lately it may take this time.
_MARGIN = 1.25
_LEAST_SHARE = 0.25
_PASSES_BEFORE_RAISING = 3
_PASSES_AT_CEILING = 5
# QEMU goes by a new limit only when it measures its speed anew, every 100 ms (BUFFER_DELAY, migration/migration.c), while
# late passes take 10 ms: raised at each of them, it would end far above what the guest needs.
_SECONDS_BETWEEN = 0.3


@dataclass
class Convergence:
    """Decides, pass by pass, how long the guest may be stopped for the rest. Knows no libvirt.

    ``ceiling_ms`` is the longest last pass that keeps the promised pause. ``raised_at`` is of the monotonic clock.
    """

    ceiling_ms: int
    downtime_ms: int = FIRST_DOWNTIME_MS
    raised_at_pass: int = _PASSES_BEFORE_RAISING - 1
    raised_at: float | None = None
    seconds_between: float = _SECONDS_BETWEEN

    @staticmethod
    def for_plan(plan: CapturePlan) -> Convergence:
        """Return the decider for a policy's promise, less what the rest of the pause takes.

        However long the rest was, the last pass is left a share of the promise: else a few slow pauses would keep a guest
        from ever being captured again, and so from showing that it got better. The pause then shows, and is reported.
        """
        promised = round(plan.settings.max_pause.total_seconds() * 1000)
        if plan.usual_rest_ms is not None:
            ceiling = max(1, promised - round(plan.usual_rest_ms * _MARGIN), round(promised * _LEAST_SHARE))
        else:
            ceiling = max(1, promised - _RESERVE_MS, promised // 2)
        return Convergence(ceiling_ms=ceiling, downtime_ms=min(FIRST_DOWNTIME_MS, ceiling))

    def after_pass(self, number: int, *, at: float) -> int | None:
        """Return the downtime to allow from now on, after RAM was read ``number`` times; None where nothing changes.

        ``at``: when the pass began, in seconds of the monotonic clock.
        """
        if number <= self.raised_at_pass:
            return None
        if self.raised_at is None:
            self.raised_at = at
        if self.downtime_ms >= self.ceiling_ms or not self._tried_until(at):
            return None
        self.raised_at_pass, self.raised_at = number, at
        self.downtime_ms = min(self.downtime_ms * 2, self.ceiling_ms)
        return self.downtime_ms

    def gave_up(self, number: int, *, at: float) -> bool:
        """Tell whether the promise cannot be kept: several passes went by at the longest downtime allowed."""
        return (
            self.downtime_ms >= self.ceiling_ms
            and number > self.raised_at_pass + _PASSES_AT_CEILING
            and self._tried_until(at)
        )

    def _tried_until(self, at: float) -> bool:
        return self.raised_at is not None and at >= self.raised_at + self.seconds_between
