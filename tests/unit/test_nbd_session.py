from __future__ import annotations

import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmsnap.nbd import wire
from vmsnap.nbd.session import LARGEST_REQUEST, NbdProtocolError, Request, Session
from vmsnap.nbd.wire import Command, Export, Fault, Option, OptionReply, Run

VDA = Export(name="vda", size_bytes=1 << 20, block_bytes=1 << 16)
EXPORTS = {"vda": VDA, "vdb": Export(name="vdb", size_bytes=512, block_bytes=1 << 16)}
HELLO = struct.pack("!I", 3)


def option(number: int, data: bytes = b"") -> bytes:
    return struct.pack("!8sII", b"IHAVEOPT", number, len(data)) + data


def named(name: bytes, rest: bytes) -> bytes:
    return struct.pack("!I", len(name)) + name + rest


def go(name: bytes = b"vda") -> bytes:
    return option(Option.GO, named(name, struct.pack("!HH", 1, 3)))


def context(name: bytes = b"vda", query: bytes = b"base:allocation") -> bytes:
    return option(Option.SET_META_CONTEXT, named(name, struct.pack("!I", 1) + named(query, b"")))


def request(command: int, *, offset: int = 0, length: int = 0, cookie: int = 7, flags: int = 0) -> bytes:
    return struct.pack("!IHHQQI", 0x25609513, flags, command, cookie, offset, length)


def ready(*options: bytes) -> Session:
    session = Session(EXPORTS)
    session.receive(HELLO + b"".join(options) + go())
    session.pending()
    return session


def replies(data: bytes) -> list[tuple[int, int, bytes]]:
    """Return option, kind and payload of each answer to an option."""
    found = []
    while data:
        magic, number, kind, length = struct.unpack_from("!QIII", data)
        assert magic == 0x3E889045565A9
        found.append((number, kind, data[20 : 20 + length]))
        data = data[20 + length :]
    return found


def test_greets_as_fixed_newstyle() -> None:
    assert Session(EXPORTS).pending() == b"NBDMAGICIHAVEOPT\x00\x03"


def test_go_tells_size_flags_and_block_size() -> None:
    session = Session(EXPORTS)
    session.pending()
    session.receive(HELLO + go())
    export, sizes, end = replies(session.pending())
    number, size, flags = struct.unpack("!HQH", export[2])
    assert (number, size) == (0, 1 << 20)
    assert flags & wire.Transmission.READ_ONLY
    assert flags & wire.Transmission.CAN_MULTI_CONN
    assert struct.unpack("!HIII", sizes[2]) == (3, 1, 1 << 16, LARGEST_REQUEST)
    assert end[1] == OptionReply.ACK
    assert session.export == VDA


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (go(b"nobody"), OptionReply.ERR_UNKNOWN),
        (option(Option.GO, b"\0\0"), OptionReply.ERR_INVALID),
        (option(Option.GO, named(b"vda", b"\0\x05\0\0")), OptionReply.ERR_INVALID),
        (option(Option.LIST, b"x"), OptionReply.ERR_INVALID),
        (option(Option.STARTTLS), OptionReply.ERR_UNSUP),
        (option(99, b"anything"), OptionReply.ERR_UNSUP),
        (option(Option.STRUCTURED_REPLY, b"x"), OptionReply.ERR_INVALID),
        (context(), OptionReply.ERR_INVALID),
    ],
)
def test_refuses_an_option_and_goes_on(sent: bytes, answer: OptionReply) -> None:
    session = Session(EXPORTS)
    session.pending()
    session.receive(HELLO + sent)
    assert [kind for _, kind, _ in replies(session.pending())] == [answer]
    session.receive(go())
    assert session.export == VDA


def test_lists_exports() -> None:
    session = Session(EXPORTS)
    session.pending()
    session.receive(HELLO + option(Option.LIST))
    listed = replies(session.pending())
    assert [payload for _, _, payload in listed] == [b"\0\0\0\x03vda", b"\0\0\0\x03vdb", b""]


def test_old_clients_name_their_export() -> None:
    session = Session(EXPORTS)
    session.pending()
    session.receive(struct.pack("!I", 1) + option(Option.EXPORT_NAME, b"vda"))
    out = session.pending()
    assert len(out) == 10 + 124
    assert struct.unpack_from("!Q", out) == (1 << 20,)
    with pytest.raises(NbdProtocolError):
        Session(EXPORTS).receive(HELLO + option(Option.EXPORT_NAME, b"other"))


def test_reads_are_answered_in_simple_and_in_structured_replies() -> None:
    wanted = request(Command.READ, offset=4096, length=3)
    simple = ready()
    (asked,) = simple.receive(wanted)
    assert asked == Request(cookie=7, command=Command.READ, offset=4096, length=3)
    assert simple.data(asked, data=b"abc") == struct.pack("!IIQ", 0x67446698, 0, 7) + b"abc"
    structured = ready(option(Option.STRUCTURED_REPLY))
    (asked,) = structured.receive(wanted)
    head = struct.pack("!IHHQI", 0x668E33EF, 1, 1, 7, 11)
    assert structured.data(asked, data=b"abc") == head + struct.pack("!Q", 4096) + b"abc"


def test_holes_are_told_once_they_are_negotiated() -> None:
    asking = request(Command.BLOCK_STATUS, length=1 << 20)
    without = ready(option(Option.STRUCTURED_REPLY))
    assert not without.receive(asking)
    session = ready(option(Option.STRUCTURED_REPLY), context())
    runs = (Run(length=65536, hole=False), Run(length=65536, hole=True))
    (asked,) = session.receive(asking)
    assert session.status(asked, runs=runs)[20:] == struct.pack("!IIIII", 1, 65536, 0, 65536, 3)
    (one,) = session.receive(request(Command.BLOCK_STATUS, length=1 << 20, flags=8))
    assert session.status(one, runs=runs)[20:] == struct.pack("!III", 1, 65536, 0)


def test_holes_of_another_export_are_not_negotiated() -> None:
    session = ready(option(Option.STRUCTURED_REPLY), context(b"vdb"))
    assert not session.receive(request(Command.BLOCK_STATUS, length=512))
    assert session.pending()


@pytest.mark.parametrize(
    ("sent", "fault"),
    [
        (request(Command.WRITE, length=4) + b"data", Fault.EPERM),
        (request(Command.TRIM, length=4), Fault.EPERM),
        (request(Command.WRITE_ZEROES, length=4), Fault.EPERM),
        (request(Command.READ, offset=(1 << 20) - 1, length=2), Fault.EINVAL),
        (request(Command.READ, offset=1 << 63, length=2), Fault.EINVAL),
        (request(Command.READ), Fault.EINVAL),
        (request(Command.READ, length=1, flags=8), Fault.EINVAL),
        (request(55, length=1), Fault.EINVAL),
    ],
)
def test_refuses_a_request_and_goes_on(sent: bytes, fault: Fault) -> None:
    session = ready()
    assert not session.receive(sent)
    assert session.pending() == struct.pack("!IIQ", 0x67446698, fault, 7)
    assert len(session.receive(request(Command.READ, length=1))) == 1


def test_a_huge_read_is_refused() -> None:
    huge = {"vda": Export(name="vda", size_bytes=1 << 40, block_bytes=1 << 16)}
    session = Session(huge)
    session.receive(HELLO + go())
    session.pending()
    assert not session.receive(request(Command.READ, length=LARGEST_REQUEST + 1))
    assert session.pending() == struct.pack("!IIQ", 0x67446698, Fault.EOVERFLOW, 7)


def test_a_client_says_when_it_is_done() -> None:
    session = ready()
    session.receive(request(Command.DISCONNECT) + b"what comes after does not matter")
    assert session.closed


@pytest.mark.parametrize(
    "sent",
    [
        b"\0\0\0\0",
        b"GET / HTTP/1.1\r\n\r\n",
        HELLO + b"x" * 16,
        HELLO + struct.pack("!8sII", b"IHAVEOPT", 1, 1 << 30),
        HELLO + go() + b"\xff" * 28,
        HELLO + go() + request(Command.WRITE, length=1 << 30),
    ],
)
def test_what_is_no_nbd_is_cut_off(sent: bytes) -> None:
    with pytest.raises(NbdProtocolError):
        Session(EXPORTS).receive(sent)


TALK = (
    HELLO
    + option(Option.LIST)
    + option(Option.STRUCTURED_REPLY)
    + context()
    + go()
    + request(Command.WRITE, length=5, cookie=1)
    + b"12345"
    + request(Command.READ, offset=1, length=9, cookie=2)
    + request(Command.FLUSH, cookie=3)
    + request(Command.DISCONNECT)
)


@given(st.lists(st.integers(1, len(TALK))))
def test_how_bytes_are_cut_does_not_matter(cuts: list[int]) -> None:
    whole, cut = Session(EXPORTS), Session(EXPORTS)
    expected = whole.receive(TALK)
    edges = sorted({0, len(TALK), *cuts})
    found = tuple(one for a, b in pairwise(edges) for one in cut.receive(TALK[a:b]))
    assert found == expected
    assert [one.cookie for one in found] == [2, 3]
    assert cut.pending() == whole.pending()
    assert cut.closed


@given(st.binary(max_size=200), st.sampled_from([b"", HELLO, HELLO + go(), HELLO + option(Option.STRUCTURED_REPLY)]))
def test_no_bytes_make_it_fail_otherwise(data: bytes, before: bytes) -> None:
    session = Session(EXPORTS)
    session.receive(before)
    try:
        for one in session.receive(data):
            assert one.command is Command.FLUSH or one.offset + one.length <= VDA.size_bytes
    except NbdProtocolError:
        pass
