"""``vmsnap pin`` and ``vmsnap unpin``."""

from __future__ import annotations

import getpass
import os
from datetime import datetime
from typing import Annotated

import typer

from vmsnap.cli.context import ConfigOption, JsonOption, Session, begin
from vmsnap.cli.documents import snapshot_summary
from vmsnap.cli.show import SnapshotArgument
from vmsnap.cli.tables import print_lines
from vmsnap.cli.text import moment, printable
from vmsnap.cli.times import parse_span, parse_time
from vmsnap.errors import ConfigError


def pin(
    ctx: typer.Context,
    snapshot: SnapshotArgument,
    *,
    reason: Annotated[str, typer.Option("--reason", "-r", help="Why it must stay.")],
    until: Annotated[
        str | None, typer.Option("--until", metavar="TIME", help="When the pin ends. Without it: when it is taken off.")
    ] = None,
    lasting: Annotated[
        str | None, typer.Option("--for", metavar="SPAN", help='How long the pin lasts: "14d". Instead of --until.')
    ] = None,
    owner: Annotated[
        str | None, typer.Option("--owner", help="Who wants it to stay. [default: you]", show_default=False)
    ] = None,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Hold a snapshot against retention, with who, why, and until when. A second pin replaces the first.

    A pinned snapshot stays, however many newer ones there are, and counts as one of them.

    For example:

        vmsnap pin db1@latest --reason "before the migration" --for 30d
        vmsnap pin 3fa9 --reason "audit 2026" --owner audit@example.org --until 2027-03-31T00:00Z
    """
    session = begin(ctx, json=json, config=config)
    ends = _end(session, until=until, lasting=lasting)
    if not reason.strip():
        raise ConfigError("--reason is empty", remedy="say why: whoever finds the store full will want to know")
    from vmsnap.model.manifest import Pin  # noqa: PLC0415 - pydantic is slow to load, and --help needs none

    wanted = Pin(owner=owner or whoever(), reason=reason, since=session.now(), until=ends)
    pinned = session.application.pin(snapshot, pin=wanted)
    end = f"until {moment(ends)}" if ends else "until it is unpinned"
    session.show(
        snapshot_summary(pinned, now=session.now()),
        human=lambda console: print_lines(
            console, [f"Pinned {pinned.id} of {printable(pinned.manifest.guest)} {end}: {printable(reason)}"]
        ),
    )


def unpin(
    ctx: typer.Context, snapshot: SnapshotArgument, *, json: JsonOption = False, config: ConfigOption = None
) -> None:
    """Take a pin off, so that retention decides again.

    Nothing is removed by this. A snapshot that is not pinned stays as it is, and that is no error.

    For example:

        vmsnap unpin db1@latest
        vmsnap unpin 3fa9 && vmsnap prune db1 --dry-run
    """
    session = begin(ctx, json=json, config=config)
    let_go = session.application.pin(snapshot, pin=None)
    session.show(
        snapshot_summary(let_go, now=session.now()),
        human=lambda console: print_lines(
            console, [f"{let_go.id} of {printable(let_go.manifest.guest)} is not pinned any more."]
        ),
    )


def _end(session: Session, *, until: str | None, lasting: str | None) -> datetime | None:
    if until is not None and lasting is not None:
        raise ConfigError("--until and --for contradict each other", remedy="give one of them")
    if lasting is not None:
        return session.now() + parse_span(lasting, option="--for")
    if until is None:
        return None
    end = parse_time(until, option="--until")
    if end <= session.now():
        raise ConfigError(f"--until: {moment(end)} is past", remedy="'vmsnap unpin' takes a pin off")
    return end


def whoever() -> str:
    """Return who runs the command: the person before sudo, where there is one."""
    try:
        return os.environ.get("SUDO_USER") or getpass.getuser()
    except (OSError, KeyError):
        return f"uid {os.getuid()}"
