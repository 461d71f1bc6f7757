"""``vmsnap list``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from vmsnap.cli.completion import complete_guest
from vmsnap.cli.context import ConfigOption, JsonOption, begin
from vmsnap.cli.documents import engine_names, list_document
from vmsnap.cli.tables import print_lines, print_table
from vmsnap.cli.text import count, day, milliseconds, minute, size

if TYPE_CHECKING:
    from vmsnap.model.manifest import Snapshot

_HEADER = ("GUEST", "SNAPSHOT", "WHEN", "SIZE", "NEW", "PAUSE", "ENGINE", "CLEAN", "VERIFIED", "PINNED")

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
    disk, or in the clone before it went off.

    For example:

        vmsnap list
        vmsnap list db1 --json | jq -r '.snapshots[-1].snapshot'
    """
    session = begin(ctx, json=json, config=config)
    snapshots = session.application.snapshots(guest)
    if guest is not None and not snapshots:
        session.policies.get(guest)  # no snapshots yet is fine; a guest nobody knows is not
    session.show(list_document(snapshots), human=lambda console: _print(console, snapshots, guest=guest))


def _print(console: Console, snapshots: Sequence[Snapshot], *, guest: str | None) -> None:
    if not snapshots:
        name = guest or "GUEST"
        print_lines(console, [f"No snapshots yet. 'vmsnap backup {name}' makes one."])
        return
    print_table(console, header=_HEADER, rows=[_row(snapshot) for snapshot in snapshots], spare=_SPARE)


def _row(snapshot: Snapshot) -> tuple[str, ...]:
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
        pinned_text(snapshot),
    )


def verified_text(snapshot: Snapshot) -> str:
    """Return the day a snapshot was last verified, or how damaged it was."""
    verification = snapshot.marks.verification
    if verification is None:
        return "never"
    if verification.bad_blocks:
        return f"DAMAGED, {count(verification.bad_blocks, thing='block')}"
    return day(verification.at)


def pinned_text(snapshot: Snapshot) -> str:
    """Return who holds a snapshot, and up to which day."""
    pin = snapshot.marks.pin
    if pin is None:
        return "-"
    return f"{pin.owner} until {day(pin.until)}" if pin.until else pin.owner
