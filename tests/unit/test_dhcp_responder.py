"""The responder: every kind of message in every state of a client, and what no order of messages may break."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from datetime import timedelta
from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmsnap.dhcp.authentication import ReplayCounter, authentication_of, is_signed, nonce_of
from vmsnap.dhcp.message import UNSPECIFIED, DhcpMessage, MessageType, Op, Option, OptionCode, decode, encode
from vmsnap.dhcp.responder import IP_BROADCAST, Reply, Responder, ResponderConfig

NETWORK = IPv4Network("198.18.7.0/24")
SERVER = IPv4Address("198.18.7.1")
POOL = tuple(NETWORK[host] for host in range(10, 13))
OLD = IPv4Address("10.9.8.77")
OLD_SERVER = IPv4Address("10.9.8.2")
MAC = b"\x52\x54\x00\xaa\x00\x01"
OTHER = b"\x52\x54\x00\xaa\x00\x02"
BROADCAST_MAC = b"\xff" * 6


def responder(**changes: object) -> Responder:
    values: dict[str, object] = {"server": SERVER, "network": NETWORK, "pool": POOL, **changes}
    return Responder(ResponderConfig(**values))  # type: ignore[arg-type]


def client(
    kind: MessageType,
    *,
    mac: bytes = MAC,
    ciaddr: IPv4Address = UNSPECIFIED,
    flags: int = 0,
    giaddr: IPv4Address = UNSPECIFIED,
    options: dict[int, bytes] | None = None,
) -> DhcpMessage:
    carried = (Option(53, bytes([kind])), *(Option(code, data) for code, data in (options or {}).items()))
    return DhcpMessage(op=Op.REQUEST, xid=99, chaddr=mac, ciaddr=ciaddr, giaddr=giaddr, flags=flags, options=carried)


@dataclass
class Dialogue:
    """One client and a responder."""

    server: Responder = field(default_factory=responder)
    now: float = 0.0

    def send(self, message: DhcpMessage, *, to: IPv4Address = IP_BROADCAST) -> tuple[Reply, ...]:
        replies = self.server.receive(decode(encode(message)), destination=to, now=self.now)
        for reply in replies:
            assert decode(encode(reply.message)) == reply.message
            assert (reply.message.op, reply.message.xid) == (Op.REPLY, message.xid)
            assert reply.message.chaddr == message.chaddr
        return replies

    def take(self, *, mac: bytes = MAC) -> IPv4Address:
        """Go through discover and request; return the address."""
        (offer,) = self.send(client(MessageType.DISCOVER, mac=mac))
        address = offer.message.yiaddr
        (ack,) = self.send(
            client(MessageType.REQUEST, mac=mac, options={50: address.packed, 54: SERVER.packed}),
        )
        assert ack.message.message_type is MessageType.ACK
        return address


def kinds(replies: tuple[Reply, ...]) -> list[MessageType | None]:
    return [reply.message.message_type for reply in replies]


def test_discover_is_answered_with_an_offer_for_the_fence() -> None:
    dialogue = Dialogue()
    (offer,) = dialogue.send(client(MessageType.DISCOVER))
    assert offer.message.message_type is MessageType.OFFER
    assert offer.message.yiaddr in POOL
    assert offer.message.address(OptionCode.SERVER_ID) == SERVER
    assert offer.message.address(OptionCode.SUBNET_MASK) == NETWORK.netmask
    assert offer.message.option(OptionCode.LEASE_SECONDS) == (3600).to_bytes(4, "big")
    assert offer.message.option(OptionCode.RENEWAL_SECONDS) == (1800).to_bytes(4, "big")
    assert offer.message.option(OptionCode.REBINDING_SECONDS) == (3150).to_bytes(4, "big")
    assert offer.message.option(OptionCode.ROUTER) is None  # nothing leaves the fence
    assert offer.message.option(6) is None  # no DNS
    assert (offer.source, offer.destination, offer.link_destination) == (SERVER, offer.message.yiaddr, MAC)
    assert dialogue.server.bound(MAC, now=0) is None


def test_a_client_that_needs_a_broadcast_gets_one() -> None:
    (offer,) = Dialogue().send(client(MessageType.DISCOVER, flags=0x8000))
    assert (offer.destination, offer.link_destination) == (IP_BROADCAST, BROADCAST_MAC)
    assert offer.message.wants_broadcast


def test_a_client_id_is_echoed() -> None:
    (offer,) = Dialogue().send(client(MessageType.DISCOVER, options={61: b"\xff\1\2\3"}))
    assert offer.message.option(OptionCode.CLIENT_ID) == b"\xff\1\2\3"


def test_selecting_is_acknowledged_and_bound() -> None:
    dialogue = Dialogue()
    address = dialogue.take()
    lease = dialogue.server.bound(MAC, now=0)
    assert lease is not None
    assert (lease.address, lease.xid, lease.nonce) == (address, 99, None)
    assert dialogue.server.bound(OTHER, now=0) is None


def test_selecting_another_server_is_met_with_silence() -> None:
    dialogue = Dialogue()
    (offer,) = dialogue.send(client(MessageType.DISCOVER))
    options = {50: offer.message.yiaddr.packed, 54: OLD_SERVER.packed}
    assert dialogue.send(client(MessageType.REQUEST, options=options)) == ()
    assert dialogue.server.bound(MAC, now=0) is None


def test_selecting_what_was_not_offered_is_refused() -> None:
    dialogue = Dialogue()
    dialogue.send(client(MessageType.DISCOVER))
    replies = dialogue.send(client(MessageType.REQUEST, options={50: OLD.packed, 54: SERVER.packed}))
    assert kinds(replies) == [MessageType.NAK]


def test_init_reboot_with_the_old_address_is_refused_by_broadcast_and_starts_anew() -> None:
    dialogue = Dialogue()
    (nak,) = dialogue.send(client(MessageType.REQUEST, options={50: OLD.packed, 61: b"id"}))
    assert nak.message.message_type is MessageType.NAK
    assert (nak.destination, nak.link_destination) == (IP_BROADCAST, BROADCAST_MAC)
    assert nak.message.yiaddr == nak.message.ciaddr == UNSPECIFIED
    assert nak.message.option(OptionCode.LEASE_SECONDS) is None
    assert nak.message.option(OptionCode.CLIENT_ID) == b"id"
    assert nak.message.wants_broadcast
    assert dialogue.take() in POOL


def test_init_reboot_with_our_address_is_acknowledged_even_by_a_new_responder() -> None:
    address = Dialogue().take()
    (ack,) = Dialogue().send(client(MessageType.REQUEST, options={50: address.packed}))
    assert (ack.message.message_type, ack.message.yiaddr) == (MessageType.ACK, address)


def test_a_renewal_of_the_old_address_is_refused_twice_as_the_server_it_was_sent_to() -> None:
    dialogue = Dialogue()
    replies = dialogue.send(client(MessageType.REQUEST, ciaddr=OLD), to=OLD_SERVER)
    assert kinds(replies) == [MessageType.NAK, MessageType.NAK]
    assert [(reply.destination, reply.link_destination) for reply in replies] == [
        (OLD, MAC),
        (IP_BROADCAST, BROADCAST_MAC),
    ]
    assert {reply.source for reply in replies} == {OLD_SERVER}
    assert {reply.message.address(OptionCode.SERVER_ID) for reply in replies} == {OLD_SERVER}
    assert dialogue.server.original_server == OLD_SERVER


def test_a_rebinding_client_tells_no_server_and_a_known_one_is_used() -> None:
    unknown = Dialogue().send(client(MessageType.REQUEST, ciaddr=OLD))
    assert {reply.message.address(OptionCode.SERVER_ID) for reply in unknown} == {SERVER}
    known = Dialogue(server=responder(original_server=OLD_SERVER)).send(client(MessageType.REQUEST, ciaddr=OLD))
    assert {reply.message.address(OptionCode.SERVER_ID) for reply in known} == {OLD_SERVER}


@pytest.mark.parametrize("to", [SERVER, IP_BROADCAST])
def test_renewing_and_rebinding_our_lease_prolongs_it(to: IPv4Address) -> None:
    dialogue = Dialogue()
    address = dialogue.take()
    dialogue.now = 3000
    (ack,) = dialogue.send(client(MessageType.REQUEST, ciaddr=address), to=to)
    assert (ack.message.message_type, ack.message.ciaddr) == (MessageType.ACK, address)
    assert (ack.destination, ack.link_destination) == (address, MAC)
    assert dialogue.server.bound(MAC, now=6599) is not None
    assert dialogue.server.bound(MAC, now=6601) is None
    assert dialogue.server.original_server is None


def test_a_lease_that_expired_can_go_to_another() -> None:
    dialogue = Dialogue(server=responder(pool=POOL[:1], lease=timedelta(seconds=100)))
    dialogue.take()
    assert dialogue.send(client(MessageType.DISCOVER, mac=OTHER)) == ()
    dialogue.now = 101
    assert dialogue.take(mac=OTHER) == POOL[0]


def test_an_offer_nobody_takes_is_free_again() -> None:
    dialogue = Dialogue(server=responder(pool=POOL[:1]))
    dialogue.send(client(MessageType.DISCOVER))
    dialogue.now = 61
    assert dialogue.take(mac=OTHER) == POOL[0]


def test_a_wish_is_heard_where_it_is_ours_and_free() -> None:
    dialogue = Dialogue()
    (offer,) = dialogue.send(client(MessageType.DISCOVER, options={50: POOL[2].packed}))
    assert offer.message.yiaddr == POOL[2]
    (offer,) = dialogue.send(client(MessageType.DISCOVER, mac=OTHER, options={50: POOL[2].packed}))
    assert offer.message.yiaddr != POOL[2]
    (offer,) = dialogue.send(client(MessageType.DISCOVER, options={50: OLD.packed}))
    assert offer.message.yiaddr == POOL[2]


def test_a_declined_address_is_not_offered_again() -> None:
    dialogue = Dialogue()
    address = dialogue.take()
    assert dialogue.send(client(MessageType.DECLINE, options={50: address.packed, 54: SERVER.packed})) == ()
    assert dialogue.server.bound(MAC, now=0) is None
    assert dialogue.take() != address


def test_nobody_declines_the_address_of_another() -> None:
    dialogue = Dialogue()
    address = dialogue.take()
    dialogue.send(client(MessageType.DECLINE, mac=OTHER, options={50: address.packed}))
    assert dialogue.server.bound(MAC, now=0) is not None


def test_a_released_address_is_free_and_only_its_holder_releases_it() -> None:
    dialogue = Dialogue()
    address = dialogue.take()
    dialogue.send(client(MessageType.RELEASE, mac=OTHER, ciaddr=address))
    assert dialogue.server.bound(MAC, now=0) is not None
    assert dialogue.send(client(MessageType.RELEASE, ciaddr=address)) == ()
    assert dialogue.server.bound(MAC, now=0) is None


@pytest.mark.parametrize("kind", [MessageType.DECLINE, MessageType.RELEASE])
def test_giving_back_what_one_does_not_hold_gives_nothing_back(kind: MessageType) -> None:
    dialogue = Dialogue()
    address = dialogue.take()
    other = next(each for each in POOL if each != address)
    dialogue.send(client(kind, ciaddr=other, options={50: other.packed, 54: SERVER.packed}))
    lease = dialogue.server.bound(MAC, now=0)
    assert lease is not None
    assert lease.address == address
    assert dialogue.take(mac=OTHER) == other


def test_inform_gets_the_network_and_no_lease() -> None:
    (ack,) = Dialogue().send(client(MessageType.INFORM, ciaddr=OLD))
    assert ack.message.message_type is MessageType.ACK
    assert ack.message.yiaddr == UNSPECIFIED
    assert ack.message.option(OptionCode.LEASE_SECONDS) is None
    assert ack.destination == OLD
    assert Dialogue().send(client(MessageType.INFORM)) == ()


def test_a_server_of_the_old_address_renews_it_as_before() -> None:
    gateway = IPv4Address("10.9.8.1")
    old_network = IPv4Network("10.9.8.0/24")
    dialogue = Dialogue(server=responder(server=gateway, network=old_network, pool=(OLD,), router=gateway))
    (ack,) = dialogue.send(client(MessageType.REQUEST, ciaddr=OLD), to=OLD_SERVER)
    assert (ack.message.message_type, ack.message.yiaddr) == (MessageType.ACK, OLD)
    assert ack.message.address(OptionCode.ROUTER) == gateway


def nonce_responder(**changes: object) -> Responder:
    nonces = itertools.count()
    config = responder(**changes)._config
    return Responder(
        config,
        new_nonce=lambda: bytes([next(nonces)]) * 16,
        replay=ReplayCounter(wall_seconds=lambda: 0.0),
    )


def take_with_nonce(dialogue: Dialogue, *, algorithms: bytes = b"\1") -> DhcpMessage:
    """Go through discover and request as a client of RFC 6704; return the ACK."""
    (offer,) = dialogue.send(client(MessageType.DISCOVER, options={145: algorithms}))
    assert offer.message.option(145) == (b"\1" if 1 in algorithms else None)
    assert offer.message.option(90) is None
    chosen = {50: offer.message.yiaddr.packed, 54: SERVER.packed, 145: algorithms}
    (ack,) = dialogue.send(client(MessageType.REQUEST, options=chosen))
    return ack.message


@pytest.mark.parametrize("algorithms", [b"\1", b"\2\1"])
def test_a_client_that_knows_rfc_6704_is_given_a_nonce_and_can_be_asked_to_renew(algorithms: bytes) -> None:
    dialogue = Dialogue(server=nonce_responder())
    ack = take_with_nonce(dialogue, algorithms=algorithms)
    nonce = nonce_of(ack)
    assert nonce == bytes(16)
    given = authentication_of(ack)
    assert given is not None
    asked = dialogue.server.force_renew(MAC, now=0)
    assert asked is not None
    assert (asked.source, asked.destination, asked.link_destination) == (SERVER, ack.yiaddr, MAC)
    assert asked.message.message_type is MessageType.FORCERENEW
    assert (asked.message.ciaddr, asked.message.xid, asked.message.chaddr) == (ack.yiaddr, ack.xid, MAC)
    assert asked.message.address(OptionCode.SERVER_ID) == SERVER
    data = encode(asked.message)
    assert is_signed(data, message=decode(data), nonce=nonce, after=given.replay)
    again = dialogue.server.force_renew(MAC, now=0)
    assert again is not None
    first, second = authentication_of(asked.message), authentication_of(again.message)
    assert first is not None
    assert second is not None
    assert given.replay < first.replay < second.replay


@pytest.mark.parametrize("algorithms", [b"", b"\2"])
def test_a_client_that_cannot_verify_is_given_no_nonce_and_asked_without_a_proof(algorithms: bytes) -> None:
    dialogue = Dialogue(server=nonce_responder())
    assert take_with_nonce(dialogue, algorithms=algorithms).option(90) is None
    asked = dialogue.server.force_renew(MAC, now=0)
    assert asked is not None
    assert asked.message.option(90) is None


def test_a_renewal_keeps_the_nonce_and_a_new_exchange_brings_another() -> None:
    dialogue = Dialogue(server=nonce_responder())
    ack = take_with_nonce(dialogue)
    (renewed,) = dialogue.send(client(MessageType.REQUEST, ciaddr=ack.yiaddr, options={145: b"\1"}), to=SERVER)
    assert renewed.message.option(90) is None
    lease = dialogue.server.bound(MAC, now=0)
    assert lease is not None
    assert lease.nonce == nonce_of(ack)
    (rebooted,) = dialogue.send(client(MessageType.REQUEST, options={50: ack.yiaddr.packed, 145: b"\1"}))
    assert nonce_of(rebooted.message) not in {None, lease.nonce}


def test_a_client_that_renews_at_a_new_responder_is_given_a_nonce() -> None:
    address = take_with_nonce(Dialogue(server=nonce_responder())).yiaddr
    dialogue = Dialogue(server=nonce_responder())
    (ack,) = dialogue.send(client(MessageType.REQUEST, ciaddr=address, options={145: b"\1"}), to=SERVER)
    assert nonce_of(ack.message) is not None


def test_who_has_no_lease_is_not_asked_to_renew() -> None:
    dialogue = Dialogue(server=nonce_responder(lease=timedelta(seconds=100)))
    assert dialogue.server.force_renew(MAC, now=0) is None
    take_with_nonce(dialogue)
    assert dialogue.server.force_renew(OTHER, now=0) is None
    assert dialogue.server.force_renew(MAC, now=101) is None


def test_no_lease_shows_its_nonce() -> None:
    dialogue = Dialogue(server=nonce_responder())
    take_with_nonce(dialogue)
    assert "nonce" not in repr(dialogue.server.bound(MAC, now=0))


def test_random_nonces_differ() -> None:
    nonces = {nonce_of(take_with_nonce(Dialogue())) for _ in range(20)}
    assert len(nonces) == 20
    assert None not in nonces


@pytest.mark.parametrize("kind", [MessageType.DECLINE, MessageType.RELEASE])
def test_what_was_meant_for_another_server_gives_no_address_back(kind: MessageType) -> None:
    dialogue = Dialogue()
    address = dialogue.take()
    dialogue.send(client(kind, ciaddr=address, options={50: address.packed, 54: OLD_SERVER.packed}))
    assert dialogue.server.bound(MAC, now=0) is not None


def test_a_client_that_changes_its_id_is_known_by_its_latest_lease() -> None:
    dialogue = Dialogue()
    dialogue.take()
    dialogue.now = 10
    (offer,) = dialogue.send(client(MessageType.DISCOVER, options={61: b"other"}))
    chosen = {50: offer.message.yiaddr.packed, 54: SERVER.packed, 61: b"other"}
    dialogue.send(client(MessageType.REQUEST, options=chosen))
    lease = dialogue.server.bound(MAC, now=10)
    assert lease is not None
    assert lease.address == offer.message.yiaddr


@pytest.mark.parametrize(
    "message",
    [
        client(MessageType.DISCOVER, giaddr=SERVER),
        client(MessageType.DISCOVER, mac=b"\1\2"),
        client(MessageType.OFFER),
        client(MessageType.REQUEST),
        client(MessageType.REQUEST, options={50: b"\1"}),
        client(MessageType.DISCOVER, options={61: bytes(256)}),
        client(MessageType.REQUEST, options={54: SERVER.packed}),
        client(MessageType.REQUEST, options={54: b"\1\2", 50: OLD.packed}),
        DhcpMessage(op=Op.REPLY, xid=1, chaddr=MAC, options=(Option(53, b"\1"),)),
        DhcpMessage(op=Op.REQUEST, xid=1, chaddr=MAC),
        DhcpMessage(op=Op.REQUEST, xid=1, chaddr=MAC, htype=6, options=(Option(53, b"\1"),)),
    ],
)
def test_what_makes_no_sense_is_met_with_silence(message: DhcpMessage) -> None:
    assert responder().receive(message, destination=IP_BROADCAST, now=0) == ()


macs = st.integers(1, 5).map(lambda number: b"\x52\x54\0\0\0" + bytes([number]))
some_addresses = st.sampled_from([*POOL, OLD, SERVER, UNSPECIFIED])
steps = st.tuples(
    st.sampled_from(MessageType), macs, some_addresses, st.none() | some_addresses,
    st.none() | st.sampled_from([SERVER, OLD_SERVER]), st.sampled_from([SERVER, OLD_SERVER, IP_BROADCAST]),
    st.floats(0, 4000),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(steps, max_size=40))
def test_no_order_of_messages_gives_one_address_twice_or_a_foreign_one(
    found: list[tuple[MessageType, bytes, IPv4Address, IPv4Address | None, IPv4Address | None, IPv4Address, float]],
) -> None:
    dialogue = Dialogue()
    everybody = {mac for _, mac, *_ in found}
    for kind, mac, ciaddr, requested, chosen, to, pause in found:
        dialogue.now += pause
        wishes = {code: value.packed for code, value in ((50, requested), (54, chosen)) if value is not None}
        for reply in dialogue.send(client(kind, mac=mac, ciaddr=ciaddr, options=wishes), to=to):
            if reply.message.message_type in {MessageType.OFFER, MessageType.ACK} and kind is not MessageType.INFORM:
                assert reply.message.yiaddr in POOL
            elif kind is not MessageType.INFORM:
                assert reply.message.yiaddr == UNSPECIFIED
        leases = [dialogue.server.bound(mac, now=dialogue.now) for mac in everybody]
        held = [lease.address for lease in leases if lease is not None]
        assert len(held) == len(set(held))
        assert set(held) <= set(POOL)
