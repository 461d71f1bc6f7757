"""Making controls (``vmsnap.ports.guest.GuestAccess``)."""

from __future__ import annotations

import os
import stat
from datetime import timedelta
from pathlib import Path

import paramiko
from cryptography.exceptions import UnsupportedAlgorithm
from paramiko.pkey import UnknownKeyType

from vmsnap.errors import ConfigError
from vmsnap.guests.agent import AgentControl
from vmsnap.guests.agentfile import read_file
from vmsnap.guests.powershell_direct import PowerShellControl
from vmsnap.guests.ssh import SshControl, host_key_of, open_transport
from vmsnap.model.guest import SshLogin
from vmsnap.ports.clock import Cancel, Clock
from vmsnap.ports.guest import AgentChannel, Connector, GuestControl, HostLine

_OTHERS = stat.S_IRWXG | stat.S_IRWXO


class Access:
    """Makes controls over the guest agent and over SSH.

    ``cancel`` ends a wait for a command with CancelledError when the run is asked to stop.
    """

    def __init__(self, *, clock: Clock, cancel: Cancel | None = None) -> None:
        self._clock = clock
        self._cancel = cancel

    def cancelled_by(self, cancel: Cancel) -> Access:
        """Return the same access with another cancel."""
        return Access(clock=self._clock, cancel=cancel)

    def agent(self, channel: AgentChannel, *, urgent: bool = False) -> GuestControl:
        """Return a control over the guest agent, or over the line that the host holds instead of one."""
        if isinstance(channel, HostLine):
            return PowerShellControl(channel, cancel=self._cancel)
        return AgentControl(channel, clock=self._clock, cancel=self._cancel, urgent=urgent)

    def read_file(self, channel: AgentChannel, *, path: str, timeout: timedelta) -> bytes | None:
        """Return the beginning of a guest's file as its agent reads it. See ``vmsnap.ports.guest.GuestAccess``."""
        return read_file(channel, path=path, timeout=timeout)

    def ssh(self, login: SshLogin, *, address: str, connector: Connector) -> GuestControl:
        """Return a control over SSH to ``address``; nothing is sent yet.

        Raises ConfigError for a key file that is missing, readable by others, protected by a passphrase or no key,
        BugError for a login without a host key.
        """
        key = load_key(Path(login.key_file))
        return SshControl(login, key=key, address=address, connector=connector, clock=self._clock, cancel=self._cancel)

    def host_key(self, login: SshLogin, *, address: str, connector: Connector) -> str:
        """Return the SSH host key at ``address`` as in known_hosts without the name. Logs nobody in.

        Raises GuestUnreachableError. May be repeated.
        """
        transport = open_transport(
            address=address, port=login.port, connector=connector, timeout=login.connect_timeout, host_key=None
        )
        try:
            return host_key_of(transport, address=address)
        finally:
            transport.close()


def load_key(path: Path) -> paramiko.PKey:
    """Return the private key in a file. Raises ConfigError with what is wrong with it."""
    try:
        status = path.stat()
    except OSError as error:
        raise ConfigError(
            f"cannot read the SSH key {path}: {error.strerror}", remedy="correct key_file in the policy's [control.ssh]"
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"the SSH key {path} is no file", remedy="correct key_file in the policy's [control.ssh]")
    if status.st_uid not in {0, os.geteuid()}:
        raise ConfigError(f"the SSH key {path} belongs to another user", remedy=f"chown root {path}")
    if status.st_mode & _OTHERS:
        raise ConfigError(f"others may read or change the SSH key {path}", remedy=f"chmod 600 {path}")
    try:
        return paramiko.PKey.from_path(path)
    except (paramiko.PasswordRequiredException, TypeError) as error:
        # TypeError is cryptography's way to say that a passphrase is missing.
        raise ConfigError(
            f"the SSH key {path} needs a passphrase, and nobody is there to type it",
            remedy="use a key without one: ssh-keygen -t ed25519 -N '' -f FILE",
        ) from error
    except (paramiko.SSHException, UnknownKeyType, ValueError, OSError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{path} holds no private SSH key that can be used",
            details=type(error).__name__,
            remedy="make one: ssh-keygen -t ed25519 -N '' -f FILE",
        ) from error
