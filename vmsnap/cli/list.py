"""``vmsnap list``."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from vmsnap.cli.completion import complete_guest
from vmsnap.cli.context import ConfigOption, JsonOption, begin
from vmsnap.cli.documents import engine_names, list_document
from vmsnap.cli.tables import print_lines, print_table
from vmsnap.cli.text import count, day, milliseconds, minute, size

if TYPE_CHECKING:
    from vmsnap.model.copies import ReplicaCopies
    from vmsnap.model.manifest import Snapshot

_HEADER = ("GUEST", "SNAPSHOT", "WHEN", "SIZE", "NEW", "PAUSE", "ENGINE", "CLEAN", "VERIFIED", "PINNED", "COPIES")

_SPARE = ("CLEAN", "ENGINE", "PAUSE", "SIZE")


def list_snapshots(
    ctx: typer.Context,
    guest: Annotated[
        str | None, typer.Argument(metavar="GUEST", help="Only this guest's snapshots.", autocompletion=complete_guest)
    ] = None,
    *,
    json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """List snapshots, oldest first.

    WHEN is the instant the disks are of. NEW is what the snapshot added to the store. PAUSE is how long the guest stood
    still, or that its disks alone were captured. Every snapshot is proven clean; CLEAN says where that was read: on the
    disk, or in the clone before it went off. COPIES, where there is a replica, says where it is.

    For example:

        vmsnap list
        vmsnap list db1 --json | jq -r '.snapshots[-1].snapshot'
    """
    session = begin(ctx, json=json, config=config)
    snapshots = session.application.snapshots(guest)
    if guest is not None and not snapshots:
        session.policies.get(guest)  # no snapshots yet is fine; a guest nobody knows is not
    copies, now = session.application.copies(guest), session.now()
    session.show(
        list_document(snapshots, now=now, copies=copies),
        human=lambda console: _print(console, snapshots, copies=copies, guest=guest, now=now),
    )


def _print(
    console: Console, snapshots: Sequence[Snapshot], *, copies: ReplicaCopies, guest: str | None, now: datetime
) -> None:
    everything = [(one, True) for one in snapshots] + [(one, False) for one in copies.only_there(snapshots)]
    if not everything:
        name = guest or "GUEST"
        print_lines(console, [f"No snapshots yet. 'vmsnap backup {name}' makes one."])
    else:
        everything.sort(key=lambda one: (one[0].manifest.guest, one[0].manifest.ranked))
        columns = len(_HEADER) if copies.replica else len(_HEADER) - 1
        rows = [(*_row(one, now=now), _where(one, here=here, copies=copies))[:columns] for one, here in everything]
        print_table(console, header=_HEADER[:columns], rows=rows, spare=_SPARE)
    if copies.problem is not None:
        lines = [f"What the replica has is not known: {copies.problem.brief}"]
        print_lines(console, [*lines, f"What to do: {copies.problem.remedy}"] if copies.problem.remedy else lines)


def _where(snapshot: Snapshot, *, here: bool, copies: ReplicaCopies) -> str:
    if not here:
        return "replica only"
    if copies.problem is not None:
        return "local, replica?"
    return "local, replica" if snapshot.id in copies.ids else "local"


def _row(snapshot: Snapshot, *, now: datetime) -> tuple[str, ...]:
    manifest = snapshot.manifest
    return (
        manifest.guest,
        snapshot.id,
        minute(manifest.captured),
        size(manifest.store.logical_bytes),
        size(manifest.store.new_bytes),
        milliseconds(manifest.capture.pause_ms) if manifest.capture.memory_captured else "disks only",
        engine_names(manifest.clean),
        "+".join(sorted({item.method for item in manifest.clean.instances})),
        verified_text(snapshot),
        pinned_text(snapshot, now=now),
    )


def verified_text(snapshot: Snapshot) -> str:
    """Return the day a snapshot was last verified, or how damaged it was."""
    verification = snapshot.marks.verification
    if verification is None:
        return "never"
    if verification.bad_blocks:
        return f"DAMAGED, {count(verification.bad_blocks, thing='block')}"
    return day(verification.at)


def pinned_text(snapshot: Snapshot, *, now: datetime) -> str:
    """Return who holds a snapshot, and up to which day. A pin that has ended is none."""
    pin = snapshot.marks.pin
    if pin is None or not pin.holds(now):
        return "-"
    return f"{pin.owner} until {day(pin.until)}" if pin.until else pin.owner
