"""Rung 'link flap': pull the clone's cables, plug them in again, refuse the old address and lease one of ours.

A DHCP client that loses its link asks for its old address anew (INIT-REBOOT). The first flap is short, which is enough
for systemd-networkd and dhcpcd; NetworkManager forgives anything below 6 to 10 seconds, so a long one follows where the
clone stays silent.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import IPv4Network

from vmsnap.dhcp.pool import DEFAULT_POOL, choose_networks
from vmsnap.dhcp.responder import Responder, ResponderConfig
from vmsnap.errors import DriverError
from vmsnap.model.isolation import FencePort
from vmsnap.network import links, netns, sockets
from vmsnap.network.frames import parse_mac
from vmsnap.network.responder import FenceResponder
from vmsnap.network.rungs import Keeper, Timer
from vmsnap.ports.network import AddressRequest, LinkControl

_SERVER_HOST = 1
_FIRST_HOST = 10
_LAST_HOST = 250
_PREFIX = 24
_PROBE_TIMEOUT = timedelta(seconds=1)


@dataclass(frozen=True, kw_only=True)
class Flap:
    """Seconds: how long the cables stay out, and how long a clone that sends no DHCP message is then waited for."""

    pull: float
    silence: float


FLAPS = (Flap(pull=1.5, silence=6.0), Flap(pull=12.0, silence=12.0))


@dataclass(frozen=True, kw_only=True)
class _Side:
    port: FencePort
    network: IPv4Network
    responder: FenceResponder

    @property
    def server(self) -> str:
        return str(self.network[_SERVER_HOST])


class LinkFlap:
    """Moves clones whose DHCP client reacts to a lost link. The leases last longer than any run."""

    def __init__(
        self,
        *,
        keeper: Keeper,
        pool: IPv4Network = DEFAULT_POOL,
        avoid: tuple[IPv4Network, ...] = (),
        flaps: tuple[Flap, ...] = FLAPS,
    ) -> None:
        self._keeper = keeper
        self._pool = pool
        self._avoid = avoid
        self._flaps = flaps

    def climb(self, request: AddressRequest, *, links: LinkControl, timer: Timer) -> str:
        """See ``RungDriver``. All NICs are flapped at once; the first that answers at its lease counts."""
        if not request.fence.ports:
            raise DriverError("the guest has no network interface", remedy="use rung 'none' with a guest agent")
        with ExitStack() as undo:
            sides = self._listen(request, undo=undo)
            address = None
            for flap in self._flaps:
                _pull_and_plug(sides, links=links, timer=timer, seconds=flap.pull)
                address = _wait_for_answer(request, sides=sides, timer=timer, silence=flap.silence)
                if address is not None:
                    break
            else:
                raise DriverError(
                    "the clone sent no DHCP message after its link came back",
                    remedy="its address is static, or its client ignores the link; use rung 'old-address'",
                )
            undo.pop_all()
        self._keeper.keep(request.fence.run, responders=tuple(side.responder for side in sides))
        return address

    def _listen(self, request: AddressRequest, *, undo: ExitStack) -> tuple[_Side, ...]:
        fence = request.fence
        used = (*self._avoid, *(old.interface.network for old in request.old_addresses))
        networks = choose_networks(fence.run, count=len(fence.ports), avoid=used, pool=self._pool)
        sides = []
        for port, network in zip(fence.ports, networks, strict=True):
            config = ResponderConfig(
                server=network[_SERVER_HOST],
                network=network,
                pool=tuple(network[host] for host in range(_FIRST_HOST, _LAST_HOST)),
            )
            side = _Side(
                port=port,
                network=network,
                responder=FenceResponder(fence.namespace, interface=port.veth_inside, responder=Responder(config)),
            )
            undo.callback(_take_address, fence.namespace, side=side)
            _give_address(fence.namespace, side=side)
            undo.callback(side.responder.stop)
            side.responder.start()
            sides.append(side)
        return tuple(sides)


def _pull_and_plug(sides: tuple[_Side, ...], *, links: LinkControl, timer: Timer, seconds: float) -> None:
    with ExitStack() as plugs:
        for side in sides:
            plugs.callback(links.set_link, mac=side.port.mac, up=True)
            links.set_link(mac=side.port.mac, up=False)
        timer.wait(seconds)


def _wait_for_answer(request: AddressRequest, *, sides: tuple[_Side, ...], timer: Timer, silence: float) -> str | None:
    """Return the address that answers, or None where nobody has spoken DHCP so far and ``silence`` seconds are over."""
    quiet_until = timer.clock.monotonic() + silence
    while True:
        address = _answering(request, sides=sides)
        if address is not None:
            return address
        if not _messages(sides) and timer.clock.monotonic() > quiet_until:
            return None
        timer.tick(missing=_what_is_missing(sides))


def _answering(request: AddressRequest, *, sides: tuple[_Side, ...]) -> str | None:
    for side in sides:
        lease = side.responder.heard(parse_mac(side.port.mac)).lease
        if lease is None:
            continue
        address = str(lease.address)
        if sockets.answers(request.fence.namespace, host=address, port=request.probe_port, timeout=_PROBE_TIMEOUT):
            return address
    return None


def _messages(sides: tuple[_Side, ...]) -> int:
    return sum(side.responder.heard(parse_mac(side.port.mac)).messages for side in sides)


def _what_is_missing(sides: tuple[_Side, ...]) -> str:
    leases = [side.responder.heard(parse_mac(side.port.mac)).lease for side in sides]
    given = ", ".join(str(lease.address) for lease in leases if lease is not None)
    if given:
        return f"the clone took the address {given} and does not answer there"
    if not _messages(sides):
        return "the clone sent no DHCP message after its link came back"
    return "the clone asked for an address and took none"


def _give_address(namespace: str, *, side: _Side) -> None:
    netns.inside(
        namespace,
        action=lambda: links.add_address(side.port.veth_inside, address=side.server, prefix=_PREFIX),
    )


def _take_address(namespace: str, *, side: _Side) -> None:
    netns.inside(
        namespace,
        action=lambda: links.remove_address(side.port.veth_inside, address=side.server, prefix=_PREFIX),
    )
