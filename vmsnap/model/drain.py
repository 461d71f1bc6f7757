"""What draining a database did, and the evidence that it stopped in order."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from vmsnap.model.ids import RunId


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One database server process family in a guest (a PostgreSQL cluster).

    ``name`` is for people. ``data_directory`` is a path in the guest. ``programs`` is the folder of its tools there.
    ``user`` is the account it runs as.
    """

    engine: str
    name: str
    data_directory: str
    programs: str
    user: str
    version: str = ""
    port: int | None = None
    socket_directory: str | None = None


@dataclass(frozen=True, kw_only=True)
class DrainReport:
    """Work in flight when the lame duck began, and what became of it: ``finished + rolled_back`` is all of it."""

    engine: str
    instance: str
    in_flight_at_start: int
    finished: int
    rolled_back: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class FileSystemState:
    """The state of one file system, read from the disk after the clone was off."""

    disk: str
    kind: str
    uuid: str
    clean: bool
    observed: str


@dataclass(frozen=True, kw_only=True)
class InstanceEvidence:
    """What an engine read from one instance's own files, and its verdict. ``method``: ``disk`` or ``in-guest``."""

    engine: str
    instance: str
    data_directory: str
    method: str
    clean: bool
    observed: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class CleanShutdown:
    """Evidence that a clone's disks are clean. Publishing a snapshot needs it; only ``workflow.proof`` makes one.

    Every instance and every file system in it is clean: its constructor raises ``ValueError`` otherwise, or where
    there is no evidence at all.
    """

    run: RunId
    made: datetime
    guest_shut_down_by: str
    instances: tuple[InstanceEvidence, ...]
    file_systems: tuple[FileSystemState, ...]

    def __post_init__(self) -> None:
        if not self.instances or not self.file_systems:
            msg = "a clean shutdown needs evidence of at least one instance and one file system"
            raise ValueError(msg)
        dirty = [item.instance for item in self.instances if not item.clean]
        dirty += [item.disk for item in self.file_systems if not item.clean]
        if dirty:
            msg = f"not clean: {', '.join(dirty)}"
            raise ValueError(msg)
