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
    replica: Annotated[
        bool, typer.Option("--replica", help="Read the copy at the replica instead of the one here.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Repair what is damaged from the other copy, and read all of it again.")
    ] = False,
    sample: Annotated[
        float | None,
        typer.Option(
            "--sample",
            metavar="SHARE",
            min=0.001,
            max=1.0,
            help="Read such a part only, another one each day: with 0.05 all is read in 20 days.",
            show_default=False,
        ),
    ] = None,
    due: Annotated[bool, typer.Option("--due", help="Verify all that the policies want read again by now.")] = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Re-read every block of a snapshot and compare it with its digest. Exit code 5 where anything differs.

    The result is recorded with the snapshot; 'vmsnap list' shows it. Nothing is removed, and nothing is repaired without
    --repair: that takes each damaged block from the other copy, and writes it only if it has the right digest. With --due,
    this is done with each snapshot that was made or last verified so long ago as its guest's policy says (verify.every), and
    with a guest's newest one where none of those made since then was found whole. A sample is no verification: it is in
    'vmsnap history --audit', and marks a snapshot only where it finds damage.

    For example:

        vmsnap verify db1@latest
        vmsnap verify 3fa9 --json | jq .defects
        vmsnap verify db1@latest --repair
        vmsnap verify 3fa9 --replica --sample 0.05
        vmsnap verify --due
    """
    if due == bool(snapshot):
        raise ConfigError("verify needs a SNAPSHOT or --due, one of them", remedy="'vmsnap list' shows the snapshots")
    if due and (replica or repair or sample is not None):
        raise ConfigError(
            "--due goes by the policies, and by nothing else", remedy="leave out --replica, --repair and --sample"
        )
    session = begin(ctx, json=json, config=config)
    application = session.application
    if due:
        _verify_due(session)
        return
    from vmsnap.model.verification import VerifyChoice  # noqa: PLC0415 - pydantic is slow to load, and --help needs none

    choice = VerifyChoice(replica=replica, repair=repair, sample=sample)
    with session.running() as (progress, cancel):
        report = application.verify(snapshot, choice=choice, progress=progress, cancel=cancel)
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
    if report.sample is not None:
        read = f"part {report.sample}, {read}"
    where = " at the replica" if report.replica else ""
    lines = _defects(f"Repaired in snapshot {report.snapshot}{where}", report.repaired) if report.repaired else []
    if not report.defects:
        print_lines(console, [*lines, f"Snapshot {report.snapshot} is intact{where}: {read}."])
        return
    lines += _defects(f"Snapshot {report.snapshot} is DAMAGED{where}", report.defects, read=read)
    other = "here" if report.replica else "the replica"
    lines.append(
        f"What to do: 'vmsnap verify {report.snapshot}{' --replica' if report.replica else ''} --repair' repairs it where "
        f"{other} has an intact copy; or use another snapshot. Test the store's disk and this host's memory."
        if not report.repaired
        else "What to do: use another snapshot, and test the store's disk and this host's memory."
    )
    print_lines(console, lines)


def _defects(heading: str, defects: Sequence[str], *, read: str | None = None) -> list[str]:
    lines = [f"{heading}: {count(len(defects), thing='defect')}{f', {read}' if read else ''}."]
    lines += [f"  {printable(defect)}" for defect in defects[:_MOST_DEFECTS]]
    if len(defects) > _MOST_DEFECTS:
        lines.append(f"  and {len(defects) - _MOST_DEFECTS} more (--json lists all)")
    return lines
