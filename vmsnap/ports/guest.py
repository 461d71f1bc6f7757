"""Running commands in a guest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from socket import socket
from typing import Protocol, runtime_checkable

from vmsnap.model.command import Command, CommandResult
from vmsnap.model.guest import SshLogin
from vmsnap.ports.clock import Cancel

Connector = Callable[[str, int, timedelta], socket]
"""Opens a TCP connection (host, port, timeout), inside a fence's namespace or on the host.

Raises GuestUnreachableError.
"""


class AgentChannel(Protocol):
    """The line to one guest's QEMU guest agent, as a hypervisor offers it."""

    def send(self, request: str, *, timeout: timedelta) -> str:
        """Send one JSON request of the agent's protocol (QMP style) and return its JSON answer.

        Raises GuestUnreachableError where no agent answers in time, GuestCommandError where the agent refuses.
        """


@dataclass(frozen=True, kw_only=True)
class ProgramEnd:
    """How a program ended that a host ran in a guest. ``code`` is its own, or why it could not be started.

    ``truncated``: it said more than it was allowed to.
    """

    outcome: ProgramOutcome
    code: int
    words: str = ""
    stdout: bytes = field(default=b"", repr=False)
    stderr: bytes = field(default=b"", repr=False)
    truncated: bool = False


class ProgramOutcome(StrEnum):
    """What became of a program."""

    ENDED = "ended"
    NOT_STARTED = "not started"
    LATE = "late"


@runtime_checkable
class HostLine(Protocol):
    """A line into one guest that its host itself holds, such as PowerShell Direct: no network, and an account's password.

    What offers an ``AgentChannel`` may be one of these as well; it is then used instead.
    """

    def run_program(
        self, program: str, *, arguments: str, stdin: bytes, timeout: timedelta, cancel: Cancel | None
    ) -> ProgramEnd:
        """Run a program with a command line of Windows, and end it after ``timeout``.

        Raises HostUnreachableError, GuestUnreachableError, PreconditionError where it was not run; UnknownOutcomeError
        where the line broke; CancelledError.
        """


class GuestControl(Protocol):
    """A way to run commands in one guest."""

    @property
    def method(self) -> str:
        """Return ``agent``, ``ssh`` or ``powershell``, for manifests and messages."""

    def ping(self, *, timeout: timedelta) -> None:
        """Return where the guest answers. Raises GuestUnreachableError otherwise. May be repeated."""

    def run(self, command: Command, *, timeout: timedelta) -> CommandResult:
        """Run a command to its end and return what it did; a failing exit status is a result, not an error.

        ``command.timeout`` wins over ``timeout``. Raises DeadlineError where it did not end in time (it may still
        run), GuestUnreachableError where the line broke (it may have run), GuestCommandError for an answer that makes
        no sense. Output beyond 16 MiB a stream is cut and ``truncated`` set. It runs in the root folder. Never repeated
        by itself.
        """

    def close(self) -> None:
        """Let go of the line. May be repeated."""


class GuestAccess(Protocol):
    """Makes controls."""

    def cancelled_by(self, cancel: Cancel) -> GuestAccess:
        """Return the same access, whose controls end a wait for a command when ``cancel`` says so, with its error."""

    def agent(self, channel: AgentChannel, *, urgent: bool = False) -> GuestControl:
        """Return a control over the guest agent.

        ``urgent`` is for clones alone: commands go before the guest's other work, which is thrown away, and file systems
        that were frozen at the instant of the capture are thawed before the first one.
        """

    def read_file(self, channel: AgentChannel, *, path: str, timeout: timedelta) -> bytes | None:
        """Return the first 4 KiB of a guest's file as its agent reads them, or None where there is no such file.

        Runs no program in the guest. Raises GuestUnreachableError, GuestCommandError where the agent refuses.
        """

    def ssh(self, login: SshLogin, *, address: str, connector: Connector) -> GuestControl:
        """Return a control over SSH to ``address``, every connection opened by ``connector``; always urgent.

        Raises ConfigError for a key file that is missing, readable by others or no key; nothing is sent yet.
        """

    def host_key(self, login: SshLogin, *, address: str, connector: Connector) -> str:
        """Return the SSH host key at ``address`` as in known_hosts without the name. Logs nobody in.

        Raises GuestUnreachableError.
        """
