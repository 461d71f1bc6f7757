"""``vmsnap env``: environments."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from vmsnap.cli import reach
from vmsnap.cli.cancel import cancelled_by_signals
from vmsnap.cli.completion import complete_environment
from vmsnap.cli.context import ConfigOption, JsonOption, begin
from vmsnap.cli.documents import environment_document, environments_document, expiry_document
from vmsnap.cli.failures import plain_error_lines
from vmsnap.cli.tables import print_lines, print_table, print_tree
from vmsnap.cli.text import minute, moment, printable, size
from vmsnap.cli.times import parse_span, parse_time
from vmsnap.errors import ConfigError, EnvironmentNotFoundError, ExitCode, worst_of

if TYPE_CHECKING:
    from vmsnap.model.environment import Expiry
    from vmsnap.model.report import EnvironmentStatus

_HEADER = ("ENVIRONMENT", "STATE", "GUEST", "SNAPSHOT", "CREATED", "EXPIRES", "NETWORK", "OVERLAY")
NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="The environment's name.", autocompletion=complete_environment)
]

environments = typer.Typer(no_args_is_help=True, help="List, look at, reach, keep longer and destroy test VMs.")


@environments.command("list")
def list_environments(ctx: typer.Context, *, json: JsonOption = False, config: ConfigOption = None) -> None:
    """List environments and how they are now.

    OVERLAY is what an environment wrote. Each holds its snapshot: retention does not remove it meanwhile.

    For example:

        vmsnap env list
        vmsnap env list --json | jq -r '.environments[].environment'
    """
    session = begin(ctx, json=json, config=config)
    statuses = session.application.environments()
    session.show(environments_document(statuses), human=lambda console: _print(console, statuses))


@environments.command("show")
def show_environment(
    ctx: typer.Context, name: NameArgument, *, json: JsonOption = False, config: ConfigOption = None
) -> None:
    """Show one environment.

    It says which snapshot it is of, until when it stays, where it is attached, and how it is now.

    For example:

        vmsnap env show db1-test
        vmsnap env show db1-test --json | jq -r .state
    """
    session = begin(ctx, json=json, config=config)
    statuses = session.application.environments()
    status = next((status for status in statuses if status.environment.name == name), None)
    if status is None:
        known = ", ".join(f"'{status.environment.name}'" for status in statuses)
        none = "no environment exists; 'vmsnap provision' makes one"
        raise EnvironmentNotFoundError(
            f"there is no environment '{name}'", remedy=f"environments that exist: {known}" if known else none
        )
    document = environment_document(status)
    session.show(document, human=lambda console: print_tree(console, document))


@environments.command("extend")
def extend_environment(
    ctx: typer.Context,
    name: NameArgument,
    *,
    ttl: Annotated[str | None, typer.Option("--ttl", metavar="SPAN", help='From now on this long: "2d".')] = None,
    until: Annotated[str | None, typer.Option("--until", metavar="TIME", help="Up to this time.")] = None,
    forever: Annotated[bool, typer.Option("--forever", help="Until it is destroyed.")] = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Say how long an environment stays.

    The time counts from now, not from its present end. It may become shorter as well.

    For example:

        vmsnap env extend db1-test --ttl 2d
        vmsnap env extend db1-test --until 2026-12-01T00:00Z
    """
    session = begin(ctx, json=json, config=config)
    if sum((ttl is not None, until is not None, forever)) != 1:
        raise ConfigError("say how long: --ttl, --until or --forever, one of them", remedy="for example --ttl 2d")
    expires = None
    if ttl is not None:
        expires = session.now() + parse_span(ttl, option="--ttl")
    elif until is not None:
        expires = parse_time(until, option="--until")
        if expires <= session.now():
            raise ConfigError(f"--until: {moment(expires)} is past", remedy=f"'vmsnap env destroy {name}' removes it")
    status = session.application.extend_environment(name, expires=expires)
    end = moment(status.environment.expires, none="")
    session.show(
        environment_document(status),
        human=lambda console: print_lines(
            console, [f"Environment {printable(name)} stays until {end or 'it is destroyed'}."]
        ),
    )


@environments.command("destroy")
def destroy_environment(
    ctx: typer.Context, name: NameArgument, *, json: JsonOption = False, config: ConfigOption = None
) -> None:
    """Remove an environment and everything it wrote.

    Its snapshot stays as it was, and is held no longer. The environment is not asked to shut down.

    For example:

        vmsnap env destroy db1-test
        vmsnap env list --json | jq -r '.environments[] | select(.guest == "db1").environment' | xargs -rn1 vmsnap env destroy
    """
    session = begin(ctx, json=json, config=config)
    application = session.application
    with session.unstoppable():
        application.destroy_environment(name)
    session.show(
        {"environment": name, "destroyed": True},
        human=lambda console: print_lines(console, [f"Environment {printable(name)} is gone."]),
    )


@environments.command("expire")
def expire_environments(
    ctx: typer.Context,
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")] = False,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Remove the environments whose time has come, and everything they wrote.

    The daemon does the same by itself. One that cannot be removed stops no other; the exit code is that of the worst failure.

    For example:

        vmsnap env expire --dry-run
        vmsnap env expire --json | jq -r '.environments[].environment'
    """
    session = begin(ctx, json=json, config=config)
    application = session.application
    with session.unstoppable():
        entries = application.expire_environments(dry_run=dry_run)
    session.show(expiry_document(entries, dry_run=dry_run), human=lambda console: _print_expired(console, entries))
    code = worst_of({entry.error.exit_code for entry in entries if entry.error is not None})
    if code is not ExitCode.DONE:
        raise typer.Exit(int(code))


@environments.command("hydrate")
def hydrate_environment(
    ctx: typer.Context, name: NameArgument, *, json: JsonOption = False, config: ConfigOption = None
) -> None:
    """Wait until all data of an environment from the replica is here.

    From then on it runs on a local image and needs the replica no more. The daemon does the same in the background.

    For example:

        vmsnap env hydrate db1-test
        vmsnap env show db1-test --json | jq -r .export.phase
    """
    session = begin(ctx, json=json, config=config)
    application = session.application
    with session.running() as (progress, cancel):
        status = application.hydrate_environment(name, progress=progress, cancel=cancel)
    session.show(
        environment_document(status),
        human=lambda console: print_lines(console, [f"Environment {printable(name)} is local."]),
    )


@environments.command("serve-disks", hidden=True)
def serve_disks(
    ctx: typer.Context,
    where: Annotated[str, typer.Argument(metavar="RUN|FOLDER", help="The environment's run, or its export's folder.")],
    *,
    config: ConfigOption = None,
) -> None:
    """Serve an environment's disks out of the replica, until stopped. The unit vmsnap-export@ runs this.

    For example:

        vmsnap env serve-disks 0a1b2c3d4e
    """
    session = begin(ctx, json=False, config=config)
    from vmsnap.export_serving import serve_export  # noqa: PLC0415 - no other command needs what that loads

    stop = threading.Event()
    with cancelled_by_signals(announce=stop.set):
        serve_export(None if "/" in where else session.settings, where, stop=stop)


environments.command("forward")(reach.forward)
environments.command("serve")(reach.serve)
environments.command("register")(reach.register)


def _print(console: Console, statuses: Sequence[EnvironmentStatus]) -> None:
    if not statuses:
        print_lines(console, ["No environments. 'vmsnap provision GUEST' makes one."])
        return
    rows = [
        (
            status.environment.name,
            status.state.value if status.state else "GONE",
            status.environment.guest,
            f"{status.environment.snapshot}{_whence(status)}",
            minute(status.environment.created),
            minute(status.environment.expires, none="never"),
            status.environment.network or "fenced",
            size(status.overlay_bytes),
        )
        for status in statuses
    ]
    print_table(console, header=_HEADER, rows=rows, spare=("CREATED", "NETWORK", "OVERLAY"))


def _print_expired(console: Console, entries: Sequence[Expiry]) -> None:
    lines = [] if entries else ["No environment has expired."]
    for entry in entries:
        name = printable(entry.environment.name)
        if entry.error is not None:
            lines += [f"{name}: {line}" for line in plain_error_lines(entry.error)]
        else:
            became = "was removed" if entry.removed else "would be removed"
            lines.append(f"Environment {name} has expired ({moment(entry.environment.expires)}) and {became}.")
    print_lines(console, lines)


def _whence(status: EnvironmentStatus) -> str:
    """Return how much of an environment's data has come from the replica; nothing once all of it is here."""
    export = status.export
    if export is None or export.phase.value == "local":
        return ""
    if export.waiting is not None:
        return " (replica away)"
    if not export.data_bytes:
        return " (replica)"
    return f" ({min(100, 100 * export.read_bytes // export.data_bytes)} % here)"
