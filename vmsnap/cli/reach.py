"""``vmsnap env forward``, ``serve`` and ``register``: reaching an environment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from vmsnap.cli.completion import complete_environment
from vmsnap.cli.context import ConfigOption, JsonOption, begin
from vmsnap.cli.tables import print_lines
from vmsnap.cli.text import printable
from vmsnap.cli.times import parse_span
from vmsnap.errors import ConfigError

if TYPE_CHECKING:
    from vmsnap.model.report import ForwardReport, ServeReport

NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="The environment's name.", autocompletion=complete_environment)
]
WaitOption = Annotated[
    str | None,
    typer.Option(
        "--wait",
        metavar="SPAN",
        help="How long to wait until it answers. [default: a minute, and 5 s for a port that refuses]",
        show_default=False,
    ),
]
_LOOPBACK = "127.0.0.1"
_MOST = 65535


def forward(
    ctx: typer.Context,
    name: NameArgument,
    port: Annotated[int, typer.Argument(metavar="PORT", min=1, max=_MOST, help="The port in the environment.")],
    *,
    listen: Annotated[
        str | None,
        typer.Option(
            "--listen",
            metavar="[ADDRESS:]PORT",
            help="Where to listen on this host. [default: a free port of 127.0.0.1]",
            show_default=False,
        ),
    ] = None,
    wait: WaitOption = None,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Give a port of an environment a port of this host, until Ctrl-C.

    It works for a fenced environment and for one on a network. Connections can only be opened from this side: the
    environment reaches nobody by it.

    For example:

        vmsnap env forward db1-test 5432
        vmsnap env forward db1-test 22 --listen 2222
        vmsnap env forward db1-test 5432 --listen 127.0.0.1:15432 --wait 5m
    """
    session = begin(ctx, json=json, config=config)
    address, listen_port = _listen(listen)
    from vmsnap.model.report import ForwardOptions  # noqa: PLC0415 - pydantic is slow to load, and --help needs none

    options = ForwardOptions(
        port=port,
        listen_address=address,
        listen_port=listen_port,
        wait=parse_span(wait, option="--wait") if wait is not None else None,
    )

    def ready(report: ForwardReport) -> None:
        session.show(report.model_dump(mode="json"), human=lambda console: _print_forward(console, report))

    with session.serving() as (progress, cancel):
        session.application.forward_environment(name, options=options, ready=ready, progress=progress, cancel=cancel)


def serve(
    ctx: typer.Context,
    name: NameArgument,
    *,
    port: Annotated[
        list[int] | None,
        typer.Option(
            "--port",
            min=1,
            max=_MOST,
            help="A port to serve; may be given several times. [default: service_ports of the policy]",
            show_default=False,
        ),
    ] = None,
    wait: WaitOption = None,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Give a fenced environment an address of its own on this host, until Ctrl-C.

    Its ports are there under their own numbers, and only this host reaches them. The address stays the same until the
    environment is destroyed; where the policy says so, its name is registered in the DNS.

    For example:

        vmsnap env serve db1-test
        vmsnap env serve db1-test --port 22 --port 6432
    """
    session = begin(ctx, json=json, config=config)
    from vmsnap.model.report import ServeOptions  # noqa: PLC0415

    options = ServeOptions(
        ports=tuple(dict.fromkeys(port or ())), wait=parse_span(wait, option="--wait") if wait is not None else None
    )

    def ready(report: ServeReport) -> None:
        session.show(report.model_dump(mode="json"), human=lambda console: _print_serve(console, report))

    with session.serving() as (progress, cancel):
        session.application.serve_environment(name, options=options, ready=ready, progress=progress, cancel=cancel)


def register(ctx: typer.Context, name: NameArgument, *, json: JsonOption = False, config: ConfigOption = None) -> None:
    """Register an environment's name in the DNS, as its policy says.

    'vmsnap provision --wait' and 'vmsnap env serve' do it by themselves; this tries again, or takes a changed address.

    For example:

        vmsnap env register db1-test
        vmsnap env register db1-test --json | jq -r .dns_name
    """
    session = begin(ctx, json=json, config=config)
    with session.unstoppable():
        report = session.application.register_environment(name)
    session.show(
        report.model_dump(mode="json"),
        human=lambda console: print_lines(
            console,
            [f"Environment {printable(name)} is registered: {report.dns_name} has the address {report.address}."],
        ),
    )


def _listen(text: str | None) -> tuple[str, int]:
    """Return address and port of ``--listen``; an IPv6 address stands in brackets. Raises ConfigError."""
    if text is None:
        return _LOOPBACK, 0
    address, _, number = text.rpartition(":")
    address = address.removeprefix("[").removesuffix("]")
    if not number.isascii() or not number.isdigit() or int(number) > _MOST or (":" in text and not address):
        raise ConfigError(
            f"--listen: {text!r} is no port, and no ADDRESS:PORT", remedy="for example --listen 127.0.0.1:15432"
        )
    return address or _LOOPBACK, int(number)


def _print_forward(console: Console, report: ForwardReport) -> None:
    inner = f"port {report.port} of {printable(report.environment)} ({report.address})"
    print_lines(console, [f"{report.listen_address} port {report.listen_port} is {inner}, until Ctrl-C."])


def _print_serve(console: Console, report: ServeReport) -> None:
    ports = ", ".join(str(port) for port in report.ports)
    lines = [f"{printable(report.environment)} is at {report.service_address}, port {ports}, until Ctrl-C."]
    if report.dns_name is not None:
        lines.append(f"  registered as {report.dns_name}")
    print_lines(console, lines)
