"""ARP for IPv4 over Ethernet (RFC 826), and which questions to answer inside a fence. Sans-IO."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Address

from vmsnap.errors import DriverError

_PACKET = struct.Struct("!HHBBH6s4s6s4s")
_ETHERNET = 1
_IPV4 = 0x0800


class MalformedArpError(DriverError):
    """Bytes from the network are no ARP packet for IPv4 over Ethernet. To be ignored."""


class ArpOperation(IntEnum):
    """Question or answer."""

    REQUEST = 1
    REPLY = 2


@dataclass(frozen=True, kw_only=True)
class ArpPacket:
    """One ARP packet. MAC addresses are six bytes."""

    operation: ArpOperation
    sender_mac: bytes
    sender: IPv4Address
    target: IPv4Address
    target_mac: bytes = bytes(6)

    @staticmethod
    def decode(data: bytes) -> ArpPacket:
        """Read a packet; bytes after it (Ethernet padding) are ignored. Raises MalformedArpError."""
        if len(data) < _PACKET.size:
            raise MalformedArpError(f"an ARP packet has {_PACKET.size} bytes, this one {len(data)}")
        hardware, protocol, mac_size, address_size, operation, sender_mac, sender, target_mac, target = (
            _PACKET.unpack_from(data)
        )
        if (hardware, protocol, mac_size, address_size) != (_ETHERNET, _IPV4, 6, 4):
            raise MalformedArpError("an ARP packet for something other than IPv4 over Ethernet")
        if operation not in set(ArpOperation):
            raise MalformedArpError(f"an ARP packet with the operation {operation}")
        return ArpPacket(
            operation=ArpOperation(operation),
            sender_mac=sender_mac,
            sender=IPv4Address(sender),
            target_mac=target_mac,
            target=IPv4Address(target),
        )

    def encode(self) -> bytes:
        """Return the bytes of the packet."""
        return _PACKET.pack(
            _ETHERNET,
            _IPV4,
            6,
            4,
            self.operation,
            self.sender_mac,
            self.sender.packed,
            self.target_mac,
            self.target.packed,
        )


@dataclass(frozen=True, kw_only=True)
class ArpPolicy:
    """Which questions to answer with our own MAC.

    ``addresses``: always these. ``everything_but``: where not None, every other address too, except the ones in it;
    for a clone whose gateway nobody knows.
    """

    addresses: frozenset[IPv4Address] = frozenset()
    everything_but: frozenset[IPv4Address] | None = None

    def answer(self, packet: ArpPacket, *, mac: bytes) -> ArpPacket | None:
        """Return the answer to ``packet``, or None.

        Never answers a probe for duplicates (sender 0.0.0.0, RFC 5227) or an announcement: that would take the
        address away from the clone.
        """
        if packet.operation is not ArpOperation.REQUEST or packet.sender_mac == mac:
            return None
        if packet.sender == IPv4Address(0) or packet.sender == packet.target:
            return None
        wanted = packet.target in self.addresses or (
            self.everything_but is not None and packet.target not in self.everything_but
        )
        if not wanted:
            return None
        return ArpPacket(
            operation=ArpOperation.REPLY,
            sender_mac=mac,
            sender=packet.target,
            target_mac=packet.sender_mac,
            target=packet.sender,
        )
