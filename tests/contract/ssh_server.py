"""An SSH server on a socket pair whose commands are processes of this machine, so that no network is needed."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from socket import socket, socketpair
from threading import Event, Thread
from typing import IO

import paramiko
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from paramiko.common import AUTH_FAILED, AUTH_SUCCESSFUL, OPEN_SUCCEEDED

from vmsnap.errors import GuestUnreachableError
from vmsnap.model.guest import SshLogin

ADDRESS = "192.0.2.7"


def write_key(path: Path) -> Path:
    """Make an Ed25519 key as ssh-keygen does."""
    text = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    path.write_bytes(text)
    path.chmod(0o600)
    return path


class _Session(paramiko.ServerInterface):
    def __init__(self, server: LocalSshServer) -> None:
        self._server = server

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        self._server.before_login()
        allowed = username == self._server.user and key.asbytes() == self._server.client_key.asbytes()
        return AUTH_SUCCESSFUL if allowed else AUTH_FAILED

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        self._server.commands.append(command.decode())
        Thread(target=self._server.execute, args=(channel, command.decode()), daemon=True).start()
        return True


class LocalSshServer:
    """Serves every connection that ``connect`` opens. ``answers`` False: connections fail."""

    user = "root"

    def __init__(self, folder: Path) -> None:
        self.home = folder
        self.key_file = write_key(folder / "client")
        self.client_key = paramiko.PKey.from_path(self.key_file)
        self.server_key = paramiko.PKey.from_path(write_key(folder / "server"))
        self.answers = True
        self.commands: list[str] = []
        self.connections = 0
        self.before_login: Callable[[], object] = lambda: None
        self._transports: list[paramiko.Transport] = []
        self._lines: list[socket] = []
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def login(self) -> SshLogin:
        """How to log in here."""
        return SshLogin(
            user=self.user,
            key_file=str(self.key_file),
            host_key=f"{self.server_key.get_name()} {self.server_key.get_base64()}",
            connect_timeout=timedelta(seconds=60),
        )

    def connect(self, address: str, port: int, timeout: timedelta) -> socket:
        """Open a connection: a ``Connector``."""
        if not self.answers:
            raise GuestUnreachableError(f"no answer from {address}:{port}", details=f"waited {timeout}")
        self.connections += 1
        ours, theirs = socketpair()
        transport = paramiko.Transport(theirs)
        transport.set_log_channel("vmsnap.guests.ssh.paramiko")  # silent, as the client's
        transport.add_server_key(self.server_key)
        self._transports.append(transport)
        self._lines.append(theirs)
        Thread(target=self._serve, args=(transport,), daemon=True).start()
        return ours

    def drop_connections(self) -> None:
        """Break every connection."""
        for transport in self._transports:
            transport.close()
        for line in self._lines:
            line.close()
        self._transports.clear()
        self._lines.clear()

    def close(self) -> None:
        """End everything."""
        self.drop_connections()
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def execute(self, channel: paramiko.Channel, command: str) -> None:
        """Run one command as sshd does: by a shell, its streams over the channel, a signal told by name."""
        process = subprocess.Popen(  # noqa: S602 - a shell is what sshd runs too
            command, shell=True, cwd=self.home, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self._processes.append(process)
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        pumps = [
            Thread(target=_pump_out, args=(process.stdout, channel.sendall), daemon=True),
            Thread(target=_pump_out, args=(process.stderr, channel.sendall_stderr), daemon=True),
        ]
        went_on = Event()
        Thread(target=_pump_in, args=(channel, process.stdin, went_on), daemon=True).start()
        for pump in pumps:
            pump.start()
        status = process.wait()
        for pump in pumps:
            pump.join()
        # The client must have heard that the command was accepted before it hears that the channel is closed.
        went_on.wait(60)
        try:
            if status >= 0:
                channel.send_exit_status(status)
            channel.close()
        except (OSError, EOFError, paramiko.SSHException):
            pass

    def _serve(self, transport: paramiko.Transport) -> None:
        try:
            transport.start_server(server=_Session(self))
        except (OSError, EOFError, paramiko.SSHException):
            transport.close()


# What a line that is being torn down may raise; nobody is left to tell.
_GONE = (OSError, EOFError, ValueError, paramiko.SSHException)


def _pump_out(source: IO[bytes], send: Callable[[bytes], None]) -> None:
    with source:
        while chunk := source.read1(1 << 16):  # type: ignore[attr-defined]
            try:
                send(chunk)
            except _GONE:
                return


def _pump_in(channel: paramiko.Channel, target: IO[bytes], went_on: Event) -> None:
    """``went_on``: set when the client has sent something, be it the end of its input, or the line is gone."""
    try:
        with target:
            chunk = channel.recv(1 << 16)
            went_on.set()
            while chunk:
                target.write(chunk)
                target.flush()
                chunk = channel.recv(1 << 16)
    except _GONE:
        # The program does not read any more; a server goes on taking what is sent.
        try:
            while channel.recv(1 << 16):
                pass
        except _GONE:
            return
