"""Reading a fence back: every thing it is made of, as the kernel has it now, compared with the plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vmsnap.errors import DriverError, IsolationError
from vmsnap.model.isolation import FencePlan, FencePort, ProofKind, ProofPoint
from vmsnap.network import hooks, links, netns, rules
from vmsnap.network.links import Link
from vmsnap.network.vlans import vlan_link_name

IPV4_SETTINGS = (
    ("ip_forward", 0),
    *(
        (f"conf/{scope}/{name}", 0)
        for scope in ("all", "default")
        for name in ("rp_filter", "arp_ignore", "arp_announce", "arp_filter", "forwarding")
    ),
)
"""What holds inside a namespace. A new one may inherit other values from the host."""


def alias_of(plan: FencePlan) -> str:
    """Return the tag that every link of the fence bears as its alias."""
    return f"vmsnap:{plan.run}"


def read_back(plan: FencePlan) -> tuple[ProofPoint, ...]:
    """Return what was seen, one point a thing. Raises IsolationError naming everything that is not as built."""
    try:
        host = _HostSide(plan)
        deviations = [*host.deviations(), *host.hooks(), *_inside_deviations(plan, host=host), *rules.deviations(plan)]
    except DriverError as exc:
        raise IsolationError(
            f"the fence {plan.namespace} cannot be read back: {exc.brief}",
            details=exc.details,
            remedy="nothing ran; start a new run",
        ) from exc
    if deviations:
        raise IsolationError(
            f"the fence {plan.namespace} is not as built: {deviations[0]}",
            details="\n".join(deviations),
            remedy="find out who changes these links or rules (systemd-networkd, NetworkManager, a firewall manager) "
            "and tell it to leave alone what is named vs* and vmsnap*",
        )
    rule_count = len(rules.rules_of(plan))
    return (
        *host.points(),
        _point(f"namespace {plan.namespace}", observed="only lo and our veths; no route out, no forwarding"),
        _point(f"nft tables {plan.table}", observed=f"{rule_count} rules in bridge, inet and arp, as built"),
    )


def changes(plan: FencePlan) -> tuple[str, ...]:
    """Return what differs from the plan while the clone runs. Raises DriverError.

    A tap that is gone is no change: the hypervisor unplugs NICs, and a clone that is off has none. Addresses, routes and
    settings inside the namespace are the ladder's; a foreign link in it would be a way out. Links that differ are told of
    at once, without the rules: nft may be slow on a host with many.
    """
    host = _HostSide(plan, while_running=True)
    return (*host.deviations(), *_foreign_links_inside(plan)) or (*rules.deviations(plan), *host.hooks())


def _point(name: str, *, observed: str) -> ProofPoint:
    return ProofPoint(name=name, observed=observed, kind=ProofKind.TOPOLOGY)


class _HostSide:
    """The host's links, read once."""

    def __init__(self, plan: FencePlan, *, while_running: bool = False) -> None:
        self._plan = plan
        self._while_running = while_running
        self._links = links.all_links()
        self._addresses = links.addresses()

    def find(self, name: str) -> Link | None:
        return next((link for link in self._links if link.name == name), None)

    def deviations(self) -> Iterator[str]:
        for port in self._plan.ports:
            yield from self._port_deviations(port)

    def hooks(self) -> tuple[str, ...]:
        """Return what takes frames off the fence's links before its rules see them."""
        names = {name for port in self._plan.ports for name in (port.bridge, port.tap, port.veth_host)}
        return tuple(hooks.on_links({link.index: link.name for link in self._links if link.name in names}))

    def points(self) -> Iterator[ProofPoint]:
        for port in self._plan.ports:
            yield _point(
                f"bridge {port.bridge}",
                observed=f"members {port.tap}, {port.veth_host}; no address, no IPv6, no spanning tree, no routing, no hooks",
            )

    def _port_deviations(self, port: FencePort) -> Iterator[str]:
        bridge = self.find(port.bridge)
        if bridge is None or bridge.kind != "bridge":
            yield f"the bridge {port.bridge} is missing"
            return
        members = {link.name for link in self._links if link.master == bridge.index}
        wanted = {port.veth_host} if self._is_gone(port.tap) else {port.tap, port.veth_host}
        for name in sorted(wanted - members):
            yield f"{name} is not in the bridge {port.bridge}"
        for name in sorted(members - {port.tap, port.veth_host}):
            yield f"{name} is in the bridge {port.bridge} and does not belong there"
        for name, value in bridge.settings:
            if value != links.BRIDGE_SETTINGS[name]:
                yield f"{port.bridge}: {name} is {value}, not {links.BRIDGE_SETTINGS[name]}"
        for name, value in self._routing_settings():
            seen = links.get_ipv4(f"conf/{port.bridge}/{name}")
            if seen != value:
                yield f"{port.bridge}: {name} is {seen}, not {value}"
        if port.mtu is not None and bridge.mtu != port.mtu:
            yield f"{port.bridge}: the MTU is {bridge.mtu}, not {port.mtu}"
        for name in (port.bridge, port.tap, port.veth_host):
            if not self._is_gone(name) or name != port.tap:
                yield from self._link_deviations(name, is_tap=name == port.tap)

    def _routing_settings(self) -> Iterable[tuple[str, int]]:
        """Return what shall hold; not while the clone runs, when the watch itself sets it again where it changed."""
        return () if self._while_running else links.BRIDGE_IPV4_SETTINGS.items()

    def _is_gone(self, tap: str) -> bool:
        return self._while_running and self.find(tap) is None

    def _link_deviations(self, name: str, *, is_tap: bool) -> Iterator[str]:
        link = self.find(name)
        if link is None:
            yield f"the link {name} is missing"
            return
        if not is_tap and link.alias != alias_of(self._plan):
            yield f"{name} does not bear the tag {alias_of(self._plan)} but {link.alias!r}"
        if link.ipv6_off is False:
            yield f"{name} has IPv6 switched on"
        for address in self._addresses.get(link.index, ()):
            yield f"{name} has the address {address}"
        for other in self._links:
            if other.lower == link.index and not other.lower_elsewhere and other.index != link.index:
                yield f"{other.name} sits on {name}"


def _foreign_links_inside(plan: FencePlan) -> Iterator[str]:
    """Yield the links of the namespace that are not ours, nor sit on ours without leaving it."""
    if not netns.is_another(plan.namespace):
        yield f"the namespace {plan.namespace} is missing or is the host's own"
        return
    found = netns.inside(plan.namespace, action=links.all_links)
    ours = {"lo", *(name for port in plan.ports for name in (port.veth_inside, vlan_link_name(port)))}
    indexes = {link.index for link in found if link.name in ours}
    for link in found:
        sits_on_ours = link.lower in indexes and not link.lower_elsewhere
        if link.name not in ours and not sits_on_ours:
            yield f"the namespace {plan.namespace} has a foreign link, {link.name}"


def _inside_deviations(plan: FencePlan, *, host: _HostSide) -> Iterator[str]:
    if not netns.is_another(plan.namespace):
        yield f"the namespace {plan.namespace} is missing or is the host's own"
        return
    found, addresses, routes, settings = netns.inside(
        plan.namespace,
        action=lambda: (
            links.all_links(),
            links.addresses(),
            links.routes(),
            {name: links.get_ipv4(name) for name, _ in IPV4_SETTINGS},
        ),
    )
    wanted = {"lo"} | {port.veth_inside for port in plan.ports}
    for name in sorted(wanted ^ {link.name for link in found}):
        yield f"the namespace {plan.namespace} {'lacks' if name in wanted else 'has a foreign link,'} {name}"
    yield from (f"the namespace {plan.namespace} has the route {route}" for route in routes)
    for name, value in IPV4_SETTINGS:
        if settings[name] != value:
            yield f"the namespace {plan.namespace} has {name} = {settings[name]}, not {value}"
    for link in found:
        if link.ipv6_off is False:
            yield f"{link.name} in the namespace {plan.namespace} has IPv6 switched on"
        if link.name != "lo":
            yield from (
                f"{link.name} in the namespace {plan.namespace} has the address {address}"
                for address in addresses.get(link.index, ())
            )
    by_name = {link.name: link for link in found}
    for port in plan.ports:
        near, far = host.find(port.veth_host), by_name.get(port.veth_inside)
        if near is None or far is None:
            continue  # said above
        paired = near.kind == far.kind == "veth" and near.lower == far.index and far.lower == near.index
        if not (paired and near.lower_elsewhere and far.lower_elsewhere):
            yield f"{port.veth_host} does not end in {port.veth_inside} of the namespace {plan.namespace}"
