"""``vmsnap removable``: for whoever takes the program away, such as the package's own script."""

from __future__ import annotations

import typer

from vmsnap.cli.context import ConfigOption, JsonOption, begin
from vmsnap.cli.tables import print_lines
from vmsnap.errors import BusyError


def removable(ctx: typer.Context, *, json: JsonOption = False, config: ConfigOption = None) -> None:
    """Say whether nothing on this host needs vmsnap any more; exit code 4 where something does.

    Runs that go on, runs that died and are not undone, and test VMs that still read from the replica need it. Changes nothing.

    For example:

        vmsnap removable
    """
    session = begin(ctx, json=json, config=config)
    from vmsnap.bootstrap import make_world  # noqa: PLC0415 - loads the drivers
    from vmsnap.workflow.unfinished import unfinished  # noqa: PLC0415

    found = unfinished(make_world(session.settings))
    if found:
        raise BusyError(
            "vmsnap is still needed on this host", details="\n".join(found), remedy="see to these, then try again"
        )
    session.show({"removable": True}, human=lambda console: print_lines(console, ["Nothing here needs vmsnap now."]))
