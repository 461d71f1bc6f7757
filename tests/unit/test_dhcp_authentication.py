"""Option 90 and FORCERENEW: the layout on the wire, the digest, and what a client must not believe."""

from __future__ import annotations

import hashlib
import hmac
import itertools
import warnings
from dataclasses import replace
from ipaddress import IPv4Address
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmsnap.dhcp.authentication import (
    Authentication,
    Proof,
    ReplayCounter,
    authentication_of,
    is_signed,
    nonce_of,
    sign,
    takes_nonce,
)
from vmsnap.dhcp.forcerenew import Bound, forcerenew
from vmsnap.dhcp.message import DhcpMessage, MalformedMessageError, MessageType, Op, Option, decode, encode
from vmsnap.errors import PreconditionError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # scapy warns of old ciphers when it is imported
    from scapy.layers.dhcp import BOOTP, DHCP

NONCE = bytes(range(16))
MAC = b"\x52\x54\0\xaa\0\1"
CLIENT = Bound(mac=MAC, address=IPv4Address("10.9.8.77"), server=IPv4Address("10.9.8.2"), xid=0xCAFE, nonce=NONCE)
replays = st.integers(0, 2**64 - 1)
secrets = st.binary(min_size=16, max_size=16)
addresses = st.integers(0, 2**32 - 1).map(IPv4Address)
clients = st.builds(
    Bound, mac=st.binary(min_size=6, max_size=6), address=addresses, server=addresses, xid=st.integers(0, 2**32 - 1),
    nonce=secrets,
)  # fmt: skip


def test_the_layout_on_the_wire() -> None:
    data = Authentication(proof=Proof.NONCE, replay=0x0102030405060708, value=NONCE).encode()
    assert data == bytes.fromhex("03 01 00 0102030405060708 01") + NONCE
    assert len(data) == 0x1C
    message = DhcpMessage(op=Op.REPLY, xid=1, chaddr=MAC, options=(Option(90, data),))
    assert b"\x5a\x1c" + data in encode(message)


@settings(deadline=None)
@given(st.sampled_from(Proof), replays, secrets)
def test_what_is_written_is_read_back(proof: Proof, replay: int, value: bytes) -> None:
    written = Authentication(proof=proof, replay=replay, value=value)
    assert Authentication.decode(written.encode()) == written
    assert value.hex() not in repr(written)
    assert "value" not in repr(written)


@settings(deadline=None)
@given(st.binary(max_size=40) | st.binary(min_size=28, max_size=28))
def test_any_bytes_are_an_authentication_or_malformed(data: bytes) -> None:
    try:
        found = Authentication.decode(data)
    except MalformedMessageError:
        return
    assert found.encode() == data


@pytest.mark.parametrize(
    ("position", "value"), [(0, 1), (1, 0), (2, 1), (11, 0), (11, 3)],
    ids=["delayed authentication", "algorithm", "replay method", "type 0", "type 3"],
)  # fmt: skip
def test_what_rfc_6704_does_not_know_is_malformed(position: int, value: int) -> None:
    data = bytearray(Authentication(proof=Proof.NONCE, replay=1, value=NONCE).encode())
    data[position] = value
    with pytest.raises(MalformedMessageError):
        Authentication.decode(bytes(data))
    ack = DhcpMessage(op=Op.REPLY, xid=1, chaddr=MAC, options=(Option(53, b"\5"), Option(90, bytes(data))))
    assert nonce_of(ack) is None


@pytest.mark.parametrize(("value", "replay"), [(b"short", 1), (bytes(17), 1), (NONCE, -1), (NONCE, 1 << 64)])
def test_what_does_not_fit_is_not_written(value: bytes, replay: int) -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        Authentication(proof=Proof.NONCE, replay=replay, value=value).encode()


@pytest.mark.parametrize(("kind", "proof", "expected"), [(5, 1, NONCE), (2, 1, None), (9, 1, None), (5, 2, None)])
def test_only_an_ack_hands_a_nonce_out(kind: int, proof: int, expected: bytes | None) -> None:
    option = Authentication(proof=Proof(proof), replay=1, value=NONCE).encode()
    message = DhcpMessage(op=Op.REPLY, xid=1, chaddr=MAC, options=(Option(53, bytes([kind])), Option(90, option)))
    assert nonce_of(message) == expected
    assert nonce_of(DhcpMessage(op=Op.REPLY, xid=1, chaddr=MAC)) is None


@pytest.mark.parametrize(("option", "expected"), [(b"\1", True), (b"\7\1", True), (b"", False), (b"\2", False)])
def test_a_client_says_what_it_can_verify(option: bytes, expected: bool) -> None:  # noqa: FBT001 - a table
    assert takes_nonce(DhcpMessage(op=Op.REQUEST, xid=1, chaddr=MAC, options=(Option(145, option),))) is expected
    assert not takes_nonce(DhcpMessage(op=Op.REQUEST, xid=1, chaddr=MAC))


def test_a_forcerenew_speaks_as_the_server_of_the_lease() -> None:
    plain = forcerenew(replace(CLIENT, nonce=None), replay=7)
    assert plain.message_type is MessageType.FORCERENEW
    assert (plain.op, plain.xid, plain.chaddr, plain.ciaddr) == (Op.REPLY, 0xCAFE, MAC, CLIENT.address)
    assert plain.address(54) == CLIENT.server
    assert plain.option(90) is None
    assert "nonce" not in repr(CLIENT)


def test_the_digest_is_hmac_md5_over_the_whole_message_with_blanks() -> None:
    data = bytearray(encode(forcerenew(CLIENT, replay=7)))
    position = data.index(b"\x5a\x1c") + 2 + 12
    digest = bytes(data[position : position + 16])
    data[position : position + 16] = bytes(16)
    # RFC 2104 by hand, not by the function that the code uses.
    key = NONCE.ljust(64, b"\0")
    inner = hashlib.md5(bytes(byte ^ 0x36 for byte in key) + data).digest()  # noqa: S324 - RFC 6704 says so
    assert digest == hashlib.md5(bytes(byte ^ 0x5C for byte in key) + inner).digest()  # noqa: S324


@settings(deadline=None)
@given(clients, st.integers(1, 2**64 - 1))
def test_a_client_believes_what_its_server_signed_once(client: Bound, replay: int) -> None:
    data = encode(forcerenew(client, replay=replay))
    assert client.nonce is not None
    assert is_signed(data, message=decode(data), nonce=client.nonce, after=replay - 1)
    assert not is_signed(data, message=decode(data), nonce=client.nonce, after=replay)


@settings(deadline=None)
@given(clients, secrets)
def test_another_nonce_is_not_believed(client: Bound, other: bytes) -> None:
    data = encode(forcerenew(client, replay=1))
    assert is_signed(data, message=decode(data), nonce=other, after=0) is (other == client.nonce)


@settings(deadline=None)
@given(st.integers(0, 299), st.integers(1, 255))
def test_a_changed_message_is_not_believed_but_for_what_a_relay_may_change(position: int, change: int) -> None:
    data = bytearray(encode(forcerenew(CLIENT, replay=1)))
    data[position] ^= change
    try:
        message = decode(bytes(data))
    except MalformedMessageError:
        return
    relayed = position == 3 or 24 <= position < 28
    assert is_signed(bytes(data), message=message, nonce=NONCE, after=0) is relayed


def test_an_option_in_two_parts_is_not_believed() -> None:
    signed = encode(forcerenew(CLIENT, replay=1))
    at = signed.index(b"\x5a\x1c")
    split = signed[:at] + b"\x5a\x0c" + signed[at + 2 : at + 14] + b"\x5a\x10" + signed[at + 14 :]
    message = decode(split)
    assert authentication_of(message) == authentication_of(decode(signed))
    assert not is_signed(split, message=message, nonce=NONCE, after=0)


@pytest.mark.parametrize("option", [None, b"\3\1", Authentication(proof=Proof.NONCE, replay=9, value=NONCE).encode()])
def test_no_proof_is_not_believed(option: bytes | None) -> None:
    options = () if option is None else (Option(90, option),)
    data = encode(DhcpMessage(op=Op.REPLY, xid=1, chaddr=MAC, options=options))
    assert not is_signed(data, message=decode(data), nonce=NONCE, after=0)


def test_signing_again_replaces_the_proof() -> None:
    once = forcerenew(CLIENT, replay=1)
    twice = sign(once, nonce=NONCE, replay=2)
    assert twice == forcerenew(CLIENT, replay=2)


def test_a_host_without_md5_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bytes:
        raise ValueError("unsupported")

    monkeypatch.setattr(hmac, "digest", refuse)
    with pytest.raises(PreconditionError, match="MD5"):
        forcerenew(CLIENT, replay=1)


def test_scapy_reads_a_forcerenew() -> None:
    seen: Any = BOOTP(encode(forcerenew(CLIENT, replay=7)))
    options = {option[0]: option[1] for option in seen[DHCP].options if isinstance(option, tuple)}
    assert (seen.op, seen.xid, seen.ciaddr) == (2, 0xCAFE, "10.9.8.77")
    assert options["message-type"] == 9
    assert options["server_id"] == "10.9.8.2"
    proof: Any = options.get("dhcp-authentication", options.get(90))
    assert bytes(proof)[:12] == bytes.fromhex("03 01 00 0000000000000007 02")


@settings(deadline=None)
@given(st.lists(st.floats(0, 2**31), min_size=2, max_size=20))
def test_replay_values_rise_whatever_the_clock_does(times: list[float]) -> None:
    moments = iter(times)
    counter = ReplayCounter(wall_seconds=lambda: next(moments))
    values = [counter.next() for _ in times]
    assert all(earlier < later < 2**64 for earlier, later in itertools.pairwise(values))


def test_replay_values_are_ntp_timestamps() -> None:
    assert ReplayCounter(wall_seconds=lambda: 0.5).next() == (2_208_988_800 << 32) + (1 << 31)
