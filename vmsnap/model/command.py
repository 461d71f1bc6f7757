"""Commands that run inside a guest, and what came back.

An engine yields commands and is sent results; it never runs anything itself. See ``Procedure``.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Command:
    """One program to run in a guest.

    ``argv`` is a list of arguments, never a shell text. ``user`` is an account of the guest (``None``: root or
    whatever the control connects as). ``stdin`` is fed to the program. ``timeout`` bounds the run; ``None`` takes the
    control's default. ``sensitive`` keeps stdin and output out of every log.
    """

    argv: tuple[str, ...]
    user: str | None = None
    stdin: bytes = b""
    timeout: timedelta | None = None
    sensitive: bool = False


@dataclass(frozen=True, kw_only=True)
class CommandResult:
    """What a program in a guest did. ``exit_status`` is 128 + signal number where a signal ended it."""

    exit_status: int
    stdout: bytes = field(default=b"", repr=False)
    stderr: bytes = field(default=b"", repr=False)
    truncated: bool = False

    @property
    def text(self) -> str:
        """Return stdout as text; bytes that are not UTF-8 are replaced."""
        return self.stdout.decode("utf-8", "replace")

    @property
    def error_text(self) -> str:
        """Return stderr as text; bytes that are not UTF-8 are replaced."""
        return self.stderr.decode("utf-8", "replace")


Procedure = Generator[Command, CommandResult, T]
"""A conversation with a guest: yields commands, is sent their results, returns its finding."""
