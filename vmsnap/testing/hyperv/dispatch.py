"""What lies behind a WinRM endpoint: pipelines come in, objects and error records go out.

A dispatcher is called once a pipeline, in a thread of its own. It knows nothing of the wire.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

COR_E_EXCEPTION = -2146233088
"""HRESULT of an exception that sets none (0x80131500, corerror.h)."""


@dataclass(frozen=True)
class Secret:
    """A SecureString that came in, decrypted with the session's key."""

    text: str = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Credential:
    """A PSCredential that came in."""

    user: str
    secret: Secret


PlainValue: TypeAlias = (
    "str | int | float | bool | bytes | Secret | Credential | Sequence[PlainValue] | Mapping[str, PlainValue] | None"
)
"""A value as it crosses the wire. Everything that a script may take or give is one of these."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One command of a pipeline: a script's text, or the name of a cmdlet or function, with its parameters by name."""

    text: str
    is_script: bool
    parameters: Mapping[str, PlainValue] = field(default_factory=dict)
    arguments: tuple[PlainValue, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Invocation:
    """One pipeline. ``user`` is who logged in; ``configuration`` the session configuration (``Microsoft.PowerShell``)."""

    calls: tuple[Call, ...]
    user: str
    configuration: str

    @property
    def call(self) -> Call:
        """Return the only command. Raises PowerShellError where there are several: nothing here sends such."""
        if len(self.calls) != 1:
            raise PowerShellError("one command a pipeline is understood here", error_id="OneCommandOnly")
        return self.calls[0]


class PowerShellError(Exception):
    """An error record. Raised by a dispatcher it ends the pipeline; written to its streams it does not.

    ``error_id`` is the FullyQualifiedErrorId; ``category`` an ErrorCategory by name; ``hresult`` signed, as .NET has it.
    """

    def __init__(
        self,
        message: str,
        *,
        error_id: str,
        category: str = "NotSpecified",
        hresult: int = COR_E_EXCEPTION,
        exception_type: str = "Microsoft.HyperV.PowerShell.VirtualizationException",
        target: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.error_id = error_id
        self.category = category
        self.hresult = hresult
        self.exception_type = exception_type
        self.target = target


class StoppedError(Exception):
    """The client stopped the pipeline. A dispatcher lets it pass."""


class Streams(Protocol):
    """Where a dispatcher writes."""

    @property
    def stopped(self) -> threading.Event:
        """Return what is set when the client stops the pipeline or its pool goes away."""

    def write(self, value: PlainValue) -> None:
        """Write an object; a mapping becomes a PSCustomObject. Raises StoppedError."""

    def error(self, record: PowerShellError) -> None:
        """Write an error that does not end the pipeline."""

    def warning(self, text: str) -> None:
        """Write a warning."""

    def progress(self, activity: str, *, percent: int) -> None:
        """Write a progress record."""

    def wait(self, seconds: float) -> None:
        """Wait. Raises StoppedError at once where the pipeline is stopped meanwhile."""


Dispatcher = Callable[[Invocation, Streams], None]
"""Runs a pipeline. PowerShellError ends it as failed; any other exception too, as a fault of the test."""
