"""Making controls (``vmsnap.ports.guest.GuestAccess``)."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from vmsnap.guests.agent import AgentControl
from vmsnap.guests.agentfile import read_file
from vmsnap.guests.powershell_direct import PowerShellControl
from vmsnap.model.guest import SshLogin
from vmsnap.ports.clock import Cancel, Clock
from vmsnap.ports.guest import AgentChannel, Connector, GuestControl, HostLine


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
        from vmsnap.guests.keys import load_key  # noqa: PLC0415 - paramiko takes long to load, and most guests have an agent
        from vmsnap.guests.ssh import SshControl  # noqa: PLC0415 - as above

        key = load_key(Path(login.key_file))
        return SshControl(login, key=key, address=address, connector=connector, clock=self._clock, cancel=self._cancel)

    def host_key(self, login: SshLogin, *, address: str, connector: Connector) -> str:
        """Return the SSH host key at ``address`` as in known_hosts without the name. Logs nobody in.

        Raises GuestUnreachableError. May be repeated.
        """
        from vmsnap.guests.ssh import host_key_of, open_transport  # noqa: PLC0415 - as above

        transport = open_transport(
            address=address, port=login.port, connector=connector, timeout=login.connect_timeout, host_key=None
        )
        try:
            return host_key_of(transport, address=address)
        finally:
            transport.close()
