"""The responder's state machine (RFC 2131 section 4.3), sans-IO.

It leases addresses to whatever lives in one fence. A client that asks for an address of its past is refused (NAK) in
the ways the real clients listen to, so that it starts anew and takes ours. A client that knows RFC 6704 is given a
nonce, so that it can be asked to renew.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from ipaddress import IPv4Address, IPv4Network

from vmsnap.dhcp.answers import answer_to, client_of, identity_options, seconds_option
from vmsnap.dhcp.authentication import HMAC_MD5, NONCE_BYTES, Authentication, Proof, ReplayCounter, takes_nonce
from vmsnap.dhcp.forcerenew import Bound, forcerenew
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
_LONGEST_CLIENT_ID = 255  # RFC 2132 section 9.14: one option, in one part


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

    ``xid`` is that of the last exchange, ``nonce`` what a client that knows RFC 6704 was given (16 secret bytes).
    """

    mac: bytes
    address: IPv4Address
    bound: bool
    expires: float
    xid: int
    nonce: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A message to send, from ``source`` port 67 to ``destination`` port 68, in a frame to ``link_destination``."""

    message: DhcpMessage
    source: IPv4Address
    destination: IPv4Address
    link_destination: bytes


class Responder:
    """Answers clients. Not thread-safe; the caller gives the time with every message, in seconds that never go back."""

    def __init__(
        self,
        config: ResponderConfig,
        *,
        new_nonce: Callable[[], bytes] = lambda: secrets.token_bytes(NONCE_BYTES),
        replay: ReplayCounter | None = None,
    ) -> None:
        """``new_nonce`` makes 16 bytes that nobody can guess; ``replay`` has to rise over all servers of a client."""
        self._config = config
        self._new_nonce = new_nonce
        self._replay = replay or ReplayCounter()
        self._original_server = config.original_server
        self._leases: dict[bytes, Lease] = {}
        self._declined: dict[IPv4Address, float] = {}

    @property
    def original_server(self) -> IPv4Address | None:
        """Return the production server's address: as configured, or learned from where a renewal was sent."""
        return self._original_server

    def bound(self, mac: bytes, *, now: float) -> Lease | None:
        """Return the lease that a client with this MAC has taken (it was sent an ACK) and that still lasts."""
        leases = [lease for lease in self._leases.values() if lease.mac == mac and lease.bound and lease.expires > now]
        return max(leases, key=lambda lease: lease.expires, default=None)

    def force_renew(self, mac: bytes, *, now: float) -> Reply | None:
        """Return the message that asks a client to renew its lease now, or None where it has none.

        Signed where the client was given a nonce; few clients obey it unsigned. Raises PreconditionError without MD5.
        """
        lease = self.bound(mac, now=now)
        if lease is None:
            return None
        client = Bound(mac=mac, address=lease.address, server=self._config.server, xid=lease.xid, nonce=lease.nonce)
        return self._unicast_to(forcerenew(client, replay=self._replay.next()), destination=lease.address)

    def receive(self, message: DhcpMessage, *, destination: IPv4Address, now: float) -> tuple[Reply, ...]:
        """Take a client's message, which was sent to ``destination``, and return what to send, in this order.

        Relayed, malformed and foreign messages are answered with nothing.
        """
        relayed = message.giaddr != UNSPECIFIED
        ethernet = message.htype == ETHERNET and len(message.chaddr) == 6
        overlong = len(message.option(OptionCode.CLIENT_ID) or b"") > _LONGEST_CLIENT_ID
        if message.op is not Op.REQUEST or relayed or not ethernet or overlong:
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
        self._leases[client_of(message)] = lease
        return (self._grant(message, kind=MessageType.OFFER, address=address),)

    def _request(self, message: DhcpMessage, *, destination: IPv4Address, now: float) -> tuple[Reply, ...]:
        chosen_server = message.address(OptionCode.SERVER_ID)
        is_renewal = chosen_server is None and message.ciaddr != UNSPECIFIED
        requested = message.address(OptionCode.REQUESTED_ADDRESS)
        if chosen_server is not None:  # SELECTING
            if chosen_server != self._config.server:
                self._leases.pop(client_of(message), None)
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
        # RFC 6704 section 3.1: the first exchange hands the nonce out; it lasts until the client starts anew.
        held = self._leases.get(client_of(message))
        known = held.nonce if held is not None and is_renewal else None
        nonce = known or (self._new_nonce() if takes_nonce(message) else None)
        lease = _lease(message, address=wanted, bound=True, expires=expires, nonce=nonce)
        self._leases[client_of(message)] = lease
        given = None if nonce == known else nonce
        return (self._grant(message, kind=MessageType.ACK, address=wanted, nonce=given),)

    def _inform(self, message: DhcpMessage) -> tuple[Reply, ...]:
        if message.ciaddr == UNSPECIFIED:
            return ()
        options = identity_options(message, kind=MessageType.ACK, server=self._config.server) + self._network_options()
        answer = answer_to(message, ciaddr=message.ciaddr, options=options)
        return (self._unicast_to(answer, destination=message.ciaddr),)

    def _decline(self, message: DhcpMessage, *, now: float) -> None:
        address = message.address(OptionCode.REQUESTED_ADDRESS)
        held = self._leases.get(client_of(message))
        if held is not None and held.address == address and self._is_meant(message):
            del self._leases[client_of(message)]
            self._declined[held.address] = now + self._config.lease.total_seconds()

    def _release(self, message: DhcpMessage) -> None:
        held = self._leases.get(client_of(message))
        if held is not None and held.address == message.ciaddr and self._is_meant(message):
            del self._leases[client_of(message)]

    def _is_meant(self, message: DhcpMessage) -> bool:
        return message.address(OptionCode.SERVER_ID) in {None, self._config.server}

    def _is_ours(self, address: IPv4Address) -> bool:
        return address in self._config.pool

    def _free_for(self, message: DhcpMessage, *, address: IPv4Address) -> bool:
        """Tell whether this client may have the address: a client that outlived an earlier responder keeps its own."""
        if not self._is_ours(address) or address in self._declined:
            return False
        client = client_of(message)
        return all(key == client or lease.address != address for key, lease in self._leases.items())

    def _pick(self, message: DhcpMessage) -> IPv4Address | None:
        held = self._leases.get(client_of(message))
        wishes = (held.address if held else None, message.address(OptionCode.REQUESTED_ADDRESS), *self._config.pool)
        return next((wish for wish in wishes if wish is not None and self._free_for(message, address=wish)), None)

    def _forget_expired(self, now: float) -> None:
        self._leases = {client: lease for client, lease in self._leases.items() if lease.expires > now}
        self._declined = {address: until for address, until in self._declined.items() if until > now}

    def _grant(
        self, message: DhcpMessage, *, kind: MessageType, address: IPv4Address, nonce: bytes | None = None
    ) -> Reply:
        seconds = int(self._config.lease.total_seconds())
        options = (
            *identity_options(message, kind=kind, server=self._config.server),
            seconds_option(OptionCode.LEASE_SECONDS, seconds),
            seconds_option(OptionCode.RENEWAL_SECONDS, seconds // 2),
            seconds_option(OptionCode.REBINDING_SECONDS, seconds * 7 // 8),
            *self._network_options(),
            *self._nonce_options(message, kind=kind, nonce=nonce),
        )
        ciaddr = message.ciaddr if kind is MessageType.ACK else UNSPECIFIED
        answer = answer_to(message, ciaddr=ciaddr, yiaddr=address, options=options)
        if message.ciaddr == UNSPECIFIED and message.wants_broadcast:
            return self._broadcast(answer, source=self._config.server)
        return self._unicast_to(answer, destination=address)

    def _refuse(self, message: DhcpMessage) -> tuple[Reply, ...]:
        """Refuse, twice where the client has an address.

        RFC 2131 wants a broadcast. systemd-networkd, once it has an address, listens to unicast alone;
        NetworkManager and udhcpc want the server they had the lease from.
        """
        server = self._original_server or self._config.server
        text = Option(OptionCode.MESSAGE, b"this address is not valid here")
        options = (*identity_options(message, kind=MessageType.NAK, server=server), text)
        answer = answer_to(message, ciaddr=UNSPECIFIED, options=options, flags=message.flags | BROADCAST_FLAG)
        broadcast = self._broadcast(answer, source=server)
        if message.ciaddr == UNSPECIFIED:
            return (broadcast,)
        unicast = Reply(message=answer, source=server, destination=message.ciaddr, link_destination=message.chaddr)
        return unicast, broadcast

    def _network_options(self) -> tuple[Option, ...]:
        mask = Option(OptionCode.SUBNET_MASK, self._config.network.netmask.packed)
        router = self._config.router
        return (mask,) if router is None else (mask, Option(OptionCode.ROUTER, router.packed))

    def _nonce_options(self, message: DhcpMessage, *, kind: MessageType, nonce: bytes | None) -> tuple[Option, ...]:
        """Say in the OFFER that nonces are given, and give one in the ACK (RFC 6704 section 3.1)."""
        if kind is MessageType.OFFER and takes_nonce(message):
            return (Option(OptionCode.FORCERENEW_NONCE_CAPABLE, bytes([HMAC_MD5])),)
        if nonce is None:
            return ()
        given = Authentication(proof=Proof.NONCE, replay=self._replay.next(), value=nonce)
        return (Option(OptionCode.AUTHENTICATION, given.encode()),)

    def _unicast_to(self, message: DhcpMessage, *, destination: IPv4Address) -> Reply:
        return Reply(
            message=message,
            source=self._config.server,
            destination=destination,
            link_destination=message.chaddr,
        )

    @staticmethod
    def _broadcast(message: DhcpMessage, *, source: IPv4Address) -> Reply:
        return Reply(message=message, source=source, destination=IP_BROADCAST, link_destination=ETHERNET_BROADCAST)


def _lease(
    message: DhcpMessage, *, address: IPv4Address, bound: bool, expires: float, nonce: bytes | None = None
) -> Lease:
    return Lease(mac=message.chaddr, address=address, bound=bound, expires=expires, xid=message.xid, nonce=nonce)
