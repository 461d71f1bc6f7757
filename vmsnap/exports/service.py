"""The life of an export's process: from the lock to the end, through a replica that comes and goes."""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Protocol

from vmsnap.errors import BusyError, DriverError, VerificationError, VmsnapError
from vmsnap.exports.cache import BlockCache
from vmsnap.exports.disk import LazyDisk
from vmsnap.exports.fetching import CachedDisk, Fetcher
from vmsnap.exports.folder import DiskRecord, DisksRecord, ExportFolder, FailureRecord, StatusRecord
from vmsnap.exports.hydrating import Hydrator
from vmsnap.exports.server import NbdServer
from vmsnap.model.export import ExportPhase
from vmsnap.ports.exports import BlockSource

_LOG = logging.getLogger(__name__)
_TICK_SECONDS = 0.5
_FLUSH_SECONDS = 2.0
_HOLD_AGAIN = timedelta(minutes=10)
_MOST_DAMAGE = 20


class Replica(Protocol):
    """What the process needs of the replica. Every method may be called again after an error, from any thread."""

    def disks(self) -> Mapping[str, BlockSource]:
        """Return the snapshot's disks by target, in its order. Raises StoreUnreachableError, SnapshotNotFoundError, ..."""

    def hold(self) -> None:
        """Hold the snapshot, or renew the hold. Raises PreconditionError without the right to write."""

    def let_go(self) -> None:
        """Release the hold. Content where there is none."""

    renewed_every: timedelta


class _LateSource:
    """A disk of a replica that need not be reachable yet."""

    def __init__(self, record: DiskRecord, *, replica: Replica) -> None:
        self._record = record
        self._replica = replica
        self._lock = threading.Lock()
        self._source: BlockSource | None = None
        self.size_bytes = record.size_bytes
        self.identity = bytes.fromhex(record.identity)

    def holes(self, first: int, count: int) -> Sequence[bool]:
        """Tell which blocks are holes."""
        return self._opened().holes(first, count)

    def read(self, first: int, count: int) -> bytes:
        """Return blocks."""
        return self._opened().read(first, count)

    def _opened(self) -> BlockSource:
        with self._lock:
            if self._source is None:
                source = self._replica.disks().get(self._record.target)
                if source is None or source.identity != self.identity or source.size_bytes != self.size_bytes:
                    raise VerificationError(
                        f"disk {self._record.target} of this snapshot is another one in the replica now",
                        remedy="destroy the environment and provision it anew",
                    )
                self._source = source
            return self._source


class ExportService:
    """Serves one run's export until told to stop."""

    def __init__(
        self,
        folder: ExportFolder,
        *,
        socket: Path,
        replica: Replica,
        now: Callable[[], datetime],
        stop: threading.Event,
    ) -> None:
        self._folder = folder
        self._socket = socket
        self._replica = replica
        self._now = now
        self._stop = stop
        self._held = False
        self._hold_at: datetime | None = None
        self._said: StatusRecord | None = None

    def run(self) -> None:
        """Serve. Raises BusyError where another process does; what keeps it from beginning is in the status too."""
        with self._locked():
            try:
                record = self._folder.disks() or self._first_look()
            except VmsnapError as error:
                self._say(_failed(error))
                raise
            self._serve(record)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            descriptor = os.open(self._folder.lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DriverError(f"there is no export of run {self._folder.run}: {error.strerror}") from error
        with os.fdopen(descriptor, "r+b") as file:
            for _ in range(20):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    # Somebody who looks whether it is alive holds the lock for a moment.
                    time.sleep(0.01)
            else:
                raise BusyError(f"the export of run {self._folder.run} is served by another process")
            file.truncate(0)
            file.write(b"%d" % os.getpid())
            file.flush()
            yield

    def _first_look(self) -> DisksRecord:
        disks = self._replica.disks()
        self._renew_hold()
        record = DisksRecord(
            disks=tuple(
                DiskRecord(target=target, size_bytes=source.size_bytes, identity=source.identity.hex())
                for target, source in disks.items()
            )
        )
        try:
            self._folder.write_disks(record)
        except VmsnapError:
            # The folder may be gone: the environment was destroyed meanwhile, by somebody who saw no hold.
            with suppress(VmsnapError):
                self._replica.let_go()
            raise
        return record

    def _serve(self, record: DisksRecord) -> None:
        plan = self._folder.plan()
        fetcher = Fetcher(now=self._now)
        with ExitStack() as stack:
            disks: list[tuple[CachedDisk, LazyDisk]] = []
            for disk in record.disks:
                source = _LateSource(disk, replica=self._replica)
                cache = BlockCache(
                    self._folder.image(disk.target),
                    size_bytes=disk.size_bytes,
                    identity=source.identity,
                    most_bytes=plan.cache_bytes,
                )
                stack.callback(cache.close)
                cached = CachedDisk(target=disk.target, source=source, cache=cache)
                disks.append((cached, LazyDisk(cached, fetcher=fetcher)))
            hydrator = Hydrator(disks, fetcher=fetcher)
            served = {cached.target: (cached.source.size_bytes, lazy) for cached, lazy in disks}
            server = NbdServer(self._socket, disks=served, reader=plan.reader)
            stack.callback(lambda: [cached.cache.flush() for cached, _ in disks])
            if plan.hydrate:
                stack.callback(hydrator.stop)
            stack.callback(fetcher.stop)
            fetcher.start()
            server.start()
            stack.callback(server.stop)
            if plan.hydrate:
                hydrator.start()
            self._stay(disks, fetcher=fetcher, hydrator=hydrator)

    def _stay(self, disks: Sequence[tuple[CachedDisk, LazyDisk]], *, fetcher: Fetcher, hydrator: Hydrator) -> None:
        size_bytes = sum(cached.source.size_bytes for cached, _ in disks)
        before = self._folder.status()
        read_before = 0 if before is None else before.read_bytes
        self._held = self._held or (before is not None and before.held)
        flushed = time.monotonic()
        while True:
            tally = fetcher.tally
            phase = ExportPhase.HYDRATED if hydrator.hydrated.is_set() else ExportPhase.SERVING
            self._say(
                StatusRecord(
                    phase=phase,
                    size_bytes=size_bytes,
                    data_bytes=hydrator.data_bytes,
                    read_bytes=read_before + tally.read_bytes,
                    waiting=tally.waiting,
                    waiting_since=tally.waiting_since,
                    damage=tuple(sorted(tally.damage.values()))[:_MOST_DAMAGE],
                    held=self._held,
                )
            )
            if self._folder.is_hurried:
                hydrator.hurry()
            if self._hold_at is None or self._now() >= self._hold_at:
                self._renew_hold()
            if time.monotonic() - flushed >= _FLUSH_SECONDS:
                for cached, _ in disks:
                    cached.cache.flush()
                flushed = time.monotonic()
            if self._stop.wait(_TICK_SECONDS) or not self._folder.exists or self._folder.is_local:
                return

    def _renew_hold(self) -> None:
        try:
            self._replica.hold()
        except VmsnapError as error:
            # Serving matters more. A hold from before lasts for days.
            _LOG.warning("the hold on the snapshot in the replica was not taken or renewed: %s", error.brief)
            self._hold_at = self._now() + _HOLD_AGAIN
        else:
            self._held, self._hold_at = True, self._now() + self._replica.renewed_every

    def _say(self, status: StatusRecord) -> None:
        if status == self._said:
            return
        try:
            self._folder.write_status(status)
            self._said = status
        except OSError as error:
            _LOG.warning("the status of the export cannot be written: %s", error.strerror)


def _failed(error: VmsnapError) -> StatusRecord:
    failure = FailureRecord(exit_code=error.exit_code, brief=error.brief, details=error.details, remedy=error.remedy)
    return StatusRecord(phase=ExportPhase.STARTING, failure=failure)
