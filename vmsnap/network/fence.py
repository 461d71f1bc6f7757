"""The fence of a clone on a Linux host: bridges, veth pairs, a namespace and nftables rules, all named from the run.

systemd-networkd and NetworkManager may take hold of links they do not know; tell them to leave ``vs*`` alone.
``prove`` notices where they did not.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from vmsnap.errors import BugError, DeadlineError, DriverError, IsolationError, PreconditionError
from vmsnap.model.ids import RunId, is_run_id
from vmsnap.model.isolation import FencePlan, FencePort, IsolationProof, ProofPoint
from vmsnap.model.journal import Resource, ResourceKind
from vmsnap.network import links, netns, readback, rules
from vmsnap.network.control import send_marked_frames
from vmsnap.network.rehearsal import rehearse
from vmsnap.network.rules import Count
from vmsnap.network.sockets import connector_into
from vmsnap.network.watch import NetworkWatch
from vmsnap.ports.guest import Connector

_NAMESPACE = re.compile(r"vmsnap-([0-9a-f]{10})\Z")
_TABLE = re.compile(r"vmsnap_([0-9a-f]{10})\Z")
_LINK = re.compile(r"vs([0-9a-f]{10})([bthn])[0-9]{1,2}\Z")
_CONTROL_TIMEOUT = timedelta(seconds=3)
# A tap first: without its bridge it would be a link of the host's own. The rules outlive all links.
_REMOVAL_ORDER = "thnb"


class NetworkFence:
    """Builds, proves and removes fences with netlink and nft. Needs root. Thread-safe.

    It remembers nothing but how the rehearsals of the fences went that it built: who proves a fence must have built it.

    ``before_step`` is called with the name of each step of ``build`` before it is taken, for logs and tests.
    """

    def __init__(self, *, before_step: Callable[[str], None] = lambda _: None) -> None:
        self._before_step = before_step
        self._rehearsed: dict[RunId, tuple[ProofPoint, ...]] = {}

    @property
    def kinds(self) -> frozenset[ResourceKind]:
        """Return the one kind that this owner releases."""
        return frozenset({ResourceKind.FENCE})

    def resource(self, plan: FencePlan) -> Resource:
        """Name the fence."""
        return Resource(kind=ResourceKind.FENCE, run=plan.run, guest=plan.guest, name=plan.namespace)

    def build(self, plan: FencePlan) -> None:
        """Make the fence: rules first, so that no link is ever without them; IPv6 off before any link is up.

        Then rehearse: a stand-in at the clone's end tries what a clone could try. Raises IsolationError where it helps.

        Not to be repeated. What a failure leaves is removed by ``release``. Raises PreconditionError for a missing
        tool, right or kernel feature and for a fence that exists already, DriverError.
        """
        _check_names(plan)
        self._step("rules", action=lambda: rules.load(plan))
        self._step("namespace", action=lambda: netns.create(plan.namespace))
        self._step("namespace settings", action=lambda: netns.inside(plan.namespace, action=_settle))
        alias = readback.alias_of(plan)
        for port in plan.ports:
            self._build_port(port, namespace=plan.namespace, alias=alias)
        self._before_step("rehearsal")
        self._rehearsed[plan.run] = rehearse(plan, timeout=_CONTROL_TIMEOUT)

    def _build_port(self, port: FencePort, *, namespace: str, alias: str) -> None:
        self._step(f"bridge {port.index}", action=lambda: links.add_bridge(port.bridge, alias=alias, mtu=port.mtu))
        self._step(
            f"veth {port.index}",
            action=lambda: links.add_veth(
                port.veth_host,
                peer=port.veth_inside,
                namespace=netns.FOLDER / namespace,
                alias=alias,
                mtu=port.mtu,
            ),
        )
        self._step(
            f"veth inside {port.index}",
            action=lambda: netns.inside(namespace, action=lambda: links.set_up(port.veth_inside, alias=alias)),
        )
        self._step(f"join {port.index}", action=lambda: links.join_bridge(port.veth_host, bridge=port.bridge))

    def _step(self, name: str, *, action: Callable[[], object]) -> None:
        self._before_step(name)
        action()

    def prove(self, plan: FencePlan) -> IsolationProof:
        """Switch IPv6 off on the clone's taps, read everything back, try it out with a marked frame, and vouch for it.

        The taps are made by the hypervisor, so their IPv6 cannot be off any earlier; the clone has not run yet. May be
        repeated before any address is given out. Raises IsolationError.
        """
        _check_names(plan)
        present = {link.name for link in links.all_links()}
        for port in plan.ports:
            if port.tap in present:
                links.switch_ipv6_off(port.tap)
            if port.bridge in present:
                links.route_nothing(port.bridge)
        points = (
            *readback.read_back(plan),
            *self._rehearsed_before(plan),
            *send_marked_frames(plan, timeout=_CONTROL_TIMEOUT),
        )
        return IsolationProof(run=plan.run, made=datetime.now(UTC), points=points)

    def _rehearsed_before(self, plan: FencePlan) -> tuple[ProofPoint, ...]:
        try:
            return self._rehearsed[plan.run]
        except KeyError:
            raise IsolationError(
                f"the fence {plan.namespace} was built by another process, and its rehearsal is not known",
                remedy="nothing ran; start a new run",
            ) from None

    def cut(self, plan: FencePlan) -> None:
        """Set every tap and every outer end of a veth pair down."""
        for port in plan.ports:
            for name in (port.tap, port.veth_host):
                links.set_down(name)

    def connector(self, plan: FencePlan) -> Connector:
        """Return a way to open connections from inside the namespace, to addresses. The namespace must exist by then."""
        return connector_into(plan.namespace)

    def watch(self, plan: FencePlan, *, proof: IsolationProof, alarm: Callable[[IsolationError], None]) -> NetworkWatch:
        """Watch a proven fence from now on. See ``vmsnap.ports.network.Fence``."""
        if proof.run != plan.run:
            raise BugError(f"the proof is of run {proof.run}, the fence of run {plan.run}")
        try:
            return NetworkWatch(plan, alarm=alarm)
        except DriverError as exc:
            raise IsolationError(
                f"the fence {plan.namespace} cannot be watched: {exc.brief}",
                details=exc.details,
                remedy="nothing ran; start a new run",
            ) from exc

    def counts(self, plan: FencePlan) -> dict[str, Count]:
        """Return the counters of the fence's rules by label. Raises ToolError where the fence is gone."""
        return dict(rules.counts(plan))

    def release(self, resource: Resource, *, deadline: timedelta) -> None:
        """Remove the fence of the resource's run, whatever is there of it, even with a process inside the namespace.

        May be repeated. Raises DriverError, DeadlineError.
        """
        run = resource.run
        if not is_run_id(run):
            raise PreconditionError(f"{run!r} is no run id", remedy="the journal is damaged; run 'vmsnap reconcile'")
        end = time.monotonic() + deadline.total_seconds()
        self._rehearsed.pop(run, None)
        ours = [link.name for link in links.all_links() if _run_of(_LINK, name=link.name) == run]
        for name in sorted(ours, key=lambda name: _REMOVAL_ORDER.index(name[12])):
            _check_deadline(end, run=run)
            links.remove(name)
        netns.remove(f"vmsnap-{run}")
        _check_deadline(end, run=run)
        rules.remove(f"vmsnap_{run}", timeout=timedelta(seconds=max(end - time.monotonic(), 1)))

    def owned(self) -> tuple[Resource, ...]:
        """Return the fences, or parts of fences, that exist. Their tags do not say which guest they were for."""
        runs = {
            *(_run_of(_LINK, name=link.name) for link in links.all_links()),
            *(_run_of(_NAMESPACE, name=name) for name in netns.names("vmsnap-")),
            *(_run_of(_TABLE, name=name) for name in rules.table_names()),
        }
        return tuple(
            Resource(kind=ResourceKind.FENCE, run=run, guest="", name=f"vmsnap-{run}")
            for run in sorted(run for run in runs if run is not None)
        )


def _settle() -> None:
    """Make the calling thread's fresh namespace quiet: no IPv6, no forwarding, loopback up."""
    for scope in ("all", "default"):
        links.switch_ipv6_off(scope)
    for name, value in readback.IPV4_SETTINGS:
        links.set_ipv4(name, value=value)
    links.set_up("lo")


def _run_of(pattern: re.Pattern[str], *, name: str) -> RunId | None:
    match = pattern.match(name)
    return RunId(match.group(1)) if match else None


def _check_names(plan: FencePlan) -> None:
    """Refuse a plan whose names ``release`` and ``owned`` would not find again, or that could mean something else."""
    named = [(_NAMESPACE, plan.namespace), (_TABLE, plan.table)]
    for port in plan.ports:
        named.extend((_LINK, name) for name in (port.bridge, port.tap, port.veth_host, port.veth_inside))
    for pattern, name in named:
        if _run_of(pattern, name=name) != plan.run:
            raise PreconditionError(
                f"{name!r} is no name for a part of the fence of run {plan.run}",
                remedy="a guest has at most 100 network interfaces",
            )


def _check_deadline(end: float, *, run: RunId) -> None:
    if time.monotonic() > end:
        raise DeadlineError(f"the fence of run {run} was not removed in time", remedy="run 'vmsnap reconcile'")
