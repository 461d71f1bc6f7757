"""Exports: the disks of a snapshot in the replica, served to an environment while their data comes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from vmsnap.model.ids import RunId, SnapshotId


class ExportPhase(StrEnum):
    """How far an export has come. ``LOCAL``: the environment does not need it any more."""

    STARTING = "starting"
    SERVING = "serving"
    HYDRATED = "hydrated"
    LOCAL = "local"


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """What an export serves. ``cache_bytes``: how much it may keep here of each disk; None: all of it.

    ``hydrate``: it fetches, beside what the guest reads, everything else. ``reader``: the user and group that may read it.
    """

    run: RunId
    guest: str
    snapshot: SnapshotId
    hydrate: bool = True
    cache_bytes: int | None = None
    reader: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class ExportStatus:
    """How an export is. ``waiting``: why the guest waits for the replica; ``damage``: what the guest cannot read.

    ``data_bytes`` None: not counted yet. ``read_bytes``: how much was read of the image's data in the replica so far.
    """

    run: RunId
    guest: str
    snapshot: SnapshotId
    hydrate: bool
    phase: ExportPhase
    alive: bool
    size_bytes: int = 0
    data_bytes: int | None = None
    read_bytes: int = 0
    waiting: str | None = None
    waiting_since: datetime | None = None
    damage: tuple[str, ...] = ()
