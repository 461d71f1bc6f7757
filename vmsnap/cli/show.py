"""``vmsnap show``."""

from __future__ import annotations

from typing import Annotated

import typer

from vmsnap.cli.completion import complete_snapshot
from vmsnap.cli.context import ConfigOption, JsonOption, begin
from vmsnap.cli.documents import snapshot_document
from vmsnap.cli.tables import print_tree

SnapshotArgument = Annotated[
    str,
    typer.Argument(
        metavar="SNAPSHOT",
        help="An id, the beginning of one, GUEST@latest, or GUEST@TIME (the newest not after TIME).",
        autocompletion=complete_snapshot,
    ),
]


def show(
    ctx: typer.Context, snapshot: SnapshotArgument, *, json: JsonOption = False, config: ConfigOption = None
) -> None:
    """Show everything known about a snapshot: its manifest, the evidence that it is clean, its marks.

    The manifest was written when the snapshot was made and never changes. Marks (pin, last verification) may.

    For example:

        vmsnap show db1@latest
        vmsnap show 3fa9 --json | jq .manifest.clean
    """
    session = begin(ctx, json=json, config=config)
    document = snapshot_document(session.application.snapshot(snapshot), now=session.now())
    session.show(document, human=lambda console: print_tree(console, document))
