"""Everything a program in a clone could try to get out of its fence, and who could hear it there.

Frames are made by hand and sent raw; each carries a marker, so that a listener can say whose frame it has heard. Sources:
RFC 826, 768, 791, 792, 1112, 2131, 3315, 4291, 4443, 4861, IEEE 802.1Q, 802.1AB, 802.1X, 802.3 annex 31B.
"""

from __future__ import annotations

import secrets
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import IPv4Address, IPv6Address

from integration.networld import StandIn, attach_clone, plan_for, sh
from vmsnap.dhcp.arp import ArpOperation, ArpPacket
from vmsnap.model.isolation import FencePlan
from vmsnap.network import links, netns
from vmsnap.network.ears import Ears
from vmsnap.network.fence import NetworkFence
from vmsnap.network.frames import internet_checksum, parse_mac
from vmsnap.network.packets import PacketSocket
from vmsnap.network.probes import link_local

MAC = "52:54:00:aa:00:01"
GUEST = IPv4Address("192.0.2.50")
HOST = IPv4Address("192.0.2.1")
NEIGHBOUR = IPv4Address("192.0.2.99")
BEYOND = IPv4Address("203.0.113.9")
PORT = 7777
_BROADCAST = b"\xff" * 6
_IPV4, _ARP, _IPV6, _LLDP, _EAPOL, _PPPOE, _EXPERIMENT = 0x0800, 0x0806, 0x86DD, 0x88CC, 0x888E, 0x8863, 0x88B5
_SETTLE_SECONDS = 0.15


@dataclass(frozen=True)
class Attempt:
    """One frame and what it is."""

    name: str
    frame: bytes


@dataclass(frozen=True, kw_only=True)
class Macs:
    """Addresses of the links that a frame could be sent to."""

    own: bytes
    bridge: bytes
    tap: bytes
    veth: bytes
    host: bytes
    neighbour: bytes


def attempts(macs: Macs, *, marker: bytes) -> tuple[Attempt, ...]:
    """Return every frame, each with the marker in it."""
    return tuple(Attempt(name, frame) for name, frame in _all(macs, marker))


def _all(macs: Macs, marker: bytes) -> Iterator[tuple[str, bytes]]:
    yield from _ipv4_attempts(macs, marker)
    yield from _arp_attempts(macs, marker)
    yield from _ipv6_attempts(macs, marker)
    yield from _tagged(macs, marker)
    yield from _spoofed(macs, marker)
    yield from _odd(macs, marker)


def _ipv4_attempts(macs: Macs, marker: bytes) -> Iterator[tuple[str, bytes]]:
    ways = {"the bridge": macs.bridge, "everybody": _BROADCAST, "the host's production link": macs.host,
            "the tap": macs.tap, "the veth": macs.veth}  # fmt: skip
    targets = {"the host": HOST, "a neighbour": NEIGHBOUR, "a network behind the host": BEYOND}
    for way, mac in ways.items():
        for target, address in targets.items():
            yield f"UDP to {target} by {way}", ethernet(mac, macs.own, _IPV4, udp(GUEST, address, PORT, marker))
    yield "UDP to a neighbour", ethernet(macs.neighbour, macs.own, _IPV4, udp(GUEST, NEIGHBOUR, PORT, marker))
    yield "broadcast", ethernet(_BROADCAST, macs.own, _IPV4, udp(GUEST, IPv4Address(2**32 - 1), PORT, marker))
    yield (
        "subnet broadcast",
        ethernet(_BROADCAST, macs.own, _IPV4, udp(GUEST, IPv4Address("192.0.2.255"), PORT, marker)),
    )
    for name, text, port in (("mDNS", "224.0.0.251", 5353), ("SSDP", "239.255.255.250", 1900)):
        to_all = IPv4Address(text)
        group = b"\x01\x00\x5e" + bytes((to_all.packed[1] & 0x7F,)) + to_all.packed[2:]
        yield f"multicast {name}", ethernet(group, macs.own, _IPV4, udp(GUEST, to_all, port, marker))
    services = {"DNS": 53, "NTP": 123, "syslog": 514}
    for name, port in services.items():
        yield f"{name} at the host", ethernet(macs.bridge, macs.own, _IPV4, udp(GUEST, HOST, port, marker))
    metadata = IPv4Address("169.254.169.254")
    for way, mac in (("the bridge", macs.bridge), ("everybody", _BROADCAST)):
        yield f"metadata by {way}", ethernet(mac, macs.own, _IPV4, tcp_syn(GUEST, metadata, 80, marker))
    for port in (22, 5432, 16509):
        yield (
            f"TCP to the host's port {port}",
            ethernet(macs.bridge, macs.own, _IPV4, tcp_syn(GUEST, HOST, port, marker)),
        )
    yield "ping of the host", ethernet(macs.bridge, macs.own, _IPV4, ipv4(GUEST, HOST, 1, _echo(marker)))
    yield (
        "ping of a neighbour by the host",
        ethernet(macs.bridge, macs.own, _IPV4, ipv4(GUEST, NEIGHBOUR, 1, _echo(marker))),
    )
    yield "IGMP report", ethernet(bytes.fromhex("01005e000016"), macs.own, _IPV4,
                                  ipv4(GUEST, IPv4Address("224.0.0.22"), 2, b"\x22\0" + marker))  # fmt: skip
    yield "IPv4 in IPv4", ethernet(macs.bridge, macs.own, _IPV4, ipv4(GUEST, HOST, 4, udp(GUEST, HOST, PORT, marker)))
    yield "a fragment", ethernet(macs.bridge, macs.own, _IPV4, ipv4(GUEST, HOST, 17, marker, fragment=0x2000))
    nobody = IPv4Address(0)
    for name, data in (("DISCOVER", b"\x35\x01\x01"), ("REQUEST", b"\x35\x01\x03"), ("DECLINE", b"\x35\x01\x04")):
        packet = udp(nobody, IPv4Address(2**32 - 1), 67, _dhcp(macs.own, data) + marker, source_port=68)
        yield f"DHCP {name}", ethernet(_BROADCAST, macs.own, _IPV4, packet)
    for way, mac in (("the bridge", macs.bridge), ("everybody", _BROADCAST), ("the host's link", macs.host)):
        packet = udp(GUEST, HOST, 67, _dhcp(macs.own, b"\x35\x01\x07") + marker, source_port=68)
        yield f"DHCP RELEASE by {way}", ethernet(mac, macs.own, _IPV4, packet)


def _arp_attempts(macs: Macs, marker: bytes) -> Iterator[tuple[str, bytes]]:
    nearest = bytes.fromhex("0180c200000e")
    for name, target in (("a neighbour", NEIGHBOUR), ("the host", HOST), ("its own address", GUEST)):
        question = ArpPacket(operation=ArpOperation.REQUEST, sender_mac=macs.own, sender=GUEST, target=target)
        yield f"ARP for {name}", ethernet(_BROADCAST, macs.own, _ARP, question.encode() + marker)
    probe = ArpPacket(operation=ArpOperation.REQUEST, sender_mac=macs.own, sender=IPv4Address(0), target=HOST)
    yield "ARP probe to the bridge", ethernet(macs.bridge, macs.own, _ARP, probe.encode() + marker)
    yield "ARP probe to the tap", ethernet(macs.tap, macs.own, _ARP, probe.encode() + marker)
    yield "ARP to the nearest bridge", ethernet(nearest, macs.own, _ARP, probe.encode() + marker)
    lie = ArpPacket(operation=ArpOperation.REPLY, sender_mac=macs.own, sender=HOST, target=NEIGHBOUR)
    yield "ARP that claims the gateway", ethernet(_BROADCAST, macs.own, _ARP, lie.encode() + marker)


def _ipv6_attempts(macs: Macs, marker: bytes) -> Iterator[tuple[str, bytes]]:
    own = link_local(macs.own)
    everybody, routers = IPv6Address("ff02::1"), IPv6Address("ff02::2")
    to_all = bytes.fromhex("333300000001")
    for name, mac in (("the bridge", macs.bridge), ("the veth", macs.veth), ("the tap", macs.tap)):
        target = link_local(mac)
        yield f"UDP to the link-local address of {name}", ethernet(mac, macs.own, _IPV6, udp6(own, target, marker))
        solicited = bytes((0xFF, *target.packed[13:]))
        yield f"neighbour solicitation for {name}", ethernet(
            b"\x33\x33" + solicited, macs.own, _IPV6,
            icmp6(own, IPv6Address(b"\xff\x02" + bytes(9) + b"\x01" + solicited), 135, bytes(4) + target.packed + marker),
        )  # fmt: skip
    yield "UDP to all nodes", ethernet(to_all, macs.own, _IPV6, udp6(own, everybody, marker))
    yield (
        "router advertisement",
        ethernet(to_all, macs.own, _IPV6, icmp6(own, everybody, 134, b"\x40\0\x07\x08" + bytes(8) + marker)),
    )
    yield (
        "router solicitation",
        ethernet(bytes.fromhex("333300000002"), macs.own, _IPV6, icmp6(own, routers, 133, bytes(4) + marker)),
    )
    yield "MLD report", ethernet(bytes.fromhex("333300000016"), macs.own, _IPV6,
                                 icmp6(own, IPv6Address("ff02::16"), 143, bytes(4) + marker))  # fmt: skip
    yield "DHCPv6 solicit", ethernet(bytes.fromhex("333300010002"), macs.own, _IPV6,
                                     udp6(own, IPv6Address("ff02::1:2"), b"\x01" + marker, port=547))  # fmt: skip
    yield (
        "IPv6 to production by the bridge",
        ethernet(macs.bridge, macs.own, _IPV6, udp6(own, IPv6Address("2001:db8::99"), marker)),
    )


def _tagged(macs: Macs, marker: bytes) -> Iterator[tuple[str, bytes]]:
    packet = udp(GUEST, HOST, PORT, marker)
    for name, tags in (
        ("802.1Q", "81000001"), ("802.1Q, VLAN 100", "81000064"), ("802.1Q, priority", "8100e000"),
        ("802.1Q, VLAN 4095", "81000fff"),
        ("802.1ad", "88a80001"), ("double 802.1Q", "8100000181000064"), ("802.1ad over 802.1Q", "88a8000181000064"),
    ):  # fmt: skip
        for way, mac in (("everybody", _BROADCAST), ("the bridge", macs.bridge)):
            yield f"{name} to {way}", mac + macs.own + bytes.fromhex(tags) + struct.pack("!H", _IPV4) + packet


def _spoofed(macs: Macs, marker: bytes) -> Iterator[tuple[str, bytes]]:
    for name, source in (
        ("the host's", macs.host), ("a neighbour's", macs.neighbour), ("the bridge's", macs.bridge), ("the veth's", macs.veth),
        ("nobody's", bytes(6)), ("a random", bytes.fromhex("02deadbeef01")), ("a multicast", bytes.fromhex("01005e000001")),
    ):  # fmt: skip
        for way, mac in (("everybody", _BROADCAST), ("the bridge", macs.bridge)):
            yield f"with {name} MAC to {way}", ethernet(mac, source, _IPV4, udp(GUEST, HOST, PORT, marker))
    for name, address in (
        ("a neighbour's", NEIGHBOUR), ("the host's own", HOST), ("the loopback", IPv4Address("127.0.0.1")),
        ("a foreign", BEYOND), ("no", IPv4Address(0)),
    ):  # fmt: skip
        yield (
            f"with {name} address to the host",
            ethernet(macs.bridge, macs.own, _IPV4, udp(address, HOST, PORT, marker)),
        )
    to_loopback = udp(GUEST, IPv4Address("127.0.0.1"), PORT, marker)
    yield "UDP to the host's loopback", ethernet(macs.bridge, macs.own, _IPV4, to_loopback)


def _odd(macs: Macs, marker: bytes) -> Iterator[tuple[str, bytes]]:
    group = bytes.fromhex("0180c2000000")
    bpdu = b"\x42\x42\x03" + bytes(35)
    yield "STP BPDU", group + macs.own + struct.pack("!H", len(bpdu) + len(marker)) + bpdu + marker
    for name, last, ethertype in (
        ("pause", 0x01, 0x8808), ("LACP", 0x02, 0x8809), ("EAPOL", 0x03, _EAPOL), ("MVRP", 0x0D, 0x88F5), ("LLDP", 0x0E, _LLDP),
        ("GARP", 0x0F, 0x0021),
    ):  # fmt: skip
        yield name, ethernet(group[:5] + bytes((last,)), macs.own, ethertype, marker)
    for last in range(16):
        mac = group[:5] + bytes((last,))
        yield f"UDP to the group :{last:02x}", ethernet(mac, macs.own, _IPV4, udp(GUEST, HOST, PORT, marker))
    yield "CDP", ethernet(bytes.fromhex("01000ccccccc"), macs.own, 60, b"\xaa\xaa\x03\0\0\x0c\x20\0" + marker)
    for name, ethertype in (
        ("LLDP", _LLDP), ("EAPOL", _EAPOL), ("PPPoE", _PPPOE), ("MPLS", 0x8847), ("AoE", 0x88A2), ("FCoE", 0x8906),
        ("IPX", 0x8137),
        ("PTP", 0x88F7), ("loopback test", 0x9000), ("experiment", _EXPERIMENT), ("an unknown type", 0xFFFF),
    ):  # fmt: skip
        for way, mac in (("everybody", _BROADCAST), ("the bridge", macs.bridge)):
            yield f"{name} to {way}", ethernet(mac, macs.own, ethertype, marker)
    yield "the longest frame", ethernet(_BROADCAST, macs.own, _EXPERIMENT, marker + bytes(1500 - len(marker)))
    yield "the shortest frame", _BROADCAST + macs.own + b"\x88\xb5" + marker[:6]


def ethernet(destination: bytes, source: bytes, ethertype: int, payload: bytes) -> bytes:
    """Return an Ethernet frame, padded."""
    return destination + source + struct.pack("!H", ethertype) + payload.ljust(46, b"\0")


def ipv4(source: IPv4Address, target: IPv4Address, protocol: int, data: bytes, *, fragment: int = 0) -> bytes:
    """Return an IPv4 packet."""

    def header(checksum: int) -> bytes:
        return struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(data), 1, fragment, 64, protocol, checksum,
                           source.packed, target.packed)  # fmt: skip

    return header(internet_checksum(header(0))) + data


def udp(source: IPv4Address, target: IPv4Address, port: int, data: bytes, *, source_port: int = 40000) -> bytes:
    """Return a UDP datagram over IPv4, without a checksum."""
    return ipv4(source, target, 17, struct.pack("!HHHH", source_port, port, 8 + len(data), 0) + data)


def tcp_syn(source: IPv4Address, target: IPv4Address, port: int, data: bytes) -> bytes:
    """Return a TCP segment that asks for a connection."""

    def segment(checksum: int) -> bytes:
        return struct.pack("!HHIIBBHHH", 40000, port, 1, 0, 0x50, 0x02, 1024, checksum, 0) + data

    pseudo = source.packed + target.packed + struct.pack("!BBH", 0, 6, 20 + len(data))
    return ipv4(source, target, 6, segment(internet_checksum(pseudo + segment(0))))


def _echo(data: bytes) -> bytes:
    blank = struct.pack("!BBHHH", 8, 0, 0, 1, 1) + data
    return blank[:2] + struct.pack("!H", internet_checksum(blank)) + blank[4:]


def _dhcp(mac: bytes, options: bytes) -> bytes:
    fixed = struct.pack("!BBBBIHH4s4s4s4s", 1, 1, 6, 0, 1, 0, 0, GUEST.packed, bytes(4), bytes(4), bytes(4))
    return fixed + mac.ljust(16, b"\0") + bytes(192) + b"\x63\x82\x53\x63" + options + b"\xff"


def _ipv6(source: IPv6Address, target: IPv6Address, protocol: int, data: bytes) -> bytes:
    return struct.pack("!IHBB", 6 << 28, len(data), protocol, 255) + source.packed + target.packed + data


def _pseudo6(source: IPv6Address, target: IPv6Address, protocol: int, length: int) -> bytes:
    return source.packed + target.packed + struct.pack("!IHBB", length, 0, 0, protocol)


def udp6(source: IPv6Address, target: IPv6Address, data: bytes, *, port: int = PORT) -> bytes:
    """Return a UDP datagram over IPv6."""
    length = 8 + len(data)
    blank = struct.pack("!HHHH", 40000, port, length, 0) + data
    checksum = internet_checksum(_pseudo6(source, target, 17, length) + blank) or 0xFFFF
    return _ipv6(source, target, 17, blank[:6] + struct.pack("!H", checksum) + blank[8:])


def icmp6(source: IPv6Address, target: IPv6Address, kind: int, body: bytes) -> bytes:
    """Return an ICMPv6 message; ``body`` begins after the checksum."""
    blank = struct.pack("!BBH", kind, 0, 0) + body
    checksum = internet_checksum(_pseudo6(source, target, 58, len(blank)) + blank)
    return _ipv6(source, target, 58, blank[:2] + struct.pack("!H", checksum) + blank[4:])


class Escape:
    """A careless host with production, a second clone of the same guest, and listeners everywhere outside the fence.

    The host forwards, filters nothing by itself and shows bridged packets to its firewall, which tracks connections.
    """

    def __init__(self, plan: FencePlan, *, clone: StandIn, opened: ExitStack) -> None:
        self.plan = plan
        self.clone = clone
        self._opened = opened
        self._marker = b"ESC" + secrets.token_bytes(8)
        self._tracked = 0
        sh("sysctl", "-w", "net.ipv4.ip_forward=1", "net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.default.rp_filter=0",
           "net.ipv6.conf.all.forwarding=1", "net.bridge.bridge-nf-call-iptables=1")  # fmt: skip
        self.neighbour = self._machine("prodn", address=f"{NEIGHBOUR}/24", bridge="prod")
        self.original = self._machine("orig0", address=f"{GUEST}/24", bridge="prod", mac=MAC)
        self.beyond = self._machine("wan0", address=f"{BEYOND}/24")
        sh("ip", "addr", "add", f"{HOST}/24", "dev", "prod")
        sh("ip", "addr", "add", "203.0.113.1/24", "dev", "wan0")
        self._twin()
        self._track()
        self._outside = {
            name: self._listen(machine) for name, machine in
            (("production", self.neighbour), ("production, the original", self.original),
             ("a network behind the host", self.beyond), ("another clone", self.twin))
        }  # fmt: skip
        self._host = {
            "the host over IPv4": self._udp(socket.AF_INET), "the host over IPv6": self._udp(socket.AF_INET6),
            **{f"a program of the host's, {name}": self._program(kind)
               for name, kind in (("LLDP", _LLDP), ("802.1X", _EAPOL), ("PPPoE", _PPPOE), ("another", _EXPERIMENT))},
        }  # fmt: skip
        self.ears = opened.enter_context(Ears(plan))
        self._at_clone = self._listen(clone)
        self._inside = self._at_our_end()
        opened.callback(self._close_our_end)
        self._wait_for_production()

    def _machine(self, link: str, *, address: str, bridge: str | None = None, mac: str | None = None) -> StandIn:
        machine = StandIn()
        self._opened.callback(machine.close)
        if bridge is not None and links.find(bridge) is None:
            sh("ip", "link", "add", bridge, "type", "bridge")
            self._opened.callback(sh, "ip", "link", "del", bridge)
            sh("ip", "link", "set", bridge, "up")
        machine.plug(link, mac=mac, bridge=bridge)
        machine.run("ip", "addr", "add", address, "dev", "eth0")
        return machine

    def _twin(self) -> None:
        """Make another clone of the same guest, in a fence of its own."""
        plan, fence = plan_for(macs=(MAC,)), NetworkFence()
        fence.build(plan)
        self._opened.callback(fence.release, fence.resource(plan), deadline=timedelta(seconds=10))
        self.twin = attach_clone(plan)
        self._opened.callback(self.twin.close)

    def _track(self) -> None:
        """Give the host a firewall that tracks connections; it counts what it sees of the fence's bridge."""
        bridge = self.plan.ports[0].bridge
        sh("nft", f"add table inet host; add chain inet host seen {{ type filter hook prerouting priority 0; }}; "
           f"add rule inet host seen iifname {bridge} ct state new counter")  # fmt: skip
        self._opened.callback(sh, "nft", "delete", "table", "inet", "host", check=False)

    def _listen(self, machine: StandIn) -> PacketSocket:
        made = netns.inside(machine.namespace, action=lambda: PacketSocket("eth0"))
        self._opened.callback(made.close)
        return made

    def _close_our_end(self) -> None:
        self._inside.close()

    def _at_our_end(self) -> PacketSocket:
        """Listen and speak at our end of the veth, wherever a test has put it."""
        link = self.plan.ports[0].veth_inside
        if links.find(link) is not None:
            return PacketSocket(link)
        return netns.inside(self.plan.namespace, action=lambda: PacketSocket(link))

    def _udp(self, family: socket.AddressFamily) -> socket.socket:
        made = self._opened.enter_context(socket.socket(family, socket.SOCK_DGRAM))
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(("", PORT))
        made.setblocking(False)
        return made

    def _program(self, ethertype: int) -> socket.socket:
        """Listen as a program of the host's that waits for one kind of frame on all links (packet(7))."""
        made = self._opened.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ethertype)))
        made.setblocking(False)
        return made

    def _wait_for_production(self) -> None:
        """A link drops what is sent in its first moments: silence there would prove nothing."""
        until = time.monotonic() + 20
        while time.monotonic() < until:
            for address in (NEIGHBOUR, BEYOND):
                self._host["the host over IPv4"].sendto(b"is anybody there", (str(address), PORT))
            names = ("production", "a network behind the host")
            if all(self._heard(self._outside[name], marker=b"is anybody there", seconds=0.3) for name in names):
                return
        raise AssertionError("production cannot be heard")

    def macs(self) -> Macs:
        """Return the addresses of the links as they are now."""
        port = self.plan.ports[0]
        found = {name: links.find(name) for name in (port.bridge, port.tap, port.veth_host, "prod")}
        of = {name: parse_mac(link.mac) if link is not None else bytes(6) for name, link in found.items()}
        return Macs(
            own=parse_mac(MAC), bridge=of[port.bridge], tap=of[port.tap], veth=of[port.veth_host], host=of["prod"],
            neighbour=self._outside["production"].mac,
        )  # fmt: skip

    def frames(self) -> tuple[Attempt, ...]:
        """Return the attempts."""
        return attempts(self.macs(), marker=self._marker)

    def send_from_clone(self, frame: bytes) -> None:
        """Send one frame from the clone."""
        self._at_clone.send(frame)

    def everything(self) -> frozenset[str]:
        """Try everything from the clone's side, from ours, from the host and from production; return who heard what."""
        self._inside.close()
        self._inside = self._at_our_end()
        self._forget()
        seen: set[str] = set()
        for sender in (self._at_clone, self._inside):
            for attempt in self.frames():
                try:
                    sender.send(attempt.frame)
                except OSError:  # the link is down or gone: nothing gets out that way
                    continue
        time.sleep(_SETTLE_SECONDS)
        seen |= self.heard()
        seen |= set(self._inwards())
        return frozenset(seen)

    def _inwards(self) -> Iterator[str]:
        """Speak into the fence from the host's end of its bridge and from whatever production link is in there."""
        for who, machine_socket in (("the host", None), ("production", self._outside["production"])):
            marker = b"IN" + secrets.token_bytes(8)
            frame = ethernet(_BROADCAST, bytes.fromhex("02c0ffee0001"), _EXPERIMENT, marker)
            try:
                if machine_socket is None:
                    with PacketSocket(self.plan.ports[0].bridge) as sender:
                        sender.send(frame)
                else:
                    machine_socket.send(frame)
            except Exception:  # noqa: BLE001, S112 - the bridge is gone: nobody speaks there
                continue
            if self._heard(self._at_clone, marker=marker, seconds=_SETTLE_SECONDS):
                yield f"{who} speaks to the clone"
            if self._heard(self._inside, marker=marker, seconds=0):
                yield f"{who} speaks into the namespace"

    def heard(self) -> set[str]:
        """Return who has heard a marker, and whether anybody answered the clone."""
        seen = {name for name, at in self._outside.items() if self._heard(at, marker=self._marker[:6], seconds=0)}
        for name, listener in self._host.items():
            arrived = tuple(_drained(listener))
            if any(self._marker[:6] in data for data in arrived):
                seen.add(name)
        if self._answered():
            seen.add("somebody answers the clone")
        tracked = _packets_counted("host")
        if tracked > self._tracked:
            seen.add("connection tracking")
        self._tracked = tracked
        return seen

    def _answered(self) -> bool:
        """Tell whether the clone, or our side, got a frame that none of the two has sent."""
        own = {self._at_clone.mac, self._inside.mac}
        answered = False
        for at in (self._at_clone, self._inside):
            for data in _arrived(at):
                answered |= self._marker[:6] not in data and data[6:12] not in own
        return answered

    def _heard(self, at: PacketSocket, *, marker: bytes, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while True:
            arrived = tuple(_arrived(at))
            if any(marker in data for data in arrived):
                return True
            if time.monotonic() >= end:
                return False
            time.sleep(0.01)

    def _forget(self) -> None:
        self.heard()
        while self.ears.heard():
            pass


def _arrived(at: PacketSocket) -> Iterator[bytes]:
    """Yield what has arrived; a link that is down has nothing more."""
    try:
        while (received := at.receive(timeout_seconds=0)) is not None:
            data, leaving = received
            if not leaving:
                yield data
    except OSError:
        return


def _drained(listener: socket.socket) -> Iterator[bytes]:
    while True:
        try:
            yield listener.recv(2000)
        except BlockingIOError:
            return


def _packets_counted(table: str) -> int:
    listed = sh("nft", "list", "table", "inet", table)
    return sum(int(line.split("packets ")[1].split()[0]) for line in listed.splitlines() if "packets " in line)


@contextmanager
def escape(plan: FencePlan, *, clone: StandIn) -> Iterator[Escape]:
    """Put a careless world around a built fence, and take it away."""
    with ExitStack() as opened:
        yield Escape(plan, clone=clone, opened=opened)
