"""The contract of service addresses, over the fake."""

from __future__ import annotations

import pytest

from vmsnap.ports.service import Services
from vmsnap.testing.fake_service import FakeServices
from vmsnap.testing.service_contract import ServiceContract


class TestFakeServices(ServiceContract):
    @pytest.fixture
    def services(self) -> Services:
        return FakeServices()
