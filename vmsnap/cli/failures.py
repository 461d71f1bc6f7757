"""Errors as an operator and as a script see them."""

from __future__ import annotations

import json
import traceback
from typing import Any, TextIO

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from vmsnap.cli.text import printable, printable_lines
from vmsnap.errors import BugError, ExitCode, VmsnapError


def as_vmsnap_error(error: Exception) -> VmsnapError:
    """Return the error itself, or a bug that stands for what nobody expected."""
    if isinstance(error, BugError):
        bug: VmsnapError = error
    elif isinstance(error, VmsnapError):
        return error
    else:
        bug = BugError(f"{type(error).__name__}: {error}")
    bug.remedy = bug.remedy or (
        "this is a bug in vmsnap: please report it with the output of 'vmsnap --debug ...'; "
        "'vmsnap reconcile' undoes what the run may have left"
    )
    return bug


def error_document(error: VmsnapError) -> dict[str, Any]:
    """Return the JSON document of an error."""
    return {"error": {**error_fields(error), "also": [error_fields(other) for other in error.also]}}


def error_fields(error: VmsnapError) -> dict[str, Any]:
    """Return what an error says, for JSON."""
    return {
        "class": type(error).__name__,
        "exit_code": int(error.exit_code),
        "brief": error.brief,
        "details": error.details,
        "remedy": error.remedy,
    }


def print_error(error: VmsnapError, *, console: Console, stream: TextIO) -> None:
    """Print an error: one block on a terminal, plain lines elsewhere."""
    if console.is_terminal:
        _print_block(error, console=console)
    else:
        stream.write("".join(f"{line}\n" for line in plain_error_lines(error)))
        stream.flush()


def plain_error_lines(error: VmsnapError) -> list[str]:
    """Return an error as lines without control characters."""
    word = "bug" if error.exit_code == ExitCode.BUG else "error"
    lines = [f"vmsnap: {word}: {printable(error.brief)}"]
    lines += [f"  {line}" for line in printable_lines(error.details or "")]
    if error.remedy:
        lines.append(f"vmsnap: what to do: {printable(error.remedy)}")
    for other in error.also:
        lines.append(f"vmsnap: also: {printable(other.brief)}")
        lines += [f"  {line}" for line in printable_lines(other.details or "")]
        if other.remedy:
            lines.append(f"  what to do: {printable(other.remedy)}")
    return lines


def print_traceback(error: BaseException, *, stream: TextIO) -> None:
    """Print where an error came from, and what it came from."""
    stream.write("".join(traceback.format_exception(error)))
    stream.flush()


def print_json(document: object, *, stream: TextIO) -> None:
    """Print one JSON document. Everything beyond ASCII is escaped, so that it survives any pipe."""
    from pydantic_core import to_json  # noqa: PLC0415 - slow to load, and --help needs none

    # Many times quicker than json where lists are long, but it escapes nothing.
    text = to_json(document, indent=2)
    stream.write((text.decode("ascii") if text.isascii() else json.dumps(document, indent=2)) + "\n")
    stream.flush()


def _print_block(error: VmsnapError, *, console: Console) -> None:
    word = "Bug" if error.exit_code == ExitCode.BUG else "Error"
    console.print(Text.assemble((f"{word}: ", "bold red"), (printable(error.brief), "bold")))
    _print_details(error, console=console)
    if error.remedy:
        console.print(Text.assemble(("What to do: ", "bold green"), printable(error.remedy)))
    for other in error.also:
        console.print(Text.assemble(("Also: ", "bold yellow"), printable(other.brief)))
        _print_details(other, console=console)
        if other.remedy:
            console.print(Padding(Text(f"What to do: {printable(other.remedy)}"), (0, 0, 0, 2), expand=False))


def _print_details(error: VmsnapError, *, console: Console) -> None:
    for line in printable_lines(error.details or ""):
        console.print(Padding(Text(line, style="dim"), (0, 0, 0, 2), expand=False))
