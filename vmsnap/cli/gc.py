"""``vmsnap gc``."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from vmsnap.cli.context import ConfigOption, JsonOption, begin
from vmsnap.cli.documents import collect_document
from vmsnap.cli.tables import print_lines
from vmsnap.cli.text import count, printable, size
from vmsnap.cli.times import parse_span
from vmsnap.errors import ExitCode

if TYPE_CHECKING:
    from vmsnap.model.collection import CollectReport, Heap

_DAY = timedelta(days=1)


def collect_garbage(
    ctx: typer.Context,
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what is garbage, and remove nothing.")] = False,
    grace: Annotated[
        str | None,
        typer.Option("--grace", metavar="SPAN", help="Keep what is found for SPAN before it is removed. [default: 1d]"),
    ] = None,
    now: Annotated[
        bool, typer.Option("--now", help="Remove what is found at once, unless an upload may need it.")
    ] = False,
    rewrite: Annotated[
        bool, typer.Option("--rewrite/--no-rewrite", help="Write packs anew of which less than half is needed.")
    ] = True,
    wait: Annotated[
        bool, typer.Option("--wait", help="Where another collector is at it: see for some minutes whether it lives.")
    ] = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Remove from the replica what no snapshot there needs any more.

    What a removed snapshot alone needed, and what dead uploads left, is found by one pass, and removed by a later one, a day
    after. Backups and uploads may go on meanwhile, on any host. The daemon does this every day.

    The copies that are kept are locked for longer, where the replica locks them (replica.object_lock). Where a policy file is
    wrong, those of its guest are not, and the exit code is 2; garbage hangs on no policy.

    For example:

        vmsnap gc --dry-run
        vmsnap gc
        vmsnap gc --json | jq .removed.size_bytes
    """
    session = begin(ctx, json=json, config=config)
    span = timedelta(0) if now else _DAY if grace is None else parse_span(grace, option="--grace")
    # Loaded here: --help needs none of it.
    from vmsnap.ports.upkeep import CollectWishes  # noqa: PLC0415

    wishes = CollectWishes(dry_run=dry_run, grace=span, rewrite=rewrite, waits=wait)
    with session.running() as (progress, cancel):
        report = session.application.collect(wishes, progress=progress, cancel=cancel)
    session.show(collect_document(report), human=lambda console: _print(console, report))
    if report.unlocked:
        raise typer.Exit(int(ExitCode.CONFIGURATION))


def _print(console: Console, report: CollectReport) -> None:
    lines = [f"{count(report.snapshots, thing='snapshot')} need {_heap(report.used)}."]
    if report.uploads:
        lines.append(f"{count(report.uploads, thing='upload')} going on.")
    lines += [
        f"Upload {one.upload} of snapshot {one.snapshot} of {printable(one.guest)}, from {printable(one.host)}, was called "
        f"over: {one.reason}."
        for one in report.ended
    ]
    if report.rewritten.objects:
        lines.append(
            f"{count(report.rewritten.objects, thing='pack')} written anew, of which less than half was needed."
        )
    if report.renewed:
        lines.append(f"{count(report.renewed, thing='object')} locked for longer.")
    lines += [
        f"Not locked for longer, because a policy file is wrong: {printable(wrong)}." for wrong in report.unlocked
    ]
    if report.waiting.objects:
        lines.append(f"Waiting: {_heap(report.waiting)}{': ' if report.reasons else ''}{'; '.join(report.reasons)}.")
    if report.dry_run:
        lines.append(f"Garbage without a tombstone: {_heap(report.found)}. Nothing was removed: dry run.")
    else:
        lines.append(f"Found: {_heap(report.found)}. Freed: {_heap(report.removed)}.")
    print_lines(console, lines)


def _heap(heap: Heap) -> str:
    return f"{count(heap.objects, thing='object')}, {size(heap.size_bytes)}" if heap.objects else "nothing"
