"""Exports of the replica, as the host that owns them has them: their processes, put together from the settings.

What runs inside such a process is in ``vmsnap.export_serving``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from pydantic import ValidationError

from vmsnap.config.settings import DEFAULT_FILE, ReplicaSettings, load_settings
from vmsnap.errors import ConfigError, VmsnapError
from vmsnap.exports.launching import Launcher, find_launcher
from vmsnap.exports.processes import ExportProcesses
from vmsnap.model.ids import RunId, SnapshotId
from vmsnap.state.clock import SystemClock

FOLDER = ".exports"
"""Where exports lie, in the store's folder."""
_LET_GO_FOR = timedelta(seconds=10)


def exports_of(
    store: Path, *, runtime: Path, replica: ReplicaSettings | None, launcher: Callable[[], Launcher] | None = None
) -> ExportProcesses:
    """Return the exports of this host. Opens nothing yet. ``launcher`` None: as this host starts services."""
    clock = SystemClock()

    def let_go(snapshot: SnapshotId, run: RunId, place: str) -> None:
        from vmsnap.offsite import objects_of  # noqa: PLC0415 - what knows packs takes long to load
        from vmsnap.stores.packs import holds  # noqa: PLC0415 - as above

        where = place_of(place).model_copy(update={"retry_for": _LET_GO_FOR})
        holds.release(objects_of(where, clock=clock), snapshot=snapshot, run=run)

    def found() -> Launcher:
        argv = (sys.executable, "-m", "vmsnap", "env", "serve-disks")
        return find_launcher(argv, units=_unit_serves(store))

    return ExportProcesses(
        store / FOLDER,
        runtime=runtime,
        launcher=launcher or found,
        let_go=let_go,
        place="" if replica is None else replica.model_dump_json(exclude_unset=True),
    )


def _unit_serves(store: Path) -> bool:
    """Tell whether the unit's process, which reads the default file, would find the same folders."""
    try:
        return load_settings(DEFAULT_FILE).store.path == store
    except VmsnapError:
        return False


def place_of(text: str) -> ReplicaSettings:
    """Return where an export's replica is, as it was written down when the export was made. Raises ConfigError."""
    if not text:
        raise ConfigError("no replica is set", remedy="name it in [replica] of vmsnap.toml")
    try:
        return ReplicaSettings.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(
            "where the replica is was written down by another vmsnap, and is not understood", details=str(error)
        ) from error
