"""Scapy as an oracle of the codec: it reads what is written here, and what it writes is read here, to the same values."""

from __future__ import annotations

import warnings
from ipaddress import IPv4Address
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from vmsnap.dhcp.message import DhcpMessage, Op, Option, decode, encode

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # scapy warns of old ciphers when it is imported
    from scapy.layers.dhcp import BOOTP, DHCP, DHCPOptions, DHCPRevOptions

ADDRESS_CODES = (1, 3, 28, 50, 54)
SECONDS_CODES = (51, 58, 59)
BYTE_LIST_CODES = (55, 145)
TEXT_CODES = (12, 15, 43, 60, 61, 77)
UNNAMED_CODES = tuple(code for code in range(224, 255) if code not in DHCPOptions)

addresses = st.integers(0, 2**32 - 1).map(IPv4Address)
texts = st.binary(min_size=1, max_size=255)
fields = st.binary(max_size=60).map(lambda data: data.rstrip(b"\0"))
contents = st.one_of(
    st.tuples(st.sampled_from(ADDRESS_CODES), addresses.map(lambda address: address.packed)),
    st.tuples(st.sampled_from(SECONDS_CODES), st.binary(min_size=4, max_size=4)),
    st.tuples(st.just(53), st.integers(1, 8).map(lambda kind: bytes([kind]))),
    st.tuples(st.just(57), st.binary(min_size=2, max_size=2)),
    st.tuples(st.sampled_from(BYTE_LIST_CODES), texts),
    st.tuples(st.sampled_from(TEXT_CODES), texts),
    st.tuples(st.sampled_from(UNNAMED_CODES), st.binary(min_size=1, max_size=700)),
)
options = st.lists(contents, max_size=8, unique_by=lambda item: item[0]).map(
    lambda found: tuple(Option(code, data) for code, data in found)
)
messages = st.builds(
    DhcpMessage, op=st.sampled_from(Op), xid=st.integers(0, 2**32 - 1), chaddr=st.binary(min_size=6, max_size=6),
    hops=st.integers(0, 255), secs=st.integers(0, 65535), flags=st.integers(0, 65535), ciaddr=addresses,
    yiaddr=addresses, siaddr=addresses, giaddr=addresses, sname=fields, file=fields, options=options,
)  # fmt: skip


def bytes_of(name: str | int, values: list[Any]) -> bytes:
    """Return the bytes that scapy's value of an option stands for."""
    code = name if isinstance(name, int) else DHCPRevOptions[name][0]
    if code in ADDRESS_CODES:
        return b"".join(IPv4Address(value).packed for value in values)
    if code in SECONDS_CODES:
        return int(values[0]).to_bytes(4, "big")
    if code == 57:
        return int(values[0]).to_bytes(2, "big")
    if code == 53:
        return bytes([values[0]])
    return bytes(values[0])


def value_for(option: Option) -> tuple[Any, ...]:
    """Return an option as scapy is told of it."""
    known: Any = DHCPOptions.get(option.code)
    name = option.code if known is None else known if isinstance(known, str) else known.name
    if option.code in ADDRESS_CODES:
        return name, str(IPv4Address(option.data))
    if option.code in SECONDS_CODES or option.code in {57, 53}:
        return name, int.from_bytes(option.data, "big")
    if option.code in BYTE_LIST_CODES:
        return name, list(option.data)
    return name, option.data


@settings(deadline=None)
@given(messages)
def test_scapy_reads_what_is_written(message: DhcpMessage) -> None:
    seen: Any = BOOTP(encode(message))
    assert (seen.op, seen.htype, seen.hlen, seen.hops) == (message.op, 1, 6, message.hops)
    assert (seen.xid, seen.secs, int(seen.flags)) == (message.xid, message.secs, message.flags)
    found = [seen.ciaddr, seen.yiaddr, seen.siaddr, seen.giaddr]
    assert found == [str(each) for each in (message.ciaddr, message.yiaddr, message.siaddr, message.giaddr)]
    assert bytes(seen.chaddr)[:6] == message.chaddr
    assert (bytes(seen.sname).rstrip(b"\0"), bytes(seen.file).rstrip(b"\0")) == (message.sname, message.file)
    joined: dict[int, bytes] = {}
    for name, *values in (item for item in seen[DHCP].options if isinstance(item, tuple)):
        code = name if isinstance(name, int) else DHCPRevOptions[name][0]
        joined[code] = joined.get(code, b"") + bytes_of(name, values)  # scapy leaves long options in their parts
    assert joined == {option.code: option.data for option in message.options}


@settings(deadline=None)
@given(messages)
def test_what_scapy_writes_is_read(message: DhcpMessage) -> None:
    short = tuple(option for option in message.options if len(option.data) <= 255)  # scapy cannot split
    packet: Any = BOOTP(
        op=int(message.op), hops=message.hops, xid=message.xid, secs=message.secs, flags=message.flags,
        ciaddr=str(message.ciaddr), yiaddr=str(message.yiaddr), siaddr=str(message.siaddr),
        giaddr=str(message.giaddr), chaddr=message.chaddr, sname=message.sname, file=message.file,
    ) / DHCP(options=[*(value_for(option) for option in short), "end"])  # fmt: skip
    found = decode(bytes(packet))
    assert found.options == short
    for name in (
        "op",
        "hops",
        "xid",
        "secs",
        "flags",
        "ciaddr",
        "yiaddr",
        "siaddr",
        "giaddr",
        "chaddr",
        "sname",
        "file",
    ):
        assert getattr(found, name) == getattr(message, name), name


@settings(deadline=None)
@given(messages)
def test_scapy_writes_the_same_bytes(message: DhcpMessage) -> None:
    data = encode(message)
    seen: Any = BOOTP(data)
    for layer in (seen, seen[DHCP]):
        layer.raw_packet_cache = None  # made anew, not repeated
    assert bytes(seen) == data
