# ruff: noqa: D102, S101 - a test suite, shipped for authors of drivers
"""What every implementation of ``Names`` must do. Subclass ``NamesContract`` and override ``harness`` as a fixture."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from ipaddress import IPv4Address
from typing import Protocol

import pytest

from vmsnap.errors import DriverError, HeldError, PreconditionError
from vmsnap.model.ids import RunId
from vmsnap.model.journal import Resource, ResourceKind
from vmsnap.ports.names import DnsZone, Names

DEADLINE = timedelta(seconds=10)
TTL = timedelta(seconds=60)
ONE, OTHER = RunId("00000000a1"), RunId("00000000a2")
HERE, THERE = IPv4Address("198.18.0.1"), IPv4Address("198.18.0.3")
A_FEW_SECONDS = 5.0


class NamesHarness(Protocol):
    """A server that takes updates for one zone with one key, and an administrator's hand on it."""

    @property
    def zone(self) -> DnsZone:
        """Return how to reach it."""

    def names(self) -> Names:
        """Return the implementation under test, as in a fresh process."""

    def look(self, name: str) -> tuple[str, ...]:
        """Return the addresses of a name as the server tells them."""

    def take(self, name: str, *, address: str) -> None:
        """Let somebody else have a name."""

    def stop(self) -> None:
        """Let nobody answer any more."""

    def wrong_key(self) -> DnsZone:
        """Return the zone with a key that the server does not accept."""

    def foreign_zone(self) -> DnsZone:
        """Return a zone that the server is not to be updated in."""


class NamesContract:
    """The duties of ``vmsnap.ports.names.Names``, one test each."""

    @pytest.fixture
    def harness(self) -> Iterator[NamesHarness]:
        """Return the harness of the implementation under test."""
        raise NotImplementedError

    def test_a_name_is_added_changed_and_removed_each_as_often_as_one_likes(self, harness: NamesHarness) -> None:
        resource = _resource(harness, "db-test")
        assert resource == _resource(harness, "db-test")
        assert (resource.kind, resource.run, resource.guest) == (ResourceKind.DNS_RECORD, ONE, "db")
        for address in (HERE, HERE, THERE):
            harness.names().register(resource, address=address, ttl=TTL)
            assert harness.look(resource.name) == (str(address),)
        for _ in range(2):
            harness.names().release(resource, deadline=DEADLINE)
            assert harness.look(resource.name) == ()

    def test_a_name_that_somebody_else_has_stays_theirs(self, harness: NamesHarness) -> None:
        resource = _resource(harness, "production")
        harness.take(resource.name, address="192.0.2.7")
        with pytest.raises(HeldError, match="production"):
            harness.names().register(resource, address=HERE, ttl=TTL)
        harness.names().release(resource, deadline=DEADLINE)
        assert harness.look(resource.name) == ("192.0.2.7",)

    def test_a_name_of_another_run_stays_its(self, harness: NamesHarness) -> None:
        first, second = _resource(harness, "shared"), _resource(harness, "shared", run=OTHER)
        harness.names().register(first, address=HERE, ttl=TTL)
        with pytest.raises(HeldError):
            harness.names().register(second, address=THERE, ttl=TTL)
        harness.names().release(second, deadline=DEADLINE)
        assert harness.look(first.name) == (str(HERE),)
        harness.names().release(first, deadline=DEADLINE)

    def test_what_was_never_registered_is_released(self, harness: NamesHarness) -> None:
        harness.names().release(_resource(harness, "never"), deadline=DEADLINE)

    def test_a_wrong_key_changes_nothing(self, harness: NamesHarness) -> None:
        resource = _resource(harness, "wrong-key", zone=harness.wrong_key())
        with pytest.raises(PreconditionError, match="key") as refused:
            harness.names().register(resource, address=HERE, ttl=TTL)
        assert refused.value.remedy
        assert harness.look(resource.name) == ()

    def test_a_zone_that_is_not_to_be_updated_is_not(self, harness: NamesHarness) -> None:
        zone = harness.foreign_zone()
        resource = harness.names().resource(ONE, guest="db", full_name=f"db-test.{zone.zone}", zone=zone)
        with pytest.raises(PreconditionError, match="refused") as refused:
            harness.names().register(resource, address=HERE, ttl=TTL)
        assert refused.value.remedy
        with pytest.raises(PreconditionError):
            harness.names().release(resource, deadline=DEADLINE)

    def test_a_server_that_is_gone_takes_a_few_seconds_and_no_more(self, harness: NamesHarness) -> None:
        resource = _resource(harness, "orphan")
        harness.names().register(resource, address=HERE, ttl=TTL)
        harness.stop()
        names = harness.names()
        began = time.monotonic()
        for _ in range(3):
            with pytest.raises((PreconditionError, DriverError)):
                names.register(resource, address=HERE, ttl=TTL)
            with pytest.raises((PreconditionError, DriverError)):
                names.release(resource, deadline=DEADLINE)
        assert time.monotonic() - began < A_FEW_SECONDS


def _resource(harness: NamesHarness, label: str, *, run: RunId = ONE, zone: DnsZone | None = None) -> Resource:
    zone = zone or harness.zone
    return harness.names().resource(run, guest="db", full_name=f"{label}.{zone.zone}", zone=zone)
