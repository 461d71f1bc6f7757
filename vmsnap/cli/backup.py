"""``vmsnap backup``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from vmsnap.cli.completion import complete_guest
from vmsnap.cli.context import ConfigOption, JsonOption, begin
from vmsnap.cli.documents import backup_document, engine_names
from vmsnap.cli.tables import print_lines
from vmsnap.cli.text import count, milliseconds, moment, printable, seconds, size

if TYPE_CHECKING:
    from vmsnap.model.report import BackupReport


def backup(
    ctx: typer.Context,
    guest: Annotated[
        str,
        typer.Argument(
            metavar="GUEST", help="The VM to back up, by its name in its policy.", autocompletion=complete_guest
        ),
    ],
    *,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Back up one guest: clone it while it runs, let the clone's database finish and stop, keep its disks.

    The guest runs on throughout. A snapshot is kept only if the database and every file system in it are proven clean.
    Ctrl-C undoes what was made and leaves the guest as it was.

    For example:

        vmsnap backup db1
        vmsnap backup db1 --json | jq .capture.pause_ms
    """
    session = begin(ctx, json=json, config=config)
    application = session.application
    with session.running() as (progress, cancel):
        report = application.backup(guest, progress=progress, cancel=cancel)
    session.show(backup_document(report), human=lambda console: _print(console, report))


def _print(console: Console, report: BackupReport) -> None:
    whole = (report.finished - report.started).total_seconds()
    in_flight = sum(record.in_flight_at_start for record in report.drain)
    finished = sum(record.finished for record in report.drain)
    rolled_back = sum(record.rolled_back for record in report.drain)
    address = f", address {report.isolation.address}" if report.isolation.address else ""
    methods = ", ".join(sorted({item.method for item in report.clean.instances}))
    clusters = count(len({item.data_directory for item in report.clean.instances}), thing="database instance")
    systems = count(len(report.clean.file_systems), thing="file system")
    capture = report.capture
    pause = milliseconds(capture.pause_ms)
    if capture.memory_captured:
        captured = f"the guest stood still for {pause}, {size(capture.ram_bytes)} of memory"
    else:
        captured = f"its disks, frozen within {pause}; memory was not captured"
    if capture.on_overlay_seconds:
        captured += f"; on its own disks again after {seconds(capture.on_overlay_seconds)}"
    reason = f": {printable(report.capture.reason)}" if report.capture.reason else ""
    proofs = count(len(report.isolation.proof), thing="proof")
    stored = f"{size(report.store.new_bytes)} new of {size(report.store.logical_bytes)}"
    print_lines(
        console,
        [
            f"Snapshot {report.snapshot} of {printable(report.guest)} is stored and proven clean.",
            f"  captured  {moment(capture.captured)}; {captured}",
            f"  mode      {report.capture.mode.value}{reason}",
            *(f"  paused    {parts}" for parts in (_parts(report),) if parts),
            f"  isolated  {proofs}, way to an address: {report.isolation.rung.value}{address}",
            f"  drained   {in_flight} in flight: {finished} finished, {rolled_back} rolled back",
            f"  clean     {engine_names(report.clean)}: {clusters}, {systems} (read: {methods})",
            *(f"  read      {text}" for text in _reads(report)),
            f"  stored    {stored} in {seconds(report.store.seconds)}",
            *([] if report.replica is None else [f"  replica   {size(report.replica.sent_bytes)} sent"]),
            f"  took      {seconds(whole)}",
            *(f"  pruned    {snapshot}" for snapshot in report.pruned),
            *(f"  warning   {printable(warning)}" for warning in report.warnings),
        ],
    )


def _parts(report: BackupReport) -> str:
    """Return what the pause was spent on; nothing where that is not known."""
    return ", ".join(f"{printable(part.name)} {part.ms:.1f} ms" for part in report.capture.parts)


def _reads(report: BackupReport) -> Iterator[str]:
    """Yield how much of each disk was read, and why."""
    for target, read in report.reads.items():
        why = f"only what changed since {read.since}" if read.since is not None else f"all: {read.full_because}"
        yield f"{size(read.read_bytes)} of disk {printable(target)}, {printable(why)}"
