"""``vmsnap reconcile``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer
from rich.console import Console

from vmsnap.cli.context import ConfigOption, JsonOption, begin
from vmsnap.cli.documents import reconcile_document
from vmsnap.cli.tables import print_lines
from vmsnap.cli.text import count, printable
from vmsnap.errors import ExitCode

if TYPE_CHECKING:
    from vmsnap.model.report import ReconcileReport


def reconcile(ctx: typer.Context, *, json: JsonOption = False, config: ConfigOption = None) -> None:
    """Undo what dead runs left: clones, overlays, fences, memory images, staging folders. Exit code 8 if any is left.

    Only things that bear the id of a run that is over are touched. A source found on an overlay is put back on its own
    disk, nothing lost. Safe to repeat, and done by itself before every run.

    For example:

        vmsnap reconcile
        vmsnap reconcile --json | jq .complete
    """
    session = begin(ctx, json=json, config=config)
    application = session.application
    with session.unstoppable():
        report = application.reconcile()
    session.show(reconcile_document(report), human=lambda console: _print(console, report))
    if not report.complete:
        raise typer.Exit(int(ExitCode.CLEANUP))


def _print(console: Console, report: ReconcileReport) -> None:
    if not report.runs and not report.undone:
        print_lines(console, ["Nothing to undo: no run left anything."])
        return
    lines = []
    for item in report.undone:
        thing = f"{item.kind.value} {printable(item.name)} (run {item.run}, guest {printable(item.guest)})"
        lines.append(f"  undone  {thing}" if item.failure is None else f"  LEFT    {thing}: {printable(item.failure)}")
    left = sum(item.failure is not None for item in report.undone)
    undone = count(len(report.undone) - left, thing="thing")
    lines.append(f"{count(len(report.runs), thing='dead run')}, {undone} undone, {left} left.")
    if left:
        lines.append("What to do: remove the reason given above, then run 'vmsnap reconcile' again.")
    print_lines(console, lines)
