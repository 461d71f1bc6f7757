"""``vmsnap replicate``, ``vmsnap restore`` and ``vmsnap export``."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vmsnap.cli.completion import complete_snapshot
from vmsnap.cli.context import ConfigOption, JsonOption, begin
from vmsnap.cli.documents import export_document, replicate_document, restore_document
from vmsnap.cli.pin import whoever
from vmsnap.cli.tables import print_lines
from vmsnap.cli.text import moment, printable, seconds, size
from vmsnap.cli.times import parse_span

if TYPE_CHECKING:
    from vmsnap.model.report import RestoreReport

_REFERENCE = "An id, the beginning of one, GUEST@latest, or GUEST@TIME (the newest not after TIME)."


class _Format(StrEnum):
    RAW = "raw"
    QCOW2 = "qcow2"


def replicate(
    ctx: typer.Context,
    snapshot: Annotated[
        str, typer.Argument(metavar="SNAPSHOT", help=_REFERENCE, autocompletion=complete_snapshot, show_default=False)
    ],
    *,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Copy a snapshot to the replica that vmsnap.toml names. Only blocks that nothing there has are sent.

    Ctrl-C, a lost line or a crash costs little: the same command goes on from there. What is damaged here is not sent.

    For example:

        vmsnap replicate db1@latest
        vmsnap replicate 3fa9 --json | jq .sent_bytes
    """
    session = begin(ctx, json=json, config=config)
    application = session.application
    with session.running() as (progress, cancel):
        report = application.replicate(snapshot, progress=progress, cancel=cancel)
    what = f"Snapshot {report.snapshot} of {printable(report.guest)} is at the replica"
    cost = f"{size(report.sent_bytes)} sent of {size(report.logical_bytes)} in {seconds(report.seconds)}"
    line = f"{what} already." if report.there else f"{what}: {cost}."
    session.show(replicate_document(report), human=lambda console: print_lines(console, [line]))


def restore(
    ctx: typer.Context,
    snapshot: Annotated[
        str, typer.Argument(metavar="SNAPSHOT", help=f"{_REFERENCE} Of the replica.", show_default=False)
    ],
    *,
    keep: Annotated[
        str, typer.Option("--keep", metavar="SPAN", help='How long it is pinned: "30d"; 0: retention decides at once.')
    ] = "7d",
    owner: Annotated[
        str | None, typer.Option("--owner", help="Who wants it to stay. [default: you]", show_default=False)
    ] = None,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Bring a snapshot from the replica into this host's store, on any host that may read the replica.

    Every block is compared with its digest, and the snapshot is there once all of them are. The replica is only read.

    It is pinned for a week, or for --keep: retention would remove again what its rules do not want here. A pin that holds it
    already is left as it is.

    For example:

        vmsnap restore db1@latest
        vmsnap restore db1@2026-11-21T02:00Z --keep 30d
    """
    session = begin(ctx, json=json, config=config)
    from vmsnap.model.report import RestoreOptions  # noqa: PLC0415 - pydantic is slow to load, and --help needs none

    span = None if keep.strip() == "0" else parse_span(keep, option="--keep")
    options = RestoreOptions(keep=span, owner=owner or whoever())
    application = session.application
    with session.running() as (progress, cancel):
        report = application.restore(snapshot, options=options, progress=progress, cancel=cancel)
    what = f"Snapshot {report.snapshot} of {printable(report.guest)} is in the local store"
    line = f"{what} already." if report.there else f"{what}: {size(report.logical_bytes)} in {seconds(report.seconds)}."
    lines = [line, *_hold_lines(report, now=session.now())]
    session.show(restore_document(report), human=lambda console: print_lines(console, lines))


def _hold_lines(report: RestoreReport, *, now: datetime) -> tuple[str, ...]:
    pin, identity = report.pin, report.snapshot
    if pin is None or not pin.holds(now):
        return (f"Nothing holds it: retention may remove it. 'vmsnap pin {identity} --reason ...' holds it.",)
    end = f"until {moment(pin.until)}" if pin.until else "until it is unpinned"
    longer = f", 'vmsnap pin {identity} --reason ... --for SPAN' holds it for longer" if pin.until else ""
    return (
        f"It is pinned {end}, for {printable(pin.owner)}: {printable(pin.reason)}.",
        f"'vmsnap unpin {identity}' lets it go{longer}.",
    )


def export(
    ctx: typer.Context,
    snapshot: Annotated[
        str, typer.Argument(metavar="SNAPSHOT", help=_REFERENCE, autocompletion=complete_snapshot, show_default=False)
    ],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to; made where it is not there.")],
    *,
    image_format: Annotated[_Format, typer.Option("--format", help="What to write.")] = _Format.RAW,
    from_replica: Annotated[
        bool, typer.Option("--from-replica", help="Take it from the replica even where the local store has it.")
    ] = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Write each disk of a snapshot as a plain file: FOLDER/DISK.raw or FOLDER/DISK.qcow2.

    A snapshot that the local store does not have is taken from the replica. No file that is there is overwritten.

    For example:

        vmsnap export db1@latest /srv/out
        vmsnap export 3fa9 /srv/out --format qcow2 --json | jq -r '.files[]'
    """
    session = begin(ctx, json=json, config=config)
    from vmsnap.model.report import ExportOptions  # noqa: PLC0415 - pydantic is slow to load, and --help needs none

    options = ExportOptions(folder=folder.absolute(), image_format=image_format.value, replica_only=from_replica)
    application = session.application
    with session.running() as (progress, cancel):
        report = application.export(snapshot, options=options, progress=progress, cancel=cancel)
    place = "local store" if report.source == "local" else "replica"
    lines = [
        f"Snapshot {report.snapshot} of {printable(report.guest)}, from the {place}, in {seconds(report.seconds)}:",
        *(f"  {printable(file)}" for file in report.files),
    ]
    session.show(export_document(report), human=lambda console: print_lines(console, lines))
