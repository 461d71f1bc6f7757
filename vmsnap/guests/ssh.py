"""Commands over SSH, in a guest whose host key is known beforehand.

SSH carries a command as one text that the account's shell reads (RFC 4254, section 6.5); there is no argument list in
the protocol. So the text is always the same little ``sh`` script, which runs its own arguments, and the arguments are
quoted by ``shlex.join``: in single quotes, where a shell reads nothing.
"""

from __future__ import annotations

import base64
import logging
import selectors
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from shlex import join
from threading import Lock

import paramiko
from paramiko.ssh_exception import IncompatiblePeer

from vmsnap.errors import BugError, GuestUnreachableError, PreconditionError, SafetyError
from vmsnap.guests.limits import OUTPUT_BYTES, deadline_error
from vmsnap.model.command import Command, CommandResult
from vmsnap.model.guest import SshLogin
from vmsnap.ports.clock import Cancel, Clock
from vmsnap.ports.guest import Connector

# A shell of its own, so that a program ended by a signal becomes status 128 + number whatever the login shell is. In the
# root folder, as under the agent: the login's home is closed to the database's account. Before all other work of the
# guest, where the login may say so: only clones are spoken to by SSH, and their work would hold up the drain that ends it.
_RUN = ("/bin/sh", "-c", 'cd /; renice -n -20 -p $$ >/dev/null 2>&1; "$@"; exit "$?"', "sh")
_CHUNK = 1 << 16
_PATROL_SECONDS = 0.1
# What paramiko calls failed authentications, too (AuthHandler.wait_for_response); they say nothing of the key.
_NO_ANSWER = ("transport shut down or saw EOF", "Authentication timeout")
_KEEPALIVE_SECONDS = 15
_RSA_SIGNATURES = ("rsa-sha2-512", "rsa-sha2-256")
_log = logging.getLogger(__name__)
_PARAMIKO_LOG = "vmsnap.guests.ssh.paramiko"
# What paramiko logs it raises as well, and our errors say it once, in our words.
logging.getLogger(_PARAMIKO_LOG).setLevel(logging.CRITICAL + 1)


class SshControl:
    """Runs commands over one SSH connection (see ``vmsnap.ports.guest.GuestControl``).

    The connection is opened when it is first needed, and again where it broke. For another account than the login's
    the command runs under ``runuser`` (login root) or ``sudo -n``.
    """

    def __init__(
        self,
        login: SshLogin,
        *,
        key: paramiko.PKey,
        address: str,
        connector: Connector,
        clock: Clock,
        cancel: Cancel | None = None,
    ) -> None:
        if login.host_key is None:
            raise BugError("an SSH login needs the host key that the server must have")
        self._login = login
        self._host_key = login.host_key
        self._key = key
        self._address = address
        self._connector = connector
        self._clock = clock
        self._cancel = cancel
        self._transport: paramiko.Transport | None = None
        self._opening = Lock()

    @property
    def method(self) -> str:
        """Return ``ssh``."""
        return "ssh"

    def ping(self, *, timeout: timedelta) -> None:
        """Return where the server lets us in and runs a command. May be repeated.

        Raises GuestUnreachableError where it does not answer, SafetyError for another host key, PreconditionError
        where it refuses our key: waiting mends none of the last two.
        """
        result = self._run(Command(argv=("true",)), limit=timeout, connect_limit=timeout)
        if result.exit_status != 0:
            raise GuestUnreachableError(f"{self._address} runs no commands", details=result.error_text[:500])

    def run(self, command: Command, *, timeout: timedelta) -> CommandResult:
        """Run a command to its end. See ``GuestControl.run``. Time counts from when the connection is there.

        Connecting has the login's own limit. Also raises what ``ping`` raises.
        """
        return self._run(command, limit=command.timeout or timeout, connect_limit=self._login.connect_timeout)

    def close(self) -> None:
        """Close the connection. May be repeated."""
        if self._transport is not None:
            self._transport.close()
            self._transport = None

    def _run(self, command: Command, *, limit: timedelta, connect_limit: timedelta) -> CommandResult:
        argv = self._as_user(command)
        _log.debug("running %s in the guest", argv)
        connect_limit = min(connect_limit, self._login.connect_timeout)
        with _translated(self._address):
            with self._opening:
                transport = self._connected(connect_limit)
            channel = transport.open_session(timeout=connect_limit.total_seconds())
            try:
                channel.exec_command(join((*_RUN, *argv)))
                return self._converse(channel, command=command, limit=limit)
            finally:
                channel.close()

    def _as_user(self, command: Command) -> tuple[str, ...]:
        if command.user in {None, self._login.user}:
            return command.argv
        if self._login.user == "root":
            return ("runuser", "-u", str(command.user), "--", *command.argv)
        return ("sudo", "-n", "-u", str(command.user), "--", *command.argv)

    def _connected(self, limit: timedelta) -> paramiko.Transport:
        if self._transport is not None and self._transport.is_active():
            return self._transport
        self.close()
        login = self._login
        transport = open_transport(
            address=self._address,
            port=login.port,
            connector=self._connector,
            timeout=limit,
            host_key=self._host_key,
        )
        try:
            transport.auth_publickey(login.user, self._key)
        except paramiko.AuthenticationException as error:
            transport.close()
            if any(text in str(error) for text in _NO_ANSWER):
                raise GuestUnreachableError(
                    f"the SSH server at {self._address} did not say whether it lets {login.user} in", details=str(error)
                ) from error
            raise PreconditionError(
                f"the SSH server at {self._address} does not let {login.user} in with the key {login.key_file}",
                details=str(error),
                remedy=f"add its public key to ~{login.user}/.ssh/authorized_keys in the guest, or correct user and "
                "key_file in the policy's [control.ssh]",
            ) from error
        except BaseException:
            transport.close()
            raise
        transport.set_keepalive(_KEEPALIVE_SECONDS)
        self._transport = transport
        return transport

    def _converse(self, channel: paramiko.Channel, *, command: Command, limit: timedelta) -> CommandResult:
        end = self._clock.monotonic() + limit.total_seconds()
        rest = memoryview(command.stdin)
        streams = _Streams(channel)
        fed = False
        with selectors.DefaultSelector() as selector:
            selector.register(channel.fileno(), selectors.EVENT_READ)
            while True:
                if self._cancel is not None:
                    self._cancel.check()
                while rest and channel.send_ready() and not channel.closed:
                    rest = rest[_send(channel, rest[:_CHUNK]) :]
                if not rest and not fed:
                    channel.shutdown_write()
                    fed = True
                ended = channel.closed or (channel.eof_received and channel.exit_status_ready())
                progress = streams.read()
                if ended and not progress:
                    break
                if self._clock.monotonic() >= end:
                    raise deadline_error(command, limit=limit)
                if channel.eof_received:
                    # The selector would not wait any more.
                    channel.status_event.wait(_PATROL_SECONDS)
                elif not progress:
                    selector.select(_PATROL_SECONDS)
        if channel.exit_status < 0:
            raise GuestUnreachableError(
                f"the SSH connection to {self._address} broke while {command.argv[0]} ran in the guest"
            )
        return streams.result(channel.exit_status)


class _Streams:
    """Both outputs of a channel, read in turn so that neither can block the other, and cut at the limit."""

    def __init__(self, channel: paramiko.Channel) -> None:
        self._channel = channel
        self._stdout = bytearray()
        self._stderr = bytearray()
        self._truncated = False

    def read(self) -> bool:
        """Take what is there. Returns whether there was anything."""
        progress = False
        if self._channel.recv_ready():
            progress = True
            self._keep(self._stdout, self._channel.recv(_CHUNK))
        if self._channel.recv_stderr_ready():
            progress = True
            self._keep(self._stderr, self._channel.recv_stderr(_CHUNK))
        return progress

    def result(self, exit_status: int) -> CommandResult:
        return CommandResult(
            exit_status=exit_status,
            stdout=bytes(self._stdout),
            stderr=bytes(self._stderr),
            truncated=self._truncated,
        )

    def _keep(self, stream: bytearray, chunk: bytes) -> None:
        room = OUTPUT_BYTES - len(stream)
        stream += chunk[:room]
        self._truncated = self._truncated or len(chunk) > room


def open_transport(
    *, address: str, port: int, connector: Connector, timeout: timedelta, host_key: str | None
) -> paramiko.Transport:
    """Connect, agree on keys, and insist on the host key where one is given. Logs nobody in.

    Raises GuestUnreachableError, SafetyError for a server with another key.
    """
    seconds = timeout.total_seconds()
    with _translated(address):
        line = connector(address, port, timeout)
        try:
            transport = paramiko.Transport(line)
            transport.set_log_channel(_PARAMIKO_LOG)
            transport.banner_timeout = transport.handshake_timeout = transport.auth_timeout = seconds
            try:
                _start(transport, host_key=host_key, address=address, seconds=seconds)
            except BaseException:
                transport.close()
                raise
        except BaseException:
            # A transport that was never started leaves its socket open.
            line.close()
            raise
        return transport


def host_key_of(transport: paramiko.Transport, *, address: str) -> str:
    """Return the server's host key as in known_hosts without the name.

    Raises GuestUnreachableError where the connection broke after the keys were agreed on.
    """
    with _translated(address):
        key = transport.get_remote_server_key()
    return f"{key.get_name()} {base64.b64encode(key.asbytes()).decode('ascii')}"


def _start(transport: paramiko.Transport, *, host_key: str | None, address: str, seconds: float) -> None:
    if host_key is None:
        transport.start_client(timeout=seconds)
        return
    # A server has several keys and would show the one it likes best: ask for the pinned type.
    kind = host_key.split(maxsplit=1)[0]
    kinds = _RSA_SIGNATURES if kind == "ssh-rsa" else (kind,)
    try:
        transport.get_security_options().key_types = kinds
    except ValueError as error:
        raise PreconditionError(
            f"host keys of the type {kind} are not supported", remedy="pin another host key of the guest"
        ) from error
    try:
        transport.start_client(timeout=seconds)
    except IncompatiblePeer as error:
        raise _another_server(address, wanted=host_key, got="no key of that type") from error
    shown = host_key_of(transport, address=address)
    if shown != _two_words(host_key):
        raise _another_server(address, wanted=host_key, got=shown)


def _another_server(address: str, *, wanted: str, got: str) -> SafetyError:
    return SafetyError(
        f"the SSH server at {address} has another host key than the guest: this is not the machine we expect",
        details=f"expected {_two_words(wanted)}\ngot {got}",
        remedy="if the guest's host keys were changed, correct host_key in the policy's [control.ssh]",
    )


def _two_words(host_key: str) -> str:
    return " ".join(host_key.split()[:2])


def _send(channel: paramiko.Channel, data: memoryview) -> int:
    try:
        return channel.send(bytes(data))
    except OSError:
        # The program closed its input or ended: what it did not read, it did not want.
        return len(data)


@contextmanager
def _translated(address: str) -> Iterator[None]:
    try:
        yield
    except (paramiko.SSHException, EOFError, OSError) as error:
        raise GuestUnreachableError(
            f"the SSH server at {address} does not answer", details=f"{type(error).__name__}: {error}"
        ) from error
