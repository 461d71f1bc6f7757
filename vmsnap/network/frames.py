"""Ethernet frames and UDP over IPv4, read and written by hand: IEEE 802.3 and 802.1Q, RFC 791, RFC 768.

The responder talks through a packet socket, because it must answer clients that have no address yet, and as a server
whose address is not its own.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address

from vmsnap.errors import DriverError

ETHERTYPE_IPV4 = 0x0800
ETHERTYPE_ARP = 0x0806
ETHERTYPE_EXPERIMENT = 0x88B5  # IEEE 802: local experimental
Tag = tuple[int, int]
"""A VLAN tag: its type (IEEE 802.1Q or 802.1ad) and its control field."""

_CUSTOMER_TAG = 0x8100
_TAGS = frozenset({_CUSTOMER_TAG, 0x88A8})
_VLAN_ID = 0x0FFF
_UDP = 17
_ETHERNET = struct.Struct("!6s6sH")
_IPV4 = struct.Struct("!BBHHHBBH4s4s")
_UDP_HEADER = struct.Struct("!4H")
_FRAGMENT = 0x3FFF  # more fragments follow, or an offset


class MalformedFrameError(DriverError):
    """A frame cannot be read, or is none of the kinds that are read here. To be ignored."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One Ethernet frame without its check sequence. ``tags`` are VLAN tags, outermost first (type, control)."""

    destination: bytes
    source: bytes
    ethertype: int
    payload: bytes
    tags: tuple[Tag, ...] = ()

    @staticmethod
    def decode(data: bytes) -> Frame:
        """Read a frame. Raises MalformedFrameError."""
        if len(data) < _ETHERNET.size:
            raise MalformedFrameError(f"a frame of {len(data)} bytes")
        destination, source, ethertype = _ETHERNET.unpack_from(data)
        position = _ETHERNET.size
        tags: list[Tag] = []
        while ethertype in _TAGS:
            if len(data) < position + 4:
                raise MalformedFrameError("a frame that ends in its VLAN tag")
            control, following = struct.unpack_from("!HH", data, position)
            tags.append((ethertype, control))
            ethertype = following
            position += 4
        return Frame(
            destination=destination,
            source=source,
            ethertype=ethertype,
            payload=data[position:],
            tags=tuple(tags),
        )

    def encode(self) -> bytes:
        """Return the bytes of the frame."""
        tags = b"".join(struct.pack("!HH", kind, control) for kind, control in self.tags)
        return self.destination + self.source + tags + struct.pack("!H", self.ethertype) + self.payload


@dataclass(frozen=True, kw_only=True)
class Datagram:
    """One UDP datagram over IPv4."""

    source: IPv4Address
    source_port: int
    destination: IPv4Address
    destination_port: int
    data: bytes

    @staticmethod
    def decode(packet: bytes) -> Datagram:
        """Read an IPv4 packet; bytes after its total length (Ethernet padding) are ignored.

        Checksums are not verified: a guest's virtio card leaves them unfinished for the next card to complete, and
        there is none. Raises MalformedFrameError for anything but an unfragmented UDP datagram.
        """
        if len(packet) < _IPV4.size:
            raise MalformedFrameError("a packet shorter than an IPv4 header")
        first, _, total, _, fragment, _, protocol, _, source, destination = _IPV4.unpack_from(packet)
        header = (first & 0x0F) * 4
        if first >> 4 != 4 or header < _IPV4.size or not header <= total <= len(packet):
            raise MalformedFrameError("a packet that contradicts its IPv4 header")
        if protocol != _UDP or fragment & _FRAGMENT:
            raise MalformedFrameError("a packet that is no whole UDP datagram")
        body = packet[header:total]
        if len(body) < _UDP_HEADER.size:
            raise MalformedFrameError("a datagram shorter than a UDP header")
        source_port, destination_port, length, _ = _UDP_HEADER.unpack_from(body)
        if not _UDP_HEADER.size <= length <= len(body):
            raise MalformedFrameError("a datagram that contradicts its UDP header")
        return Datagram(
            source=IPv4Address(source),
            source_port=source_port,
            destination=IPv4Address(destination),
            destination_port=destination_port,
            data=body[_UDP_HEADER.size : length],
        )

    def encode(self) -> bytes:
        """Return an IPv4 packet with correct checksums, time to live 64, no options."""
        length = _UDP_HEADER.size + len(self.data)
        pseudo = self.source.packed + self.destination.packed + struct.pack("!BBH", 0, _UDP, length)
        blank = _UDP_HEADER.pack(self.source_port, self.destination_port, length, 0)
        # A sum of zero is sent as all ones: zero means 'no checksum' (RFC 768).
        checksum = internet_checksum(pseudo + blank + self.data) or 0xFFFF
        datagram = _UDP_HEADER.pack(self.source_port, self.destination_port, length, checksum) + self.data
        return self._ip_header(_IPV4.size + length) + datagram

    def _ip_header(self, total: int) -> bytes:
        ends = (self.source.packed, self.destination.packed)
        blank = _IPV4.pack(0x45, 0, total, 0, 0x4000, 64, _UDP, 0, *ends)
        return _IPV4.pack(0x45, 0, total, 0, 0x4000, 64, _UDP, internet_checksum(blank), *ends)


def vlan_tag(vlan: int) -> Tag:
    """Return the tag of a VLAN, without a priority. Raises ValueError where it is not 1 to 4094."""
    if not 0 < vlan < _VLAN_ID:
        raise ValueError(f"{vlan} is no VLAN id")
    return _CUSTOMER_TAG, vlan


def internet_checksum(data: bytes) -> int:
    """Return the checksum of RFC 1071."""
    padded = data + b"\0" if len(data) % 2 else data
    words = struct.iter_unpack("!H", padded)
    total: int = sum(word for (word,) in words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def parse_mac(text: str) -> bytes:
    """Return the six bytes of ``52:54:00:12:34:56``. Raises ValueError."""
    mac = bytes.fromhex(text.replace(":", ""))
    if len(mac) != 6:
        raise ValueError(f"{text!r} is no MAC address")
    return mac
