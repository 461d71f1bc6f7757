"""``vmsnap prune``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from vmsnap.cli.completion import complete_guest
from vmsnap.cli.context import ConfigOption, JsonOption, begin
from vmsnap.cli.documents import prune_document
from vmsnap.cli.tables import print_lines, print_table
from vmsnap.cli.text import minute, size

if TYPE_CHECKING:
    from vmsnap.model.report import PruneDecision


def prune(
    ctx: typer.Context,
    guest: Annotated[
        str | None, typer.Argument(metavar="GUEST", help="Only this guest's snapshots.", autocompletion=complete_guest)
    ] = None,
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")] = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Remove snapshots that retention does not keep, and say why each one stays or goes.

    Pinned snapshots, those an environment uses, and the newest always stay.

    For example:

        vmsnap prune --dry-run
        vmsnap prune db1
    """
    session = begin(ctx, json=json, config=config)
    application = session.application
    with session.unstoppable():
        decisions = application.prune(guest, dry_run=dry_run)
    session.show(
        prune_document(decisions, dry_run=dry_run), human=lambda console: _print(console, decisions, dry_run=dry_run)
    )


def _print(console: Console, decisions: Sequence[PruneDecision], *, dry_run: bool) -> None:
    if not decisions:
        print_lines(console, ["No snapshots: nothing to decide."])
        return
    rows = [
        (
            _verdict(decision, dry_run=dry_run),
            decision.snapshot.manifest.guest,
            decision.snapshot.id,
            minute(decision.snapshot.manifest.captured),
            "; ".join(decision.reasons),
        )
        for decision in decisions
    ]
    print_table(console, header=("", "GUEST", "SNAPSHOT", "WHEN", "WHY"), rows=rows)
    goes = [decision for decision in decisions if not decision.keep]
    freed = sum(decision.removed_bytes or 0 for decision in goes)
    end = "nothing was removed: dry run" if dry_run else f"{size(freed)} freed"
    verb = "would be removed" if dry_run else "removed"
    print_lines(console, [f"{len(decisions) - len(goes)} kept, {len(goes)} {verb}; {end}."])


def _verdict(decision: PruneDecision, *, dry_run: bool) -> str:
    if decision.keep:
        return "keep"
    if decision.removed_bytes is not None:
        return "removed"
    return "remove" if dry_run else "NOT REMOVED"
