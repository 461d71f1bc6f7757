"""Registering environments in the DNS."""

from __future__ import annotations

from datetime import timedelta
from ipaddress import IPv4Address, IPv6Address
from typing import Protocol

from pydantic import BaseModel, ConfigDict

from vmsnap.model.ids import RunId
from vmsnap.model.journal import Resource
from vmsnap.ports.owner import Owner


class DnsZone(BaseModel):
    """A zone, its primary server and the name of the key for updates. It holds no secret, so a journal may have it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    zone: str
    server: IPv4Address | IPv6Address
    port: int
    key_name: str
    key_file: str
    algorithm: str


class Names(Owner, Protocol):
    """Adds and removes names. Owns resources of kind DNS_RECORD. No call takes more than a few seconds.

    A name belongs to the run whose id stands beside it, in a TXT record. Whoever else has the name keeps it.
    """

    def resource(self, run: RunId, *, guest: str, full_name: str, zone: DnsZone) -> Resource:
        """Name the record. ``full_name`` is absolute, without a dot at the end."""

    def register(self, resource: Resource, *, address: IPv4Address, ttl: timedelta) -> None:
        """Give the name an address and mark it as the run's, where nobody has it; where the run has it, change the address.

        May be repeated. Raises HeldError where somebody else has the name, ConfigError for a key file that is missing
        or open to others, DriverError where the server refuses or does not answer.
        """

    def release(self, resource: Resource, *, deadline: timedelta) -> None:
        """Remove the name where it is the run's; return where it never was, is gone, or is somebody else's by now.

        Raises ConfigError, DriverError.
        """

    def owned(self) -> tuple[Resource, ...]:
        """Return nothing: a key for updates does not list a zone. What was registered stands in the journal."""
