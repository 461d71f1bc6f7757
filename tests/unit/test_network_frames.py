"""Frames and datagrams, against scapy and against any bytes."""

from __future__ import annotations

import warnings
from ipaddress import IPv4Address
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmsnap.network.frames import Datagram, Frame, MalformedFrameError, internet_checksum, parse_mac

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # scapy warns of old ciphers when it is imported
    from scapy.layers.inet import IP, UDP
    from scapy.layers.l2 import Dot1Q, Ether
    from scapy.packet import Raw

addresses = st.integers(0, 2**32 - 1).map(IPv4Address)
ports = st.integers(0, 65535)
macs = st.binary(min_size=6, max_size=6)
datagrams = st.builds(
    Datagram, source=addresses, source_port=ports, destination=addresses, destination_port=ports,
    data=st.binary(max_size=600),
)  # fmt: skip
tags = st.lists(st.tuples(st.sampled_from([0x8100, 0x88A8]), st.integers(0, 65535)), max_size=2).map(tuple)
frames = st.builds(
    Frame, destination=macs, source=macs, ethertype=st.sampled_from([0x0800, 0x0806, 0x88B5, 0x86DD]),
    payload=st.binary(max_size=100), tags=tags,
)  # fmt: skip


@settings(deadline=None)
@given(frames)
def test_frames_are_read_back(frame: Frame) -> None:
    assert Frame.decode(frame.encode()) == frame


@settings(deadline=None)
@given(datagrams, st.binary(max_size=20))
def test_datagrams_are_read_back_whatever_pads_the_frame(datagram: Datagram, padding: bytes) -> None:
    assert Datagram.decode(datagram.encode() + padding) == datagram


@settings(deadline=None)
@given(datagrams)
def test_scapy_finds_both_checksums_correct(datagram: Datagram) -> None:
    data = datagram.encode()
    seen: Any = IP(data)
    fresh: Any = IP(data)
    del fresh.chksum
    del fresh[UDP].chksum
    again: Any = IP(bytes(fresh))
    assert (seen.chksum, seen[UDP].chksum) == (again.chksum, again[UDP].chksum)
    assert (seen.src, seen.dst) == (str(datagram.source), str(datagram.destination))
    assert (seen[UDP].sport, seen[UDP].dport) == (datagram.source_port, datagram.destination_port)


@settings(deadline=None)
@given(st.binary(max_size=300), st.integers(0, 4095))
def test_what_scapy_writes_is_read(data: bytes, vlan: int) -> None:
    packet: Any = (
        Ether(dst="ff:ff:ff:ff:ff:ff", src="52:54:00:00:00:01")
        / Dot1Q(vlan=vlan)
        / IP(src="10.0.0.1", dst="10.0.0.2", options=b"\x01\x01\x01\x00")
        / UDP(sport=68, dport=67)
        / Raw(data)
    )
    frame = Frame.decode(bytes(packet))
    assert frame.tags == ((0x8100, vlan),)
    datagram = Datagram.decode(frame.payload)
    assert (datagram.destination_port, datagram.data) == (67, data)


@settings(deadline=None)
@given(datagrams, st.integers(0, 65535))
def test_an_unfinished_checksum_is_no_obstacle(datagram: Datagram, checksum: int) -> None:
    data = bytearray(datagram.encode())
    data[26:28] = checksum.to_bytes(2, "big")
    assert Datagram.decode(bytes(data)) == datagram


@settings(deadline=None)
@given(st.binary(max_size=80))
def test_any_bytes_are_read_or_malformed(data: bytes) -> None:
    for reader in (Frame.decode, Datagram.decode):
        try:
            reader(data)
        except MalformedFrameError:
            continue


def changed(position: int, value: int) -> bytes:
    data = bytearray(
        Datagram(
            source=IPv4Address(1), source_port=68, destination=IPv4Address(2), destination_port=67, data=b"hello"
        ).encode()
    )
    data[position] = value
    return bytes(data)


@pytest.mark.parametrize(
    ("position", "value"),
    [(0, 0x65), (0, 0x44), (0, 0x4F), (3, 255), (3, 10), (6, 0x20), (7, 1), (9, 6), (25, 200), (25, 3)],
    ids=["version", "short header", "long header", "long total", "short total", "more fragments", "offset", "TCP",
         "long datagram", "short datagram"],
)  # fmt: skip
def test_contradictions_are_malformed(position: int, value: int) -> None:
    with pytest.raises(MalformedFrameError):
        Datagram.decode(changed(position, value))


def test_the_checksum_of_rfc_1071() -> None:
    assert internet_checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0x220D
    assert internet_checksum(b"\x01") == 0xFEFF


def test_mac_addresses() -> None:
    assert parse_mac("52:54:00:AA:0b:01") == b"\x52\x54\x00\xaa\x0b\x01"
    for text in ("52:54:00:aa:00", "zz:54:00:aa:00:01", ""):
        with pytest.raises(ValueError, match=r"."):
            parse_mac(text)
