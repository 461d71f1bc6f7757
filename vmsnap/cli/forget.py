"""``vmsnap forget``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from vmsnap.cli.completion import complete_snapshot_id, complete_stored_guest
from vmsnap.cli.context import ConfigOption, JsonOption, begin
from vmsnap.cli.documents import forget_document
from vmsnap.cli.tables import print_lines, print_table
from vmsnap.cli.text import count, minute, printable, size
from vmsnap.errors import ConfigError

if TYPE_CHECKING:
    from vmsnap.model.forgetting import ForgetReport

_STAYS = {True: "stays", False: "none is left", None: "not known"}


def forget(
    ctx: typer.Context,
    snapshots: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SNAPSHOT]...",
            help="Ids of snapshots of one guest, or the beginnings of ids.",
            autocompletion=complete_snapshot_id,
            show_default=False,
        ),
    ] = None,
    *,
    reason: Annotated[str, typer.Option("--reason", "-r", help="Why they must go. The audit trail keeps it.")],
    guest: Annotated[
        str | None,
        typer.Option(
            "--guest", metavar="NAME", help="All snapshots of this guest.", autocompletion=complete_stored_guest
        ),
    ] = None,
    replica: Annotated[
        bool, typer.Option("--replica", help="The copies at the replica as well, and those that are only there.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")] = False,
    yes: Annotated[
        str | None,
        typer.Option("--yes", metavar="NAME", help="The guest's name: remove even what leaves nothing behind."),
    ] = None,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Remove snapshots by hand, whatever retention says: for an erasure, or for a guest that is retired.

    All of them go, or none. What is pinned, used by an environment, held by a run, or locked at the replica is refused, and who
    holds it is named. Without --replica only the copies in the local store go.

    It takes --yes with the guest's name where no copy of a snapshot would be left anywhere, where it is the newest verified one
    of the guest, or the last. --dry-run says whether it does.

    What copies needed at the replica is freed by 'vmsnap gc'.

    For example:

        vmsnap forget 3fa9b0c1d2 --reason "erasure request 4711" --dry-run
        vmsnap forget 3fa9b0c1d2 --replica --reason "erasure request 4711" --yes db1
        vmsnap forget --guest db1 --replica --reason "db1 was replaced by db2" --yes db1
    """
    session = begin(ctx, json=json, config=config)
    if (guest is None) != bool(snapshots):
        raise ConfigError("give snapshots, or --guest: one of them", remedy="see 'vmsnap forget --help'")
    if not reason.strip():
        raise ConfigError("--reason is empty", remedy="say why: whoever looks for them later will want to know")
    # Loaded here: --help needs none of it.
    from vmsnap.model.forgetting import ForgetWishes  # noqa: PLC0415

    wishes = ForgetWishes(
        reason=reason,
        references=tuple(snapshots or ()),
        guest=guest,
        replica=replica,
        dry_run=dry_run,
        confirmed=yes,
    )
    application = session.application
    with session.unstoppable():
        report = application.forget(wishes)
    session.show(forget_document(report, now=session.now()), human=lambda console: _print(console, report))


def _print(console: Console, report: ForgetReport) -> None:
    if not report.entries:
        print_lines(console, ["A removal that was cut is finished. There was nothing else to remove."])
        return
    verb = "remove" if report.dry_run else "removed"
    rows = [
        (
            verb,
            entry.place.value,
            entry.snapshot.manifest.guest,
            entry.snapshot.id,
            minute(entry.snapshot.manifest.captured),
            _STAYS[entry.copy_stays],
        )
        for entry in report.entries
    ]
    print_table(console, header=("", "WHERE", "GUEST", "SNAPSHOT", "WHEN", "ANOTHER COPY"), rows=rows)
    copies = count(len(report.entries), thing="copy", things="copies")
    if report.dry_run:
        lines = [f"{copies} would be removed, and {size(report.freed_bytes)} freed; nothing was removed: dry run."]
        if report.confirm:
            lines.append(f"It takes --yes {printable(report.guest)}:")
            lines += [f"  {printable(reason)}" for reason in report.confirm]
    else:
        lines = [f"{copies} removed; {size(report.freed_bytes)} freed."]
    if any(entry.place == "replica" for entry in report.entries):
        lines.append("What only those copies needed at the replica is freed by 'vmsnap gc'.")
    print_lines(console, lines)
