"""The control file's parser, over files with the layouts of several versions."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmsnap.engines.pg_control import ClusterState, ControlFileError, crc32c, parse_control_file
from vmsnap.testing.fake_postgresql import control_file

# Where the CRC lies, by the size of the struct in PostgreSQL's header of that version.
VERSIONS = ((1002, 288, "<"), (1100, 280, "<"), (1300, 288, "<"), (1700, 296, "<"), (1800, 292, "<"), (1300, 288, ">"))


def make(*, version: int, crc_at: int, order: str, state: int, filling: int = 0x5A) -> bytes:
    fields = struct.pack(f"{order}QIIIxxxxqQ", 0x6B01020304050607, version, 202209061, state, 1795249458, 0x1_0151_1A88)
    body = fields + bytes([filling]) * (crc_at - len(fields))
    return (body + struct.pack(f"{order}I", crc32c(body))).ljust(8192, b"\0")


def test_the_sum_is_castagnolis() -> None:
    # The check value of CRC-32C in RFC 3720, and its example of 32 zeroes.
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"6789", start=crc32c(b"12345")) == 0xE3069283


@pytest.mark.parametrize(("version", "crc_at", "order"), VERSIONS)
@pytest.mark.parametrize("state", ClusterState)
def test_every_version_and_state_is_read(version: int, crc_at: int, order: str, state: ClusterState) -> None:
    said = parse_control_file(make(version=version, crc_at=crc_at, order=order, state=state))
    assert said.state is state
    assert said.control_version == version
    assert said.system_identifier == 0x6B01020304050607
    assert said.checkpoint == "1/1511A88"


def test_states_have_the_words_of_pg_controldata() -> None:
    assert [state.text for state in ClusterState] == [
        "starting up",
        "shut down",
        "shut down in recovery",
        "shutting down",
        "in crash recovery",
        "in archive recovery",
        "in production",
    ]


def test_a_state_nobody_knows_is_refused() -> None:
    with pytest.raises(ControlFileError, match="unknown state, 7"):
        parse_control_file(make(version=1300, crc_at=288, order="<", state=7))


@pytest.mark.parametrize("content", [b"", bytes(43), bytes(8192), b"\xff" * 8192, b"x" * 44])
def test_what_is_no_control_file_is_refused(content: bytes) -> None:
    with pytest.raises(ControlFileError):
        parse_control_file(content)


@given(place=st.integers(0, 291), bit=st.integers(0, 7))
def test_no_flipped_bit_goes_unnoticed(place: int, bit: int) -> None:
    content = bytearray(control_file(ClusterState.SHUT_DOWN))
    content[place] ^= 1 << bit
    with pytest.raises(ControlFileError):
        parse_control_file(bytes(content))


@given(st.binary(max_size=600))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    with pytest.raises(ControlFileError):
        parse_control_file(content)


@given(st.integers(1, 291))
def test_a_torn_file_is_refused(length: int) -> None:
    content = control_file(ClusterState.SHUT_DOWN)
    with pytest.raises(ControlFileError):
        parse_control_file(content[:length])
    with pytest.raises(ControlFileError):
        parse_control_file(content[:length] + control_file(ClusterState.IN_PRODUCTION, system_identifier=1)[length:])
