"""``vmsnap history``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from vmsnap.cli.completion import complete_guest
from vmsnap.cli.context import ConfigOption, JsonOption, begin
from vmsnap.cli.documents import audit_document, history_document
from vmsnap.cli.tables import print_lines, print_table
from vmsnap.cli.text import milliseconds, moment, printable, seconds, size
from vmsnap.errors import ConfigError

if TYPE_CHECKING:
    from vmsnap.model.history import AuditEntry, RunEntry

_RUNS = ("WHEN", "GUEST", "KIND", "OUTCOME", "TOOK", "PAUSE", "NEW", "RUN", "BY", "WHAT")
_RUNS_SPARE = ("NEW", "PAUSE", "KIND", "TOOK", "RUN", "BY")
_TRAIL = ("WHEN", "WHO", "ACTION", "WHAT", "GUEST", "OUTCOME", "DETAIL")
_TRAIL_SPARE = ("GUEST", "OUTCOME")


def history(
    ctx: typer.Context,
    guest: Annotated[
        str | None, typer.Argument(metavar="GUEST", help="Only this guest.", autocompletion=complete_guest)
    ] = None,
    *,
    audit: Annotated[
        bool, typer.Option("--audit", help="Who pruned, pinned, provisioned, destroyed ..., instead of runs.")
    ] = False,
    failed: Annotated[bool, typer.Option("--failed", help="Only runs that failed, or died.")] = False,
    limit: Annotated[int, typer.Option("--limit", "-n", min=0, help="At most so many; 0: all there are.")] = 20,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Show what was run, when, by whom, and how it ended; the newest first.

    A run that 'died' was cut off: its process was killed, crashed, or the host went down. BY is the person who logged in,
    also before sudo, or the timer, or the daemon. --json has each run's steps. The last 1000 runs of each guest are kept.

    For example:

        vmsnap history db1
        vmsnap history --failed --limit 5
        vmsnap history --audit db1
        vmsnap history db1 --json | jq '.runs[0].steps'
    """
    session = begin(ctx, json=json, config=config)
    if audit and failed:
        raise ConfigError("--failed is about runs, --audit is not", remedy="give one of them")
    most = limit or None
    if audit:
        trail = session.application.audit_trail(guest, limit=most)
        if guest is not None and not trail:
            session.policies.get(guest)  # nothing done yet is fine; a guest nobody knows is not
        session.show(audit_document(trail), human=lambda console: _print_trail(console, trail))
        return
    runs = session.application.past_runs(guest, failures_only=failed, limit=most)
    if guest is not None and not runs:
        session.policies.get(guest)
    session.show(history_document(runs), human=lambda console: _print_runs(console, runs))


def _print_runs(console: Console, runs: Sequence[RunEntry]) -> None:
    if not runs:
        print_lines(console, ["No runs are known."])
        return
    print_table(console, header=_RUNS, rows=[_run_row(entry) for entry in runs], spare=_RUNS_SPARE)
    newest = runs[0]
    if newest.result is not None and newest.result.remedy:
        print_lines(console, [f"What to do about run {newest.run}: {printable(newest.result.remedy)}"])


def _run_row(entry: RunEntry) -> tuple[str, ...]:
    result = entry.result
    return (
        moment(entry.started),
        entry.guest,
        entry.kind.value,
        entry.outcome.value,
        "-" if entry.seconds is None else seconds(entry.seconds),
        "-" if result is None or result.pause_ms is None else milliseconds(result.pause_ms),
        "-" if result is None or result.new_bytes is None else size(result.new_bytes),
        entry.run,
        str(entry.starter),
        _what(entry),
    )


def _what(entry: RunEntry) -> str:
    """Return what came of a run: what it made, why it failed, or where it is."""
    if entry.result is None:
        return f"in step '{entry.steps[-1].name}'" if entry.steps else "has just begun"
    if entry.result.error is not None:
        return entry.result.error
    made = entry.result.environment or entry.result.snapshot or "-"
    warnings = len(entry.result.warnings)
    return made if not warnings else f"{made}, with {warnings} warning{'s' if warnings > 1 else ''}"


def _print_trail(console: Console, trail: Sequence[AuditEntry]) -> None:
    if not trail:
        print_lines(console, ["Nothing was done that is audited."])
        return
    rows = [
        (
            moment(entry.at),
            str(entry.starter),
            entry.action.value,
            entry.subject,
            entry.guest or "-",
            "done" if entry.failure is None else "FAILED",
            entry.failure or entry.detail or "-",
        )
        for entry in trail
    ]
    print_table(console, header=_TRAIL, rows=rows, spare=_TRAIL_SPARE)
