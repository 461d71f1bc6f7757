"""The responder's state machine (RFC 2131 section 4.3), sans-IO.

It leases addresses to whatever lives in one fence. A client that asks for an address of its past is refused (NAK) in
the ways the real clients listen to, so that it starts anew and takes ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from ipaddress import IPv4Address, IPv4Network

from vmsnap.dhcp.message import (
    BROADCAST_FLAG,
    ETHERNET,
    UNSPECIFIED,
    DhcpMessage,
    MalformedMessageError,
    MessageType,
    Op,
    Option,
    OptionCode,
)

ETHERNET_BROADCAST = b"\xff" * 6
IP_BROADCAST = IPv4Address("255.255.255.255")
_OFFER_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class ResponderConfig:
    """What the responder hands out.

    ``server`` is its own address. ``original_server`` is the production server's, where known: refusals carry it,
    because NetworkManager and udhcpc believe nobody else.
    """

    server: IPv4Address
    network: IPv4Network
    pool: tuple[IPv4Address, ...]
    router: IPv4Address | None = None
    original_server: IPv4Address | None = None
    lease: timedelta = timedelta(hours=1)


@dataclass(frozen=True, kw_only=True)
class Lease:
    """An address that is offered to or bound by a client. Times are seconds of the caller's monotonic clock.

    ``xid`` is that of the last exchange and ``nonce_capable`` says that the client knows RFC 6704.
    """

    mac: bytes
    address: IPv4Address
    bound: bool
    expires: float
    xid: int
    nonce_capable: bool


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A message to send, from ``source`` port 67 to ``destination`` port 68, in a frame to ``link_destination``."""

    message: DhcpMessage
    source: IPv4Address
    destination: IPv4Address
    link_destination: bytes


class Responder:
    """Answers clients. Not thread-safe; the caller gives the time with every message, in seconds that never go back."""

    def __init__(self, config: ResponderConfig) -> None:
        self._config = config
        self._original_server = config.original_server
        self._leases: dict[bytes, Lease] = {}
        self._declined: dict[IPv4Address, float] = {}

    @property
    def original_server(self) -> IPv4Address | None:
        """Return the production server's address: as configured, or learned from where a renewal was sent."""
        return self._original_server

    def bound(self, mac: bytes, *, now: float) -> Lease | None:
        """Return the lease that a client with this MAC has taken (it was sent an ACK) and that still lasts."""
        leases = (lease for lease in self._leases.values() if lease.mac == mac and lease.bound and lease.expires > now)
        return next(leases, None)

    def receive(self, message: DhcpMessage, *, destination: IPv4Address, now: float) -> tuple[Reply, ...]:
        """Take a client's message, which was sent to ``destination``, and return what to send, in this order.

        Relayed, malformed and foreign messages are answered with nothing.
        """
        relayed = message.giaddr != UNSPECIFIED
        ethernet = message.htype == ETHERNET and len(message.chaddr) == 6
        if message.op is not Op.REQUEST or relayed or not ethernet:
            return ()
        self._forget_expired(now)
        try:
            return self._dispatch(message, destination=destination, now=now)
        except MalformedMessageError:
            return ()

    def _dispatch(self, message: DhcpMessage, *, destination: IPv4Address, now: float) -> tuple[Reply, ...]:
        match message.message_type:
            case MessageType.DISCOVER:
                return self._discover(message, now=now)
            case MessageType.REQUEST:
                return self._request(message, destination=destination, now=now)
            case MessageType.INFORM:
                return self._inform(message)
            case MessageType.DECLINE:
                self._decline(message, now=now)
            case MessageType.RELEASE:
                self._release(message)
        return ()

    def _discover(self, message: DhcpMessage, *, now: float) -> tuple[Reply, ...]:
        address = self._pick(message)
        if address is None:
            return ()
        lease = _lease(message, address=address, bound=False, expires=now + _OFFER_SECONDS)
        self._leases[_client(message)] = lease
        return (self._grant(message, kind=MessageType.OFFER, address=address),)

    def _request(self, message: DhcpMessage, *, destination: IPv4Address, now: float) -> tuple[Reply, ...]:
        chosen_server = message.address(OptionCode.SERVER_ID)
        requested = message.address(OptionCode.REQUESTED_ADDRESS)
        if chosen_server is not None:  # SELECTING
            if chosen_server != self._config.server:
                self._leases.pop(_client(message), None)
                return ()
            wanted = requested
        elif message.ciaddr == UNSPECIFIED:  # INIT-REBOOT
            wanted = requested
        else:  # RENEWING is unicast to the server of the lease, REBINDING is broadcast
            wanted = message.ciaddr
            if destination not in {IP_BROADCAST, self._config.server} and not self._is_ours(wanted):
                self._original_server = destination
        if wanted is None:
            return ()
        if not self._free_for(message, address=wanted):
            return self._refuse(message)
        expires = now + self._config.lease.total_seconds()
        self._leases[_client(message)] = _lease(message, address=wanted, bound=True, expires=expires)
        return (self._grant(message, kind=MessageType.ACK, address=wanted),)

    def _inform(self, message: DhcpMessage) -> tuple[Reply, ...]:
        if message.ciaddr == UNSPECIFIED:
            return ()
        options = self._options(message, kind=MessageType.ACK, server=self._config.server) + self._network_options()
        answer = _answer(message, ciaddr=message.ciaddr, options=options)
        return (self._unicast(answer, destination=message.ciaddr),)

    def _decline(self, message: DhcpMessage, *, now: float) -> None:
        address = message.address(OptionCode.REQUESTED_ADDRESS)
        held = self._leases.get(_client(message))
        if held is not None and held.address == address:
            del self._leases[_client(message)]
            self._declined[held.address] = now + self._config.lease.total_seconds()

    def _release(self, message: DhcpMessage) -> None:
        held = self._leases.get(_client(message))
        if held is not None and held.address == message.ciaddr:
            del self._leases[_client(message)]

    def _is_ours(self, address: IPv4Address) -> bool:
        return address in self._config.pool

    def _free_for(self, message: DhcpMessage, *, address: IPv4Address) -> bool:
        """Tell whether this client may have the address: a client that outlived an earlier responder keeps its own."""
        if not self._is_ours(address) or address in self._declined:
            return False
        client = _client(message)
        return all(key == client or lease.address != address for key, lease in self._leases.items())

    def _pick(self, message: DhcpMessage) -> IPv4Address | None:
        held = self._leases.get(_client(message))
        wishes = (held.address if held else None, message.address(OptionCode.REQUESTED_ADDRESS), *self._config.pool)
        return next((wish for wish in wishes if wish is not None and self._free_for(message, address=wish)), None)

    def _forget_expired(self, now: float) -> None:
        self._leases = {client: lease for client, lease in self._leases.items() if lease.expires > now}
        self._declined = {address: until for address, until in self._declined.items() if until > now}

    def _grant(self, message: DhcpMessage, *, kind: MessageType, address: IPv4Address) -> Reply:
        seconds = int(self._config.lease.total_seconds())
        options = (
            *self._options(message, kind=kind, server=self._config.server),
            _seconds(OptionCode.LEASE_SECONDS, seconds),
            _seconds(OptionCode.RENEWAL_SECONDS, seconds // 2),
            _seconds(OptionCode.REBINDING_SECONDS, seconds * 7 // 8),
            *self._network_options(),
        )
        ciaddr = message.ciaddr if kind is MessageType.ACK else UNSPECIFIED
        answer = _answer(message, ciaddr=ciaddr, yiaddr=address, options=options)
        if message.ciaddr == UNSPECIFIED and message.wants_broadcast:
            return self._broadcast(answer, source=self._config.server)
        return self._unicast(answer, destination=address)

    def _refuse(self, message: DhcpMessage) -> tuple[Reply, ...]:
        """Refuse, twice where the client has an address.

        RFC 2131 wants a broadcast. systemd-networkd, once it has an address, listens to unicast alone;
        NetworkManager and udhcpc want the server they had the lease from.
        """
        server = self._original_server or self._config.server
        text = Option(OptionCode.MESSAGE, b"this address is not valid here")
        options = (*self._options(message, kind=MessageType.NAK, server=server), text)
        answer = _answer(message, ciaddr=UNSPECIFIED, options=options, flags=message.flags | BROADCAST_FLAG)
        broadcast = self._broadcast(answer, source=server)
        if message.ciaddr == UNSPECIFIED:
            return (broadcast,)
        unicast = Reply(message=answer, source=server, destination=message.ciaddr, link_destination=message.chaddr)
        return unicast, broadcast

    @staticmethod
    def _options(message: DhcpMessage, *, kind: MessageType, server: IPv4Address) -> tuple[Option, ...]:
        client = message.option(OptionCode.CLIENT_ID)
        echoed = () if client is None else (Option(OptionCode.CLIENT_ID, client),)  # RFC 6842
        return (
            Option(OptionCode.MESSAGE_TYPE, bytes([kind])),
            Option(OptionCode.SERVER_ID, server.packed),
            *echoed,
        )

    def _network_options(self) -> tuple[Option, ...]:
        mask = Option(OptionCode.SUBNET_MASK, self._config.network.netmask.packed)
        router = self._config.router
        return (mask,) if router is None else (mask, Option(OptionCode.ROUTER, router.packed))

    def _unicast(self, message: DhcpMessage, *, destination: IPv4Address) -> Reply:
        return Reply(
            message=message,
            source=self._config.server,
            destination=destination,
            link_destination=message.chaddr,
        )

    @staticmethod
    def _broadcast(message: DhcpMessage, *, source: IPv4Address) -> Reply:
        return Reply(message=message, source=source, destination=IP_BROADCAST, link_destination=ETHERNET_BROADCAST)


def _client(message: DhcpMessage) -> bytes:
    """Return what identifies a client: its id where it sends one, else its MAC (RFC 2131 section 4.2)."""
    return message.option(OptionCode.CLIENT_ID) or bytes([message.htype]) + message.chaddr


def _lease(message: DhcpMessage, *, address: IPv4Address, bound: bool, expires: float) -> Lease:
    return Lease(
        mac=message.chaddr,
        address=address,
        bound=bound,
        expires=expires,
        xid=message.xid,
        nonce_capable=message.option(OptionCode.FORCERENEW_NONCE_CAPABLE) is not None,
    )


def _answer(
    message: DhcpMessage,
    *,
    ciaddr: IPv4Address,
    options: tuple[Option, ...],
    yiaddr: IPv4Address = UNSPECIFIED,
    flags: int | None = None,
) -> DhcpMessage:
    return DhcpMessage(
        op=Op.REPLY,
        xid=message.xid,
        chaddr=message.chaddr,
        flags=message.flags if flags is None else flags,
        ciaddr=ciaddr,
        yiaddr=yiaddr,
        options=options,
    )


def _seconds(code: OptionCode, seconds: int) -> Option:
    return Option(code, seconds.to_bytes(4, "big"))
