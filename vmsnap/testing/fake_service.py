# ruff: noqa: D102 - the ports state the contracts
"""Fakes of service addresses, relays and residences. They need no root and no kernel."""

from __future__ import annotations

from datetime import timedelta
from ipaddress import IPv4Address
from socket import socket

from vmsnap.errors import PreconditionError
from vmsnap.model.guest import OldAddress
from vmsnap.model.ids import RunId
from vmsnap.model.isolation import FencePlan
from vmsnap.model.journal import Resource, ResourceKind
from vmsnap.ports.service import Opener, Place
from vmsnap.testing.fake_network import NetworkWorld

_FIRST = int(IPv4Address("198.18.0.1"))


class FakeRelay:
    """A relay that a test connects through by ``connect``."""

    def __init__(self, address: tuple[str, int], *, opener: Opener) -> None:
        self.address = address
        self.closed = False
        self._opener = opener

    def connect(self) -> socket:
        """Open what a client's connection would be joined to."""
        return self._opener()

    def close(self) -> None:
        self.closed = True


class FakeServices:
    """Service addresses in memory."""

    def __init__(self) -> None:
        self.made: dict[RunId, IPv4Address] = {}
        self.relays: list[FakeRelay] = []

    @property
    def kinds(self) -> frozenset[ResourceKind]:
        return frozenset({ResourceKind.SERVICE})

    def resource(self, run: RunId, *, guest: str) -> Resource:
        taken = {address for key, address in self.made.items() if key != run}
        address = IPv4Address(_FIRST + 2 * (int(run, 16) % 1024))
        while address in taken:
            address += 2
        return Resource(
            kind=ResourceKind.SERVICE, run=run, guest=guest, name=f"vmsnap-service-{run}", detail=str(address)
        )

    def address(self, resource: Resource) -> IPv4Address:
        return IPv4Address(resource.detail)

    def make(self, resource: Resource) -> None:
        self.made[resource.run] = self.address(resource)

    def listen(self, resource: Resource, *, port: int, opener: Opener) -> FakeRelay:
        if resource.run not in self.made:
            raise PreconditionError(f"{resource.name} is not there", remedy="this is a fake")
        return self._relay(str(self.address(resource)), port=port, opener=opener)

    def forward(self, *, address: str, port: int, opener: Opener) -> FakeRelay:
        return self._relay(address, port=port or 40000 + len(self.relays), opener=opener)

    def _relay(self, address: str, *, port: int, opener: Opener) -> FakeRelay:
        if any(not relay.closed and relay.address == (address, port) for relay in self.relays):
            raise PreconditionError(f"{address} port {port} is taken", remedy="this is a fake")
        self.relays.append(FakeRelay((address, port), opener=opener))
        return self.relays[-1]

    def release(self, resource: Resource, *, deadline: timedelta) -> None:  # noqa: ARG002 - nothing takes time here
        self.made.pop(resource.run, None)

    def owned(self) -> tuple[Resource, ...]:
        return tuple(
            Resource(kind=ResourceKind.SERVICE, run=run, guest="", name=f"vmsnap-service-{run}")
            for run in sorted(self.made)
        )


class FakeResidence:
    """A residence that a test asks about."""

    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True


class FakeResidences:
    """Residences that are remembered. ``living`` maps fixed addresses to the MACs where they answer."""

    def __init__(self, network: NetworkWorld) -> None:
        self.living: dict[IPv4Address, str] = {}
        self.opened: list[tuple[Place, ...]] = []
        self.residences: list[FakeResidence] = []
        self._network = network

    def open(self, plan: FencePlan, *, places: tuple[Place, ...]) -> FakeResidence:
        if plan.run not in self._network.fences:
            raise PreconditionError(f"the namespace {plan.namespace} is gone", remedy="this is a fake")
        self.opened.append(places)
        self.residences.append(FakeResidence())
        return self.residences[-1]

    def find(self, plan: FencePlan, *, old: OldAddress) -> str | None:
        mac = self.living.get(old.interface.ip)
        return mac if mac in {port.mac for port in plan.ports} else None
