"""``vmsnap doctor``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from vmsnap.cli.completion import complete_guest
from vmsnap.cli.context import ConfigOption, JsonOption, begin
from vmsnap.cli.documents import doctor_document
from vmsnap.cli.tables import print_lines
from vmsnap.cli.text import count, printable
from vmsnap.errors import ExitCode

if TYPE_CHECKING:
    from vmsnap.model.guest import Finding

_STYLES = {"ok": "green", "warning": "yellow", "refusal": "bold red"}


def doctor(
    ctx: typer.Context,
    guest: Annotated[
        str | None, typer.Argument(metavar="GUEST", help="A guest to look at as well.", autocompletion=complete_guest)
    ] = None,
    *,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Look whether this host can make backups, and of a guest; say what to change. Changes nothing itself.

    A refusal would stop a backup (exit code 3). A warning would not.

    For example:

        vmsnap doctor
        vmsnap doctor db1
    """
    session = begin(ctx, json=json, config=config)
    findings = session.application.doctor(guest)
    if guest is None:
        findings += (*session.settings_warnings(), *session.silence_warnings())
    refusals = sum(finding.severity.value == "refusal" for finding in findings)
    session.show(
        doctor_document(findings, guest=guest, ready=refusals == 0),
        human=lambda console: _print(console, findings, guest=guest),
    )
    if refusals:
        raise typer.Exit(int(ExitCode.PRECONDITION))


def _print(console: Console, findings: Sequence[Finding], *, guest: str | None) -> None:
    lines: list[str | Text] = []
    for finding in findings:
        severity = finding.severity.value
        line = Text(f"{severity:<8}", style=_STYLES[severity])
        line.append(f" {printable(finding.check)}: {printable(finding.message)}", style="default")
        lines.append(line)
        if finding.remedy and severity != "ok":
            lines.append(f"         what to do: {printable(finding.remedy)}")
    refusals = sum(finding.severity.value == "refusal" for finding in findings)
    warnings = sum(finding.severity.value == "warning" for finding in findings)
    what = f"guest {printable(guest)}" if guest else "this host"
    verdict = f"{what} cannot be backed up as it is" if refusals else f"{what} is ready"
    lines.append(f"{verdict}: {count(refusals, thing='refusal')}, {count(warnings, thing='warning')}.")
    print_lines(console, lines)
