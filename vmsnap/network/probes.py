"""What a clone might send first when it wakes up, as frames: to the host, the gateway, DNS, the metadata address.

They bear the clone's own MAC and address, and go to whoever might carry them on: the bridge's own MAC, as if the host
were the router, everybody, and a group that bridges treat in a way of its own. Sources: RFC 826, 768, 791, 8200, 2131,
IEEE 802.1Q (group addresses), RFC 3927.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_interface
from pathlib import Path

from vmsnap.dhcp.arp import ArpOperation, ArpPacket
from vmsnap.model.isolation import FencePlan, FencePort
from vmsnap.network import links
from vmsnap.network.frames import ETHERTYPE_ARP, ETHERTYPE_IPV4, Datagram, Frame, internet_checksum, parse_mac

BROADCAST = b"\xff" * 6
_NEAREST_BRIDGE = bytes.fromhex("0180c200000e")  # where LLDP goes; IEEE 802.1Q, table 8-1
_METADATA = IPv4Address("169.254.169.254")
_NOBODY = IPv4Address("192.0.2.1")  # RFC 5737: where no address of the guest is known
_ANYWHERE = IPv4Address("255.255.255.255")
_ETHERTYPE_IPV6 = 0x86DD
_UDP = 17
_MOST_ADDRESSES = 16  # of a host that has very many
_RESOLVER = Path("/etc/resolv.conf")


@dataclass(frozen=True, kw_only=True)
class Target:
    """An address of production that a clone might speak to, and what it is."""

    what: str
    address: IPv4Address | IPv6Address
    port: int


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One frame, and what it tries to reach."""

    what: str
    frame: bytes


def targets_of(plan: FencePlan) -> tuple[Target, ...]:
    """Return the addresses worth a try: the host's own, the gateways, the resolvers, the metadata service's.

    Raises DriverError.
    """
    found: list[Target] = []
    for text in sorted({text for texts in links.addresses().values() for text in texts}):
        address = ip_interface(text).ip
        if not address.is_loopback:
            found.append(Target(what=f"the host's address {address}", address=address, port=22))
    found = [
        *[target for target in found if target.address.version == 4][:_MOST_ADDRESSES],
        *[target for target in found if target.address.version == 6][:_MOST_ADDRESSES],
    ]
    gateways = {old.gateway for old in plan.original.addresses if old.gateway} if plan.original else set()
    gateways |= {IPv4Address(text) for text in links.gateways()}
    found += [Target(what=f"the gateway {address}", address=address, port=67) for address in sorted(gateways)]
    found += [Target(what=f"the resolver {address}", address=address, port=53) for address in _resolvers()]
    return (*found, Target(what=f"the metadata address {_METADATA}", address=_METADATA, port=80))


def _resolvers() -> tuple[IPv4Address | IPv6Address, ...]:
    """Return the host's name servers (resolv.conf(5)); a line that makes no sense is none."""
    found = []
    try:
        lines = _RESOLVER.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ()
    for words in (line.split() for line in lines):
        if len(words) > 1 and words[0] == "nameserver":
            try:
                found.append(ip_interface(words[1].partition("%")[0]).ip)
            except ValueError:
                continue
    return tuple(address for address in found if not address.is_loopback)


def probes_of(plan: FencePlan, *, port: FencePort, bridge_mac: bytes, targets: tuple[Target, ...]) -> tuple[Probe, ...]:
    """Return the frames for one NIC. All but those to the group of bridges are for the host to drop."""
    mac = parse_mac(port.mac)
    own = _own_address(plan, port=port)
    found = []
    for target in targets:
        if isinstance(target.address, IPv4Address):
            packet = Datagram(
                source=own, source_port=40000, destination=target.address, destination_port=target.port, data=b"probe"
            ).encode()
            asked = ArpPacket(
                operation=ArpOperation.REQUEST, sender_mac=mac, sender=own, target=target.address
            ).encode()
            found += [
                Probe(what=target.what, frame=_frame(bridge_mac, mac, ETHERTYPE_IPV4, packet)),
                Probe(what=f"ARP for {target.what}", frame=_frame(BROADCAST, mac, ETHERTYPE_ARP, asked)),
            ]
        else:
            packet = _udp_over_ipv6(link_local(mac), target.address, port=target.port)
            found.append(Probe(what=target.what, frame=_frame(bridge_mac, mac, _ETHERTYPE_IPV6, packet)))
    release = Datagram(source=own, source_port=68, destination=_ANYWHERE, destination_port=67, data=b"\0" * 240)
    found.append(Probe(what="a DHCP broadcast", frame=_frame(BROADCAST, mac, ETHERTYPE_IPV4, release.encode())))
    return tuple(found)


def past_the_filter(port: FencePort, *, targets: tuple[Target, ...]) -> tuple[Probe, ...]:
    """Return frames to the group that a bridge by itself hands to the host past all rules of bridges."""
    mac = parse_mac(port.mac)
    first = next((target.address for target in targets if isinstance(target.address, IPv4Address)), _METADATA)
    packet = Datagram(source=_NOBODY, source_port=40000, destination=first, destination_port=22, data=b"probe").encode()
    asked = ArpPacket(operation=ArpOperation.REQUEST, sender_mac=mac, sender=_NOBODY, target=first).encode()
    return (
        Probe(what="the nearest bridge", frame=_frame(_NEAREST_BRIDGE, mac, ETHERTYPE_IPV4, packet)),
        Probe(what="ARP to the nearest bridge", frame=_frame(_NEAREST_BRIDGE, mac, ETHERTYPE_ARP, asked)),
    )


def link_local(mac: bytes) -> IPv6Address:
    """Return the IPv6 link-local address that follows from a MAC (RFC 4291, appendix A)."""
    identifier = bytes((mac[0] ^ 2, mac[1], mac[2], 0xFF, 0xFE, *mac[3:]))
    return IPv6Address(b"\xfe\x80" + bytes(6) + identifier)


def _own_address(plan: FencePlan, *, port: FencePort) -> IPv4Address:
    if plan.original is None:
        return _NOBODY
    known = [interface.ip for nic in plan.original.nics if nic.mac == port.mac for interface in nic.addresses]
    known += [old.interface.ip for old in plan.original.addresses]
    return known[0] if known else _NOBODY


def _frame(destination: bytes, source: bytes, ethertype: int, payload: bytes) -> bytes:
    return Frame(destination=destination, source=source, ethertype=ethertype, payload=payload.ljust(46, b"\0")).encode()


def _udp_over_ipv6(source: IPv6Address, destination: IPv6Address, *, port: int) -> bytes:
    data = b"probe"
    length = 8 + len(data)
    pseudo = source.packed + destination.packed + struct.pack("!IHBB", length, 0, 0, _UDP)
    header = struct.pack("!HHHH", 40000, port, length, 0)
    checksum = internet_checksum(pseudo + header + data) or 0xFFFF
    datagram = struct.pack("!HHHH", 40000, port, length, checksum) + data
    return struct.pack("!IHBB", 6 << 28, length, _UDP, 64) + source.packed + destination.packed + datagram
