"""What the stages of a backup hand to one another."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from vmsnap.model.capture import Capture, CapturePlan, Clone, ModeChoice
from vmsnap.model.drain import CleanShutdown, DrainReport
from vmsnap.model.isolation import Addressed, FencePlan, IsolationEvidence, IsolationProof, ProofPoint
from vmsnap.model.manifest import MachineRecord
from vmsnap.ports.network import FenceWatch
from vmsnap.workflow import identity, reach
from vmsnap.workflow.guard import IsolationGuard
from vmsnap.workflow.proof import StoppedInstance
from vmsnap.workflow.world import World


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What the preflight found: the guest, the way into its clone, and the mode to capture it in."""

    source: identity.Source
    login: reach.Login
    choice: ModeChoice


@dataclass(frozen=True, kw_only=True)
class Quiesced:
    """What happened between the clone's resume and its power-off. ``last`` is what the fence's watch saw at its end."""

    addressed: Addressed
    evidence: IsolationEvidence
    last: tuple[ProofPoint, ...]
    drains: tuple[DrainReport, ...]
    stopped: tuple[StoppedInstance, ...]
    shut_down_by: str


@dataclass(frozen=True, kw_only=True)
class Running:
    """A clone that may run, and what keeps it in. Commands in the clone by ``world`` end when ``guard`` ends it.

    ``booted``: it did not inherit the original's memory.
    """

    world: World
    clone: Clone
    fence: FencePlan
    proof: IsolationProof
    watch: FenceWatch
    guard: IsolationGuard
    booted: bool


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a run learned, for its manifest."""

    plan: CapturePlan
    started: datetime
    capture: Capture
    proof: IsolationProof
    quiesced: Quiesced
    clean: CleanShutdown
    machine: MachineRecord

    @property
    def points(self) -> tuple[ProofPoint, ...]:
        """Return all points of the proof of isolation; of what the watch saw, the last."""
        quiesced = self.quiesced
        seen_last = {point.name for point in quiesced.last}
        between = tuple(point for point in quiesced.evidence.points if point.name not in seen_last)
        return (*self.proof.points, *between, *quiesced.last)
