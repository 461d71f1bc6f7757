"""From a frame that arrives to the frames that leave, without a link: what a fence's responder serves and ignores."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

import pytest

from vmsnap.dhcp.arp import ArpOperation, ArpPacket, ArpPolicy
from vmsnap.dhcp.message import DhcpMessage, MessageType, Op, Option, decode, encode
from vmsnap.dhcp.responder import IP_BROADCAST, Responder, ResponderConfig
from vmsnap.network.frames import ETHERTYPE_ARP, ETHERTYPE_IPV4, Datagram, Frame, Tag, vlan_tag
from vmsnap.network.responder import FenceResponder

NETWORK = IPv4Network("198.18.7.0/24")
SERVER, ADDRESS = NETWORK[1], NETWORK[10]
OLD = IPv4Address("10.9.8.77")
OLD_SERVER = IPv4Address("10.9.8.2")
OURS = b"\x02\0\0\0\0\1"
CLIENT = b"\x52\x54\0\0\0\1"
BROADCAST = b"\xff" * 6


def served() -> FenceResponder:
    return FenceResponder(
        "no namespace",
        interface="no link",
        responder=Responder(ResponderConfig(server=SERVER, network=NETWORK, pool=(ADDRESS,))),
        arp=ArpPolicy(addresses=frozenset({OLD_SERVER})),
    )


def from_client(
    *, mac: bytes = CLIENT, port: int = 67, tags: tuple[Tag, ...] = (), kind: MessageType = MessageType.DISCOVER
) -> bytes:
    message = DhcpMessage(op=Op.REQUEST, xid=7, chaddr=mac, ciaddr=OLD, options=(Option(53, bytes([kind])),))
    datagram = Datagram(
        source=IPv4Address(0), source_port=68, destination=IP_BROADCAST, destination_port=port, data=encode(message)
    )
    return Frame(
        destination=BROADCAST, source=mac, ethertype=ETHERTYPE_IPV4, payload=datagram.encode(), tags=tags
    ).encode()


@pytest.mark.parametrize("tags", [(), (vlan_tag(42),), ((0x88A8, 7), (0x8100, 42))], ids=["none", "one", "two"])
def test_an_answer_leaves_from_us_inside_the_tags_of_the_question(tags: tuple[Tag, ...]) -> None:
    (answer,) = served().answers(from_client(tags=tags), mac=OURS)
    frame = Frame.decode(answer)
    assert (frame.source, frame.destination, frame.tags) == (OURS, CLIENT, tags)
    datagram = Datagram.decode(frame.payload)
    assert (datagram.source, datagram.source_port, datagram.destination_port) == (SERVER, 67, 68)
    assert decode(datagram.data).message_type is MessageType.OFFER

    question = ArpPacket(operation=ArpOperation.REQUEST, sender_mac=CLIENT, sender=ADDRESS, target=OLD_SERVER).encode()
    asked = Frame(destination=BROADCAST, source=CLIENT, ethertype=ETHERTYPE_ARP, payload=question, tags=tags)
    (answer,) = served().answers(asked.encode(), mac=OURS)
    frame = Frame.decode(answer)
    assert (frame.source, frame.destination, frame.tags) == (OURS, CLIENT, tags)
    assert ArpPacket.decode(frame.payload).sender_mac == OURS


@pytest.mark.parametrize(
    "data",
    [b"", b"short", from_client()[:60], from_client(port=68), from_client(port=53),
     from_client().replace(b"\x08\x00", b"\x86\xdd", 1)],
    ids=["nothing", "short", "cut", "from a server", "another service", "another protocol"],
)  # fmt: skip
def test_everything_else_is_met_with_silence(data: bytes) -> None:
    assert served().answers(data, mac=OURS) == ()


def test_messages_are_counted_by_client_and_made_up_clients_do_not_fill_the_memory() -> None:
    responder = served()
    for number in range(3000):
        responder.answers(from_client(mac=b"\x52\x54" + number.to_bytes(4, "big")), mac=OURS)
    counted = [responder.heard(b"\x52\x54" + number.to_bytes(4, "big")).messages for number in range(3000)]
    assert sum(counted) == 1024
    first = responder.heard(b"\x52\x54\0\0\0\0").messages
    responder.answers(from_client(mac=b"\x52\x54\0\0\0\0"), mac=OURS)
    assert (first, responder.heard(b"\x52\x54\0\0\0\0").messages) == (1, 2)


@pytest.mark.parametrize("kind", MessageType)
def test_only_what_asks_for_an_address_counts(kind: MessageType) -> None:
    responder = served()
    responder.answers(from_client(kind=kind), mac=OURS)
    expected = 1 if kind in {MessageType.DISCOVER, MessageType.REQUEST} else 0
    assert responder.heard(CLIENT).messages == expected


@pytest.mark.parametrize("vlan", [0, 4095, -1, 5000])
def test_some_numbers_are_no_vlan(vlan: int) -> None:
    with pytest.raises(ValueError, match="no VLAN"):
        vlan_tag(vlan)
