"""Taking the guest: everything a capture needs is made, the capture is done, and production goes home as soon as it can."""

from __future__ import annotations

from dataclasses import replace

from vmsnap.model.capture import Capture, CapturePlan, DiskSnapshot
from vmsnap.model.isolation import FencePlan
from vmsnap.ports.clock import Cancel
from vmsnap.workflow.guard import alarmed
from vmsnap.workflow.run import Run
from vmsnap.workflow.world import World


class Taking:
    """The capture of one run. Call its methods once each, in the order they stand here."""

    def __init__(self, world: World, *, run: Run, plan: CapturePlan, fence: FencePlan) -> None:
        self._world = world
        self._run = run
        self._plan = plan
        self._fence = fence
        self._overlays = world.hypervisor.overlays_resource(plan)
        self._memory = world.hypervisor.memory_resource(plan)

    def prepare(self) -> None:
        """Make overlays, copies, the place of the memory image, and the fence."""
        run, plan, fence = self._run, self._plan, self._fence
        hypervisor = self._world.hypervisor
        with run.step("prepare"):
            run.acquire(self._overlays, lambda: hypervisor.prepare_overlays(plan))
            if plan.settings.on_copies:
                run.acquire(hypervisor.copies_resource(plan), lambda: hypervisor.prepare_copies(plan))
            run.acquire(hypervisor.clone_overlays_resource(plan), lambda: hypervisor.prepare_clone_overlays(plan))
            if plan.choice.mode.takes_memory:
                run.acquire(self._memory, lambda: hypervisor.prepare_memory(plan))
            with alarmed():
                run.acquire(self._world.fence.resource(fence), lambda: self._world.fence.build(fence))

    def capture(self, *, cancel: Cancel) -> Capture:
        """Capture the guest."""
        hypervisor = self._world.hypervisor
        with self._run.step("capture"):
            # A capture may make the clone while it goes on.
            return self._run.acquire(
                hypervisor.clone_resource(self._plan),
                lambda: hypervisor.capture(self._plan, fence=self._fence, cancel=cancel),
            )

    def detach(self, capture: Capture) -> Capture:
        """Put production back on its own disks, where the clone has copies of them; tell how long it was away."""
        settings = self._plan.settings
        if not settings.on_copies:
            return capture
        with self._run.step("detach"):
            self._run.release(self._overlays)
            if settings.disk_snapshot is DiskSnapshot.STORAGE:
                return replace(capture, on_overlay_seconds=0.0)
            seconds = (self._world.clock.now() - capture.resumed).total_seconds()
            self._run.progress.note(f"production was on its overlays for {seconds:.1f} s")
        return replace(capture, on_overlay_seconds=seconds)

    def give_back_memory(self) -> None:
        """Give back the place of the memory image, which the clone has read."""
        if self._plan.choice.mode.takes_memory:
            self._run.release(self._memory)
