# ruff: noqa: D102 - the ports state the contracts
"""Fakes of the fence and the addressing, for tests of workflows. They need no root and no kernel.

The fake fence is held to the same contract suite as the real one. It and ``fence_contract`` aside, only the real fence
makes proofs.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from vmsnap.errors import BugError, DeadlineError, GuestUnreachableError, IsolationError, PreconditionError, VmsnapError
from vmsnap.model.ids import RunId
from vmsnap.model.isolation import (
    BEFORE_IT_RUNS,
    Addressed,
    FencePlan,
    IsolationProof,
    ProofKind,
    ProofPoint,
    Rung,
    RungAttempt,
)
from vmsnap.model.journal import Resource, ResourceKind
from vmsnap.ports.clock import Cancel
from vmsnap.ports.guest import Connector
from vmsnap.ports.network import AddressRequest, FenceWatch, LinkControl


@dataclass
class FenceState:
    """One fence of the fake world. ``members``: what is in its bridges; ``intact``: all rules are there.

    ``passed_bytes`` came from the clone; ``watch`` is the watch that is open over it.
    """

    plan: FencePlan
    members: set[str] = field(default_factory=set)
    intact: bool = True
    passed_bytes: int = 0
    is_cut: bool = False
    watch: FakeWatch | None = None


@dataclass
class NetworkWorld:
    """The network of the fake world. It outlives the fakes, as the kernel outlives a process.

    ``needs_taps``: whether a proof wants the clone's taps in the bridges; tests without a hypervisor's hand on the
    bridges say False. ``servers``: TCP servers, (address, port) to the address and port of a real one on loopback.
    ``original_answers`` False: the original is silent once the clone runs. ``needs_watch``: a clone that runs without
    a watch over its fence is a violation. ``by_the_tap`` False: what answers by SSH does not come by the clone's tap.
    """

    fences: dict[RunId, FenceState] = field(default_factory=dict)
    needs_taps: bool = True
    servers: dict[tuple[str, int], tuple[str, int]] = field(default_factory=dict)
    original_answers: bool = True
    needs_watch: bool = False
    by_the_tap: bool = True

    def heard(self, run: RunId | None, *, size_bytes: int) -> None:
        """Count what a clone sent into its fence."""
        if run in self.fences and self.by_the_tap:
            self.fences[run].passed_bytes += size_bytes

    def breach(self, run: RunId, *, what: str) -> None:
        """Let something of a clone get out, or its fence change; a watch that is open sounds the alarm."""
        watch = self.fences[run].watch
        if watch is not None:
            watch.sound(IsolationError(what, remedy="this is a fake"))

    def look(self, run: RunId) -> None:
        """Let a watch that is open notice that the fence is not as built."""
        state = self.fences[run]
        deviation = _deviation(state.plan, state=state, needs_taps=False)
        if deviation is not None:
            self.breach(run, what=f"the fence {state.plan.namespace} changed while the clone ran: {deviation}")

    def end_of_process(self) -> None:
        """Close the watches that a process had open."""
        for state in self.fences.values():
            state.watch = None


class FakeWatch:
    """``ports.network.FenceWatch`` over the fake world."""

    def __init__(self, world: NetworkWorld, *, state: FenceState, alarm: Callable[[IsolationError], None]) -> None:
        self._world = world
        self._state = state
        self._alarm = alarm
        self._breach: IsolationError | None = None
        state.watch = self

    def sound(self, breach: IsolationError) -> None:
        """Sound the alarm, once."""
        if self._breach is None:
            self._breach = breach
            self._alarm(breach)

    def observed(self) -> tuple[ProofPoint, ...]:
        self._require_peace()
        return (ProofPoint(kind=ProofKind.PRODUCTION, name="ears on the host's links", observed="0 frames"),)

    def original(self) -> tuple[ProofPoint, ...]:
        self._require_peace()
        original = self._state.plan.original
        if original is None:
            return ()
        if not self._world.original_answers:
            raise IsolationError("the original does not answer ARP any more", remedy="this is a fake")
        return tuple(
            ProofPoint(kind=ProofKind.ORIGINAL, name=f"original {nic.mac}", observed="answers") for nic in original.nics
        )

    def passed_bytes(self) -> int:
        return self._state.passed_bytes

    def close(self) -> None:
        if self._state.watch is self:
            self._state.watch = None

    def _require_peace(self) -> None:
        if self._breach is not None:
            raise self._breach
        if self._state.watch is not self:
            raise IsolationError("the watch over the fence is not there any more", remedy="this is a fake")


class FakeFence:
    """A fence in memory. ``deviation`` makes the next proofs fail with that text."""

    def __init__(self, world: NetworkWorld | None = None, *, deviation: str | None = None) -> None:
        self.world = world or NetworkWorld()
        self.deviation = deviation

    @property
    def kinds(self) -> frozenset[ResourceKind]:
        return frozenset({ResourceKind.FENCE})

    def resource(self, plan: FencePlan) -> Resource:
        return Resource(kind=ResourceKind.FENCE, run=plan.run, guest=plan.guest, name=plan.namespace)

    def build(self, plan: FencePlan) -> None:
        if plan.run in self.world.fences:
            raise PreconditionError(f"the fence {plan.namespace} exists already", remedy="run 'vmsnap reconcile'")
        members = {port.veth_host for port in plan.ports}
        self.world.fences[plan.run] = FenceState(plan=plan, members=members)

    def prove(self, plan: FencePlan) -> IsolationProof:
        state = self.world.fences.get(plan.run)
        deviation = self.deviation or _deviation(plan, state=state, needs_taps=self.world.needs_taps)
        if deviation is not None:
            raise IsolationError(f"the fence {plan.namespace} is not as built: {deviation}", remedy="start a new run")
        points = tuple(
            ProofPoint(kind=kind, name=plan.namespace, observed="as built") for kind in sorted(BEFORE_IT_RUNS)
        )
        return IsolationProof(run=plan.run, made=datetime.now(UTC), points=points)

    def cut(self, plan: FencePlan) -> None:
        if plan.run in self.world.fences:
            self.world.fences[plan.run].is_cut = True

    def watch(self, plan: FencePlan, *, proof: IsolationProof, alarm: Callable[[IsolationError], None]) -> FenceWatch:
        if proof.run != plan.run:
            raise BugError(f"the proof is of run {proof.run}, the fence of run {plan.run}")
        state = self.world.fences.get(plan.run)
        deviation = _deviation(plan, state=state, needs_taps=False)
        if state is None or deviation is not None:
            raise IsolationError(f"the fence {plan.namespace} changed: {deviation}", remedy="start a new run")
        return FakeWatch(self.world, state=state, alarm=alarm)

    def connector(self, plan: FencePlan) -> Connector:
        def connect(host: str, port: int, timeout: timedelta) -> socket.socket:
            server = self.world.servers.get((host, port))
            if plan.run not in self.world.fences or server is None:
                raise GuestUnreachableError(f"no connection to {host} port {port}", remedy="this is a fake")
            try:
                return socket.create_connection(server, timeout.total_seconds())
            except OSError as exc:
                raise GuestUnreachableError(f"no connection to {host} port {port}: {exc}") from exc

        return connect

    def release(self, resource: Resource, *, deadline: timedelta) -> None:  # noqa: ARG002 - nothing takes time here
        self.world.fences.pop(resource.run, None)

    def owned(self) -> tuple[Resource, ...]:
        return tuple(
            Resource(kind=ResourceKind.FENCE, run=run, guest="", name=state.plan.namespace)
            for run, state in sorted(self.world.fences.items())
        )


def _deviation(plan: FencePlan, *, state: FenceState | None, needs_taps: bool) -> str | None:
    if state is None:
        return f"the namespace {plan.namespace} is missing"
    wanted = {port.veth_host for port in plan.ports}
    if needs_taps:
        wanted |= {port.tap for port in plan.ports}
    if missing := sorted(wanted - state.members):
        return f"{missing[0]} is not in its bridge"
    if foreign := sorted(state.members - {port.tap for port in plan.ports} - wanted):
        return f"{foreign[0]} is in the bridge {plan.ports[0].bridge if plan.ports else ''} and does not belong there"
    if state.is_cut:
        return f"{plan.ports[0].tap} is down"
    return None if state.intact else f"nft table {plan.table} lacks a rule"


@dataclass(frozen=True)
class RungOutcome:
    """What a rung does in the fake world: an address, or why there is none, after so many seconds."""

    address: str | None = None
    failure: VmsnapError | None = None
    seconds: float = 0.1


class FakeAddressing:
    """Addressing whose outcomes a test has written down. Rungs without one fail."""

    def __init__(self, outcomes: dict[Rung, RungOutcome] | None = None) -> None:
        self.outcomes = {Rung.LINK_FLAP: RungOutcome("198.18.7.10")} if outcomes is None else outcomes
        self.requests: list[AddressRequest] = []
        self.impossible = False

    def require_possible(self, *, to_connect: bool) -> None:
        del to_connect
        if self.impossible:
            raise PreconditionError("no clone can be given an address here", remedy="this is a fake")

    def move(self, request: AddressRequest, *, links: LinkControl, cancel: Cancel) -> Addressed:
        self.requests.append(request)
        attempts: list[RungAttempt] = []
        for rung in request.ladder:
            cancel.check()
            if rung is Rung.NONE:
                return _addressed(rung, address=None, attempts=attempts, seconds=0.0)
            request.note(f"rung {rung} began")
            outcome = self.outcomes.get(rung, RungOutcome(failure=DeadlineError(f"{rung} does not work here")))
            if rung is Rung.HOT_PLUG:
                outcome = _replugged(request, links=links, outcome=outcome)
            if rung is Rung.LINK_FLAP:
                for up in (False, True):
                    for port in request.fence.ports:
                        links.set_link(mac=port.mac, up=up)
            request.note(f"rung {rung} ended")
            if outcome.failure is None:
                return _addressed(rung, address=outcome.address, attempts=attempts, seconds=outcome.seconds)
            if not isinstance(outcome.failure, DeadlineError):
                raise outcome.failure
            attempts.append(RungAttempt(rung=rung, seconds=outcome.seconds, failure=outcome.failure.brief))
        raise DeadlineError("the clone could not be reached at any address", remedy="this is a fake")

    def close(self) -> None:
        """Let go of nothing."""


def _replugged(request: AddressRequest, *, links: LinkControl, outcome: RungOutcome) -> RungOutcome:
    """Plug every NIC anew; return what comes of the rung."""
    try:
        for port in request.fence.ports:
            links.replug(mac=port.mac, deadline=timedelta(seconds=1))
    except DeadlineError as exc:
        return RungOutcome(failure=exc)
    return outcome


def _addressed(rung: Rung, *, address: str | None, attempts: list[RungAttempt], seconds: float) -> Addressed:
    attempts = [*attempts, RungAttempt(rung=rung, seconds=seconds)]
    return Addressed(
        rung=rung, address=address, seconds=sum(attempt.seconds for attempt in attempts), attempts=tuple(attempts)
    )
