"""The fence of a clone on a Hyper-V host: a private switch, which has no uplink and on which the host itself is not.

What a Linux host's fence is tried out with - frames, probes, ears on production - cannot be sent or heard from here. What
is proven is what Hyper-V itself says: what the switch is, who is on it, and on what else the clone's adapters are. The
clone is reached by PowerShell Direct, which is no network; there is nobody on the switch but the clone, and for a while a
responder (``vmsnap.hypervisors.hyperv.responder``) where the policy asks for an address.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from socket import socket

from vmsnap.errors import (
    BugError,
    DeadlineError,
    GuestUnreachableError,
    IsolationError,
    PreconditionError,
    UnknownOutcomeError,
    VmsnapError,
)
from vmsnap.hypervisors.hyperv.failures import RemoteError
from vmsnap.hypervisors.hyperv.host import Host
from vmsnap.hypervisors.hyperv.responder import Responder, unplug_responders
from vmsnap.hypervisors.hyperv.rows import Machine, Plug, Switch
from vmsnap.hypervisors.hyperv.tags import Tag, TagKind, read_tag
from vmsnap.model.ids import RunId, is_run_id
from vmsnap.model.isolation import FencePlan, IsolationProof, Original, ProofKind, ProofPoint
from vmsnap.model.journal import Resource, ResourceKind
from vmsnap.ports.guest import Connector

_LOG = logging.getLogger(__name__)
_PRIVATE = "Private"
_INTERVAL_SECONDS = 0.4
# A host that does not answer for so long cannot be watched, and what cannot be watched does not run.
_BLIND_SECONDS = 60.0
_BETWEEN_REMOVALS_SECONDS = 0.5
_NOTHING_RAN = "nothing ran; start a new run"
_REMEDY = "the clone was cut off and ended; look who changed switches or adapters on the Hyper-V host"


def fence_tag(run: RunId, *, guest: str = "") -> Tag:
    """Return the tag of a run's switch."""
    return Tag(kind=TagKind.FENCE, run=run, guest=guest)


def switches_of(host: Host, *, run: RunId) -> tuple[Switch, ...]:
    """Return the switches that bear a run's tag."""
    return tuple(switch for switch in host.switches() if _run_of(switch) == run)


def find_switch(host: Host, *, run: RunId) -> Switch:
    """Return the switch of a run's fence. Raises IsolationError where there is not just one."""
    found = switches_of(host, run=run)
    if len(found) != 1:
        raise IsolationError(
            f"the fence vmsnap-{run} has {len(found)} switches instead of one",
            details=", ".join(f"{switch.name} {switch.id}" for switch in found),
            remedy=_NOTHING_RAN,
        )
    return found[0]


def _run_of(switch: Switch) -> RunId | None:
    tag = read_tag(switch.notes)
    return tag.run if tag is not None and tag.kind is TagKind.FENCE else None


class HyperVFence:
    """Builds, proves, watches and removes private switches. Keeps nothing: whoever knows the plan can prove the fence.

    ``responder`` is the one VM that may be on a switch beside its clone, while it is admitted there.
    """

    def __init__(self, host: Host, *, responder: Responder | None = None) -> None:
        self._host = host
        self._eyes = _Eyes(host, responder=responder)

    @property
    def kinds(self) -> frozenset[ResourceKind]:
        """Return the one kind that this owner releases."""
        return frozenset({ResourceKind.FENCE})

    def resource(self, plan: FencePlan) -> Resource:
        """Name the fence."""
        return Resource(kind=ResourceKind.FENCE, run=plan.run, guest=plan.guest, name=plan.namespace)

    def build(self, plan: FencePlan) -> None:
        """Make the switch. Raises PreconditionError where there is one, IsolationError where it is not as ordered."""
        try:
            self._host.make_switch(plan.namespace, tag=fence_tag(plan.run, guest=plan.guest))
        except UnknownOutcomeError:
            _LOG.info("no answer to making switch %s; it is looked for", plan.namespace)
        except RemoteError as error:
            if error.record.error_id == "VmsnapSwitchExists":
                raise PreconditionError(
                    f"there is already a switch {plan.namespace} on the Hyper-V host",
                    remedy="run 'vmsnap reconcile'; where it is nobody's, remove it there (Remove-VMSwitch)",
                ) from error
            raise
        _require_private(find_switch(self._host, run=plan.run))

    def prove(self, plan: FencePlan) -> IsolationProof:
        """Read switches and adapters back, and vouch for them. May be repeated. Raises IsolationError."""
        return IsolationProof(run=plan.run, made=datetime.now(UTC), points=self._eyes.look(plan, complete=True))

    def read_back(self, plan: FencePlan) -> None:
        """Look at the fence of a running clone, some of whose adapters may be unplugged. Raises IsolationError."""
        self._eyes.look(plan, complete=False)

    def watch(self, plan: FencePlan, *, proof: IsolationProof, alarm: Callable[[IsolationError], None]) -> SwitchWatch:
        """Watch a proven fence from now on. See ``vmsnap.ports.network.Fence``."""
        if proof.run != plan.run:
            raise BugError(f"the proof is of run {proof.run}, the fence of run {plan.run}")
        return SwitchWatch(self._host, plan, eyes=self._eyes, alarm=alarm)

    def cut(self, plan: FencePlan) -> None:
        """Disconnect every adapter of the run's VMs. May be repeated."""
        self._cut(plan.run)

    def _cut(self, run: RunId) -> None:
        for machine in self._host.machines_of(run):
            if machine.tag is not None:
                self._host.disconnect(machine.id, tag=machine.tag)

    def connector(self, plan: FencePlan) -> Connector:
        """Return a connector that reaches nobody: this host is not on the switch, and no host is."""

        def connect(host: str, port: int, timeout: timedelta) -> socket:
            del timeout
            raise GuestUnreachableError(
                f"{host} port {port} cannot be reached: the private switch {plan.namespace} has no way in",
                remedy="a VM in a fence on Hyper-V is reached by PowerShell Direct; for others, provision it with --network",
            )

        return connect

    def release(self, resource: Resource, *, deadline: timedelta) -> None:
        """Remove the switch of the resource's run; VMs of the run that are still on it are disconnected first.

        May be repeated. Raises DriverError, DeadlineError.
        """
        run = resource.run
        if not is_run_id(run):
            raise PreconditionError(f"{run!r} is no run id", remedy="the journal is damaged; run 'vmsnap reconcile'")
        end = time.monotonic() + deadline.total_seconds()
        while found := switches_of(self._host, run=run):
            self._cut(run)
            for switch in found:
                unplug_responders(self._host, switch=switch)
                try:
                    self._host.remove_switch(switch, tag=fence_tag(run))
                except UnknownOutcomeError:
                    time.sleep(_BETWEEN_REMOVALS_SECONDS)
            if time.monotonic() > end:
                raise DeadlineError(f"the switch of run {run} was not removed in time", remedy="run 'vmsnap reconcile'")

    def owned(self) -> tuple[Resource, ...]:
        """Return the switches that bear a tag."""
        found = []
        for switch in self._host.switches():
            tag = read_tag(switch.notes)
            if tag is not None and tag.kind is TagKind.FENCE:
                name = f"vmsnap-{tag.run}"
                found.append(Resource(kind=ResourceKind.FENCE, run=tag.run, guest=tag.guest, name=name))
        return tuple(found)


def _require_private(switch: Switch) -> None:
    wrong = []
    if switch.kind != _PRIVATE:
        wrong.append(f"it is {switch.kind}, not {_PRIVATE}")
    if switch.uplinks:
        wrong.append(f"it has the uplink {switch.uplinks}")
    if switch.with_host:
        wrong.append("the Hyper-V host is on it")
    if wrong:
        raise IsolationError(
            f"the switch {switch.name} is no fence: {wrong[0]}", details="\n".join(wrong), remedy=_NOTHING_RAN
        )


class _Eyes:
    """Reads switches and adapters back."""

    def __init__(self, host: Host, *, responder: Responder | None) -> None:
        self._host = host
        self._responder = responder

    def look(self, plan: FencePlan, *, complete: bool) -> tuple[ProofPoint, ...]:
        """Read everything back. Raises IsolationError.

        ``complete``: the clone is there, on all its ports. Else it may be gone, or unplugged: nobody is reached from there.
        The machines are listed before the adapters: one that appears between the two counts as a stranger.
        """
        # The responder comes and goes while others look: who was admitted before, or is afterwards, may have been there.
        admitted = {self._admitted(plan.run)}
        machines = {machine.id.lower(): machine for machine in self._host.machines_of(plan.run)}
        switch = find_switch(self._host, run=plan.run)
        _require_private(switch)
        plugs = self._host.plugs()
        admitted.add(self._admitted(plan.run))
        own = [plug for plug in plugs if not plug.of_host and plug.machine_id.lower() in machines]
        admissible = {
            machine_id
            for machine_id in admitted
            if machine_id is not None and sum(plug.machine_id.lower() == machine_id for plug in plugs) == 1
        }
        members = [
            plug
            for plug in plugs
            if plug.switch_id.lower() == switch.id.lower()
            and (plug.of_host or plug.machine_id.lower() not in admissible)
        ]
        plugged = own if complete else [plug for plug in own if plug.switch]
        _require_members(switch, own=plugged, members=members, machines=machines)
        if complete and len(own) != len(plan.ports):
            missing = ", ".join(f"{port.mac}" for port in plan.ports) or "none"
            raise IsolationError(
                f"the VM of {switch.name} has {len(own)} adapters on it, the fence has {len(plan.ports)} ports: {missing}",
                remedy=_NOTHING_RAN,
            )
        names = ", ".join(f"{plug.mac} of {plug.machine}" for plug in own) or "nobody"
        return (
            _point(f"switch {switch.name}", observed=f"{switch.kind}, no uplink, the host not on it; id {switch.id}"),
            _point(f"members of {switch.name}", observed=names),
            *(_point(f"adapter {plug.mac}", observed=f"on {plug.switch} ({plug.switch_id})") for plug in own),
        )

    @property
    def exception(self) -> str:
        """Return who else was allowed there, for reports."""
        return "" if self._responder is None else " but the responder while it was admitted"

    def _admitted(self, run: RunId) -> str | None:
        return None if self._responder is None else self._responder.admitted(run)


def _require_members(switch: Switch, *, own: list[Plug], members: list[Plug], machines: dict[str, Machine]) -> None:
    strangers = [plug for plug in members if plug.of_host or plug.machine_id.lower() not in machines]
    if strangers:
        who = ", ".join("the host" if plug.of_host else f"{plug.mac} of {plug.machine}" for plug in strangers)
        raise IsolationError(f"somebody else is on the switch {switch.name}: {who}", remedy=_REMEDY)
    for plug in own:
        if plug.switch_id.lower() != switch.id.lower():
            where = f"on switch {plug.switch}" if plug.switch else "on no switch"
            raise IsolationError(
                f"adapter {plug.mac} of {plug.machine} is {where} and not on {switch.name}", remedy=_REMEDY
            )


def _point(name: str, *, observed: str) -> ProofPoint:
    return ProofPoint(kind=ProofKind.TOPOLOGY, name=name, observed=observed)


class SwitchWatch:
    """Looks again and again, in a thread of its own, at the fence's switch and at who is on it. Changes nothing."""

    def __init__(self, host: Host, plan: FencePlan, *, eyes: _Eyes, alarm: Callable[[IsolationError], None]) -> None:
        self._host = host
        self._eyes = eyes
        self._plan = plan
        self._alarm = alarm
        self._breach: IsolationError | None = None
        self._looks = 0
        self._began = self._seen = time.monotonic()
        self._look_once()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="vmsnap-switch-watch", daemon=True)
        self._thread.start()

    def observed(self) -> tuple[ProofPoint, ...]:
        """Return what was seen until now. Raises IsolationError."""
        self._require_whole()
        return (
            ProofPoint(
                kind=ProofKind.PRODUCTION,
                name=f"adapters of {self._plan.namespace}",
                observed=f"on the private switch or on none, nobody else there{self._eyes.exception}, at {self._looks} "
                f"looks within {self._seen - self._began:.0f} s, as Hyper-V says; frames are not listened to",
            ),
        )

    def original(self) -> tuple[ProofPoint, ...]:
        """Return how the original's adapters are connected. Raises IsolationError where they are not as before."""
        self._require_whole()
        original = self._plan.original
        return () if original is None else _original_points(self._host, self._plan, original)

    def _require_whole(self) -> None:
        if self._breach is not None:
            raise self._breach

    def passed_bytes(self) -> int:
        """Return 0: nothing of ours is on the switch, so nothing can come to our side of it."""
        return 0

    def close(self) -> None:
        """End the watch. May be repeated."""
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(_INTERVAL_SECONDS):
            try:
                self._look_once()
            except IsolationError as breach:
                self._sound(breach)
                return
            except VmsnapError as error:
                if time.monotonic() - self._seen > _BLIND_SECONDS:
                    self._sound(
                        IsolationError(
                            f"the fence {self._plan.namespace} could not be looked at for {_BLIND_SECONDS:.0f} s",
                            details=error.brief,
                            remedy="is the Hyper-V host still reachable? What cannot be watched does not go on",
                        )
                    )
                    return

    def _look_once(self) -> None:
        self._eyes.look(self._plan, complete=False)
        self._looks += 1
        self._seen = time.monotonic()

    def _sound(self, breach: IsolationError) -> None:
        if self._stop.is_set():
            return
        self._breach = breach
        self._alarm(breach)


def _original_points(host: Host, plan: FencePlan, original: Original) -> tuple[ProofPoint, ...]:
    own = {machine.id.lower() for machine in host.machines_of(plan.run)}
    plugs = [plug for plug in host.plugs() if not plug.of_host and plug.machine_id.lower() not in own]
    points = []
    for nic in original.nics:
        before = "" if nic.attached_to == "none" else nic.attached_to
        now = [plug.switch for plug in plugs if plug.mac == nic.mac.lower() and plug.machine == plan.guest]
        if before not in now:
            raise IsolationError(
                f"the original's adapter {nic.mac} is not on switch {nic.attached_to} any more",
                details=f"it is on {', '.join(now) or 'none'}",
                remedy="nothing was stored; look at the original's adapters on the Hyper-V host",
            )
        points.append(
            ProofPoint(kind=ProofKind.ORIGINAL, name=f"adapter {nic.mac}", observed=f"on {nic.attached_to}, as before")
        )
    return tuple(points)
