"""The line into a guest that a Hyper-V host holds: PowerShell Direct (``vmsnap.ports.guest.HostLine``)."""

from __future__ import annotations

import base64
import binascii
from datetime import timedelta
from typing import Protocol

from vmsnap.errors import GuestCommandError, PreconditionError
from vmsnap.hypervisors.hyperv.connection import Login, Row
from vmsnap.hypervisors.hyperv.running import ScriptRunner
from vmsnap.ports.clock import Cancel
from vmsnap.ports.guest import ProgramEnd, ProgramOutcome

OUTPUT_BYTES = 16 << 20
"""What is kept of each stream."""

_MARGIN = timedelta(seconds=60)
"""What a session into a guest may take beyond the program's own time: the guest's PowerShell has to start."""


class GuestLogins(Protocol):
    """Accounts in guests."""

    def login(self, guest: str) -> Login | None:
        """Return the account in a guest, or None where none is known."""


class DirectLine:
    """A line into one VM. ``guest`` is whose accounts it has: a clone has its guest's. It has no QEMU guest agent."""

    def __init__(self, commands: ScriptRunner, *, machine_id: str, guest: str, login: Login | None) -> None:
        self._commands = commands
        self._machine_id = machine_id
        self._guest = guest
        self._login = login

    def send(self, request: str, *, timeout: timedelta) -> str:  # noqa: ARG002 - an AgentChannel
        """Refuse: guests of Hyper-V have another agent. Raises GuestCommandError."""
        raise GuestCommandError("guests of Hyper-V have no QEMU guest agent")

    def run_program(
        self, program: str, *, arguments: str, stdin: bytes, timeout: timedelta, cancel: Cancel | None
    ) -> ProgramEnd:
        """Run a program in the guest. See ``HostLine.run_program``."""
        if self._login is None:
            raise PreconditionError(
                f"no account in the guest {self._guest!r} is known, and PowerShell Direct always needs one",
                remedy="name one in the file of hyperv.guest_credential",
            )
        rows = self._commands.run(
            "run_in_guest",
            doing="run a program in a guest",
            parameters={
                "Id": self._machine_id,
                "Credential": self._login,
                "Program": program,
                "Arguments": arguments,
                "InputBase64": base64.b64encode(stdin).decode("ascii"),
                "OutputBytes": OUTPUT_BYTES,
                "TimeoutMs": round(timeout.total_seconds() * 1000),
            },
            timeout=timeout + _MARGIN,
            cancel=cancel,
        )
        return _end(rows)


def _end(rows: tuple[Row, ...]) -> ProgramEnd:
    try:
        (row,) = rows
        return ProgramEnd(
            outcome=ProgramOutcome(str(row["Outcome"])),
            code=int(str(row["Code"])),
            words=str(row["Words"]),
            stdout=base64.b64decode(str(row["Output"]), validate=True),
            stderr=base64.b64decode(str(row["Error"]), validate=True),
            truncated=row["Truncated"] is True,
        )
    except (ValueError, KeyError, binascii.Error) as error:
        raise GuestCommandError("the answer of a guest through its host makes no sense", details=str(error)) from error
