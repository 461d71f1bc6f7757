"""Where a guest lives in production, by three witnesses: its agent, libvirt's leases, and the host's ARP table."""

from __future__ import annotations

from ipaddress import AddressValueError, IPv4Interface
from typing import Any

import libvirt

Addresses = dict[str, tuple[IPv4Interface, ...]]
"""IPv4 addresses by MAC. A /32 says that the prefix is not known."""

_COMPLETE = 0x2  # ATF_COM of linux/if_arp.h


def by_agent(answer: dict[str, Any]) -> Addresses:
    """Read the answer of guest-network-get-interfaces (qga/qapi-schema.json)."""
    found = {}
    for interface in answer["return"]:
        addresses = tuple(
            IPv4Interface(f"{item['ip-address']}/{item['prefix']}")
            for item in interface.get("ip-addresses", [])
            if item["ip-address-type"] == "ipv4"
        )
        mac = interface.get("hardware-address", "").lower()
        if mac and mac != "00:00:00:00:00:00" and addresses:
            found[mac] = addresses
    return found


def by_lease(interfaces: dict[str, Any]) -> Addresses:
    """Read what virDomainInterfaceAddresses says of libvirt's own DHCP servers."""
    found = {}
    for interface in interfaces.values():
        addresses = tuple(
            IPv4Interface(f"{item['addr']}/{item['prefix'] or 32}")
            for item in interface.get("addrs") or []
            if item["type"] == libvirt.VIR_IP_ADDR_TYPE_IPV4
        )
        if addresses and interface.get("hwaddr"):
            found[interface["hwaddr"].lower()] = addresses
    return found


def by_arp(table: str, *, macs: frozenset[str]) -> Addresses:
    """Read ``/proc/net/arp`` (proc(5)) for some MACs.

    libvirt's own reading of that table (its source 'arp') fails with 'wrong nlmsg len' in 9.0.
    """
    found: Addresses = {}
    for line in table.splitlines()[1:]:
        words = line.split()
        if len(words) < 6 or words[3].lower() not in macs:
            continue
        try:
            if int(words[2], 16) & _COMPLETE:
                address = IPv4Interface(f"{words[0]}/32")
                found[words[3].lower()] = (*found.get(words[3].lower(), ()), address)
        except (AddressValueError, ValueError):
            continue
    return found
