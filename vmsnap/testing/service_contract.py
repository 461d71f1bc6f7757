# ruff: noqa: D102, S101 - a test suite, shipped for authors of drivers
"""What every implementation of ``Services`` must do. Subclass ``ServiceContract`` and override ``services``."""

from __future__ import annotations

import socket
from datetime import timedelta

import pytest

from vmsnap.errors import PreconditionError
from vmsnap.model.ids import RunId
from vmsnap.model.journal import ResourceKind
from vmsnap.ports.service import Services

DEADLINE = timedelta(seconds=10)
ONE, OTHER = RunId("00000000a1"), RunId("00000000a2")


def _no_vm() -> socket.socket:
    raise AssertionError


class ServiceContract:
    """The duties of ``vmsnap.ports.service.Services``, one test each."""

    @pytest.fixture
    def services(self) -> Services:
        """Return the implementation under test."""
        raise NotImplementedError

    def test_an_address_is_the_same_every_time_and_another_for_another_run(self, services: Services) -> None:
        resource = services.resource(ONE, guest="shop db/1")
        assert resource == services.resource(ONE, guest="shop db/1")
        assert (resource.kind, resource.run, resource.guest) == (ResourceKind.SERVICE, ONE, "shop db/1")
        assert resource.kind in services.kinds
        assert services.address(resource) != services.address(services.resource(OTHER, guest="shop db/1"))

    def test_it_is_made_used_and_removed_each_as_often_as_one_likes(self, services: Services) -> None:
        resource = services.resource(ONE, guest="db")
        services.make(resource)
        assert services.resource(ONE, guest="db") == resource, "what is there is its own"
        services.make(resource)
        assert [item.run for item in services.owned()] == [ONE]
        relay = services.listen(resource, port=5432, opener=_no_vm)
        assert relay.address == (str(services.address(resource)), 5432)
        with pytest.raises(PreconditionError):
            services.listen(resource, port=5432, opener=_no_vm)
        relay.close()
        relay.close()
        for owned in services.owned():
            services.release(owned, deadline=DEADLINE)
        services.release(resource, deadline=DEADLINE)
        assert services.owned() == ()

    def test_nobody_listens_at_an_address_that_was_not_made(self, services: Services) -> None:
        with pytest.raises(PreconditionError):
            services.listen(services.resource(ONE, guest="db"), port=22, opener=_no_vm)

    def test_one_that_is_removed_takes_nothing_from_another(self, services: Services) -> None:
        for run in (ONE, OTHER):
            services.make(services.resource(run, guest="db"))
        services.release(services.resource(ONE, guest="db"), deadline=DEADLINE)
        assert [item.run for item in services.owned()] == [OTHER]
        services.listen(services.resource(OTHER, guest="db"), port=22, opener=_no_vm).close()
        services.release(services.resource(OTHER, guest="db"), deadline=DEADLINE)

    def test_what_was_never_made_is_released(self, services: Services) -> None:
        services.release(services.resource(ONE, guest="db"), deadline=DEADLINE)

    def test_a_port_of_the_host_is_forwarded(self, services: Services) -> None:
        relay = services.forward(address="127.0.0.1", port=0, opener=_no_vm)
        host, port = relay.address
        assert host == "127.0.0.1"
        assert port > 0
        with pytest.raises(PreconditionError):
            services.forward(address="127.0.0.1", port=port, opener=_no_vm)
        relay.close()
