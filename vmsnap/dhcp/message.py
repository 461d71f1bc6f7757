"""Codec of DHCP messages: RFC 2131 section 2 (header), RFC 2132 (options), RFC 3396 (long options).

Nothing here opens a socket. Decoding never trusts a length; encoding gives bytes that ``decode`` reads back the same.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Address

from vmsnap.errors import DriverError

CLIENT_PORT = 68
SERVER_PORT = 67
ETHERNET = 1
BROADCAST_FLAG = 0x8000
UNSPECIFIED = IPv4Address(0)

_HEADER = struct.Struct("!4BIHH4s4s4s4s16s64s128s4s")
_COOKIE = b"\x63\x82\x53\x63"
_SMALLEST_BYTES = 300  # what BOOTP promised (RFC 951); some clients drop anything shorter
_LONGEST_PART = 255
_PAD = 0
_END = 255


class Op(IntEnum):
    """Direction of a message."""

    REQUEST = 1
    REPLY = 2


class MessageType(IntEnum):
    """Values of option 53 (RFC 2132 section 9.6; FORCERENEW: RFC 3203)."""

    DISCOVER = 1
    OFFER = 2
    REQUEST = 3
    DECLINE = 4
    ACK = 5
    NAK = 6
    RELEASE = 7
    INFORM = 8
    FORCERENEW = 9


class OptionCode(IntEnum):
    """Options that vmsnap reads or writes."""

    SUBNET_MASK = 1
    ROUTER = 3
    REQUESTED_ADDRESS = 50
    LEASE_SECONDS = 51
    OVERLOAD = 52
    MESSAGE_TYPE = 53
    SERVER_ID = 54
    MESSAGE = 56
    RENEWAL_SECONDS = 58
    REBINDING_SECONDS = 59
    VENDOR_CLASS = 60
    CLIENT_ID = 61
    AUTHENTICATION = 90
    FORCERENEW_NONCE_CAPABLE = 145


class MalformedMessageError(DriverError):
    """Bytes from the network are no DHCP message. The fault is the sender's; the message is to be ignored."""


@dataclass(frozen=True)
class Option:
    """One option, its parts already joined. ``data`` may be longer than 255 bytes."""

    code: int
    data: bytes


@dataclass(frozen=True, kw_only=True)
class DhcpMessage:
    """One DHCP message.

    ``options`` holds each code once, in the order of first appearance; pad, end and overload are matters of the wire
    and never appear. ``sname`` and ``file`` come without trailing zero bytes.
    """

    op: Op
    xid: int
    chaddr: bytes
    htype: int = ETHERNET
    hops: int = 0
    secs: int = 0
    flags: int = 0
    ciaddr: IPv4Address = UNSPECIFIED
    yiaddr: IPv4Address = UNSPECIFIED
    siaddr: IPv4Address = UNSPECIFIED
    giaddr: IPv4Address = UNSPECIFIED
    sname: bytes = b""
    file: bytes = b""
    options: tuple[Option, ...] = ()

    def option(self, code: int) -> bytes | None:
        """Return the data of an option, or None where the message does not carry it."""
        return next((option.data for option in self.options if option.code == code), None)

    def address(self, code: int) -> IPv4Address | None:
        """Return an option that holds one address. Raises MalformedMessageError where it has another length."""
        data = self.option(code)
        if data is None:
            return None
        if len(data) != 4:
            raise MalformedMessageError(f"DHCP option {code} holds {len(data)} bytes instead of an address")
        return IPv4Address(data)

    @property
    def message_type(self) -> MessageType | None:
        """Return the kind of message; None for plain BOOTP and for kinds vmsnap does not know."""
        data = self.option(OptionCode.MESSAGE_TYPE)
        if data is None or len(data) != 1 or data[0] not in set(MessageType):
            return None
        return MessageType(data[0])

    @property
    def wants_broadcast(self) -> bool:
        """Tell whether the client cannot take unicast before it has an address (RFC 2131 section 4.1)."""
        return bool(self.flags & BROADCAST_FLAG)


def decode(data: bytes) -> DhcpMessage:
    """Read one message from the payload of a UDP datagram.

    Options that fill ``file`` and ``sname`` (option 52) and options split into parts are joined in the order of RFC
    3396 section 5. A missing end mark is forgiven. Raises MalformedMessageError.
    """
    if len(data) < _HEADER.size:
        raise MalformedMessageError(f"a DHCP message has at least {_HEADER.size} bytes, this one {len(data)}")
    op, htype, hlen, hops, xid, secs, flags, ciaddr, yiaddr, siaddr, giaddr, chaddr, sname, file, cookie = (
        _HEADER.unpack_from(data)
    )
    if op not in set(Op):
        raise MalformedMessageError(f"a DHCP message is a request (1) or a reply (2), this one says {op}")
    if hlen > len(chaddr):
        raise MalformedMessageError(f"a hardware address of {hlen} bytes does not fit a DHCP message")
    if cookie != _COOKIE:
        raise MalformedMessageError("the message lacks the DHCP cookie")
    joined: dict[int, bytes] = {}
    overload = _read_options(data[_HEADER.size :], into=joined, place="options")
    if overload & 1:
        _read_options(file, into=joined, place="file")
    if overload & 2:
        _read_options(sname, into=joined, place="sname")
    return DhcpMessage(
        op=Op(op),
        htype=htype,
        hops=hops,
        xid=xid,
        secs=secs,
        flags=flags,
        ciaddr=IPv4Address(ciaddr),
        yiaddr=IPv4Address(yiaddr),
        siaddr=IPv4Address(siaddr),
        giaddr=IPv4Address(giaddr),
        chaddr=chaddr[:hlen],
        sname=b"" if overload & 2 else sname.rstrip(b"\0"),
        file=b"" if overload & 1 else file.rstrip(b"\0"),
        options=tuple(Option(code, value) for code, value in joined.items()),
    )


@dataclass(frozen=True, kw_only=True)
class OptionPart:
    """Where one part of an option lies: its data are the bytes from ``start`` to before ``end``."""

    code: int
    start: int
    end: int


def option_parts(data: bytes) -> tuple[OptionPart, ...]:
    """Return the parts in the options field of a message, without pads and end. Raises MalformedMessageError."""
    return tuple(_parts(data, start=_HEADER.size, place="options"))


def _parts(data: bytes, *, start: int, place: str) -> Iterator[OptionPart]:
    position = start
    while position < len(data) and data[position] != _END:
        code = data[position]
        position += 1
        if code == _PAD:
            continue
        if position >= len(data):
            raise MalformedMessageError(f"DHCP option {code} in {place} has no length")
        begin, end = position + 1, position + 1 + data[position]
        if end > len(data):
            raise MalformedMessageError(
                f"DHCP option {code} in {place} says {data[position]} bytes and has {len(data) - begin}"
            )
        yield OptionPart(code=code, start=begin, end=end)
        position = end


def _read_options(area: bytes, *, into: dict[int, bytes], place: str) -> int:
    """Add the options of one area to ``into`` and return which other areas hold options as well (option 52)."""
    overload = 0
    for part in _parts(area, start=0, place=place):
        value = area[part.start : part.end]
        if part.code != OptionCode.OVERLOAD:
            into[part.code] = into.get(part.code, b"") + value
        elif place == "options":
            if len(value) != 1 or value[0] not in {1, 2, 3}:
                raise MalformedMessageError(f"DHCP option 52 is 1, 2 or 3, here {value.hex() or 'empty'}")
            overload = value[0]
    return overload


def encode(message: DhcpMessage) -> bytes:
    """Return the bytes of a message, padded to the 300 bytes that BOOTP promised.

    Options longer than 255 bytes are split into parts. Raises ValueError for values that do not fit their field.
    """
    if len(message.chaddr) > 16 or len(message.sname) > 64 or len(message.file) > 128:
        raise ValueError("chaddr, sname or file is longer than its field")
    head = _HEADER.pack(
        message.op,
        message.htype,
        len(message.chaddr),
        message.hops,
        message.xid,
        message.secs,
        message.flags,
        message.ciaddr.packed,
        message.yiaddr.packed,
        message.siaddr.packed,
        message.giaddr.packed,
        message.chaddr,
        message.sname,
        message.file,
        _COOKIE,
    )
    body = b"".join(_encode_option(option) for option in message.options) + bytes([_END])
    return (head + body).ljust(_SMALLEST_BYTES, b"\0")


def _encode_option(option: Option) -> bytes:
    if option.code in {_PAD, _END, OptionCode.OVERLOAD} or not 0 < option.code < _END:
        raise ValueError(f"{option.code} is no option that a message can carry")
    starts = range(0, len(option.data), _LONGEST_PART) if option.data else (0,)
    parts = (option.data[start : start + _LONGEST_PART] for start in starts)
    return b"".join(bytes([option.code, len(part)]) + part for part in parts)
