"""Asking a guest: run a command, insist on its exit status, and quote it in errors."""

from __future__ import annotations

from vmsnap.errors import GuestCommandError
from vmsnap.model.command import Command, CommandResult, Procedure

PLAIN_MESSAGES = ("env", "-u", "HOME", "LC_ALL=C")
"""Prefix of commands whose words are judged: messages in English, and the account's own home folder."""


def ask(command: Command, *, what: str, remedy: str | None = None) -> Procedure[CommandResult]:
    """Run ``command`` and return its result. Raises GuestCommandError, saying ``what`` failed, for any failure."""
    result = yield command
    if result.exit_status != 0:
        raise failure(result, command=command, what=what, remedy=remedy)
    if result.truncated:
        raise GuestCommandError(f"{what}: the output is too long", details=_name(command), remedy=remedy)
    return result


def failure(result: CommandResult, *, command: Command, what: str, remedy: str | None = None) -> GuestCommandError:
    """Return the error for a command that failed, with its name, exit status and last words."""
    return GuestCommandError(
        f"{what}: {_name(command)} ended with status {result.exit_status}", details=last_words(result), remedy=remedy
    )


def last_words(result: CommandResult) -> str | None:
    """Return the end of what a command said: its errors, else its output."""
    text = result.error_text.strip() or result.text.strip()
    return text[-2000:] or None


def _name(command: Command) -> str:
    words = command.argv[len(PLAIN_MESSAGES) :] if command.argv[:4] == PLAIN_MESSAGES else command.argv
    return words[0] if words else "an empty command"
