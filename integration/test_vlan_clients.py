"""A clone's DHCP client behind a VLAN tag is served inside its VLAN; frames are made by hand, whatever the kernel knows."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network

import pytest

from integration.networld import fresh_network
from integration.test_addressing import GATEWAY, MAC, Fenced, Worlds
from vmsnap.dhcp.arp import ArpOperation, ArpPacket, ArpPolicy
from vmsnap.dhcp.message import UNSPECIFIED, DhcpMessage, MessageType, Op, Option, OptionCode, decode, encode
from vmsnap.dhcp.responder import IP_BROADCAST, Responder, ResponderConfig
from vmsnap.network import netns
from vmsnap.network.frames import ETHERTYPE_ARP, ETHERTYPE_IPV4, Datagram, Frame, Tag, parse_mac
from vmsnap.network.packets import PacketSocket
from vmsnap.network.responder import FenceResponder

NETWORK = IPv4Network("198.18.7.0/24")
SERVER, ADDRESS = NETWORK[1], NETWORK[10]
OLD = IPv4Address("10.9.8.77")
BROADCAST = b"\xff" * 6
PRIORITY = 5 << 13


@pytest.fixture
def world() -> Iterator[Fenced]:
    with fresh_network():
        worlds = Worlds()
        made = worlds.empty()
        port = made.plan.ports[0]
        responder = FenceResponder(
            made.plan.namespace,
            interface=port.veth_inside,
            responder=Responder(ResponderConfig(server=SERVER, network=NETWORK, pool=(ADDRESS,))),
            arp=ArpPolicy(addresses=frozenset({GATEWAY})),
        )
        responder.start()
        yield made
        responder.stop()
        worlds.close()


class TaggedClient:
    """A machine's network card, its frames all inside one VLAN or none."""

    def __init__(self, world: Fenced, tags: tuple[Tag, ...]) -> None:
        self.packets = netns.inside(world.clone.namespace, action=lambda: PacketSocket("eth0"))
        self.tags = tags

    def ask(self, *, ethertype: int, payload: bytes) -> Frame:
        frame = Frame(
            destination=BROADCAST, source=parse_mac(MAC), ethertype=ethertype, payload=payload, tags=self.tags
        )
        self.packets.send(frame.encode())
        while (received := self.packets.receive(timeout_seconds=2)) is not None:
            answer = Frame.decode(received[0])
            if not received[1] and answer.ethertype == ethertype:
                return answer
        raise AssertionError("no answer")

    def dhcp(self, kind: MessageType, *options: Option, ciaddr: IPv4Address = UNSPECIFIED) -> tuple[Frame, DhcpMessage]:
        message = DhcpMessage(
            op=Op.REQUEST, xid=7, chaddr=parse_mac(MAC), ciaddr=ciaddr, options=(Option(53, bytes([kind])), *options)
        )
        datagram = Datagram(
            source=ciaddr, source_port=68, destination=IP_BROADCAST, destination_port=67, data=encode(message)
        )
        frame = self.ask(ethertype=ETHERTYPE_IPV4, payload=datagram.encode())
        return frame, decode(Datagram.decode(frame.payload).data)


@pytest.mark.parametrize(
    "tags", [(), ((0x8100, 42),), ((0x8100, PRIORITY | 42),), ((0x88A8, 7),)],
    ids=["untagged", "802.1Q", "with a priority", "802.1ad"],
)  # fmt: skip
def test_answers_come_inside_the_vlan_of_the_question(tags: tuple[Tag, ...], world: Fenced) -> None:
    client = TaggedClient(world, tags)
    with client.packets:
        frame, offer = client.dhcp(MessageType.DISCOVER)
        assert (offer.message_type, offer.yiaddr, frame.tags) == (MessageType.OFFER, ADDRESS, tags)
        chosen = Option(OptionCode.SERVER_ID, SERVER.packed), Option(OptionCode.REQUESTED_ADDRESS, ADDRESS.packed)
        frame, ack = client.dhcp(MessageType.REQUEST, *chosen)
        assert (ack.message_type, ack.yiaddr, frame.tags) == (MessageType.ACK, ADDRESS, tags)
        frame, nak = client.dhcp(MessageType.REQUEST, ciaddr=OLD)
        assert (nak.message_type, frame.tags) == (MessageType.NAK, tags)

        question = ArpPacket(
            operation=ArpOperation.REQUEST, sender_mac=parse_mac(MAC), sender=OLD, target=GATEWAY
        ).encode()
        frame = client.ask(ethertype=ETHERTYPE_ARP, payload=question)
        answer = ArpPacket.decode(frame.payload)
        assert (answer.operation, answer.sender, frame.tags) == (ArpOperation.REPLY, GATEWAY, tags)
