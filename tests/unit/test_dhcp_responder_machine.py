"""The responder under any sequence of messages, well-meant and hostile, beside a model of who was promised what."""

from __future__ import annotations

from datetime import timedelta
from ipaddress import IPv4Address, IPv4Network

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vmsnap.dhcp.authentication import authentication_of, is_signed, nonce_of, takes_nonce
from vmsnap.dhcp.message import UNSPECIFIED, DhcpMessage, MalformedMessageError, MessageType, Op, Option, decode, encode
from vmsnap.dhcp.responder import IP_BROADCAST, Reply, Responder, ResponderConfig

NETWORK = IPv4Network("198.18.7.0/24")
SERVER = NETWORK[1]
POOL = tuple(NETWORK[host] for host in range(10, 13))
OLD = IPv4Address("10.9.8.77")
OLD_SERVER = IPv4Address("10.9.8.2")
LEASE_SECONDS = 600.0
OFFER_SECONDS = 60.0
GRANTS = {MessageType.OFFER, MessageType.ACK}
ANSWERED = {MessageType.DISCOVER, MessageType.REQUEST, MessageType.INFORM}

macs = st.integers(1, 5).map(lambda number: b"\x52\x54\0\0\0" + bytes([number]))
client_ids = st.sampled_from([None, b"\xff one", b"\xff two", bytes(255), bytes(256)])
some_addresses = st.sampled_from([*POOL, NETWORK[200], OLD, SERVER, OLD_SERVER, UNSPECIFIED, IP_BROADCAST])
some_values = some_addresses.map(lambda address: address.packed) | st.binary(max_size=5)
extras = st.dictionaries(st.sampled_from([50, 54, 57, 90, 145]), some_values, max_size=3)
kinds = st.integers(0, 12)


class Conversation(RuleBasedStateMachine):
    """Clients that keep to RFC 2131, clients that do not, and a clock."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.xid = 0
        self.last_replay = 0
        self.offered: dict[bytes, tuple[IPv4Address, float]] = {}
        self.held: dict[bytes, tuple[IPv4Address, float]] = {}
        self.declined: dict[IPv4Address, float] = {}
        self.seen_macs: set[bytes] = set()

    @initialize(original=st.sampled_from([None, OLD_SERVER]))
    def begin(self, original: IPv4Address | None) -> None:
        self.server = Responder(
            ResponderConfig(
                server=SERVER, network=NETWORK, pool=POOL, original_server=original,
                lease=timedelta(seconds=LEASE_SECONDS),
            )
        )  # fmt: skip

    def send(self, message: DhcpMessage, *, to: IPv4Address) -> tuple[Reply, ...]:
        """Send a message and hold what comes back against what may come back."""
        self.seen_macs.add(message.chaddr)
        replies = self.server.receive(message, destination=to, now=self.now)
        if message.op is not Op.REQUEST or message.message_type not in ANSWERED:
            assert replies == ()
        assert len(replies) <= 2
        for reply in replies:
            self.check(reply, message=message)
        return replies

    def check(self, reply: Reply, *, message: DhcpMessage) -> None:
        answer = reply.message
        assert decode(encode(answer)) == answer
        assert (answer.op, answer.xid, answer.chaddr, answer.giaddr) == (
            Op.REPLY,
            message.xid,
            message.chaddr,
            UNSPECIFIED,
        )
        assert answer.option(61) == message.option(61)
        assert reply.link_destination in {message.chaddr, b"\xff" * 6}
        kind = answer.message_type
        if message.message_type is MessageType.INFORM:
            assert (kind, answer.yiaddr, answer.option(51)) == (MessageType.ACK, UNSPECIFIED, None)
            return
        if kind in GRANTS:
            assert (kind is MessageType.OFFER) == (message.message_type is MessageType.DISCOVER)
            self.grant(answer, key=key_of(message), is_ack=kind is MessageType.ACK)
            assert answer.address(54) == SERVER
            if answer.option(90) is not None:
                assert kind is MessageType.ACK
                assert takes_nonce(message)
        else:
            assert kind is MessageType.NAK
            assert (answer.yiaddr, answer.ciaddr) == (UNSPECIFIED, UNSPECIFIED)
            assert answer.option(51) is None
            assert answer.option(90) is None

    def grant(self, answer: DhcpMessage, *, key: bytes, is_ack: bool) -> None:
        address = answer.yiaddr
        assert address in POOL
        assert self.declined.get(address, 0) <= self.now
        for book in (self.offered, self.held):
            for other, (taken, until) in book.items():
                assert other == key or taken != address or until <= self.now, "one address for two clients"
        self.offered.pop(key, None)
        self.held.pop(key, None)
        if is_ack:
            self.held[key] = (address, self.now + LEASE_SECONDS)
            proof = authentication_of(answer)
            if proof is not None:
                assert proof.replay > self.last_replay
                self.last_replay = proof.replay
        else:
            self.offered[key] = (address, self.now + OFFER_SECONDS)

    def forget(self, key: bytes) -> None:
        self.offered.pop(key, None)
        self.held.pop(key, None)

    def message(
        self, kind: int, *, mac: bytes, client_id: bytes | None, ciaddr: IPv4Address, carried: dict[int, bytes]
    ) -> DhcpMessage:
        self.xid += 1
        identity = () if client_id is None else (Option(61, client_id),)
        options = (Option(53, bytes([kind])), *identity, *(Option(code, data) for code, data in carried.items()))
        return DhcpMessage(op=Op.REQUEST, xid=self.xid, chaddr=mac, ciaddr=ciaddr, options=options)

    @rule(mac=macs, client_id=client_ids, knows_nonces=st.booleans(), wish=st.none() | some_addresses)
    def boot(
        self,
        mac: bytes,
        client_id: bytes | None,
        knows_nonces: bool,  # noqa: FBT001 - hypothesis gives it by name
        wish: IPv4Address | None,
    ) -> None:
        """Go from DISCOVER to ACK as a client does. With room in the pool that works, at whatever moment."""
        capable = {145: b"\1"} if knows_nonces else {}
        wishes = {} if wish is None else {50: wish.packed}
        discover = self.message(1, mac=mac, client_id=client_id, ciaddr=UNSPECIFIED, carried={**capable, **wishes})
        offers = self.send(discover, to=IP_BROADCAST)
        if not offers:
            assert client_id == bytes(256) or self.is_full(key_of(discover))
            return
        address = offers[0].message.yiaddr
        chosen = {50: address.packed, 54: SERVER.packed, **capable}
        request = self.message(3, mac=mac, client_id=client_id, ciaddr=UNSPECIFIED, carried=chosen)
        (ack,) = self.send(request, to=IP_BROADCAST)
        assert (ack.message.message_type, ack.message.yiaddr) == (MessageType.ACK, address)
        assert (nonce_of(ack.message) is not None) is knows_nonces
        lease = self.server.bound(mac, now=self.now)
        assert lease is not None

    def is_full(self, key: bytes) -> bool:
        busy = {taken for book in (self.offered, self.held) for other, (taken, until) in book.items()
                if other != key and until > self.now}  # fmt: skip
        return busy | {address for address, until in self.declined.items() if until > self.now} >= set(POOL)

    @rule(mac=macs, client_id=client_ids, to=st.sampled_from([SERVER, IP_BROADCAST]))
    def renew(self, mac: bytes, client_id: bytes | None, to: IPv4Address) -> None:
        """Renew or rebind what this client holds: always granted, at the same address."""
        probe = self.message(3, mac=mac, client_id=client_id, ciaddr=UNSPECIFIED, carried={})
        address, until = self.held.get(key_of(probe), (UNSPECIFIED, 0.0))
        if until <= self.now:
            return
        request = self.message(3, mac=mac, client_id=client_id, ciaddr=address, carried={})
        (ack,) = self.send(request, to=to)
        assert (ack.message.message_type, ack.message.yiaddr) == (MessageType.ACK, address)

    @rule(mac=macs, to=st.sampled_from([OLD_SERVER, IP_BROADCAST]))
    def renew_in_the_past(self, mac: bytes, to: IPv4Address) -> None:
        """Renew the address of production: refused twice, as the server that the client believes."""
        request = self.message(3, mac=mac, client_id=None, ciaddr=OLD, carried={})
        replies = self.send(request, to=to)
        assert [reply.message.message_type for reply in replies] == [MessageType.NAK] * 2
        assert [reply.destination for reply in replies] == [OLD, IP_BROADCAST]
        assert {reply.source for reply in replies} == {self.server.original_server or SERVER}
        if to == OLD_SERVER:
            assert self.server.original_server == OLD_SERVER

    @rule(mac=macs, client_id=client_ids, kind=st.sampled_from([4, 7]), server=st.sampled_from([None, SERVER]))
    def give_back(self, mac: bytes, client_id: bytes | None, kind: int, server: IPv4Address | None) -> None:
        """Decline or release what this client holds: nobody answers, and nobody else loses anything."""
        probe = self.message(kind, mac=mac, client_id=client_id, ciaddr=UNSPECIFIED, carried={})
        address, until = self.held.get(key_of(probe), (UNSPECIFIED, 0.0))
        if until <= self.now:
            return
        chosen = {} if server is None else {54: server.packed}
        if kind == 4:
            chosen[50] = address.packed
            self.declined[address] = self.now + LEASE_SECONDS
        ciaddr = address if kind == 7 else UNSPECIFIED
        self.send(self.message(kind, mac=mac, client_id=client_id, ciaddr=ciaddr, carried=chosen), to=SERVER)
        self.forget(key_of(probe))

    @rule(mac=macs, client_id=client_ids, kind=kinds, ciaddr=some_addresses, carried=extras, to=some_addresses)
    def talk_nonsense(
        self, mac: bytes, client_id: bytes | None, kind: int, ciaddr: IPv4Address, carried: dict[int, bytes],
        to: IPv4Address,
    ) -> None:  # fmt: skip
        """Send anything. What it makes the responder forget is read off its own rules for that kind of message."""
        message = self.message(kind, mac=mac, client_id=client_id, ciaddr=ciaddr, carried=carried)
        self.send(message, to=to)
        self.follow(message)

    def follow(self, message: DhcpMessage) -> None:
        """Note in the model what a message that was not answered took away from its own sender."""
        key = key_of(message)
        address, until = self.held.get(key, self.offered.get(key, (UNSPECIFIED, 0.0)))
        wanted, server = message.option(50), message.option(54)
        ours = server is None or server == SERVER.packed
        if until <= self.now or len(message.option(61) or b"") > 255:
            return
        if message.message_type is MessageType.DECLINE and wanted == address.packed and ours:
            self.declined[address] = self.now + LEASE_SECONDS
            self.forget(key)
        elif (message.message_type is MessageType.RELEASE and message.ciaddr == address and ours) or (
            message.message_type is MessageType.REQUEST and is_chosen_elsewhere(server, wanted=wanted)
        ):
            self.forget(key)

    @rule(mac=macs, kind=kinds, carried=extras, position=st.integers(0, 320), value=st.integers(0, 255))
    def send_damaged_bytes(self, mac: bytes, kind: int, carried: dict[int, bytes], position: int, value: int) -> None:
        data = bytearray(encode(self.message(kind, mac=mac, client_id=None, ciaddr=UNSPECIFIED, carried=carried)))
        data[position % len(data)] = value
        try:
            message = decode(bytes(data))
        except MalformedMessageError:
            return
        self.send(message, to=IP_BROADCAST)
        self.follow(message)

    @rule(mac=macs)
    def force_renew(self, mac: bytes) -> None:
        """Ask a client to renew: signed with what it was given, at the address that it has, and never twice the same."""
        asked = self.server.force_renew(mac, now=self.now)
        lease = self.server.bound(mac, now=self.now)
        if lease is None or asked is None:
            assert lease is None
            assert asked is None
            return
        assert (asked.destination, asked.message.ciaddr, asked.message.xid) == (lease.address, lease.address, lease.xid)
        assert asked.link_destination == mac
        if lease.nonce is not None:
            data = encode(asked.message)
            assert is_signed(data, message=decode(data), nonce=lease.nonce, after=self.last_replay)
            proof = authentication_of(asked.message)
            assert proof is not None
            self.last_replay = proof.replay
        else:
            assert asked.message.option(90) is None

    @precondition(lambda self: self.xid > 0)
    @rule(seconds=st.sampled_from([1.0, 30.0, OFFER_SECONDS, 299.5, LEASE_SECONDS]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def no_address_is_bound_to_two_clients_or_lies_outside_the_pool(self) -> None:
        if not hasattr(self, "server"):
            return
        leases = [self.server.bound(mac, now=self.now) for mac in self.seen_macs]
        held = [lease.address for lease in leases if lease is not None]
        assert len(held) == len(set(held))
        assert set(held) <= set(POOL)
        assert all(lease.nonce is None or lease.nonce.hex() not in repr(lease) for lease in leases if lease is not None)


def is_chosen_elsewhere(server: bytes | None, *, wanted: bytes | None) -> bool:
    """Tell whether a request says, in options that can be read, that another server's offer is taken."""
    if server is None or len(server) != 4 or server == SERVER.packed:
        return False
    return wanted is None or len(wanted) == 4


def key_of(message: DhcpMessage) -> bytes:
    """Return who a client is (RFC 2131 section 4.2), in the model's own words."""
    return message.option(61) or bytes([message.htype]) + message.chaddr


TestConversation = Conversation.TestCase
TestConversation.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
