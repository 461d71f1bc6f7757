"""One input of the fuzzer: bytes to frames, options and conversations, with everything that must hold of the answers.

The first byte chooses how the rest is read. Whatever is raised here is a finding.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

from vmsnap.dhcp.arp import ArpPacket, ArpPolicy
from vmsnap.dhcp.authentication import authentication_of, is_signed, nonce_of, takes_nonce
from vmsnap.dhcp.message import (
    DhcpMessage,
    MalformedMessageError,
    MessageType,
    Op,
    Option,
    decode,
    encode,
    option_parts,
)
from vmsnap.dhcp.responder import IP_BROADCAST, Reply, Responder, ResponderConfig
from vmsnap.network.frames import ETHERTYPE_ARP, ETHERTYPE_IPV4, Datagram, Frame
from vmsnap.network.responder import FenceResponder

NETWORK = IPv4Network("198.18.7.0/24")
SERVER = NETWORK[1]
POOL = tuple(NETWORK[host] for host in range(10, 14))
OLD = IPv4Address("10.9.8.77")
OLD_SERVER = IPv4Address("10.9.8.2")
OUR_MAC = b"\x02\0\0\0\0\1"
CLIENT_MAC = b"\x52\x54\0\0\0\1"
ADDRESSES = (*POOL, SERVER, OLD, OLD_SERVER, IP_BROADCAST, IPv4Address(0))
STEP_BYTES = 6


def one_input(data: bytes) -> None:
    """Try one input. Raises whatever the code under test should not have."""
    if not data:
        return
    modes = (_datagram, _options, _frame, _conversation)
    modes[data[0] % len(modes)](data[1:])


def seeds() -> tuple[bytes, ...]:
    """Return inputs to begin with: each kind of message in each way of reading, with the options that mean something."""
    options = (
        Option(50, OLD.packed), Option(54, SERVER.packed), Option(61, b"\xff\0\0\0\1"), Option(145, b"\1"),
        Option(90, bytes.fromhex("030100") + bytes(7) + b"\1\2" + bytes(16)), Option(43, bytes(300)),
    )  # fmt: skip
    found = [b"\1\x34\x01\x03\x35\x01\x01\xff"]
    for kind in MessageType:
        message = DhcpMessage(
            op=Op.REQUEST, xid=7, chaddr=CLIENT_MAC, ciaddr=OLD, options=(Option(53, bytes([kind])), *options)
        )
        data = encode(message)
        datagram = Datagram(source=OLD, source_port=68, destination=OLD_SERVER, destination_port=67, data=data).encode()
        for tags in ((), ((0x8100, 42),)):
            frame = Frame(destination=OUR_MAC, source=CLIENT_MAC, ethertype=ETHERTYPE_IPV4, payload=datagram, tags=tags)
            found.append(b"\2" + frame.encode())
        found.extend((b"\0" + data, b"\1" + data[240:], b"\3" + bytes([kind, 0, 5, 0, 1, 3] * 4)))
    question = bytes.fromhex("0001080006040001") + CLIENT_MAC + OLD.packed + bytes(6) + OLD_SERVER.packed
    arp = Frame(destination=b"\xff" * 6, source=CLIENT_MAC, ethertype=ETHERTYPE_ARP, payload=question)
    return (*found, b"\2" + arp.encode())


def _responder() -> Responder:
    return Responder(
        ResponderConfig(server=SERVER, network=NETWORK, pool=POOL, original_server=OLD_SERVER),
        new_nonce=lambda: bytes(range(16)),
    )


def _datagram(data: bytes) -> None:
    try:
        message = decode(data)
    except MalformedMessageError:
        return
    assert decode(encode(message)) == message
    for part in option_parts(data):
        assert 240 <= part.start <= part.end <= len(data)
    nonce_of(message)
    takes_nonce(message)
    is_signed(data, message=message, nonce=bytes(16), after=0)
    try:
        found = authentication_of(message)
    except MalformedMessageError:
        found = None
    if found is not None:
        assert found.encode() == message.option(90)
    _receive(_responder(), message, destination=IP_BROADCAST, now=0.0)


def _options(data: bytes) -> None:
    head = encode(DhcpMessage(op=Op.REQUEST, xid=7, chaddr=CLIENT_MAC, options=()))[:240]
    names = data[:192]  # the same bytes once more as sname and file, where option 52 may say that options are
    _datagram(head[:44] + names.ljust(192, b"\0") + head[236:] + data)


def _frame(data: bytes) -> None:
    policy = ArpPolicy(addresses=frozenset({OLD_SERVER}), everything_but=frozenset({OLD}))
    served = FenceResponder("nowhere", interface="none", responder=_responder(), arp=policy)
    for _ in range(2):  # once more: the second time the client has a past
        for answer in served.answers(data, mac=OUR_MAC):
            _check_frame(Frame.decode(answer), question=Frame.decode(data))


def _check_frame(answer: Frame, *, question: Frame) -> None:
    assert answer.source == OUR_MAC
    assert answer.tags == question.tags
    if answer.ethertype == ETHERTYPE_ARP:
        assert ArpPacket.decode(answer.payload).sender_mac == OUR_MAC
        return
    datagram = Datagram.decode(answer.payload)
    assert (datagram.source_port, datagram.destination_port) == (67, 68)
    assert decode(datagram.data).op is Op.REPLY


def _conversation(data: bytes) -> None:
    """Read steps of six bytes: kind, client, address, what the options hold, where it was sent, seconds."""
    responder, now = _responder(), 0.0
    for start in range(0, len(data) - STEP_BYTES + 1, STEP_BYTES):
        kind, client, address, held, to, pause = data[start : start + STEP_BYTES]
        now += pause * 30
        message = DhcpMessage(
            op=Op.REQUEST, xid=start, chaddr=CLIENT_MAC[:5] + bytes([client % 5]), ciaddr=_address(address),
            options=(Option(53, bytes([kind % 12])), *_options_of(held)),
        )  # fmt: skip
        _receive(responder, message, destination=_address(to), now=now)


def _address(number: int) -> IPv4Address:
    return ADDRESSES[number % len(ADDRESSES)]


def _options_of(bits: int) -> tuple[Option, ...]:
    address = _address(bits >> 4).packed
    options = (Option(50, address), Option(54, SERVER.packed), Option(145, b"\1"), Option(61, bytes([bits & 3])))
    return tuple(option for place, option in enumerate(options) if bits >> place & 1)


def _receive(responder: Responder, message: DhcpMessage, *, destination: IPv4Address, now: float) -> None:
    replies = responder.receive(message, destination=destination, now=now)
    for reply in replies:
        _check_reply(reply, message=message)
    macs = {CLIENT_MAC[:5] + bytes([number]) for number in range(5)} | {message.chaddr}
    leases = [lease for mac in macs if (lease := responder.bound(mac, now=now)) is not None]
    held = [lease.address for lease in leases]
    assert len(held) == len(set(held))
    assert set(held) <= set(POOL)
    asked = responder.force_renew(message.chaddr, now=now)
    assert (asked is None) == (responder.bound(message.chaddr, now=now) is None)


def _check_reply(reply: Reply, *, message: DhcpMessage) -> None:
    answer = reply.message
    assert message.op is Op.REQUEST
    assert decode(encode(answer)) == answer
    assert (answer.op, answer.xid, answer.chaddr) == (Op.REPLY, message.xid, message.chaddr)
    if answer.option(51) is not None:
        assert answer.yiaddr in POOL
