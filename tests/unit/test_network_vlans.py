"""What a link inside a VLAN hands on: tags off and on, checksums made, and nothing of another VLAN."""

from __future__ import annotations

import warnings
from ipaddress import IPv4Address
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmsnap.model.isolation import FencePort
from vmsnap.network.frames import ETHERTYPE_IPV4, Datagram, Frame, Tag
from vmsnap.network.vlans import VlanLink, vlan_link_name, with_checksum
from vmsnap.testing.fence_contract import fence_plan

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # scapy warns of old ciphers when it is imported
    from scapy.layers.inet import ICMP, IP, TCP, UDP
    from scapy.packet import Raw

PORT = fence_plan().ports[0]
OURS, CLIENT = b"\x02\0\0\0\0\1", b"\x52\x54\0\0\0\1"
layers = st.sampled_from([TCP(sport=22, dport=40000, flags="PA"), UDP(sport=53, dport=40000)])


def link(*tags: Tag) -> VlanLink:
    return VlanLink("no namespace", port=PORT, tags=tags or ((0x8100, 42),))


def frame(*tags: Tag, payload: bytes = bytes(46), ethertype: int = 0x0806) -> Frame:
    return Frame(destination=OURS, source=CLIENT, ethertype=ethertype, payload=payload, tags=tags)


@settings(deadline=None)
@given(layers, st.binary(max_size=200), st.integers(0, 65535), st.binary(max_size=20))
def test_checksums_are_made_as_scapy_makes_them(layer: Any, data: bytes, wrong: int, padding: bytes) -> None:
    right = bytes(IP(src="198.18.7.10", dst="198.18.7.1", options=b"\1\1\1\0") / layer / Raw(data))
    damaged = layer.copy()
    damaged.chksum = wrong
    sent = bytes(IP(src="198.18.7.10", dst="198.18.7.1", options=b"\1\1\1\0") / damaged / Raw(data))
    assert with_checksum(sent + padding) == right + padding


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"\x45" + bytes(10),
        bytes(IP(src="10.0.0.1", dst="10.0.0.2") / ICMP()),
        bytes(IP(src="10.0.0.1", dst="10.0.0.2", flags="MF") / UDP() / Raw(bytes(8))),
        bytes(IP(src="10.0.0.1", dst="10.0.0.2", len=500) / UDP() / Raw(b"cut")),
        bytes(IP(src="10.0.0.1", dst="10.0.0.2", proto=6) / Raw(b"short")),
    ],
    ids=["nothing", "short", "ICMP", "a fragment", "cut", "no whole header"],
)
def test_what_has_no_such_checksum_is_left_alone(packet: bytes) -> None:
    assert with_checksum(packet) == packet


@settings(deadline=None)
@given(st.binary(max_size=80))
def test_any_bytes_are_handed_on_or_not(data: bytes) -> None:
    assert len(with_checksum(data)) == len(data)
    link()._untagged(data)
    link()._untagged(frame((0x8100, 42), payload=data, ethertype=ETHERTYPE_IPV4).encode())


@pytest.mark.parametrize(
    ("tags", "passes"),
    [
        (((0x8100, 42),), True),
        (((0x8100, 5 << 13 | 42),), True),
        (((0x8100, 43),), False),
        (((0x88A8, 42),), False),
        (((0x8100, 42), (0x8100, 7)), False),
        ((), False),
    ],
    ids=["its own", "with a priority", "another", "another kind", "one more", "none"],
)
def test_only_its_own_vlan_passes(tags: tuple[Tag, ...], passes: bool) -> None:  # noqa: FBT001 - a table
    arrived = link()._untagged(frame(*tags).encode())
    assert arrived == (frame().encode() if passes else None)


def test_what_leaves_bears_the_tags() -> None:
    tags = ((0x88A8, 7), (0x8100, 42))
    sent = link(*tags)._tagged(frame().encode())
    assert Frame.decode(sent) == frame(*tags)


@pytest.mark.parametrize(("port", "passes"), [(67, False), (68, True), (53, True)])
def test_what_the_responder_serves_does_not_reach_the_kernel(port: int, passes: bool) -> None:  # noqa: FBT001 - a table
    datagram = Datagram(
        source=IPv4Address("198.18.7.10"), source_port=68, destination=IPv4Address("198.18.7.1"),
        destination_port=port, data=b"renew",
    )  # fmt: skip
    data = frame((0x8100, 42), payload=datagram.encode(), ethertype=ETHERTYPE_IPV4).encode()
    assert (link()._untagged(data) is not None) is passes


@pytest.mark.parametrize("index", [0, 9, 10, 99])
def test_its_name_is_of_the_run_and_of_nothing_else(index: int) -> None:
    run = "0123456789"
    port = FencePort(
        index=index, mac="52:54:00:00:00:01", bridge=f"vs{run}b{index}", tap=f"vs{run}t{index}",
        veth_host=f"vs{run}h{index}", veth_inside=f"vs{run}n{index}",
    )  # fmt: skip
    assert vlan_link_name(port) == f"vs{run}v{index}"
    assert len(vlan_link_name(port)) <= 15


def test_closing_what_was_never_opened_is_no_error() -> None:
    link().close()
