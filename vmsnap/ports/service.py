"""Reaching a fenced VM from the host: a place for it inside its fence, a service address, and relays of connections.

Connections are opened by the host alone. Nothing here gives a VM a way out of its fence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address
from socket import socket
from typing import Protocol

from vmsnap.model.guest import OldAddress
from vmsnap.model.ids import RunId
from vmsnap.model.isolation import FencePlan
from vmsnap.model.journal import Resource
from vmsnap.ports.owner import Owner

Opener = Callable[[], socket]
"""Opens one connection to a service in a VM. Raises GuestUnreachableError."""


class Relay(Protocol):
    """A listener whose connections are joined, one by one, to connections that an ``Opener`` makes."""

    @property
    def address(self) -> tuple[str, int]:
        """Return where clients connect."""

    def close(self) -> None:
        """End the listener and every connection. May be repeated."""


class Services(Owner, Protocol):
    """Gives fenced VMs addresses on the host, and relays connections to them. Owns resources of kind SERVICE."""

    def resource(self, run: RunId, *, guest: str) -> Resource:
        """Choose a service address for the VM of a run: the same for the same run, unless it is taken.

        Raises PreconditionError where no address is free.
        """

    def address(self, resource: Resource) -> IPv4Address:
        """Return the address that the resource names."""

    def make(self, resource: Resource) -> None:
        """Put the address on the host. Nobody listens there yet. May be repeated. Raises PreconditionError, DriverError."""

    def listen(self, resource: Resource, *, port: int, opener: Opener) -> Relay:
        """Relay connections to the service address and ``port``. Raises PreconditionError where it is not made."""

    def forward(self, *, address: str, port: int, opener: Opener) -> Relay:
        """Relay connections to an address of the host itself. Port 0: a free one. Raises PreconditionError where taken."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a fenced VM's NIC lives, or is to live: its address and gateway."""

    mac: str
    old: OldAddress


class Residence(Protocol):
    """The world around a fenced VM that keeps its NICs at their places."""

    def close(self) -> None:
        """Stop answering DHCP. The VM stays reachable as long as it keeps its addresses. May be repeated."""


class Residences(Protocol):
    """Makes the inside of a fence the network that a VM knew."""

    def open(self, plan: FencePlan, *, places: tuple[Place, ...]) -> Residence:
        """Be the gateway of each place and lease its address to whoever asks for one on that NIC.

        May be repeated, by several processes at once too. What it sets up inside the namespace stays until the fence is
        released. Raises DriverError, PreconditionError.
        """

    def find(self, plan: FencePlan, *, old: OldAddress) -> str | None:
        """Ask on every NIC for an address; return the MAC of the NIC where it answers. Raises DriverError."""
