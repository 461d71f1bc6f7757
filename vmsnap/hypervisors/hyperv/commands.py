"""The constant scripts of this package, by name, on a Hyper-V host.

A script is sent as it is, with its parameters beside it: nothing is pasted into its text. On a host with a constrained
session configuration (JEA) the same scripts are functions there, and only their names are sent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import timedelta
from functools import cache
from importlib import resources

from vmsnap.errors import BugError
from vmsnap.hypervisors.hyperv.connection import DEFAULT_CONFIGURATION, Parameter, Row
from vmsnap.hypervisors.hyperv.failures import translate
from vmsnap.hypervisors.hyperv.transport import Script, Transport
from vmsnap.ports.clock import Cancel

SOON = timedelta(minutes=2)
_NAME = re.compile(r"[a-z]+(_[a-z]+)*\Z")


class Commands:
    """Runs scripts by name."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._by_name = transport.connection.configuration != DEFAULT_CONFIGURATION

    @property
    def where(self) -> str:
        """Return the host for messages."""
        return self._transport.connection.where

    def run(
        self,
        name: str,
        *,
        doing: str,
        parameters: Mapping[str, Parameter] | None = None,
        timeout: timedelta = SOON,
        cancel: Cancel | None = None,
    ) -> tuple[Row, ...]:
        """Run a script and return what it emitted; ``doing`` completes 'the Hyper-V host could not ...'.

        Raises what ``failures.translate`` makes of the first error that the script met, whether or not that ended it;
        HostUnreachableError, PreconditionError where it was not run; UnknownOutcomeError, DeadlineError, CancelledError
        where it may have done some of its work.
        """
        text = script_text(name)
        script = Script(text=function_name(name), is_name=True) if self._by_name else Script(text=text)
        outcome = self._transport.run(script, parameters=parameters or {}, timeout=timeout, cancel=cancel)
        if outcome.errors:
            raise translate(outcome.errors[0], doing=doing)
        return outcome.rows

    def close(self) -> None:
        """Close the sessions. May be repeated."""
        self._transport.close()


@cache
def script_text(name: str) -> str:
    """Return a script's text, with line feeds. Raises BugError where there is none of that name."""
    if not _NAME.match(name):
        raise BugError(f"{name!r} is no name of a script")
    try:
        return resources.files(__package__).joinpath("scripts", f"{name}.ps1").read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise BugError(f"there is no script {name!r} in this package") from error


def script_names() -> tuple[str, ...]:
    """Return the names of all scripts."""
    folder = resources.files(__package__).joinpath("scripts")
    return tuple(sorted(file.name.removesuffix(".ps1") for file in folder.iterdir() if file.name.endswith(".ps1")))


def function_name(name: str) -> str:
    """Return a script's name as a function of a session configuration, such as ``Invoke-VmsnapExportMachine``."""
    return "Invoke-Vmsnap" + "".join(word.capitalize() for word in name.split("_"))
