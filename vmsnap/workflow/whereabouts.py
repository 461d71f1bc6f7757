"""What is known, before a guest is captured, of the addresses that its clone will believe to have."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from datetime import timedelta
from ipaddress import IPv4Interface
from typing import Any

from vmsnap.errors import VmsnapError
from vmsnap.model.command import Command
from vmsnap.model.guest import Guest, OldAddress
from vmsnap.model.isolation import Exchange, Rung
from vmsnap.model.policy import Policy
from vmsnap.workflow.run import closing
from vmsnap.workflow.world import World

_LOG = logging.getLogger(__name__)
_ASSUMED_PREFIX = 24
ADDRESS_QUESTION = Command(argv=("ip", "-json", "-4", "address", "show"))
"""The one command that a guest in production is ever asked to run."""
_TIMEOUT = timedelta(seconds=10)


def old_addresses(policy: Policy, *, guest: Guest) -> tuple[OldAddress, ...]:
    """Return where the guest lives in production: by the policy, else as the hypervisor saw it.

    An address whose prefix nobody knows is taken for a /24; the prefix only decides who counts as a neighbour.
    """
    gateway, vlan = policy.isolation.old_gateway, policy.isolation.old_vlan
    if policy.isolation.old_address is not None:
        return (OldAddress(interface=policy.isolation.old_address, gateway=gateway, vlan=vlan),)
    found = []
    for nic in guest.nics:
        for interface in nic.addresses:
            known = interface
            if interface.network.prefixlen == interface.max_prefixlen:
                known = IPv4Interface(f"{interface.ip}/{_ASSUMED_PREFIX}")
            found.append(OldAddress(interface=known, gateway=gateway, mac=nic.mac, vlan=vlan))
    if gateway is not None and any(gateway in old.interface.network for old in found):
        # The gateway is on one of the guest's networks; on the others it would not be believed.
        return tuple(old if gateway in old.interface.network else replace(old, gateway=None) for old in found)
    return tuple(found)


def exchanges_of(world: World, *, policy: Policy, guest: Guest) -> tuple[Exchange, ...]:
    """Return the last DHCP exchanges of the guest's NICs, where the policy names who saw them. Never fails a backup."""
    if policy.isolation.exchanges == "none":
        return ()
    found = []
    for nic in guest.nics:
        try:
            exchange = world.exchanges.get(nic.mac)
        except VmsnapError as error:
            _LOG.warning("the last DHCP exchange of %s is not known: %s", nic.mac, error.brief)
            continue
        if exchange is not None:
            found.append(exchange)
    return tuple(found)


def static_macs(world: World, *, policy: Policy, guest: Guest, exchanges: tuple[Exchange, ...]) -> frozenset[str]:
    """Return the NICs that do not use DHCP: by the policy, else as the guest's agent says, where it may be asked.

    Asking is one command that changes nothing. A NIC without any IPv4 address counts as static beside one that is.
    Where nothing is known nothing is static.
    """
    macs = frozenset(nic.mac.lower() for nic in guest.nics)
    if policy.isolation.static != "auto":
        return macs if policy.isolation.static else frozenset()
    if policy.control.via == "ssh" and Rung.AGENT not in policy.isolation.ladder:
        return frozenset()
    if not guest.has_agent_channel:
        return frozenset()
    kinds = _kinds(_ask(world, guest=guest.name))
    if not any(mac in kinds and not kinds[mac] for mac in macs):
        return frozenset()
    by_dhcp = {mac for mac, dynamic in kinds.items() if dynamic} | {item.mac.lower() for item in exchanges}
    return macs - by_dhcp


def _ask(world: World, *, guest: str) -> Any:
    control = world.access.agent(world.hypervisor.agent(guest))
    with closing(control):
        try:
            done = control.run(ADDRESS_QUESTION, timeout=_TIMEOUT)
            return json.loads(done.text) if done.exit_status == 0 else []
        except (VmsnapError, ValueError) as error:
            _LOG.info("whether %r has static addresses is not known: %s", guest, error)
            return []


def _kinds(answer: Any) -> dict[str, bool]:
    """Return whether the addresses of each MAC are dynamic: whether at least one has a lifetime (ip-address(8))."""
    kinds: dict[str, bool] = {}
    try:
        for link in answer:
            addresses = [item for item in link.get("addr_info", ()) if item.get("scope") == "global"]
            if addresses and "address" in link:
                mac = str(link["address"]).lower()
                kinds[mac] = kinds.get(mac, False) or any(item.get("dynamic") for item in addresses)
    except (AttributeError, TypeError) as error:
        _LOG.info("the guest's list of addresses makes no sense: %s", error)
        return {}
    return kinds
