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
_PASSES_BEFORE_RAISING = 3
_PASSES_AT_CEILING = 5


@dataclass
class Convergence:
    """Decides, pass by pass, how long the guest may be stopped for the rest. Knows no libvirt.

    ``ceiling_ms`` is the longest last pass that keeps the promised pause.
    """

    ceiling_ms: int
    downtime_ms: int = FIRST_DOWNTIME_MS
    raised_at_pass: int = _PASSES_BEFORE_RAISING - 1

    @staticmethod
    def for_plan(plan: CapturePlan) -> Convergence:
        """Return the decider for a policy's promise, less what the rest of the pause takes.

        A promise shorter than the rest leaves the last pass a millisecond; the pause then shows, and is reported.
        """
        promised = round(plan.settings.max_pause.total_seconds() * 1000)
        if plan.usual_rest_ms is not None:
            ceiling = max(1, promised - round(plan.usual_rest_ms * _MARGIN))
        else:
            ceiling = max(1, promised - _RESERVE_MS, promised // 2)
        return Convergence(ceiling_ms=ceiling, downtime_ms=min(FIRST_DOWNTIME_MS, ceiling))

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
