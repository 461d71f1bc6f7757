# ruff: noqa: D102 - the ports state the contracts
"""A DNS server in memory, and the port ``Names`` over it, held to the same contract suite as the real one."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from ipaddress import IPv4Address

from vmsnap.errors import DriverError, HeldError, PreconditionError
from vmsnap.model.ids import RunId
from vmsnap.model.journal import Resource, ResourceKind
from vmsnap.ports.names import DnsZone


@dataclass
class FakeServer:
    """A server. ``records``: name to (address, owner's text). ``keys`` it accepts; ``up`` False: nobody answers.

    ``forgets_to_answer``: updates are done and not answered.
    """

    zones: frozenset[str] = frozenset({"test.example"})
    keys: frozenset[str] = frozenset({"vmsnap"})
    up: bool = True
    forgets_to_answer: bool = False
    records: dict[str, tuple[IPv4Address, str]] = field(default_factory=dict)


class FakeNames:
    """Registers names in a ``FakeServer``."""

    def __init__(self, server: FakeServer | None = None) -> None:
        self.server = server or FakeServer()

    @property
    def kinds(self) -> frozenset[ResourceKind]:
        return frozenset({ResourceKind.DNS_RECORD})

    def resource(self, run: RunId, *, guest: str, full_name: str, zone: DnsZone) -> Resource:
        return Resource(
            kind=ResourceKind.DNS_RECORD, run=run, guest=guest, name=full_name, detail=zone.model_dump_json()
        )

    def register(self, resource: Resource, *, address: IPv4Address, ttl: timedelta) -> None:  # noqa: ARG002
        self._reach(resource)
        _, owner = self.server.records.get(resource.name, (address, resource.run))
        if owner != resource.run:
            raise HeldError(f"the name {resource.name} is taken", remedy="choose another")
        self.server.records[resource.name] = (address, resource.run)
        self._answer()

    def release(self, resource: Resource, *, deadline: timedelta) -> None:  # noqa: ARG002 - nothing takes time here
        self._reach(resource)
        if self.server.records.get(resource.name, (None, ""))[1] == resource.run:
            del self.server.records[resource.name]
        self._answer()

    def owned(self) -> tuple[Resource, ...]:
        return ()

    def _reach(self, resource: Resource) -> None:
        zone = DnsZone.model_validate_json(resource.detail)
        if not self.server.up:
            raise PreconditionError(f"the DNS server {zone.server} cannot be reached", remedy="this is a fake")
        if zone.key_name not in self.server.keys:
            raise PreconditionError(f"the DNS server does not accept the key {zone.key_name}", remedy="this is a fake")
        if zone.zone not in self.server.zones:
            raise PreconditionError(f"the DNS server refused the update of {resource.name}", remedy="this is a fake")

    def _answer(self) -> None:
        if self.server.forgets_to_answer:
            raise DriverError("the DNS server gave no answer", remedy="this is a fake")
