"""What runs inside the process of an export: the replica's blocks, and the hold that keeps them there."""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from vmsnap.config.credentials import encryption_key_of
from vmsnap.config.settings import Settings
from vmsnap.errors import PreconditionError, SnapshotNotFoundError
from vmsnap.exporting import FOLDER, place_of
from vmsnap.exports.cache import BLOCK_BYTES
from vmsnap.exports.folder import ExportFolder, PlanRecord
from vmsnap.exports.service import ExportService
from vmsnap.model.ids import RunId
from vmsnap.offsite import objects_of
from vmsnap.ports.clock import Clock
from vmsnap.ports.exports import BlockSource
from vmsnap.state.clock import SystemClock
from vmsnap.stores.packs import holds
from vmsnap.stores.packs.manifests import PackedSnapshot
from vmsnap.stores.packs.reading import PackedDisk, PackReader
from vmsnap.stores.packs.repository import Repository, open_repository

_RETRY_FOR = timedelta(seconds=5)
"""After which a call that goes on failing is told as such. The export itself tries for ever."""


def serve_export(settings: Settings | None, where: str, *, stop: threading.Event) -> None:
    """Serve one export until told to stop. ``where`` is its folder, or a run's id, which the settings' store has.

    Raises BusyError where it is served already, and what keeps it from beginning.
    """
    clock = SystemClock()
    if settings is not None:
        folder = ExportFolder(settings.store.path / FOLDER, run=RunId(where))
    else:
        folder = ExportFolder(Path(where).parent, run=RunId(Path(where).name))
    if not folder.exists:
        raise PreconditionError(f"run {folder.run} has no export", remedy="'vmsnap env list' shows what there is")
    plan = folder.plan()
    replica = ReplicaOfRun(plan, run=folder.run, clock=clock)
    ExportService(folder, socket=Path(plan.socket), replica=replica, now=clock.now, stop=stop).run()


@dataclass(frozen=True, kw_only=True)
class _PackedBlocks:
    """A disk in packs as ``ports.exports.BlockSource``. Every block is compared with its id as it is read."""

    disk: PackedDisk
    identity: bytes
    block_bytes: int

    @property
    def size_bytes(self) -> int:
        """Return the disk's size."""
        return self.disk.size_bytes

    def holes(self, first: int, count: int) -> Sequence[bool]:
        """Tell which blocks are holes."""
        return [place is None for place in self.disk.places(first, count)]

    def read(self, first: int, count: int) -> bytes:
        """Return blocks in a row."""
        return self.disk.read(first * self.block_bytes, count * self.block_bytes)


class ReplicaOfRun:
    """What an export's process needs of a repository of packs."""

    renewed_every = holds.RENEWED_EVERY

    def __init__(self, plan: PlanRecord, *, run: RunId, clock: Clock) -> None:
        self._plan = plan
        self._run = run
        self._clock = clock
        self._lock = threading.Lock()
        self._found: tuple[Repository, PackedSnapshot] | None = None

    def disks(self) -> Mapping[str, BlockSource]:
        """Return the snapshot's disks."""
        repository, packed = self._open()
        reader = PackReader(repository=repository)
        sizes = {disk.target: disk.size_bytes for disk in packed.body.manifest.disks}
        return {
            disk.target: _PackedBlocks(
                disk=PackedDisk(
                    repository, root=bytes.fromhex(disk.root), size_bytes=sizes[disk.target], reader=reader
                ),
                identity=hashlib.sha256(f"{repository.id} {disk.root}".encode()).digest(),
                block_bytes=BLOCK_BYTES,
            )
            for disk in packed.body.disks
        }

    def hold(self) -> None:
        """Hold the snapshot, or renew the hold."""
        repository, packed = self._open()
        now = self._clock.now()
        record = holds.HoldRecord(
            snapshot=packed.id, run=self._run, host=socket.gethostname(), since=now, until=now + holds.LASTS
        )
        holds.take(repository.store, hold=record, exists=lambda: self._exists(repository))

    def let_go(self) -> None:
        """Release the hold."""
        repository, packed = self._open()
        holds.release(repository.store, snapshot=packed.id, run=self._run)

    def _exists(self, repository: Repository) -> bool:
        try:
            repository.snapshot(self._plan.guest, snapshot=self._plan.snapshot)
        except SnapshotNotFoundError:
            return False
        return True

    def _open(self) -> tuple[Repository, PackedSnapshot]:
        with self._lock:
            if self._found is None:
                place = place_of(self._plan.place)
                objects = objects_of(place.model_copy(update={"retry_for": _RETRY_FOR}), clock=self._clock)
                repository = open_repository(objects, key=encryption_key_of(place))
                self._found = repository, repository.snapshot(self._plan.guest, snapshot=self._plan.snapshot)
            return self._found
