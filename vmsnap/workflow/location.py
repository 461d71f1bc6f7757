"""What is known of where an environment is: its addresses, and what the journal has of it."""

from __future__ import annotations

from datetime import timedelta
from ipaddress import IPv4Address, IPv4Interface

from vmsnap.model.environment import Environment
from vmsnap.model.guest import Nic
from vmsnap.model.journal import Resource, ResourceKind
from vmsnap.workflow.world import World

_BETWEEN_LOOKS = timedelta(milliseconds=300)


def usable(nic: Nic) -> tuple[IPv4Interface, ...]:
    """Return the addresses of a NIC that others could use."""
    return tuple(interface for interface in nic.addresses if not (interface.is_loopback or interface.is_link_local))


def resources_of(world: World, environment: Environment, *, kind: ResourceKind) -> tuple[Resource, ...]:
    """Return the things of a kind that the journal knows of an environment, newest first."""
    for record in world.journals.records():
        if record.run == environment.run:
            return tuple(resource for resource in reversed(record.unreleased) if resource.kind is kind)
    return ()


def known_address(world: World, environment: Environment) -> IPv4Address | None:
    """Return the address at which others can reach an environment now, or None where none is known.

    On a network that is its own; in a fence it is the service address, where there is one.
    """
    if environment.network is None:
        services = resources_of(world, environment, kind=ResourceKind.SERVICE)
        return world.services.address(services[0]) if services else None
    nics = world.hypervisor.environment_nics(environment.name)
    return next((interface.ip for nic in nics for interface in usable(nic)), None)


def wait_for_address(world: World, environment: Environment, *, deadline: timedelta) -> IPv4Address | None:
    """Look for an address until one is known, or until the deadline."""
    end = world.clock.monotonic() + deadline.total_seconds()
    while (address := known_address(world, environment)) is None and world.clock.monotonic() < end:
        world.clock.sleep(_BETWEEN_LOOKS)
    return address
