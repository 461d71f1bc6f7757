"""The contract of guest controls, over the fake and over both real controls with processes of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.ssh_server import ADDRESS, LocalSshServer
from vmsnap.guests.access import Access
from vmsnap.ports.guest import GuestControl
from vmsnap.state.clock import SystemClock
from vmsnap.testing.fake_guest import FakeGuest
from vmsnap.testing.guest_contract import GuestControlContract
from vmsnap.testing.local_agent import LocalAgent


class TestFakeGuest(GuestControlContract):
    @pytest.fixture
    def control(self) -> GuestControl:
        return FakeGuest()

    @pytest.fixture
    def lost(self) -> GuestControl:
        guest = FakeGuest()
        guest.answers = False
        return guest


class TestAgentControl(GuestControlContract):
    much_input = 48 << 10

    @pytest.fixture
    def control(self) -> Iterator[GuestControl]:
        agent = LocalAgent()
        yield Access(clock=SystemClock()).agent(agent)
        agent.close()

    @pytest.fixture
    def lost(self) -> GuestControl:
        return Access(clock=SystemClock()).agent(LocalAgent(answers=False))


class TestSshControl(GuestControlContract):
    @pytest.fixture
    def server(self, tmp_path: Path) -> Iterator[LocalSshServer]:
        server = LocalSshServer(tmp_path)
        yield server
        server.close()

    @pytest.fixture
    def control(self, server: LocalSshServer) -> Iterator[GuestControl]:
        control = Access(clock=SystemClock()).ssh(server.login, address=ADDRESS, connector=server.connect)
        yield control
        control.close()

    @pytest.fixture
    def lost(self, server: LocalSshServer) -> GuestControl:
        server.answers = False
        return Access(clock=SystemClock()).ssh(server.login, address=ADDRESS, connector=server.connect)
