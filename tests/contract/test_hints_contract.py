"""The contract of hints, over the fake."""

from __future__ import annotations

import pytest

from vmsnap.model.guest import Guest
from vmsnap.ports.hints import ChangeHints
from vmsnap.testing.fake_guest import FakeGuest
from vmsnap.testing.fake_hints import FakeHints
from vmsnap.testing.fake_host import FakeHost
from vmsnap.testing.fake_hypervisor import FakeHypervisor
from vmsnap.testing.fake_network import NetworkWorld
from vmsnap.testing.hints_contract import HintsContract, HintsHarness
from vmsnap.testing.world import FakeClock


class _Harness:
    def __init__(self) -> None:
        self._host = FakeHost(network=NetworkWorld())
        self._machine = self._host.add_guest("db", guest=FakeGuest(clusters=()), disks=2)

    @property
    def hints(self) -> ChangeHints:
        return FakeHints(self._host)

    def guest(self) -> Guest:
        return FakeHypervisor(self._host, clock=FakeClock()).inspect("db")

    def write(self, target: str, *, block: int) -> None:
        self._machine.note_write(target, block=block)

    def start_anew(self) -> None:
        self._host.power_cycle("db")


class TestFakeHints(HintsContract):
    @pytest.fixture
    def harness(self) -> HintsHarness:
        return _Harness()
