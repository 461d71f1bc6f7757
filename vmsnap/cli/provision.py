"""``vmsnap provision``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from vmsnap.cli.completion import complete_guest_or_snapshot
from vmsnap.cli.context import ConfigOption, JsonOption, begin
from vmsnap.cli.documents import provision_document
from vmsnap.cli.tables import print_lines
from vmsnap.cli.text import milliseconds, moment, printable, seconds, size
from vmsnap.cli.times import parse_span, parse_time, reference_time
from vmsnap.errors import ConfigError

if TYPE_CHECKING:
    from vmsnap.cli.application import Application
    from vmsnap.model.report import ProvisionReport


def provision(
    ctx: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="GUEST|SNAPSHOT",
            help="A guest (its newest snapshot), a snapshot's id or the beginning of one, GUEST@latest, GUEST@TIME.",
            autocompletion=complete_guest_or_snapshot,
        ),
    ],
    *,
    at: Annotated[
        str | None, typer.Option("--at", metavar="TIME", help="With a guest: its newest snapshot not after TIME.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="The environment's name. [default: made up]", show_default=False)
    ] = None,
    ttl: Annotated[
        str | None,
        typer.Option(
            "--ttl", metavar="SPAN", help='How long it stays: "4h". [default: the policy\'s]', show_default=False
        ),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            "--network", help="The hypervisor's network to put it on. [default: a fence of its own]", show_default=False
        ),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Return only once its guest agent answers.")] = False,
    origin: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="store|replica",
            help="Where its data comes from. [default: the replica where the snapshot is not in the store]",
            show_default=False,
        ),
    ] = None,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Make a test VM from a snapshot. It starts in about a second, on an overlay: the snapshot is not changed.

    It has a new name, UUID and MAC addresses, and its database starts without crash recovery. In its fence it reaches
    nobody; on a network it is whatever the guest was, so think of jobs and mails that it may send.

    Straight from the replica it starts as quickly, and reads its data as it needs it; the rest follows, and then it is as any
    other.

    For example:

        vmsnap provision db1 --ttl 4h --wait
        vmsnap provision db1 --at 2026-11-21T02:00Z --name db1-before-migration
        vmsnap provision db1 --from replica
        vmsnap provision 3fa9 --network test-lab --json | jq -r .environment
    """
    session = begin(ctx, json=json, config=config)
    from vmsnap.model.report import Origin, ProvisionOptions  # noqa: PLC0415 - pydantic is slow to load, --help needs none

    if origin is not None and origin not in list(Origin):
        raise ConfigError(f"--from {origin}: there is no such place", remedy="--from store, or --from replica")
    options = ProvisionOptions(
        name=name,
        ttl=parse_span(ttl, option="--ttl") if ttl is not None else None,
        network=network,
        wait=wait,
        origin=None if origin is None else Origin(origin),
    )
    when = reference_time(parse_time(at, option="--at")) if at is not None else None
    application = session.application
    with session.running() as (progress, cancel):
        reference = _reference(source, when=when, application=application)
        report = application.provision(reference, options=options, progress=progress, cancel=cancel)
    session.show(provision_document(report), human=lambda console: _print(console, report))


def _reference(source: str, *, when: str | None, application: Application) -> str:
    """Return the reference that a guest's or a snapshot's name means. A guest of that name wins."""
    if when is not None:
        return f"{source}@{when}"
    return f"{source}@latest" if application.snapshots(source) else source


def _print(console: Console, report: ProvisionReport) -> None:
    answered = f", its agent answered after {seconds(report.answered_ms / 1000)}" if report.answered_ms else ""
    name = printable(report.environment)
    replica = " in the replica" if report.origin.value == "replica" else ""
    source = f"snapshot {report.snapshot} of {printable(report.guest)}{replica}"
    times = f"defined after {milliseconds(report.defined_ms)}, running after {milliseconds(report.running_ms)}"
    expires = moment(report.expires, none="never")
    print_lines(
        console,
        [
            f"Environment {name} is {report.state.value}, from {source}.",
            f"  {times}{answered}",
            f"  overlay {size(report.overlay_bytes)}, address {report.address or 'none known'}, expires {expires}",
            *([f"  registered as {report.dns_name}"] if report.dns_name else []),
            *([f"  a port of it: {printable(report.reach)}"] if report.reach else []),
            f"  'vmsnap env destroy {name}' removes it",
        ],
    )
