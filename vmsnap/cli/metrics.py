"""``vmsnap metrics``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vmsnap.cli.context import ConfigOption, JsonOption, begin
from vmsnap.cli.documents import metrics_document
from vmsnap.cli.tables import print_lines

if TYPE_CHECKING:
    from rich.console import Console

    from vmsnap.monitoring.metrics import Metric


def metrics(
    ctx: typer.Context,
    *,
    textfile: Annotated[
        Path | None,
        typer.Option(
            "--textfile", metavar="PATH", help="Write them there at once, for node_exporter. PATH ends in .prom."
        ),
    ] = None,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Print all metrics in Prometheus' text format, or write them to a file that node_exporter reads.

    Nothing else is done, and nobody is told. 'vmsnap daemon' answers Prometheus itself where [metrics] listen is set; with
    [metrics] textfile it writes the file after each look, as 'vmsnap run --due' and 'vmsnap backup' do at their end.

    For example:

        vmsnap metrics | grep overdue
        vmsnap metrics --textfile /var/lib/prometheus/node-exporter/vmsnap.prom
    """
    session = begin(ctx, json=json, config=config)
    found = session.application.metrics()
    if textfile is not None:
        from vmsnap.monitoring.exposition import write_textfile  # noqa: PLC0415 - loads the drivers' libraries

        write_textfile(textfile, metrics=found)
    session.show(
        metrics_document(found),
        human=lambda console: _print(console, found) if textfile is None else None,
    )


def _print(console: Console, found: Sequence[Metric]) -> None:
    from vmsnap.monitoring.exposition import text_of  # noqa: PLC0415 - as above

    print_lines(console, text_of(tuple(found)).decode().splitlines())
