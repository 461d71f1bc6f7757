"""What still needs the program on this host: while there is any of it, it must not be taken away."""

from __future__ import annotations

from vmsnap.model.export import ExportPhase
from vmsnap.workflow.world import World


def unfinished(world: World) -> tuple[str, ...]:
    """Return in words what goes on, what a dead run left, and which environments wait for their data. Changes nothing.

    Environments whose data is here need nobody. Raises DriverError where the journals cannot be read.
    """
    found = []
    for record in world.journals.records():
        what = f"run {record.run} ({record.kind.value} of {record.guest!r})"
        if record.alive:
            found.append(f"{what} goes on: wait for it, or stop it")
        elif not record.closed and record.kept_for is None:
            found.append(f"{what} died and is not undone: run 'vmsnap reconcile'")
    names = {environment.run: environment.name for environment in world.book.all()}
    for status in world.exports.all():
        if status.phase is not ExportPhase.LOCAL:
            name = names.get(status.run)
            what = f"the export of run {status.run}" if name is None else f"environment {name!r}"
            found.append(f"{what} reads from the replica: run 'vmsnap env hydrate' for it, or 'vmsnap env destroy'")
    return tuple(found)
