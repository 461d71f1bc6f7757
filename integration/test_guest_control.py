"""Guest control over the real things: an agent and an SSH server in a guest, and OpenSSH's server on loopback."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from integration.lab.guest import LabGuest
from integration.lab.lab import Lab
from integration.lab.services import URI
from vmsnap.engines.guestfacts import boot_id
from vmsnap.engines.postgresql import PostgreSQL
from vmsnap.errors import DriverError, GuestUnreachableError, PreconditionError, SafetyError
from vmsnap.guests.access import Access
from vmsnap.hypervisors.libvirt.agent import LibvirtAgentChannel
from vmsnap.hypervisors.libvirt.connection import Connection
from vmsnap.model.command import Command
from vmsnap.model.guest import SshLogin
from vmsnap.ports.guest import GuestControl
from vmsnap.state.clock import SystemClock
from vmsnap.testing.fake_guest import run_procedure
from vmsnap.testing.guest_contract import QUICK, GuestControlContract

_PRIVILEGE_SEPARATION = Path("/run/sshd")  # OpenSSH's server insists on it
KINDS = ("ed25519", "ecdsa", "rsa")


ACCESS = Access(clock=SystemClock())


def connect(address: str, port: int, timeout: timedelta) -> socket.socket:
    try:
        return socket.create_connection((address, port), timeout.total_seconds())
    except OSError as error:
        raise GuestUnreachableError(f"{address}:{port} does not answer", details=str(error)) from error


def make_key(path: Path, *, kind: str = "ed25519") -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-f", str(path)], check=True, timeout=60)
    return path


def public(path: Path) -> str:
    return " ".join(path.with_name(f"{path.name}.pub").read_text().split()[:2])


class Sshd:
    """OpenSSH's server on loopback, its files in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.host_keys = {kind: make_key(folder / f"host_{kind}", kind=kind) for kind in KINDS}
        self.key = make_key(folder / "client")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._made_folder = not _PRIVILEGE_SEPARATION.exists()
        if self._made_folder:
            _PRIVILEGE_SEPARATION.mkdir(mode=0o755)
        lines = [f"HostKey {path}" for path in self.host_keys.values()]
        lines += [f"AuthorizedKeysFile {self.key}.pub", "StrictModes no", "UsePAM no", "PidFile none"]
        lines += ["ListenAddress 127.0.0.1", f"Port {self.port}", "PermitRootLogin prohibit-password"]
        config = folder / "sshd_config"
        config.write_text("\n".join(lines) + "\n")
        self._log = (folder / "log").open("wb")
        self._process = subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", str(config)], stderr=self._log)
        deadline = time.monotonic() + 20
        while True:
            try:
                connect("127.0.0.1", self.port, timedelta(seconds=1)).close()
            except GuestUnreachableError:
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.05)
            else:
                return

    def login(self, *, kind: str = "ed25519") -> SshLogin:
        return SshLogin(user="root", key_file=str(self.key), host_key=public(self.host_keys[kind]), port=self.port)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=20)
        self._log.close()
        if self._made_folder:
            _PRIVILEGE_SEPARATION.rmdir()


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    server = Sshd(tmp_path_factory.mktemp("sshd"))
    yield server
    server.close()


class TestSshToOpenSsh(GuestControlContract):
    @pytest.fixture
    def control(self, sshd: Sshd) -> Iterator[GuestControl]:
        control = ACCESS.ssh(sshd.login(), address="127.0.0.1", connector=connect)
        yield control
        control.close()

    @pytest.fixture
    def lost(self, sshd: Sshd) -> GuestControl:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            free = probe.getsockname()[1]
        return ACCESS.ssh(replace(sshd.login(), port=free), address="127.0.0.1", connector=connect)

    def test_a_server_that_says_nothing_is_unreachable(self, sshd: Sshd) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            login = replace(sshd.login(), port=silent.getsockname()[1], connect_timeout=timedelta(seconds=1))
            control = ACCESS.ssh(login, address="127.0.0.1", connector=connect)
            with pytest.raises(GuestUnreachableError):
                control.ping(timeout=QUICK)

    @pytest.mark.parametrize("kind", KINDS)
    def test_each_type_of_host_key_can_be_pinned(self, sshd: Sshd, kind: str) -> None:
        control = ACCESS.ssh(sshd.login(kind=kind), address="127.0.0.1", connector=connect)
        control.ping(timeout=QUICK)
        control.close()

    @pytest.mark.parametrize("kind", KINDS)
    def test_another_host_key_is_refused(self, sshd: Sshd, tmp_path: Path, kind: str) -> None:
        other = replace(sshd.login(), host_key=public(make_key(tmp_path / "other", kind=kind)))
        control = ACCESS.ssh(other, address="127.0.0.1", connector=connect)
        with pytest.raises(SafetyError, match="another host key"):
            control.run(Command(argv=("true",)), timeout=QUICK)

    def test_a_host_key_of_a_type_the_server_has_not_is_refused(self, sshd: Sshd, tmp_path: Path) -> None:
        key = tmp_path / "p521"
        argv = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "521", "-N", "", "-f", str(key)]
        subprocess.run(argv, check=True, timeout=60)
        login = replace(sshd.login(), host_key=public(key))
        control = ACCESS.ssh(login, address="127.0.0.1", connector=connect)
        with pytest.raises(SafetyError, match="another host key"):
            control.ping(timeout=QUICK)

    def test_the_host_key_can_be_asked_for(self, sshd: Sshd) -> None:
        got = ACCESS.host_key(sshd.login(), address="127.0.0.1", connector=connect)
        assert got in {public(path) for path in sshd.host_keys.values()}

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_key_that_is_not_allowed_is_refused(self, sshd: Sshd, tmp_path: Path, kind: str) -> None:
        login = replace(sshd.login(), key_file=str(make_key(tmp_path / "stranger", kind=kind)))
        control = ACCESS.ssh(login, address="127.0.0.1", connector=connect)
        with pytest.raises(PreconditionError) as caught:
            control.ping(timeout=QUICK)
        assert "authorized_keys" in str(caught.value.remedy)

    def test_commands_run_as_another_account(self, control: GuestControl) -> None:
        result = control.run(Command(argv=("id", "-un"), user="nobody"), timeout=QUICK)
        assert result.stdout == b"nobody\n"


@pytest.fixture
def channel(guest: LabGuest) -> Iterator[LibvirtAgentChannel]:
    connection = Connection(URI)
    yield LibvirtAgentChannel(connection, domain=guest.name)
    connection.close()


class TestAgentOfAGuest(GuestControlContract):
    much_input = 48 << 10
    much_output = 1_000_000  # emulated guests are slow

    @pytest.fixture
    def control(self, channel: LibvirtAgentChannel) -> GuestControl:
        return ACCESS.agent(channel)

    @pytest.fixture
    def lost(self, guest: LabGuest, channel: LibvirtAgentChannel) -> Iterator[GuestControl]:
        """An agent that stands still for a while."""
        # The end first, and the beginning late enough that the agent still tells how the command to begin ended.
        for after, name in ((60, "CONT"), (5, "STOP")):
            kill = ("systemctl", "kill", f"--signal={name}", "qemu-guest-agent")
            guest.run(["systemd-run", f"--on-active={after}", "--timer-property=AccuracySec=100ms", *kill])
        deadline = time.monotonic() + 30
        control = ACCESS.agent(channel)
        while True:
            try:
                control.ping(timeout=timedelta(seconds=5))  # longer than a guest that is only slow takes
            except GuestUnreachableError:
                break
            assert time.monotonic() < deadline, "the agent did not stand still"
            time.sleep(0.2)
        yield control
        guest.wait_for_agent()

    def test_output_is_cut_at_16_mib(self, control: GuestControl) -> None:
        """Libvirt takes 10 MiB in one answer and breaks the line at more, so ours is the smaller bound."""
        with pytest.raises(DriverError, match="10485760"):
            control.run(Command(argv=("head", "-c", str(16 << 20), "/dev/zero")), timeout=QUICK)

    def test_commands_run_as_another_account(self, control: GuestControl) -> None:
        result = control.run(Command(argv=("id", "-un"), user="postgres"), timeout=QUICK)
        assert result.stdout == b"postgres\n"

    def test_an_agent_that_was_restarted_forgot_the_command(self, guest: LabGuest, control: GuestControl) -> None:
        restart = ("systemctl", "restart", "qemu-guest-agent")
        control.run(
            Command(argv=("systemd-run", "--on-active=2", "--timer-property=AccuracySec=100ms", *restart)),
            timeout=QUICK,
        )
        with pytest.raises(GuestUnreachableError):
            control.run(Command(argv=("sleep", "40")), timeout=timedelta(seconds=60))
        guest.wait_for_agent()

    def test_the_engine_finds_a_debian_cluster_and_its_disk(self, guest: LabGuest, control: GuestControl) -> None:
        engine = PostgreSQL()
        (instance,) = run_procedure(engine.discover(), control)
        assert instance.data_directory == "/var/lib/postgresql/15/main"
        assert instance.programs == "/usr/lib/postgresql/15/bin"
        assert (instance.name, instance.user, instance.version, instance.port) == ("main:5432", "postgres", "15", 5432)
        found = run_procedure(engine.locate(instance), control)
        uuid = guest.run(["blkid", "-o", "value", "-s", "UUID", "/dev/vda"]).strip()
        assert {item.file_system_uuid for item in found} == {uuid}
        assert found[0].path == "/var/lib/postgresql/15/main/global/pg_control"
        assert run_procedure(boot_id(), control) == guest.run(["cat", "/proc/sys/kernel/random/boot_id"]).strip()

    def test_the_engine_drains_and_stops_it_under_load(self, guest: LabGuest, control: GuestControl) -> None:
        engine = PostgreSQL()
        (instance,) = run_procedure(engine.discover(), control)
        guest.start_pgbench(clients=4)
        try:
            while len(guest.pgbench_progress()) < 2:
                time.sleep(1)
            report = run_procedure(engine.drain(instance, deadline=timedelta(seconds=60)), control)
            run_procedure(engine.stop(instance, deadline=timedelta(minutes=5)), control)
            evidence = run_procedure(engine.evidence_in_guest(instance), control)
            run_procedure(engine.require_all_stopped(), control)
        finally:
            guest.stop_pgbench()
            guest.run(["systemctl", "restart", "postgresql@15-main"], timeout_s=60)
        assert report.in_flight_at_start == report.finished + report.rolled_back
        assert report.rolled_back == 0
        assert evidence.clean
        guest.wait_for_postgresql()


class TestSshToAGuest(GuestControlContract):
    @pytest.fixture
    def login(self, lab: Lab) -> SshLogin:
        return SshLogin(
            user="root",
            key_file=str(lab.image.private_key),
            host_key=lab.image.host_key,
            connect_timeout=timedelta(seconds=10 * lab.time_factor),
        )

    @pytest.fixture
    def control(self, guest: LabGuest, login: SshLogin) -> Iterator[GuestControl]:
        control = ACCESS.ssh(login, address=guest.address(), connector=connect)
        yield control
        control.close()

    @pytest.fixture
    def lost(self, guest: LabGuest, login: SshLogin) -> GuestControl:
        nobody = replace(login, connect_timeout=timedelta(seconds=2))
        return ACCESS.ssh(nobody, address="10.77.0.250", connector=connect)
