"""``vmsnap dhcp``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from vmsnap.cli.cancel import cancelled_by_signals
from vmsnap.cli.completion import complete_guest
from vmsnap.cli.context import ConfigOption, JsonOption, begin
from vmsnap.cli.tables import print_lines
from vmsnap.cli.text import count, moment, printable

if TYPE_CHECKING:
    from vmsnap.model.isolation import Exchange

dhcp = typer.Typer(no_args_is_help=True, help="Watch the DHCP exchanges of guests.")


@dhcp.callback()
def _options() -> None:
    """Watch the DHCP exchanges of guests."""


@dhcp.command("watch")
def watch(
    ctx: typer.Context,
    guests: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[GUEST]...", help="Watch these guests only.", autocompletion=complete_guest, show_default=False
        ),
    ] = None,
    *,
    interface: Annotated[
        list[str] | None,
        typer.Option(
            "--interface",
            metavar="BRIDGE",
            help="Listen here; may be repeated. [default: the bridges of the guests]",
            show_default=False,
        ),
    ] = None,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Keep the last DHCP exchange of every guest that has a policy, until stopped by Ctrl-C or SIGTERM.

    Policies are read again every five minutes; a file that is wrong is told, and stops its own guest and no other.

    It reads production's bridges and never sends anything. What it keeps, for root's eyes only, lets a clone be given an
    address by a FORCERENEW that its DHCP client believes. The service vmsnap-dhcp-watch runs it.

    For example:

        vmsnap dhcp watch
        vmsnap dhcp watch db1 --interface br0
    """
    session = begin(ctx, json=json, config=config)
    application = session.application
    recorded = 0

    def tell(guest: str, exchange: Exchange) -> None:
        nonlocal recorded
        recorded += 1
        if not session.json:
            print_lines(session.out, [_line(guest, exchange)])
            session.out.file.flush()

    with cancelled_by_signals(announce=lambda: None) as cancel:
        application.watch_dhcp(tuple(guests or ()), interfaces=tuple(interface or ()), tell=tell, cancel=cancel)
    session.show(
        {"recorded": recorded},
        human=lambda console: print_lines(console, [f"Stopped; {count(recorded, thing='exchange')} recorded."]),
    )


def _line(guest: str, exchange: Exchange) -> str:
    vlan = "" if exchange.vlan is None else f", VLAN {exchange.vlan}"
    nonce = "no nonce" if exchange.nonce is None else "with a nonce"
    client = f", {printable(exchange.client)}" if exchange.client else ""
    return (
        f"{moment(exchange.seen)}  {printable(guest)}  {exchange.mac}  "
        f"{exchange.address} from {exchange.server}, {nonce}{vlan}{client}"
    )
