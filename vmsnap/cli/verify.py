"""``vmsnap verify``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from vmsnap.cli.completion import complete_snapshot
from vmsnap.cli.context import ConfigOption, JsonOption, Session, begin
from vmsnap.cli.documents import verify_document, verify_due_document
from vmsnap.cli.failures import plain_error_lines
from vmsnap.cli.tables import print_lines
from vmsnap.cli.text import count, printable, seconds
from vmsnap.errors import ConfigError, ExitCode, worst_of

if TYPE_CHECKING:
    from vmsnap.model.report import VerifyReport
    from vmsnap.model.verification import VerifyEntry

_MOST_DEFECTS = 20


def verify(
    ctx: typer.Context,
    snapshot: Annotated[
        str,
        typer.Argument(
            metavar="SNAPSHOT",
            help="An id, the beginning of one, GUEST@latest, or GUEST@TIME (the newest not after TIME).",
            autocompletion=complete_snapshot,
            show_default=False,
        ),
    ] = "",
    *,
    due: Annotated[bool, typer.Option("--due", help="Verify all that the policies want read again by now.")] = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Re-read every block of a snapshot and compare it with its digest. Exit code 5 where anything differs.

    The result is recorded with the snapshot; 'vmsnap list' shows it. Nothing is repaired or removed. With --due, this is
    done with each snapshot that was made or last verified so long ago as its guest's policy says (verify.every).

    For example:

        vmsnap verify db1@latest
        vmsnap verify 3fa9 --json | jq .defects
        vmsnap verify --due
    """
    if due == bool(snapshot):
        raise ConfigError("verify needs a SNAPSHOT or --due, one of them", remedy="'vmsnap list' shows the snapshots")
    session = begin(ctx, json=json, config=config)
    application = session.application
    if due:
        _verify_due(session)
        return
    with session.running() as (progress, cancel):
        report = application.verify(snapshot, progress=progress, cancel=cancel)
    session.show(verify_document(report), human=lambda console: _print(console, report))
    if report.defects:
        raise typer.Exit(int(ExitCode.SAFETY))


def _verify_due(session: Session) -> None:
    with session.running() as (progress, cancel):
        entries = session.application.verify_due(progress=progress, cancel=cancel)
        cancel.check()
    session.show(verify_due_document(entries), human=lambda console: _print_due(console, entries))
    code = worst_of({entry.error.exit_code for entry in entries if entry.error is not None})
    if code is not ExitCode.DONE:
        raise typer.Exit(int(code))


def _print_due(console: Console, entries: Sequence[VerifyEntry]) -> None:
    for entry in entries:
        if entry.report is not None:
            _print(console, entry.report)
        elif entry.error is not None:
            what = printable(f"snapshot {entry.snapshot} of {entry.guest}" if entry.snapshot else entry.guest)
            print_lines(console, [f"{what}: {line}" for line in plain_error_lines(entry.error)])
    print_lines(console, [f"{count(len(entries), thing='snapshot')} due." if entries else "Nothing is due."])


def _print(console: Console, report: VerifyReport) -> None:
    read = f"{count(report.blocks, thing='block')} read in {seconds(report.seconds)}"
    if not report.defects:
        print_lines(console, [f"Snapshot {report.snapshot} is intact: {read}."])
        return
    lines = [f"Snapshot {report.snapshot} is DAMAGED: {count(len(report.defects), thing='defect')}, {read}."]
    lines += [f"  {printable(defect)}" for defect in report.defects[:_MOST_DEFECTS]]
    if len(report.defects) > _MOST_DEFECTS:
        lines.append(f"  and {len(report.defects) - _MOST_DEFECTS} more (--json lists all)")
    lines.append("What to do: use another snapshot, and test the store's disk and this host's memory.")
    print_lines(console, lines)
