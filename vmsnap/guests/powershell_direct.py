"""Commands in Windows guests over PowerShell Direct: through the host, without a network, with an account of the guest.

The host runs programs, not texts of a shell. What a program gets on Windows is one command line, which it takes apart
itself; nearly all do so by the rules of Microsoft's C runtime, which are followed here.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from datetime import timedelta

from vmsnap.errors import BugError, GuestCommandError, GuestUnreachableError, HostUnreachableError, UnknownOutcomeError
from vmsnap.guests.limits import deadline_error
from vmsnap.model.command import Command, CommandResult
from vmsnap.ports.clock import Cancel
from vmsnap.ports.guest import HostLine, ProgramOutcome

_PING = ("hostname",)
_PLAIN = re.compile(r"[^\s\"]+")
_BACKSLASHES_BEFORE_QUOTE = re.compile(r'(\\*)"')
_CANNOT_RUN = 126
_NOT_FOUND = 127
# winerror.h: the file, or the folder, is not there.
_MISSING = frozenset({2, 3})
_LONGEST_COMMAND_LINE = 32766
_log = logging.getLogger(__name__)


class PowerShellControl:
    """Runs commands through a guest's host (see ``vmsnap.ports.guest.GuestControl``).

    It runs as the account that the host's line logs in with; ``Command.user`` must be that of an administrator, which is
    what ``root`` and nobody in particular stand for.
    """

    def __init__(self, line: HostLine, *, cancel: Cancel | None = None) -> None:
        self._line = line
        self._cancel = cancel

    @property
    def method(self) -> str:
        """Return ``powershell``."""
        return "powershell"

    def ping(self, *, timeout: timedelta) -> None:
        """Return where the guest runs programs. Raises GuestUnreachableError otherwise. May be repeated."""
        self.run(Command(argv=_PING), timeout=timeout)

    def run(self, command: Command, *, timeout: timedelta) -> CommandResult:
        """Run a command to its end. See ``GuestControl.run``. What takes too long is ended in the guest.

        Exit status 127 stands for a program that is not there and 126 for one that cannot be run, as in a shell.
        Raises GuestCommandError for another account, BugError for a command line that is too long.
        """
        if command.user not in {None, "root"}:
            raise GuestCommandError(
                f"{command.argv[0]} was to run as {command.user}: PowerShell Direct runs programs as one account alone",
                remedy="name an administrator of the guest in hyperv.guest_credential",
            )
        limit = command.timeout or timeout
        arguments = command_line(command.argv[1:])
        if len(arguments) > _LONGEST_COMMAND_LINE:
            raise BugError(f"{len(arguments)} characters of arguments for {command.argv[0]} are too many for Windows")
        _log.debug("running %s in the guest", command.argv[0] if command.sensitive else command.argv)
        try:
            end = self._line.run_program(
                command.argv[0], arguments=arguments, stdin=command.stdin, timeout=limit, cancel=self._cancel
            )
        except (HostUnreachableError, UnknownOutcomeError) as error:
            raise GuestUnreachableError(
                f"the line to the guest through its host broke: {error.brief}",
                details=error.details,
                remedy=error.remedy,
            ) from error
        if end.outcome is ProgramOutcome.LATE:
            raise deadline_error(command, limit=limit)
        if end.outcome is ProgramOutcome.NOT_STARTED:
            status = _NOT_FOUND if end.code in _MISSING else _CANNOT_RUN
            return CommandResult(exit_status=status, stderr=f"{end.words or end.code}".encode())
        return CommandResult(exit_status=end.code, stdout=end.stdout, stderr=end.stderr, truncated=end.truncated)

    def close(self) -> None:
        """Do nothing: the line belongs to the hypervisor."""


def command_line(arguments: Sequence[str]) -> str:
    """Return arguments as one command line that ``CommandLineToArgvW`` takes apart into just these."""
    return " ".join(argument if _PLAIN.fullmatch(argument) else _quoted(argument) for argument in arguments)


def _quoted(argument: str) -> str:
    # Backslashes count only before a quotation mark: there each is doubled, and one more takes the mark's meaning away.
    text = _BACKSLASHES_BEFORE_QUOTE.sub(r'\1\1\\"', argument)
    trailing = len(text) - len(text.rstrip("\\"))
    return f'"{text}{text[len(text) - trailing :]}"'
