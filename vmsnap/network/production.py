"""The original's side: which bridge it is on, where that bridge last saw its MAC, and whether it still answers there."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import IPv4Address

from pyroute2 import IPRoute

from vmsnap.dhcp.arp import ArpOperation, ArpPacket, MalformedArpError
from vmsnap.model.guest import Nic
from vmsnap.model.isolation import Original
from vmsnap.network import links
from vmsnap.network.frames import ETHERTYPE_ARP, Frame, MalformedFrameError, parse_mac
from vmsnap.network.links import Link
from vmsnap.network.packets import PacketSocket, arp_filter

AF_BRIDGE = 7  # linux/socket.h
PERMANENT = 0x80  # NUD_PERMANENT of linux/neighbour.h: an entry that was not learned
_BETWEEN_QUESTIONS_SECONDS = 0.3
_NOBODY = IPv4Address(0)


@dataclass(frozen=True, kw_only=True)
class Side:
    """One NIC of the original in production. ``tap`` and ``bridge`` are None where it is on no Linux bridge here."""

    nic: Nic
    tap: Link | None
    bridge: Link | None
    addresses: tuple[IPv4Address, ...]


def sides_of(original: Original | None) -> tuple[Side, ...]:
    """Return where the original's NICs are now. Raises DriverError."""
    if original is None:
        return ()
    known = links.all_links()
    by_name = {link.name: link for link in known}
    by_index = {link.index: link for link in known}
    sides = []
    for nic in original.nics:
        tap = by_name.get(nic.tap) if nic.tap is not None else None
        master = by_index.get(tap.master) if tap is not None and tap.master is not None else None
        found = tuple(interface.ip for interface in nic.addresses)
        if not found and len(original.nics) == 1:
            found = tuple(old.interface.ip for old in original.addresses)
        bridge = master if master is not None and master.kind == "bridge" else None
        sides.append(Side(nic=nic, tap=tap, bridge=bridge, addresses=found))
    return tuple(sides)


def ports_of(mac: str, *, bridge: Link) -> tuple[int, ...]:
    """Return the links at which a bridge has learned a MAC: none where it forgot it. Raises DriverError."""
    with links.translated(f"read the forwarding table of {bridge.name}"), IPRoute() as route:
        return tuple(
            entry["ifindex"]
            for entry in route.get_neighbours(family=AF_BRIDGE)
            if entry.get("lladdr") == mac and entry.get("master") == bridge.index and not entry["state"] & PERMANENT
        )


def answers(side: Side, *, timeout: timedelta) -> IPv4Address | None:
    """Ask the original for its address by ARP and return the one it answered for, or None.

    The question goes to its MAC alone and names no asker, so nobody learns anything from it (RFC 5227, 2.1.1; RFC 1122,
    2.3.2.1). Only an answer that comes in by the original's own tap counts. Raises DriverError.
    """
    if side.tap is None or side.bridge is None or not side.addresses:
        return None
    end = time.monotonic() + timeout.total_seconds()
    with (
        PacketSocket(side.tap.name, bpf=arp_filter()) as listener,
        PacketSocket(side.bridge.name, bpf=arp_filter()) as asker,
    ):
        while (now := time.monotonic()) < end:
            try:
                for address in side.addresses:
                    asker.send(_question(side, asker=asker.mac, address=address))
                pause = min(now + _BETWEEN_QUESTIONS_SECONDS, end)
                while (received := listener.receive(timeout_seconds=pause - time.monotonic())) is not None:
                    data, leaving = received
                    address_found = None if leaving else _answer(data, side=side)
                    if address_found is not None:
                        return address_found
            except OSError:  # the link went down for a moment
                time.sleep(_BETWEEN_QUESTIONS_SECONDS)
    return None


def _question(side: Side, *, asker: bytes, address: IPv4Address) -> bytes:
    packet = ArpPacket(operation=ArpOperation.REQUEST, sender_mac=asker, sender=_NOBODY, target=address).encode()
    return Frame(
        destination=parse_mac(side.nic.mac), source=asker, ethertype=ETHERTYPE_ARP, payload=packet.ljust(46, b"\0")
    ).encode()


def _answer(data: bytes, *, side: Side) -> IPv4Address | None:
    try:
        packet = ArpPacket.decode(Frame.decode(data).payload)
    except (MalformedFrameError, MalformedArpError):
        return None
    is_its_own = packet.sender_mac == parse_mac(side.nic.mac) and packet.sender in side.addresses
    return packet.sender if packet.operation is ArpOperation.REPLY and is_its_own else None
