"""The codec: what it writes it reads back, it finds options wherever they lie, and it survives any bytes."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmsnap.dhcp.message import (
    DhcpMessage,
    MalformedMessageError,
    MessageType,
    Op,
    Option,
    OptionCode,
    decode,
    encode,
    option_parts,
)

COOKIE = b"\x63\x82\x53\x63"
addresses = st.integers(0, 2**32 - 1).map(IPv4Address)
fields = st.binary(max_size=40).map(lambda data: data.rstrip(b"\0"))
codes = st.integers(1, 254).filter(lambda code: code != OptionCode.OVERLOAD)
options = st.dictionaries(codes, st.binary(max_size=700), max_size=8).map(
    lambda found: tuple(Option(code, data) for code, data in found.items())
)
messages = st.builds(
    DhcpMessage,
    op=st.sampled_from(Op),
    xid=st.integers(0, 2**32 - 1),
    chaddr=st.binary(max_size=16),
    htype=st.integers(0, 255),
    hops=st.integers(0, 255),
    secs=st.integers(0, 65535),
    flags=st.integers(0, 65535),
    ciaddr=addresses,
    yiaddr=addresses,
    siaddr=addresses,
    giaddr=addresses,
    sname=fields,
    file=fields,
    options=options,
)


def raw(options: bytes, *, sname: bytes = b"", file: bytes = b"") -> bytes:
    """Return a message with these option bytes as they are."""
    head = struct.pack("!4BIHH16x16s64s128s", 1, 1, 6, 0, 7, 0, 0, b"\x52\x54\0\0\0\1", sname, file)
    return head + COOKIE + options


@settings(deadline=None)
@given(messages)
def test_what_is_written_is_read_back(message: DhcpMessage) -> None:
    data = encode(message)
    assert len(data) >= 300
    assert decode(data) == message


@settings(deadline=None)
@given(st.binary(max_size=600))
def test_any_bytes_are_a_message_or_malformed(data: bytes) -> None:
    for candidate in (data, raw(data)):
        try:
            decode(candidate)
        except MalformedMessageError:
            continue


@settings(deadline=None)
@given(messages, st.integers(0, 1200), st.integers(0, 255))
def test_a_damaged_message_is_a_message_or_malformed(message: DhcpMessage, position: int, value: int) -> None:
    data = bytearray(encode(message))
    data[position % len(data)] = value
    for candidate in (bytes(data), bytes(data[: position % len(data)])):
        try:
            decode(candidate)
        except MalformedMessageError:
            continue


@settings(deadline=None)
@given(messages)
def test_what_is_read_can_be_written_again(message: DhcpMessage) -> None:
    assert decode(encode(decode(encode(message)))) == message


@st.composite
def scattered(draw: st.DrawFn) -> tuple[bytes, tuple[Option, ...]]:
    """Draw a message whose options lie in parts, with pads, over all areas; and what it says.

    Written from RFC 2131 section 4.1 and RFC 3396, not with the encoder.
    """
    areas = {0: bytearray(), 1: bytearray(), 2: bytearray()}  # options, file, sname: the order of joining
    space = {0: 4000, 1: 128, 2: 64}
    parts = draw(st.lists(st.tuples(codes, st.binary(max_size=40), st.integers(0, 2), st.integers(0, 3)), max_size=30))
    placed: dict[int, list[tuple[int, bytes]]] = {0: [], 1: [], 2: []}
    for code, data, area, pads in parts:
        piece = bytes(pads) + bytes([code, len(data)]) + data
        if len(areas[area]) + len(piece) <= space[area]:
            areas[area] += piece
            placed[area].append((code, data))
    overload = (1 if placed[1] else 0) | (2 if placed[2] else 0)
    if overload:
        where = draw(st.sampled_from(["first", "last"]))
        option = bytes([OptionCode.OVERLOAD, 1, overload])
        areas[0] = bytearray(option + areas[0] if where == "first" else areas[0] + option)
    ends = {area: draw(st.booleans()) for area in areas}
    for area, filled in areas.items():
        # A field that is full has no room for an end mark; pads to the end of a field do as well.
        if ends[area] and len(filled) < space[area]:
            filled.append(255)
    joined: dict[int, bytes] = {}
    for code, data in (item for area in (0, 1, 2) for item in placed[area]):
        joined[code] = joined.get(code, b"") + data
    expected = tuple(Option(code, data) for code, data in joined.items())
    file = bytes(areas[1]) if overload & 1 else b""
    sname = bytes(areas[2]) if overload & 2 else b""
    return raw(bytes(areas[0]), file=file, sname=sname), expected


@settings(deadline=None, max_examples=300)
@given(scattered())
def test_options_are_found_wherever_and_in_how_many_parts_they_lie(
    found: tuple[bytes, tuple[Option, ...]],
) -> None:
    data, expected = found
    message = decode(data)
    assert message.options == expected
    assert decode(encode(message)) == message


@settings(deadline=None)
@given(st.integers(0, 1500))
def test_long_options_are_split_at_255_bytes(size: int) -> None:
    value = bytes(index % 251 for index in range(size))
    data = encode(DhcpMessage(op=Op.REPLY, xid=1, chaddr=b"", options=(Option(43, value), Option(12, b"shop"))))
    parts = option_parts(data)
    lengths = [part.end - part.start for part in parts if part.code == 43]
    assert sum(lengths) == size
    assert all(length == 255 for length in lengths[:-1])
    assert b"".join(data[part.start : part.end] for part in parts if part.code == 43) == value
    assert parts[-1].code == 12


def test_an_empty_option_is_an_option() -> None:
    message = decode(raw(b"\x50\x00\x35\x01\x01\xff"))
    assert message.option(80) == b""
    assert decode(encode(message)) == message


def test_of_two_overloads_the_last_counts() -> None:
    data = raw(b"\x34\x01\x01\x34\x01\x02\xff", file=b"\x0c\x01f\xff", sname=b"\x0c\x01s\xff")
    assert decode(data).option(12) == b"s"


def test_parts_of_an_option_are_joined_in_the_order_options_file_sname() -> None:
    message = decode(
        raw(b"\x34\x01\x03\x3d\x02ab\x0c\x01h\xff", file=b"\x3d\x02cd\0\0\xff", sname=b"\0\x3d\x02ef\x0c\x01i\xff")
    )
    assert message.option(61) == b"abcdef"
    assert message.option(12) == b"hi"
    assert message.option(52) is None
    assert (message.sname, message.file) == (b"", b"")


@pytest.mark.parametrize(
    ("overload", "expected"), [(b"", None), (b"\x34\x01\x01", b"f"), (b"\x34\x01\x02", b"s"), (b"\x34\x01\x03", b"fs")]
)
def test_only_fields_that_are_overloaded_are_read_as_options(overload: bytes, expected: bytes | None) -> None:
    data = raw(overload + b"\xff", file=b"\x0c\x01f\xff", sname=b"\x0c\x01s\xff")
    assert decode(data).option(12) == expected


def test_an_overload_inside_an_overloaded_field_means_nothing() -> None:
    data = raw(b"\x34\x01\x01\xff", file=b"\x34\x01\x02\xff", sname=b"\x0c\x01s\xff")
    assert decode(data).option(12) is None


def test_pads_are_skipped_a_missing_end_is_forgiven_and_bytes_after_the_end_are_not_read() -> None:
    assert decode(raw(b"\0\0\x35\x01\x01")).message_type is MessageType.DISCOVER
    assert decode(raw(b"\x35\x01\x01\xff\x0c\xff")).options == (Option(53, b"\x01"),)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        raw(b"")[:239],
        raw(b"").replace(COOKIE, b"\0\0\0\0"),
        b"\x03" + raw(b"")[1:],
        raw(b"")[:2] + b"\x11" + raw(b"")[3:],
        raw(b"\x35"),
        raw(b"\x35\x02\x01"),
        raw(b"\x34\x01\x04\xff"),
        raw(b"\x34\x02\x01\x01\xff"),
        raw(b"\x34\x00\xff"),
        raw(b"\x34\x01\x01\xff", file=b"\0" * 126 + b"\x0c\x05"),
    ],
    ids=["empty", "short", "no cookie", "op", "hlen", "no length", "cut", "overload 4", "long overload",
         "empty overload", "cut in file"],
)  # fmt: skip
def test_malformed(data: bytes) -> None:
    with pytest.raises(MalformedMessageError):
        decode(data)


def test_an_address_of_another_length_is_malformed() -> None:
    message = decode(raw(b"\x32\x03\x01\x02\x03\xff"))
    with pytest.raises(MalformedMessageError):
        message.address(OptionCode.REQUESTED_ADDRESS)


@pytest.mark.parametrize("data", [b"", b"\x00", b"\x09\x09", b"\x0a", b"\xff"])
def test_an_unknown_kind_of_message_has_no_type(data: bytes) -> None:
    assert DhcpMessage(op=Op.REQUEST, xid=1, chaddr=b"", options=(Option(53, data),)).message_type is None


def test_forcerenew_is_known() -> None:
    message = DhcpMessage(op=Op.REPLY, xid=1, chaddr=b"", options=(Option(53, b"\x09"),))
    assert message.message_type is MessageType.FORCERENEW


@pytest.mark.parametrize(
    "broken",
    [{"chaddr": bytes(17)}, {"sname": bytes(65)}, {"file": bytes(129)}, {"options": (Option(0, b""),)},
     {"options": (Option(255, b""),)}, {"options": (Option(52, b"\1"),)}, {"options": (Option(300, b""),)}],
)  # fmt: skip
def test_what_does_not_fit_is_not_written(broken: dict[str, Any]) -> None:
    values: dict[str, Any] = {"op": Op.REPLY, "xid": 1, "chaddr": b"", **broken}
    with pytest.raises(ValueError, match=r"."):
        encode(DhcpMessage(**values))
