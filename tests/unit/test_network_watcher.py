"""What the watcher keeps of DHCP messages that it sees."""

from __future__ import annotations

from datetime import UTC, datetime
from ipaddress import IPv4Address

import pytest

from vmsnap.dhcp.authentication import Authentication, Proof
from vmsnap.dhcp.message import UNSPECIFIED, DhcpMessage, MessageType, Op, Option, OptionCode
from vmsnap.model.isolation import Exchange
from vmsnap.network.watcher import ExchangeFollower
from vmsnap.testing.memory_state import MemoryExchanges, MemoryState

MAC = "52:54:00:aa:00:01"
CHADDR = bytes.fromhex("525400aa0001")
SERVER = IPv4Address("192.0.2.1")
ADDRESS = IPv4Address("192.0.2.7")
AT = datetime(2026, 11, 21, tzinfo=UTC)
NONCE = bytes(range(16))


class World:
    def __init__(self) -> None:
        self.book = MemoryExchanges(MemoryState())
        self.follower = ExchangeFollower(self.book)
        self.follower.follow(frozenset({MAC.upper()}))

    def see(self, message: DhcpMessage, *, vlan: int | None = None) -> Exchange | None:
        return self.follower.see(message, vlan=vlan, at=AT)

    @property
    def known(self) -> Exchange | None:
        return self.book.get(MAC)


def from_client(kind: MessageType, *, xid: int = 1, vendor: bytes | None = b"dhcpcd-9") -> DhcpMessage:
    named = () if vendor is None else (Option(OptionCode.VENDOR_CLASS, vendor),)
    options = (Option(OptionCode.MESSAGE_TYPE, bytes([kind])), *named)
    return DhcpMessage(op=Op.REQUEST, xid=xid, chaddr=CHADDR, options=options)


def from_server(
    kind: MessageType = MessageType.ACK,
    *,
    xid: int = 1,
    address: IPv4Address = ADDRESS,
    nonce: bytes | None = None,
    chaddr: bytes = CHADDR,
) -> DhcpMessage:
    given = () if nonce is None else (
        Option(OptionCode.AUTHENTICATION, Authentication(proof=Proof.NONCE, replay=1, value=nonce).encode()),
    )  # fmt: skip
    options = (
        Option(OptionCode.MESSAGE_TYPE, bytes([kind])), Option(OptionCode.SERVER_ID, SERVER.packed), *given,
    )  # fmt: skip
    return DhcpMessage(op=Op.REPLY, xid=xid, chaddr=chaddr, yiaddr=address, options=options)


def test_an_exchange_is_kept_when_it_is_acknowledged() -> None:
    world = World()
    assert world.see(from_client(MessageType.DISCOVER)) is None
    assert world.see(from_server(MessageType.OFFER)) is None
    assert world.see(from_client(MessageType.REQUEST, xid=9)) is None
    assert world.known is None
    kept = world.see(from_server(xid=9, nonce=NONCE), vlan=100)
    assert kept == world.known == Exchange(
        mac=MAC, address=ADDRESS, server=SERVER, xid=9, seen=AT, nonce=NONCE, client="dhcpcd-9", vlan=100
    )  # fmt: skip
    assert "nonce" not in repr(kept)


def test_a_renewal_keeps_the_nonce_and_brings_its_own_xid() -> None:
    world = World()
    world.see(from_client(MessageType.REQUEST))
    world.see(from_server(xid=1, nonce=NONCE))
    world.see(from_client(MessageType.REQUEST, xid=2, vendor=None))
    world.see(from_server(xid=2))
    assert world.known is not None
    assert (world.known.xid, world.known.nonce, world.known.client) == (2, NONCE, "dhcpcd-9")


def test_another_lease_has_no_nonce_of_the_one_before() -> None:
    world = World()
    world.see(from_server(nonce=NONCE))
    world.see(from_server(xid=2, address=IPv4Address("192.0.2.8")))
    assert world.known is not None
    assert world.known.nonce is None


@pytest.mark.parametrize("end", [from_client(MessageType.RELEASE), from_client(MessageType.DECLINE),
                                 from_server(MessageType.NAK, address=UNSPECIFIED)])  # fmt: skip
def test_a_lease_that_ended_is_forgotten(end: DhcpMessage) -> None:
    world = World()
    world.see(from_server())
    world.see(end)
    assert world.known is None


def test_what_is_no_lease_of_a_protected_nic_is_not_kept() -> None:
    world = World()
    world.see(from_server(address=UNSPECIFIED))  # the answer to an INFORM
    world.see(from_server(chaddr=bytes(6)))
    world.see(from_server(chaddr=b""))
    assert world.known is None
    assert world.book.get("00:00:00:00:00:00") is None
    world.follower.follow(frozenset())
    world.see(from_server())
    assert world.known is None
