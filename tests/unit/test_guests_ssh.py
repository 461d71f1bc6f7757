"""Control over SSH: keys, accounts, and lines that break. The contract suite has the rest."""

from __future__ import annotations

import logging
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from socket import socket, socketpair
from threading import Event, Thread

import pytest

from tests.contract.ssh_server import ADDRESS, LocalSshServer, write_key
from vmsnap.errors import BugError, CancelledError, ConfigError, GuestUnreachableError, PreconditionError, SafetyError
from vmsnap.guests.access import Access
from vmsnap.guests.keys import load_key
from vmsnap.guests.ssh import host_key_of, open_transport
from vmsnap.model.command import Command
from vmsnap.model.guest import SshLogin
from vmsnap.ports.guest import GuestControl
from vmsnap.state.clock import SystemClock

LIMIT = timedelta(seconds=20)


ACCESS = Access(clock=SystemClock())


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LocalSshServer]:
    server = LocalSshServer(tmp_path)
    yield server
    server.close()


def control(server: LocalSshServer, *, login: SshLogin | None = None) -> GuestControl:
    return ACCESS.ssh(login or server.login, address=ADDRESS, connector=server.connect)


def test_one_connection_serves_many_commands(server: LocalSshServer) -> None:
    with_one = control(server)
    for _ in range(3):
        with_one.ping(timeout=LIMIT)
    assert server.connections == 1


def test_a_broken_connection_is_opened_again(server: LocalSshServer) -> None:
    mended = control(server)
    mended.ping(timeout=LIMIT)
    server.drop_connections()
    time.sleep(0.2)
    mended.ping(timeout=LIMIT)
    assert server.connections == 2


def test_a_line_that_breaks_in_mid_command_is_unreachable(server: LocalSshServer, tmp_path: Path) -> None:
    begun = tmp_path / "begun"

    def drop() -> None:
        until = time.monotonic() + LIMIT.total_seconds()
        while not begun.exists() and time.monotonic() < until:
            time.sleep(0.01)
        server.drop_connections()

    dropping = Thread(target=drop)
    dropping.start()
    # It says that it has begun when its input has ended: the caller waits for its output by then.
    command = Command(argv=("sh", "-c", 'cat; touch "$0"; sleep 10', str(begun)))
    with pytest.raises(GuestUnreachableError, match="broke while"):
        control(server).run(command, timeout=LIMIT)
    dropping.join()


def test_a_login_without_a_host_key_is_our_mistake(server: LocalSshServer) -> None:
    with pytest.raises(BugError):
        control(server, login=replace(server.login, host_key=None))
    assert server.connections == 0


def test_another_host_key_is_a_danger(server: LocalSshServer, tmp_path: Path) -> None:
    other = LocalSshServer(_folder(tmp_path / "other"))
    with pytest.raises(SafetyError, match="not the machine we expect") as caught:
        control(server, login=replace(server.login, host_key=other.login.host_key)).ping(timeout=LIMIT)
    assert str(server.login.host_key) in str(caught.value.details)
    assert server.commands == []


@pytest.mark.parametrize("kind", ["ssh-rsa", "ecdsa-sha2-nistp256", "ssh-dss", "sk-ssh-ed25519@openssh.com"])
def test_a_host_key_of_another_type_never_logs_in(server: LocalSshServer, kind: str) -> None:
    with pytest.raises((SafetyError, PreconditionError)):
        control(server, login=replace(server.login, host_key=f"{kind} AAAA")).ping(timeout=LIMIT)
    assert server.commands == []


def test_a_comment_after_the_host_key_does_not_matter(server: LocalSshServer) -> None:
    control(server, login=replace(server.login, host_key=f"{server.login.host_key} root@db")).ping(timeout=LIMIT)


def test_the_host_key_can_be_asked_for(server: LocalSshServer) -> None:
    login = replace(server.login, host_key=None)
    assert ACCESS.host_key(login, address=ADDRESS, connector=server.connect) == server.login.host_key
    server.answers = False
    with pytest.raises(GuestUnreachableError):
        ACCESS.host_key(login, address=ADDRESS, connector=server.connect)


def test_a_line_that_breaks_before_the_host_key_is_read_is_unreachable(server: LocalSshServer) -> None:
    transport = open_transport(
        address=ADDRESS, port=server.login.port, connector=server.connect, timeout=LIMIT, host_key=None
    )
    transport.close()
    with pytest.raises(GuestUnreachableError, match="does not answer"):
        host_key_of(transport, address=ADDRESS)


def test_a_key_that_the_guest_does_not_know_is_refused(server: LocalSshServer, tmp_path: Path) -> None:
    stranger = str(write_key(tmp_path / "stranger"))
    with pytest.raises(PreconditionError) as caught:
        control(server, login=replace(server.login, key_file=stranger)).ping(timeout=LIMIT)
    assert stranger in caught.value.brief
    assert "authorized_keys" in str(caught.value.remedy)


def test_a_line_that_breaks_in_a_login_says_nothing_of_the_key(server: LocalSshServer) -> None:
    server.before_login = server.drop_connections
    with pytest.raises(GuestUnreachableError, match="did not say"):
        control(server).ping(timeout=LIMIT)


def test_a_login_that_is_not_answered_says_nothing_of_the_key(server: LocalSshServer) -> None:
    closing = Event()
    server.before_login = closing.wait
    with pytest.raises(GuestUnreachableError, match="did not say"):
        control(server).ping(timeout=timedelta(seconds=3))
    closing.set()


def test_a_server_that_speaks_no_ssh_is_unreachable(server: LocalSshServer) -> None:
    ends: list[socket] = []

    def wrong(_address: str, _port: int, _timeout: timedelta) -> socket:
        ours, theirs = socketpair()
        theirs.sendall(b"220 mail.example ESMTP\r\n" * 200)
        ends.append(theirs)
        return ours

    login = replace(server.login, connect_timeout=timedelta(seconds=1))
    with pytest.raises(GuestUnreachableError):
        ACCESS.ssh(login, address=ADDRESS, connector=wrong).ping(timeout=LIMIT)
    for end in ends:
        end.close()


def test_a_server_that_says_nothing_is_unreachable(server: LocalSshServer) -> None:
    ours, theirs = socketpair()
    login = replace(server.login, connect_timeout=timedelta(seconds=1))
    began = time.monotonic()
    with pytest.raises(GuestUnreachableError):
        ACCESS.ssh(login, address=ADDRESS, connector=lambda *_: ours).ping(timeout=LIMIT)
    assert time.monotonic() - began < 10
    theirs.close()


@pytest.mark.parametrize(
    ("login_user", "user", "begins"),
    [
        ("root", None, "id"),
        ("root", "root", "id"),
        ("root", "postgres", "runuser -u postgres -- id"),
        ("backup", "backup", "id"),
        ("backup", "postgres", "sudo -n -u postgres -- id"),
        ("root", "it's $me", "runuser -u 'it'\"'\"'s $me' -- id"),
    ],
)
def test_accounts(server: LocalSshServer, login_user: str, user: str | None, begins: str) -> None:
    server.user = login_user
    control(server, login=replace(server.login, user=login_user)).run(Command(argv=("id",), user=user), timeout=LIMIT)
    assert server.commands[0].partition(" sh ")[2] == begins


def test_a_cancelled_run_stops_waiting(server: LocalSshServer) -> None:
    class Cancel:
        def is_set(self) -> bool:
            return True

        def check(self) -> None:
            raise CancelledError("a signal asked the run to stop")

    waiting = Access(clock=SystemClock(), cancel=Cancel()).ssh(server.login, address=ADDRESS, connector=server.connect)
    with pytest.raises(CancelledError):
        waiting.run(Command(argv=("sleep", "10")), timeout=LIMIT)


def test_no_secret_is_logged(server: LocalSshServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    secret = b"correct horse battery staple"
    result = control(server).run(Command(argv=("cat",), stdin=secret, sensitive=True), timeout=LIMIT)
    assert result.stdout == secret
    assert secret.decode() not in caplog.text
    assert "BEGIN OPENSSH" not in caplog.text


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_a_key_file_is_looked_at_before_anything_is_sent(server: LocalSshServer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        control(server, login=replace(server.login, key_file=str(tmp_path / "none")))
    assert server.connections == 0


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o620, 0o602, 0o601])
def test_a_key_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    path = write_key(tmp_path / "key")
    path.chmod(mode)
    with pytest.raises(ConfigError) as caught:
        load_key(path)
    assert "chmod 600" in str(caught.value.remedy)


def test_what_is_no_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no file"):
        load_key(tmp_path)
    path = tmp_path / "key"
    for content in (b"", b"not a key", b"\xff\x00" * 99, b"-----BEGIN OPENSSH PRIVATE KEY-----\n!!!!\n"):
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(ConfigError, match="no private SSH key"):
            load_key(path)


@pytest.mark.parametrize("kind", [("ed25519",), ("ecdsa", "-b", "384"), ("rsa", "-b", "2048"), ("rsa", "-m", "PEM")])
def test_keys_of_ssh_keygen_are_read_unless_they_need_a_passphrase(tmp_path: Path, kind: tuple[str, ...]) -> None:
    path = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", *kind, "-N", "", "-f", str(path)], check=True, timeout=60)
    public = path.with_suffix(".pub").read_text().split()[1]
    assert load_key(path).get_base64() == public
    subprocess.run(["ssh-keygen", "-q", "-p", "-P", "", "-N", "secret", "-f", str(path)], check=True, timeout=60)
    with pytest.raises(ConfigError, match="passphrase"):
        load_key(path)


def test_a_key_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_key(tmp_path / "key")
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(ConfigError, match="belongs to another user"):
        load_key(path)
