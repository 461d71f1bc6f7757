"""Addresses of guests in the host's ARP table."""

from __future__ import annotations

from ipaddress import IPv4Interface

from vmsnap.hypervisors.libvirt.addresses import by_arp

TABLE = """\
IP address       HW type     Flags       HW address            Mask     Device
192.0.2.20       0x1         0x2         52:54:00:AA:00:01     *        br0
192.0.2.21       0x1         0x0         52:54:00:aa:00:02     *        br0
192.0.2.22       0x1         0x2         52:54:00:aa:00:03     *        br0
192.0.2.23       0x1         0x6         52:54:00:aa:00:01     *        br0
half a line
not.an.address   0x1         0x2         52:54:00:aa:00:01     *        br0
"""


def test_a_guest_is_found_by_its_cards() -> None:
    found = by_arp(TABLE, macs=frozenset({"52:54:00:aa:00:01", "52:54:00:aa:00:02"}))
    assert found == {"52:54:00:aa:00:01": (IPv4Interface("192.0.2.20/32"), IPv4Interface("192.0.2.23/32"))}


def test_an_unanswered_question_is_no_address() -> None:
    assert by_arp(TABLE, macs=frozenset({"52:54:00:aa:00:02"})) == {}


def test_an_empty_table_knows_nobody() -> None:
    assert by_arp("", macs=frozenset({"52:54:00:aa:00:01"})) == {}
