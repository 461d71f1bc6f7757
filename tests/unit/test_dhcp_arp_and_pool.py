"""ARP packets and answers; the choice of a network for leases."""

from __future__ import annotations

import warnings
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmsnap.dhcp.arp import ArpOperation, ArpPacket, ArpPolicy, MalformedArpError
from vmsnap.dhcp.pool import DEFAULT_POOL, choose_networks
from vmsnap.errors import PreconditionError
from vmsnap.model.ids import RunId

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # scapy warns of old ciphers when it is imported
    from scapy.layers.l2 import ARP

OURS = b"\x02\0\0\0\0\1"
CLONE = b"\x52\x54\0\0\0\1"
GATEWAY = IPv4Address("10.9.8.1")
OLD = IPv4Address("10.9.8.77")
addresses = st.integers(0, 2**32 - 1).map(IPv4Address)
macs = st.binary(min_size=6, max_size=6)
packets = st.builds(
    ArpPacket, operation=st.sampled_from(ArpOperation), sender_mac=macs, sender=addresses, target=addresses,
    target_mac=macs,
)  # fmt: skip
runs = st.integers(0, 2**40 - 1).map(lambda number: RunId(f"{number:010x}"))
networks = st.tuples(st.integers(0, 2**17 - 1), st.integers(15, 32)).map(
    lambda pair: IPv4Network((int(DEFAULT_POOL.network_address) + pair[0], pair[1]), strict=False)
)


@settings(deadline=None)
@given(packets, st.binary(max_size=20))
def test_packets_are_read_back_and_scapy_agrees(packet: ArpPacket, padding: bytes) -> None:
    assert ArpPacket.decode(packet.encode() + padding) == packet
    seen: Any = ARP(packet.encode())
    assert (seen.op, seen.psrc, seen.pdst) == (packet.operation, str(packet.sender), str(packet.target))
    assert bytes.fromhex(seen.hwsrc.replace(":", "")) == packet.sender_mac
    assert bytes.fromhex(seen.hwdst.replace(":", "")) == packet.target_mac


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_a_packet_or_malformed(data: bytes) -> None:
    try:
        ArpPacket.decode(data)
    except MalformedArpError:
        return


def ask(target: IPv4Address, *, sender: IPv4Address = OLD, mac: bytes = CLONE) -> ArpPacket:
    return ArpPacket(operation=ArpOperation.REQUEST, sender_mac=mac, sender=sender, target=target)


def test_questions_for_our_addresses_are_answered() -> None:
    answer = ArpPolicy(addresses=frozenset({GATEWAY})).answer(ask(GATEWAY), mac=OURS)
    assert answer == ArpPacket(
        operation=ArpOperation.REPLY, sender_mac=OURS, sender=GATEWAY, target_mac=CLONE, target=OLD
    )


@pytest.mark.parametrize(
    "packet",
    [
        ask(OLD),
        ask(GATEWAY, sender=IPv4Address(0)),
        ask(OLD, sender=IPv4Address(0)),
        ask(GATEWAY, sender=GATEWAY),
        ask(GATEWAY, mac=OURS),
        ArpPacket(operation=ArpOperation.REPLY, sender_mac=CLONE, sender=OLD, target=GATEWAY),
    ],
    ids=["its own", "probe", "probe of its own", "announcement", "ourselves", "an answer"],
)
def test_nothing_takes_an_address_from_the_clone(packet: ArpPacket) -> None:
    everything = ArpPolicy(addresses=frozenset({GATEWAY}), everything_but=frozenset({OLD}))
    assert everything.answer(packet, mac=OURS) is None


def test_without_a_gateway_everything_is_answered() -> None:
    stranger = IPv4Address("10.9.8.200")
    assert ArpPolicy(everything_but=frozenset({OLD})).answer(ask(stranger), mac=OURS) is not None
    assert ArpPolicy().answer(ask(stranger), mac=OURS) is None


@settings(deadline=None)
@given(runs, st.integers(0, 4), st.lists(networks, max_size=6))
def test_networks_overlap_nothing_that_is_in_use(run: RunId, count: int, avoid: list[IPv4Network]) -> None:
    free = sum(not any(net.overlaps(other) for other in avoid) for net in DEFAULT_POOL.subnets(new_prefix=24))
    if free < count:
        with pytest.raises(PreconditionError):
            choose_networks(run, count=count, avoid=avoid)
        return
    chosen = choose_networks(run, count=count, avoid=avoid)
    assert chosen == choose_networks(run, count=count, avoid=avoid)
    assert len(set(chosen)) == count
    for net in chosen:
        assert net.prefixlen == 24
        assert net.subnet_of(DEFAULT_POOL)
        assert not any(net.overlaps(other) for other in avoid)


def test_runs_are_spread_over_the_pool() -> None:
    found = {choose_networks(RunId(f"{n:010x}"), count=1, avoid=()) for n in range(100)}
    assert len(found) == 100


def test_a_pool_that_is_too_small_is_refused() -> None:
    with pytest.raises(PreconditionError, match="has 0 free"):
        choose_networks(RunId("0" * 10), count=1, avoid=(), pool=IPv4Network("198.18.0.0/25"))
