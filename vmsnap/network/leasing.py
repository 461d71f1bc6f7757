"""The DHCP service of one fence: a responder on each NIC's veth, from before the first rung until the fence is gone.

Our side gets its address on a veth only once the clone has taken a lease there: until then the fence can be proven
anew, and packet sockets need no address.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import IPv4Network

from vmsnap.dhcp.arp import ArpPolicy
from vmsnap.dhcp.pool import DEFAULT_POOL, choose_networks
from vmsnap.dhcp.responder import Lease, Responder, ResponderConfig
from vmsnap.model.isolation import Exchange, FencePort
from vmsnap.network import links, netns, sockets
from vmsnap.network.frames import Tag, parse_mac
from vmsnap.network.responder import FenceResponder
from vmsnap.network.vlans import VlanLink
from vmsnap.ports.network import AddressRequest

_SERVER_HOST = 1
_FIRST_HOST = 10
_LAST_HOST = 250
_PREFIX = 24
_PROBE_TIMEOUT = timedelta(seconds=1)


@dataclass(frozen=True, kw_only=True)
class Side:
    """One NIC of the clone: the network it is leased from, and what listens there."""

    port: FencePort
    network: IPv4Network
    responder: FenceResponder

    @property
    def server(self) -> str:
        """Return our own address on this side."""
        return str(self.network[_SERVER_HOST])

    @property
    def lease(self) -> Lease | None:
        """Return the lease that the clone has taken on this NIC."""
        return self.responder.heard(parse_mac(self.port.mac)).lease

    @property
    def tags(self) -> tuple[Tag, ...]:
        """Return the VLAN tags that the NIC's DHCP client sends with."""
        return self.responder.heard(parse_mac(self.port.mac)).tags

    @property
    def messages(self) -> int:
        """Return how many DHCP messages this NIC has sent."""
        return self.responder.heard(parse_mac(self.port.mac)).messages


class FenceDhcp:
    """Leases addresses to one clone. Used by one thread; ``start`` and ``stop`` may be repeated, in any order."""

    def __init__(
        self, request: AddressRequest, *, pool: IPv4Network = DEFAULT_POOL, avoid: tuple[IPv4Network, ...] = ()
    ) -> None:
        """Open nothing yet. ``avoid`` are networks never to lease from; the guest's old ones are avoided anyway."""
        self._request = request
        self._pool = pool
        self._avoid = (*avoid, *(old.interface.network for old in request.old_addresses))
        self._sides: dict[FencePort, Side] = {}
        self._addressed: dict[FencePort, str] = {}
        self._vlans: dict[FencePort, VlanLink] = {}

    @property
    def sides(self) -> tuple[Side, ...]:
        """Return the NICs that are listened to."""
        return tuple(self._sides.values())

    @property
    def messages(self) -> int:
        """Return how many DHCP messages the clone has sent to those that listen now."""
        return sum(side.messages for side in self.sides)

    @property
    def is_running(self) -> bool:
        """Tell whether anything still listens; a responder ends by itself when its link is gone."""
        return any(side.responder.is_running for side in self.sides)

    def start(self, ports: Sequence[FencePort] | None = None) -> None:
        """Listen on these NICs (all by default) beside those that are listened to already.

        Raises DriverError, PreconditionError (also for a pool that is too small).
        """
        every = self._request.fence.ports
        networks = choose_networks(self._request.fence.run, count=len(every), avoid=self._avoid, pool=self._pool)
        for port, network in zip(every, networks, strict=True):
            known = self._sides.get(port)
            if (known is not None and known.responder.is_running) or (ports is not None and port not in ports):
                continue
            side = Side(port=port, network=network, responder=self._responder(port, network=network))
            # Known before it listens: where starting fails, stop has to see it.
            self._sides[port] = side
            side.responder.start()

    def stop(self) -> None:
        """Stop listening. Our addresses stay, but for those in a VLAN: the clone may be spoken to until its lease ends."""
        sides, self._sides = self._sides, {}
        for side in sides.values():
            side.responder.stop()
        self._leave_vlans()

    def withdraw(self) -> None:
        """Take our addresses away, so that the fence is as it was built. Content where it is gone."""
        namespace = self._request.fence.namespace
        self._leave_vlans()
        while self._addressed:
            port, address = next(iter(self._addressed.items()))
            if netns.is_another(namespace):
                netns.inside(namespace, action=lambda: _take_address(port, address=address))  # noqa: B023 - runs at once
            del self._addressed[port]

    def _leave_vlans(self) -> None:
        while self._vlans:
            self._vlans.popitem()[1].close()

    def answering(self) -> str | None:
        """Return an address leased here at which the clone answers, or None. Takes up to a second a lease."""
        for side in self.sides:
            lease = side.lease
            if lease is None:
                continue
            self._address(side)
            host, namespace = str(lease.address), self._request.fence.namespace
            if sockets.answers(namespace, host=host, port=self._request.probe_port, timeout=_PROBE_TIMEOUT):
                return host
        return None

    def missing(self) -> str:
        """Say what keeps the clone from being reached here."""
        given = ", ".join(str(side.lease.address) for side in self.sides if side.lease is not None)
        if given:
            return f"the clone took the address {given} and does not answer there"
        return "the clone asked for an address and took none" if self.messages else "the clone sent no DHCP message"

    def _responder(self, port: FencePort, *, network: IPv4Network) -> FenceResponder:
        exchange = exchange_of(self._request, mac=port.mac)
        config = ResponderConfig(
            server=network[_SERVER_HOST],
            network=network,
            pool=tuple(network[host] for host in range(_FIRST_HOST, _LAST_HOST)),
            original_server=None if exchange is None else exchange.server,
        )
        return FenceResponder(
            self._request.fence.namespace,
            interface=port.veth_inside,
            responder=Responder(config),
            arp=self._arp_policy(exchange, network=network),
        )

    def _arp_policy(self, exchange: Exchange | None, *, network: IPv4Network) -> ArpPolicy:
        """Answer for who granted the old lease, or the clone's renewals would never come; unseen, it may be anybody."""
        old_addresses = self._request.old_addresses
        if exchange is None:
            own = frozenset(old.interface.ip for old in old_addresses)
            return ArpPolicy(everything_but=own | frozenset(network))
        gateways = {old.gateway for old in old_addresses if old.gateway is not None}
        return ArpPolicy(addresses=frozenset(gateways | {exchange.server}))

    def _address(self, side: Side) -> None:
        if side.port in self._addressed or side.port in self._vlans:
            return
        if side.tags:
            self._address_in_vlan(side)
            return
        self._addressed[side.port] = side.server  # first: where giving it fails half-way, withdrawing has to know
        netns.inside(
            self._request.fence.namespace,
            action=lambda: links.add_address(side.port.veth_inside, address=side.server, prefix=_PREFIX),
        )

    def _address_in_vlan(self, side: Side) -> None:
        namespace = self._request.fence.namespace
        link = VlanLink(namespace, port=side.port, tags=side.tags)
        self._vlans[side.port] = link
        link.open()
        netns.inside(namespace, action=lambda: links.add_address(link.name, address=side.server, prefix=_PREFIX))


def _take_address(port: FencePort, *, address: str) -> None:
    links.remove_address(port.veth_inside, address=address, prefix=_PREFIX)


def exchange_of(request: AddressRequest, *, mac: str) -> Exchange | None:
    """Return the last exchange of a NIC in production, where somebody saw one."""
    wanted = parse_mac(mac)
    return next((item for item in request.exchanges if parse_mac(item.mac) == wanted), None)
