"""Service addresses: a fenced VM's ports at an address of the host's, in front of the fence and not through it.

An address lives in a small namespace of its own, which only the host reaches (a veth pair, a /31 of the service network
(RFC 3021), no other route). There the ports are free: a server of the host that listens on all addresses, as its SSH
server does, would otherwise keep port 22, and answer in the VM's place. A relay listens in there and opens its
connections inside the fence; nothing but that process joins the two namespaces, and no packet passes between them.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from ipaddress import IPv4Address, IPv4Network

from vmsnap.errors import DeadlineError, DriverError, PreconditionError, SafetyError
from vmsnap.model.ids import RunId, is_run_id
from vmsnap.model.journal import Resource, ResourceKind
from vmsnap.network import links, netns
from vmsnap.network.readback import IPV4_SETTINGS
from vmsnap.network.relay import TcpRelay
from vmsnap.ports.service import Opener

DEFAULT_NETWORK = IPv4Network("198.18.0.0/15")
"""Addresses for benchmarks (RFC 2544), routed nowhere."""

_PAIR_BITS = 31
_LINK = re.compile(r"vs([0-9a-f]{10})s0\Z")
_NAMESPACE = re.compile(r"vmsnap-service-([0-9a-f]{10})\Z")


class HostServices:
    """Makes service addresses with netlink. Needs root. Keeps no state."""

    def __init__(self, *, network: IPv4Network = DEFAULT_NETWORK) -> None:
        """``network``: where addresses are taken from, in pairs: the host's end, and the service."""
        self._network = network

    @property
    def kinds(self) -> frozenset[ResourceKind]:
        """Return the one kind that this owner releases."""
        return frozenset({ResourceKind.SERVICE})

    def resource(self, run: RunId, *, guest: str) -> Resource:
        """Choose the address; see ``vmsnap.ports.service.Services``."""
        mine = next((link.index for link in links.all_links() if link.name == _link(run)), None)
        used = _used(except_link=mine)
        pairs = self._network.num_addresses // 2
        start = int(run, 16) % pairs
        pair = next((pair for pair in _pairs(self._network, start=start) if not _overlaps(pair, used)), None)
        if pair is None:
            raise PreconditionError(
                f"no pair of addresses of the service network {self._network} is free",
                details=f"in use: {', '.join(str(net) for net in used if net.overlaps(self._network))}",
                remedy="name another network in vmsnap.toml: [isolation] service_network",
            )
        return Resource(
            kind=ResourceKind.SERVICE, run=run, guest=guest, name=_namespace(run), detail=str(pair.network_address + 1)
        )

    def address(self, resource: Resource) -> IPv4Address:
        """Return the address that the resource names. Raises DriverError for a journal entry that names none."""
        try:
            return IPv4Address(resource.detail)
        except ValueError as error:
            raise DriverError(
                f"{resource.detail!r} is no service address", remedy="the journal is damaged; run 'vmsnap reconcile'"
            ) from error

    def make(self, resource: Resource) -> None:
        """Make namespace, veth pair and addresses; content with what is there. Raises PreconditionError, DriverError."""
        run, service = resource.run, self.address(resource)
        name = _link(run)
        if links.find(name) is None or resource.name not in netns.names(resource.name):
            self._remove(run)
            netns.create(resource.name)
            netns.inside(resource.name, action=_settle)
            links.add_veth(
                name, peer=_peer(run), namespace=netns.FOLDER / resource.name, alias=f"vmsnap:{run}", mtu=None
            )
        _stop_routing(name)
        netns.inside(resource.name, action=lambda: _give(_peer(run), address=service))
        _give(name, address=service - 1)

    def listen(self, resource: Resource, *, port: int, opener: Opener) -> TcpRelay:
        """Relay the port of the service address. Raises PreconditionError."""
        address = str(self.address(resource))
        try:
            listener = netns.inside(resource.name, action=lambda: _listener(address, port=port))
        except DriverError as error:
            raise PreconditionError(error.brief, details=error.details, remedy="the environment is gone") from error
        return TcpRelay(listener, opener=lambda: _unrouted(_link(resource.run), opener=opener))

    def forward(self, *, address: str, port: int, opener: Opener) -> TcpRelay:
        """Relay a port of the host. Raises PreconditionError."""
        return TcpRelay(_listener(address, port=port), opener=opener)

    def release(self, resource: Resource, *, deadline: timedelta) -> None:
        """Remove the address, whoever still listens there. May be repeated. Raises DriverError, DeadlineError."""
        if not is_run_id(resource.run):
            raise PreconditionError(f"{resource.run!r} is no run id", remedy="the journal is damaged")
        began = time.monotonic()
        self._remove(resource.run)
        if time.monotonic() - began > deadline.total_seconds():
            raise DeadlineError(f"{resource.name} was not removed in time", remedy="run 'vmsnap reconcile'")

    def owned(self) -> tuple[Resource, ...]:
        """Return the service addresses, or parts of them, that exist."""
        matches = [
            *(_LINK.match(link.name) for link in links.all_links()),
            *(_NAMESPACE.match(name) for name in netns.names("vmsnap-service-")),
        ]
        runs = sorted({RunId(match.group(1)) for match in matches if match is not None})
        return tuple(Resource(kind=ResourceKind.SERVICE, run=run, guest="", name=_namespace(run)) for run in runs)

    @staticmethod
    def _remove(run: RunId) -> None:
        links.remove(_link(run))
        netns.remove(_namespace(run))


def _stop_routing(link: str) -> bool:
    """Let the host route nothing that comes by the link, nor to it; return whether it did."""
    setting = f"conf/{link}/forwarding"
    if links.get_ipv4(setting) == 0:
        return False
    links.set_ipv4(setting, value=0)
    return True


def _unrouted(link: str, *, opener: Opener) -> socket.socket:
    """Open a connection, unless the host has begun to route to the service address: then it may not be the host's own.

    A write of the host's ``ip_forward``, as network managers do, switches routing on for every link. It is off again when
    this raises SafetyError.
    """
    if _stop_routing(link):
        raise SafetyError(
            f"the host had begun to route to the service address on {link}, and does not any more",
            remedy="connect again, from this host",
        )
    return opener()


def _link(run: RunId) -> str:
    return f"vs{run}s0"


def _peer(run: RunId) -> str:
    return f"vs{run}p0"


def _namespace(run: RunId) -> str:
    return f"vmsnap-service-{run}"


def _pairs(network: IPv4Network, *, start: int) -> Iterator[IPv4Network]:
    """Return the pairs of a network, from one of them on and around."""
    first = int(network.network_address)
    count = network.num_addresses // 2
    return (IPv4Network((first + 2 * ((start + index) % count), _PAIR_BITS)) for index in range(count))


def _used(*, except_link: int | None) -> tuple[IPv4Network, ...]:
    """Return every IPv4 network that the host has a route or an address in, the default route apart."""
    own = links.addresses()
    found = [IPv4Network(route) for route in links.routes() if route != "default" and ":" not in route]
    mine = [IPv4Network(text, strict=False) for text in own.get(except_link or 0, ()) if ":" not in text]
    for index, texts in own.items():
        if index != except_link:
            found.extend(IPv4Network(text, strict=False) for text in texts if ":" not in text)
    return tuple(network for network in found if network not in mine)


def _overlaps(pair: IPv4Network, used: tuple[IPv4Network, ...]) -> bool:
    return any(pair.overlaps(network) for network in used)


def _settle() -> None:
    """Make the calling thread's fresh namespace quiet: no IPv6, no forwarding, loopback up."""
    for scope in ("all", "default"):
        links.switch_ipv6_off(scope)
    for name, value in IPV4_SETTINGS:
        links.set_ipv4(name, value=value)
    links.set_up("lo")


def _give(interface: str, *, address: IPv4Address) -> None:
    links.add_address(interface, address=str(address), prefix=_PAIR_BITS)
    links.set_up(interface)


def _listener(address: str, *, port: int) -> socket.socket:
    try:
        return socket.create_server((address, port), backlog=128)
    except (OSError, OverflowError) as error:
        raise PreconditionError(
            f"cannot listen at {address} port {port}: {error}",
            remedy="is the address one of this host's, and the port free? Port 0 takes any that is",
        ) from error
