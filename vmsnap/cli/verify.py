"""``vmsnap verify``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer
from rich.console import Console

from vmsnap.cli.context import ConfigOption, JsonOption, begin
from vmsnap.cli.documents import verify_document
from vmsnap.cli.show import SnapshotArgument
from vmsnap.cli.tables import print_lines
from vmsnap.cli.text import count, printable, seconds
from vmsnap.errors import ExitCode

if TYPE_CHECKING:
    from vmsnap.model.report import VerifyReport

_MOST_DEFECTS = 20


def verify(
    ctx: typer.Context, snapshot: SnapshotArgument, *, json: JsonOption = False, config: ConfigOption = None
) -> None:
    """Re-read every block of a snapshot and compare it with its digest. Exit code 5 where anything differs.

    The result is recorded with the snapshot; 'vmsnap list' shows it. Nothing is repaired or removed.

    For example:

        vmsnap verify db1@latest
        vmsnap verify 3fa9 --json | jq .defects
    """
    session = begin(ctx, json=json, config=config)
    application = session.application
    with session.running() as (progress, cancel):
        report = application.verify(snapshot, progress=progress, cancel=cancel)
    session.show(verify_document(report), human=lambda console: _print(console, report))
    if report.defects:
        raise typer.Exit(int(ExitCode.SAFETY))


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
