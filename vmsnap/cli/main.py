"""The program ``vmsnap``."""

from __future__ import annotations

import sys
from io import TextIOWrapper
from typing import Annotated

import typer

from vmsnap import __version__
from vmsnap.cli.backup import backup
from vmsnap.cli.context import ConfigOption, JsonOption, Session, session_of
from vmsnap.cli.daemon import daemon
from vmsnap.cli.dhcp import dhcp
from vmsnap.cli.doctor import doctor
from vmsnap.cli.env import environments
from vmsnap.cli.forget import forget
from vmsnap.cli.gc import collect_garbage
from vmsnap.cli.group import ErrorGroup
from vmsnap.cli.history import history
from vmsnap.cli.list import list_snapshots
from vmsnap.cli.metrics import metrics
from vmsnap.cli.pin import pin, unpin
from vmsnap.cli.policy import policies
from vmsnap.cli.provision import provision
from vmsnap.cli.prune import prune
from vmsnap.cli.reconcile import reconcile
from vmsnap.cli.removable import removable
from vmsnap.cli.replica import export, replicate, restore
from vmsnap.cli.run import run
from vmsnap.cli.show import show
from vmsnap.cli.verify import verify

_MAKE, _KEEP, _HOST = "Backups and test VMs", "Snapshots", "This host"
_EPILOG = (
    "Exit codes: 0 done, 2 configuration, 3 something is missing, 4 busy, 5 safety (never retried, never stored), "
    "6 deadline, 7 driver, 8 cleaned up incompletely, 70 bug in vmsnap."
)


def _print_version(wanted: bool) -> None:  # noqa: FBT001 - typer calls it so
    if wanted:
        typer.echo(f"vmsnap {__version__}")
        raise typer.Exit


def _options(
    ctx: typer.Context,
    *,
    json: JsonOption = False,
    config: ConfigOption = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is done, on stderr.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Log everything, and show where errors came from.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Clean database backups by cloning running VMs.

    vmsnap clones a running VM with its memory, cuts the clone off the network, lets its database finish its work and stop
    in order, proves it from the disk, and keeps that disk. The VM itself runs on.

    For example:

        vmsnap doctor db1            can it be done here, and what to change
        vmsnap backup db1            make a snapshot
        vmsnap list db1              what there is
        vmsnap provision db1 --wait  have a test VM with that data
    """
    del version
    session = session_of(ctx)
    session.set_options(json=json, config=config)
    session.set_logging(verbose=verbose, debug=debug)


app = typer.Typer(
    cls=ErrorGroup,
    no_args_is_help=True,
    epilog=_EPILOG,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["--help", "-h"]},
)
app.callback()(_options)
app.command("backup", rich_help_panel=_MAKE)(backup)
app.command("run", rich_help_panel=_MAKE)(run)
app.command("provision", rich_help_panel=_MAKE)(provision)
app.add_typer(environments, name="env", rich_help_panel=_MAKE)
app.command("list", rich_help_panel=_KEEP)(list_snapshots)
app.command("show", rich_help_panel=_KEEP)(show)
app.command("prune", rich_help_panel=_KEEP)(prune)
app.command("forget", rich_help_panel=_KEEP)(forget)
app.command("pin", rich_help_panel=_KEEP)(pin)
app.command("unpin", rich_help_panel=_KEEP)(unpin)
app.command("replicate", rich_help_panel=_KEEP)(replicate)
app.command("restore", rich_help_panel=_KEEP)(restore)
app.command("export", rich_help_panel=_KEEP)(export)
app.command("verify", rich_help_panel=_KEEP)(verify)
app.command("gc", rich_help_panel=_KEEP)(collect_garbage)
app.command("daemon", rich_help_panel=_HOST)(daemon)
app.command("history", rich_help_panel=_HOST)(history)
app.command("doctor", rich_help_panel=_HOST)(doctor)
app.command("metrics", rich_help_panel=_HOST)(metrics)
app.command("reconcile", rich_help_panel=_HOST)(reconcile)
app.command("removable", hidden=True)(removable)
app.add_typer(dhcp, name="dhcp", rich_help_panel=_HOST)
app.add_typer(policies, name="policy", rich_help_panel=_HOST)


def main(session: Session | None = None) -> None:
    """Run the program and exit with its exit code. Tests give a session with an application of their own."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # A guest's name beyond the terminal's alphabet is printed in escapes, and is no reason to fail.
            stream.reconfigure(errors="backslashreplace")
    app(obj=session or Session())
