"""FORCERENEW: a server asks a client to renew its lease now (RFC 3203), with or without a proof (RFC 6704).

The client answers with a REQUEST like any renewal. dhcpcd wants the transaction id of its last exchange and, unless
configured otherwise, the proof; it listens to unicast alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import IPv4Address

from vmsnap.dhcp.authentication import sign
from vmsnap.dhcp.message import DhcpMessage, MessageType, Op, Option, OptionCode


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A client as its server knows it: where it is bound, the id of its last exchange, and its nonce, if it has one."""

    mac: bytes
    address: IPv4Address
    server: IPv4Address
    xid: int
    nonce: bytes | None = field(default=None, repr=False)


def forcerenew(client: Bound, *, replay: int) -> DhcpMessage:
    """Return the message, signed where the client has a nonce. Raises PreconditionError on a host without MD5.

    ``replay`` has to be greater than in every message that the client was sent before.
    """
    plain = DhcpMessage(
        op=Op.REPLY,
        xid=client.xid,
        chaddr=client.mac,
        ciaddr=client.address,
        options=(
            Option(OptionCode.MESSAGE_TYPE, bytes([MessageType.FORCERENEW])),
            Option(OptionCode.SERVER_ID, client.server.packed),
        ),
    )
    return plain if client.nonce is None else sign(plain, nonce=client.nonce, replay=replay)
