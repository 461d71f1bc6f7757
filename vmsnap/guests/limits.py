"""Bounds on what a guest may send, and the words for a command that took too long."""

from __future__ import annotations

from datetime import timedelta

from vmsnap.errors import DeadlineError
from vmsnap.model.command import Command

OUTPUT_BYTES = 16 << 20
"""What is kept of a command's stdout and stderr, each."""

ANSWER_CHARACTERS = 64 << 20
"""The longest answer of an agent that is looked at: two streams of ``OUTPUT_BYTES`` in base64 and some more."""


def deadline_error(command: Command, *, limit: timedelta) -> DeadlineError:
    """Return the error for a command that did not end in time. It may still run in the guest."""
    return DeadlineError(
        f"{command.argv[0]} did not end in the guest within {limit.total_seconds():g} s",
        remedy="raise the limit (control.command_timeout, or the deadline of the step), or look what it waits for",
    )
