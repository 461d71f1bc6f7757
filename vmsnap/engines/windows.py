"""PowerShell in a Windows guest, as commands: a constant script with its parameters beside it, and JSON back.

The script goes in ``-EncodedCommand``, which no quoting can spoil, and its parameters as JSON on standard input, where they
are data. Windows PowerShell 5.1, which every Windows since Server 2016 has, is enough.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import cache
from importlib import resources
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from vmsnap.engines.asking import ask
from vmsnap.errors import GuestCommandError, NotCleanError, PreconditionError
from vmsnap.model.command import Command, CommandResult, Procedure

_PROLOGUE = """$ErrorActionPreference = 'Stop'
$ProgressPreference = 'SilentlyContinue'
[Console]::OutputEncoding = New-Object System.Text.UTF8Encoding $false
$given = (@($input) -join '') | ConvertFrom-Json
"""

# A process may be there for a moment after its service has stopped; each look takes Windows about a second.
_LOOKS = 5
_AS_TEXT = ("-InputFormat", "Text", "-OutputFormat", "Text")

Parameters = Mapping[str, str | int | list[str]]


class Answer(BaseModel):
    """What a script prints, by the names that PowerShell gives it. Nothing else is believed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


A = TypeVar("A", bound=Answer)


def powershell(*names: str, parameters: Parameters | None = None, timeout: timedelta | None = None) -> Command:
    """Return the command that runs scripts of this package one after another; ``$given`` has their parameters.

    JSON is sent in ASCII, whatever code page the guest's console has.
    """
    text = _PROLOGUE + "".join(map(script_text, names))
    encoded = base64.b64encode(text.encode("utf-16-le")).decode("ascii")
    return Command(
        # Without a format, PowerShell writes errors as XML where its command came encoded.
        argv=("powershell.exe", "-NoLogo", "-NoProfile", "-NonInteractive", *_AS_TEXT, "-EncodedCommand", encoded),
        stdin=json.dumps(dict(parameters or {})).encode("ascii"),
        timeout=timeout,
    )


@cache
def script_text(name: str) -> str:
    """Return the text of a script without its comments, which the guest has no use for and a command line no room."""
    text = resources.files(__package__).joinpath("scripts", f"{name}.ps1").read_text(encoding="utf-8")
    return "".join(line for line in text.splitlines(keepends=True) if not line.lstrip().startswith("#"))


def names_in(command: Command) -> tuple[str, ...]:
    """Return the scripts that a command of ``powershell`` runs, for messages and tests."""
    text = base64.b64decode(command.argv[-1]).decode("utf-16-le")
    folder = resources.files(__package__).joinpath("scripts")
    known = sorted(file.name.removesuffix(".ps1") for file in folder.iterdir() if file.name.endswith(".ps1"))
    found = [(text.index(script_text(name)), name) for name in known if script_text(name) in text]
    return tuple(name for _, name in sorted(found))


def refuse_late(service: str, *, state: str, starts: str) -> None:
    """Raise PreconditionError for a service that Windows starts by itself and that does not run, or not yet.

    It would come up after the others were found, and nobody would drain it.
    """
    if state == "Stopped" and starts == "Auto":
        raise PreconditionError(
            f"the service {service} starts by itself, and does not run",
            remedy="start it in the guest, or let it be started by hand: Set-Service -StartupType Manual",
        )


def require_no_process(look: Callable[[], Procedure[list[int]]], *, what: str) -> Procedure[None]:
    """Make sure that no server process is left. ``look`` returns the ids of those that run; it is repeated for a while.

    Raises NotCleanError: Windows would end the process when it powers off, and nobody would judge how.
    """
    left = yield from look()
    for _ in range(_LOOKS):
        if not left:
            return
        left = yield from look()
    if left:
        raise NotCleanError(
            f"{what} runs in the clone with process id {left[0]}, after every server that was found had been stopped",
            remedy="a server came up while the others were drained, or something started one again: stop what does with "
            "the policy's database.before_drain, or back up when all servers of the guest are up",
        )


def ask_json(command: Command, *, what: str, remedy: str | None = None) -> Procedure[object]:
    """Run a script that prints JSON and return it. Raises GuestCommandError for any failure, saying ``what`` failed."""
    result = yield from ask(command, what=what, remedy=remedy)
    return parse_json(result, what=what)


def ask_model(kind: type[A], command: Command, *, what: str, remedy: str | None = None) -> Procedure[A]:
    """Run a script that prints JSON and return it as what it has to be. Raises GuestCommandError as ``ask_json`` does."""
    answer = yield from ask_json(command, what=what, remedy=remedy)
    try:
        return kind.model_validate(answer)
    except ValidationError as error:
        raise GuestCommandError(f"{what}: the answer makes no sense", details=str(error)) from error


def parse_json(result: CommandResult, *, what: str) -> object:
    """Return the JSON that a script printed. Raises GuestCommandError."""
    try:
        answer: object = json.loads(result.text.strip().removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}"))
    except ValueError as error:
        raise GuestCommandError(f"{what}: the answer makes no sense", details=result.text[:500]) from error
    return answer
