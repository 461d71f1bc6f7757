"""The contract of guest controls, over the fake and over both real controls with processes of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.ssh_server import ADDRESS, LocalSshServer
from vmsnap.errors import GuestCommandError, PreconditionError
from vmsnap.guests.access import Access
from vmsnap.hypervisors.hyperv.commands import Commands
from vmsnap.hypervisors.hyperv.connection import HostConnection, Login
from vmsnap.hypervisors.hyperv.guestline import DirectLine
from vmsnap.hypervisors.hyperv.transport import Transport
from vmsnap.model.command import Command
from vmsnap.ports.guest import GuestControl
from vmsnap.state.clock import SystemClock
from vmsnap.testing.fake_guest import FakeGuest
from vmsnap.testing.guest_contract import QUICK, GuestControlContract
from vmsnap.testing.hyperv.direct import DirectGuest
from vmsnap.testing.hyperv.endpoint import PASSWORD, USER, running
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


class TestPowerShellControl(GuestControlContract):
    """Over WinRM and PowerShell remoting as they are, to a host whose guest is this machine."""

    @pytest.fixture
    def guest(self) -> DirectGuest:
        return DirectGuest(id="8b6f", user="db1\\Administrator", password="Pa$$ wörd")

    @pytest.fixture
    def control(self, guest: DirectGuest) -> Iterator[GuestControl]:
        with running(guest.dispatch) as endpoint:
            transport = Transport(
                HostConnection(
                    host="127.0.0.1", port=endpoint.port, tls=False, login=Login(user=USER, password=PASSWORD)
                )
            )
            line = DirectLine(
                Commands(transport),
                machine_id=guest.id,
                guest="db1",
                login=Login(user=guest.user, password=guest.password),
            )
            yield Access(clock=SystemClock()).agent(line)
            transport.close()

    @pytest.fixture
    def lost(self, guest: DirectGuest, control: GuestControl) -> GuestControl:
        guest.answers = False
        return control

    def test_a_wrong_account_is_told_from_a_guest_that_is_gone(self, guest: DirectGuest, control: GuestControl) -> None:
        guest.password = "changed"
        with pytest.raises(PreconditionError, match="refuses the account"):
            control.ping(timeout=QUICK)

    def test_another_account_is_refused(self, control: GuestControl) -> None:
        with pytest.raises(GuestCommandError, match="one account alone"):
            control.run(Command(argv=("true",), user="postgres"), timeout=QUICK)


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
