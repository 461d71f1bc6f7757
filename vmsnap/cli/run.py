"""``vmsnap run``."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from vmsnap.cli.context import ConfigOption, JsonOption, begin
from vmsnap.cli.documents import due_document
from vmsnap.cli.failures import plain_error_lines
from vmsnap.cli.tables import print_lines, print_table
from vmsnap.cli.text import minute, printable
from vmsnap.errors import ConfigError, ExitCode

if TYPE_CHECKING:
    from vmsnap.model.due import DueEntry, DueReport


def run(
    ctx: typer.Context,
    *,
    due: Annotated[bool, typer.Option("--due", help="Back up the guests that are due. Must be given.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what is due, and back up nothing.")] = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Back up every guest whose policy says that it is due, as many at a time as [limits] allows; by default one.

    What is due follows from the newest snapshots and the failures since, so this may be called as often as one likes: by a
    timer, every few minutes. A guest that fails stops no other. A guest that somebody works on is passed over.

    The exit code is 0 where nothing failed or nothing was due, else that of the worst failure (5, 8, 70, 7, 6, 3, 2 in
    this order); 4 where another process does the same at this time.

    For example:

        vmsnap run --due --dry-run
        vmsnap run --due
        vmsnap run --due --json | jq '.guests[] | select(.result == "failed")'
    """
    if not due:
        raise ConfigError("run needs --due", remedy="say 'vmsnap run --due', or 'vmsnap backup GUEST' for one guest")
    session = begin(ctx, json=json, config=config)
    application = session.application
    with session.running() as (progress, cancel):
        report = application.run_due(dry_run=dry_run, progress=progress, cancel=cancel)
    session.show(due_document(report), human=lambda console: _print(console, report))
    if report.exit_code is not ExitCode.DONE:
        raise typer.Exit(int(report.exit_code))


def _print(console: Console, report: DueReport) -> None:
    if not report.entries:
        print_lines(console, ["No guest has a policy."])
        return
    rows = [
        (
            entry.guest,
            entry.outcome.value.replace("-", " "),
            "-" if entry.report is None else entry.report.snapshot,
            minute(None if entry.following is None else entry.following.at),
            _why(entry),
        )
        for entry in report.entries
    ]
    print_table(console, header=("GUEST", "RESULT", "SNAPSHOT", "NEXT", "WHY"), rows=rows, spare=("NEXT", "SNAPSHOT"))
    for entry in report.entries:
        if entry.error is not None:
            first, *rest = plain_error_lines(entry.error)
            said = [first.replace("vmsnap: ", f"{printable(entry.guest)}: ", 1), *(f"  {line}" for line in rest)]
            print_lines(console, [line.replace("vmsnap: ", "", 1) for line in said])
    for one in report.replicated:
        what = printable(f"snapshot {one.snapshot} of {one.guest}" if one.snapshot else one.guest)
        told = ["is at the replica now"] if one.error is None else plain_error_lines(one.error)
        print_lines(console, [f"{what}: {line}" for line in told])
    counts = Counter(entry.outcome.value.replace("-", " ") for entry in report.entries)
    end = "; nothing was begun: dry run" if report.dry_run else ""
    print_lines(console, [f"{', '.join(f'{number} {name}' for name, number in counts.items())}{end}."])


def _why(entry: DueEntry) -> str:
    """Return what matters most of a guest: why nothing was done, or else why it is, or will be, due."""
    if entry.error is not None:
        return "see below"
    due = entry.due or entry.following
    reason = "its policy says enabled = false" if due is None else due.reason
    return reason if entry.note is None else f"{entry.note} ({reason})"
