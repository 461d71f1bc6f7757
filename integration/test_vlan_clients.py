"""A clone's DHCP client behind a VLAN tag is served inside its VLAN; frames are made by hand, whatever the kernel knows."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from ipaddress import IPv4Address, IPv4Network

import pytest

from integration.networld import fresh_network
from integration.test_addressing import GATEWAY, MAC, Fenced, Worlds
from vmsnap.dhcp.arp import ArpOperation, ArpPacket, ArpPolicy
from vmsnap.dhcp.message import UNSPECIFIED, DhcpMessage, MessageType, Op, Option, OptionCode, decode, encode
from vmsnap.dhcp.responder import IP_BROADCAST, Responder, ResponderConfig
from vmsnap.errors import DriverError
from vmsnap.network import links, netns
from vmsnap.network.fence import NetworkFence
from vmsnap.network.frames import ETHERTYPE_ARP, ETHERTYPE_IPV4, Datagram, Frame, Tag, parse_mac, vlan_tag
from vmsnap.network.packets import PacketSocket
from vmsnap.network.responder import FenceResponder
from vmsnap.network.vlans import VlanLink, vlan_link_name

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


HOLD_OPEN = """
import sys, time
from vmsnap.model.isolation import FencePort
from vmsnap.network.frames import vlan_tag
from vmsnap.network.vlans import VlanLink
namespace, inside = sys.argv[1:]
port = FencePort(index=0, mac="", bridge="", tap="", veth_host="", veth_inside=inside)
VlanLink(namespace, port=port, tags=(vlan_tag(42),)).open()
print("open", flush=True)
time.sleep(60)
"""


def test_a_link_inside_a_vlan_ends_with_its_process_however_that_ends(world: Fenced) -> None:
    port = world.plan.ports[0]
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD_OPEN, world.plan.namespace, port.veth_inside], stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        assert vlan_link_name(port) in names_inside(world)
        process.kill()
    assert vlan_link_name(port) not in names_inside(world)
    again = VlanLink(world.plan.namespace, port=port, tags=(vlan_tag(42),))
    again.open()
    with pytest.raises(DriverError, match="cannot make the link"):
        VlanLink(world.plan.namespace, port=port, tags=(vlan_tag(43),)).open()
    again.close()
    again.close()
    assert vlan_link_name(port) not in names_inside(world)


def test_a_link_inside_a_vlan_ends_with_its_fence(world: Fenced) -> None:
    link = VlanLink(world.plan.namespace, port=world.plan.ports[0], tags=(vlan_tag(42),))
    link.open()
    fence = NetworkFence()
    fence.release(fence.resource(world.plan), deadline=timedelta(seconds=10))
    end = time.monotonic() + 5
    while any(thread.name.startswith("vmsnap-vlan") for thread in threading.enumerate()):
        assert time.monotonic() < end, "the thread goes on without its fence"
        time.sleep(0.05)
    link.close()


def names_inside(world: Fenced) -> set[str]:
    return {link.name for link in netns.inside(world.plan.namespace, action=links.all_links)}
