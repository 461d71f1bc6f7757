"""The contract of names in the DNS, over the fake."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest

from vmsnap.ports.names import DnsZone, Names
from vmsnap.testing.fake_names import FakeNames, FakeServer
from vmsnap.testing.names_contract import NamesContract, NamesHarness

ZONE = DnsZone(
    zone="test.example",
    server=IPv4Address("192.0.2.53"),
    port=53,
    key_name="vmsnap",
    key_file="/etc/vmsnap/dns.key",
    algorithm="hmac-sha256",
)


class FakeHarness:
    zone = ZONE

    def __init__(self) -> None:
        self._server = FakeServer()

    def names(self) -> Names:
        return FakeNames(self._server)

    def look(self, name: str) -> tuple[str, ...]:
        found = self._server.records.get(name)
        return () if found is None else (str(found[0]),)

    def take(self, name: str, *, address: str) -> None:
        self._server.records[name] = (IPv4Address(address), "somebody")

    def stop(self) -> None:
        self._server.up = False

    def wrong_key(self) -> DnsZone:
        return ZONE.model_copy(update={"key_name": "another"})

    def foreign_zone(self) -> DnsZone:
        return ZONE.model_copy(update={"zone": "foreign.example"})


class TestFakeNames(NamesContract):
    @pytest.fixture
    def harness(self) -> NamesHarness:
        return FakeHarness()
