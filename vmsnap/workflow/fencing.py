"""Proving a clone's fence, and telling a clone that ended meanwhile from a breach."""

from __future__ import annotations

from datetime import timedelta

from vmsnap.errors import GuestNotFoundError, IsolationError, NotCleanError, VmsnapError
from vmsnap.model.capture import Clone
from vmsnap.model.isolation import FencePlan, IsolationProof
from vmsnap.workflow.world import World

# A clone that is being ended has lost its taps before its hypervisor forgets it.
_ENDING_SECONDS = 2.0
_POLL = timedelta(milliseconds=50)


def prove_fence(world: World, *, clone: Clone, fence: FencePlan) -> IsolationProof:
    """Prove the fence of a paused clone.

    Raises IsolationError; NotCleanError where the clone has ended: it took its taps with it, and that is no breach.
    """
    try:
        return world.fence.prove(fence)
    except IsolationError as error:
        if _has_ended(world, clone):
            raise NotCleanError(
                "the clone ended before its fence was proven",
                details=error.brief,
                remedy="see the hypervisor's log of the clone, and the host's for the OOM killer",
            ) from error
        raise


def _has_ended(world: World, clone: Clone) -> bool:
    until = world.clock.monotonic() + _ENDING_SECONDS
    while True:
        try:
            world.hypervisor.clone_state(clone)
        except GuestNotFoundError:
            return True
        except VmsnapError:
            return False
        if world.clock.monotonic() > until:
            return False
        world.clock.sleep(_POLL)
