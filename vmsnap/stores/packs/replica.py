"""The port ``Replica`` over a repository of packs."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import socket
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path

from vmsnap.errors import (
    BusyError,
    DriverError,
    PreconditionError,
    SnapshotNotFoundError,
    VerificationError,
    VmsnapError,
)
from vmsnap.model.guest import Finding, Severity
from vmsnap.model.ids import SnapshotId
from vmsnap.model.manifest import Snapshot
from vmsnap.model.verification import Checked, Share
from vmsnap.ports.clock import Cancel, Clock
from vmsnap.ports.objects import ObjectStore
from vmsnap.ports.replica import DiskFile, LocalCopy, Remembered, Sent
from vmsnap.ports.store import ByteProgress, DiskContent
from vmsnap.stores.blocks import BLOCK_BYTES
from vmsnap.stores.layout import disk_failure, replace_file
from vmsnap.stores.packs import intents
from vmsnap.stores.packs.downloading import Target, download
from vmsnap.stores.packs.index import BlockIndex
from vmsnap.stores.packs.manifests import Absence, PackedSnapshot
from vmsnap.stores.packs.mending import mend
from vmsnap.stores.packs.names import REPOSITORY, damaged, guest_prefix, snapshot_in, snapshot_name
from vmsnap.stores.packs.reading import PackedDisk
from vmsnap.stores.packs.remembering import CopyMemory, Newest, newest_of
from vmsnap.stores.packs.repository import Repository, initialise, open_repository
from vmsnap.stores.packs.uploading import Means, upload
from vmsnap.stores.packs.verifying import Checking, check
from vmsnap.stores.references import by_age, resolve

_log = logging.getLogger(__name__)
_TOKEN = re.compile(r"[0-9a-f]{32}\Z")
_MARK_BYTES = 1024
"""A manifest is larger than that, and a mark is smaller."""


class PacksReplica:
    """Copies of snapshots in a repository. Safe to use from several threads.

    ``connect`` and ``key`` are called when the place is first needed. ``state`` is the folder for what is remembered here of
    the repository: it can be lost. ``connections``: how many objects are on their way at a time.
    """

    def __init__(
        self,
        connect: Callable[[], ObjectStore],
        *,
        key: Callable[[], bytes | None],
        state: Path,
        connections: int,
        clock: Clock,
    ) -> None:
        self._connect = connect
        self._key = key
        self._state = state
        self._connections = connections
        self._clock = clock
        self._memory = CopyMemory(folder=state / "copies")
        self._guard = threading.RLock()
        self._objects: ObjectStore | None = None
        self._repository: Repository | None = None
        self._known: dict[str, tuple[str, PackedSnapshot | Absence]] = {}

    @property
    def objects(self) -> ObjectStore:
        """Return the place. Raises ConfigError for a credential that cannot be read."""
        with self._guard:
            if self._objects is None:
                self._objects = self._connect()
            return self._objects

    def repository(self) -> Repository:
        """Return the repository. Raises PreconditionError where there is none, ConfigError for a wrong key."""
        with self._guard:
            if self._repository is None:
                self._repository = open_repository(self.objects, key=self._key())
            return self._repository

    def findings(self) -> tuple[Finding, ...]:
        """Look whether the place can be used, and with which key. Changes nothing that stays."""
        found = list(self.objects.findings())
        if any(one.severity is Severity.REFUSAL for one in found):
            return tuple(found)
        try:
            repository = self.repository()
        except PreconditionError:
            message = f"the place has no {REPOSITORY} yet: 'vmsnap replicate' makes a repository in it"
            found.append(Finding(check="replica", severity=Severity.OK, message=message))
        except VmsnapError as error:
            found.append(Finding(check="replica", severity=Severity.REFUSAL, message=error.brief, remedy=error.remedy))
        else:
            how = "encrypted, and the key is right" if repository.seal.keyed else "not encrypted"
            message = f"repository {repository.id} is there; it is {how}"
            found.append(Finding(check="replica", severity=Severity.OK, message=message))
        return tuple(found)

    def snapshots(self, guest: str | None = None) -> tuple[Snapshot, ...]:
        """Return snapshots, oldest first by guest. Damaged manifests are logged and left out."""
        return by_age([Snapshot(manifest=one.body.manifest) for one in self.entries(guest)])

    def entries(self, guest: str | None = None) -> tuple[PackedSnapshot, ...]:
        """Return what the manifests say. Those that did not change are not read again. Damaged ones are logged."""
        try:
            repository = self.repository()
        except PreconditionError:
            return ()
        infos = [info for info in repository.store.list(_prefix(guest)) if snapshot_in(info.name) is not None]

        def read(name: str, version: str) -> PackedSnapshot | None:
            known = self._known.get(name)
            if known is None or known[0] != version:
                try:
                    found = repository.versioned_entry(name)
                except VerificationError as error:
                    _log.warning("%s", error.brief)
                    return None
                if found is None:
                    return None
                known = (found[1], found[0])
                self._known[name] = known
            return known[1] if isinstance(known[1], PackedSnapshot) else None

        with ThreadPoolExecutor(self._connections) as pool:
            entries = pool.map(read, [info.name for info in infos], [info.version for info in infos])
            return tuple(entry for entry in entries if entry is not None)

    def find(self, reference: str) -> Snapshot:
        """Return the snapshot that a reference names. Raises SnapshotNotFoundError."""
        self.repository()
        return resolve(reference, snapshots=self.snapshots(), now=self._clock.now())

    def lacking(self, guest: str, *, snapshots: Collection[Snapshot]) -> frozenset[SnapshotId]:
        """Return which of a guest's snapshots were never sent whole. One that was removed there is not lacking."""
        captured = {one.id: one.manifest.captured for one in snapshots}
        try:
            repository = self.repository()
        except PreconditionError:
            self._memory.found(guest, repository="", settled=(), newest=None)
            return frozenset(captured)
        before = self._memory.newest(guest, repository=repository.id)
        known = {**captured, **({} if before is None else {before.snapshot: before.captured})}
        settled, copies = set(), []
        for info in repository.store.list(_prefix(guest)):
            named = snapshot_in(info.name)
            if named is None or named[1] not in known:
                continue
            entry = repository.entry(info.name) if info.size_bytes < _MARK_BYTES else None
            if info.size_bytes < _MARK_BYTES and (entry is None or _is_revoked(entry)):
                continue
            settled.add(named[1])
            if not isinstance(entry, Absence):
                copies.append(Newest(snapshot=named[1], captured=known[named[1]]))
        settled &= captured.keys()
        newest = newest_of(copies, now=self._clock.now())
        self._memory.found(guest, repository=repository.id, settled=settled, newest=newest)
        return frozenset(captured.keys() - settled)

    def remembered(self, guest: str) -> Remembered:
        """Return what is known here of a guest's copies."""
        return self._memory.recall(guest)

    def send(self, copy: LocalCopy, *, retain_until: datetime | None, progress: ByteProgress, cancel: Cancel) -> Sent:
        """Copy a snapshot there. May be repeated, after an error too: what was sent is not sent again."""
        manifest = copy.snapshot.manifest
        with self._guard:
            self._repository = repository = initialise(self.objects, key=self._key(), now=self._clock.now())
        folder = self._state / repository.id
        try:
            with _alone(folder), closing(BlockIndex(folder / "blocks.sqlite")) as index:
                path = folder / f"upload-{manifest.id}"
                means = Means(
                    upload=_token(repository, path=path, name=snapshot_name(manifest.guest, snapshot=manifest.id)),
                    host=socket.gethostname(),
                    connections=self._connections,
                    retain_until=retain_until,
                    now=self._clock.now,
                )
                sent = upload(repository, copy=copy, means=means, index=index, progress=progress, cancel=cancel)
                path.unlink(missing_ok=True)
                made = Newest(snapshot=manifest.id, captured=manifest.captured)
                self._memory.sent(manifest.guest, repository=repository.id, copy=made, now=self._clock.now())
                return sent
        except OSError as error:
            raise disk_failure(error, doing=f"send snapshot {manifest.id} to the replica") from error

    def fetch_disk(self, snapshot: Snapshot, *, content: DiskContent, progress: ByteProgress, cancel: Cancel) -> None:
        """Write a disk's image and digests into files that have their sizes and nothing else. Only reads the replica."""
        entry = self._entry(snapshot)
        roots = {disk.target: disk.root for disk in entry.body.disks}
        record = content.record
        if record not in entry.body.manifest.disks or record.target not in roots:
            raise SnapshotNotFoundError(
                f"snapshot {snapshot.id} has no such disk {record.target!r}", remedy="report it"
            )
        disk = PackedDisk(self.repository(), root=bytes.fromhex(roots[record.target]), size_bytes=record.size_bytes)
        try:
            with _opened(content.image) as image, _opened(content.digests) as digests:
                download(
                    disk,
                    target=Target(image=image, digests=digests),
                    digests_sha256=record.digests_sha256,
                    connections=self._connections,
                    progress=progress,
                    cancel=cancel,
                )
        except OSError as error:
            raise disk_failure(error, doing=f"write {content.image}") from error

    def fetch_files(self, snapshot: Snapshot) -> tuple[DiskFile, ...]:
        """Return the small files beside the disks. Raises VerificationError."""
        entry, found = self._entry(snapshot), []
        for file in entry.body.files:
            disk = PackedDisk(self.repository(), root=bytes.fromhex(file.root), size_bytes=file.size_bytes)
            data = disk.read(0, file.size_bytes)
            found.append(DiskFile(name=file.name, data=data))
        return tuple(found)

    def check(
        self, guest: str, *, snapshot: SnapshotId, share: Share | None, progress: ByteProgress, cancel: Cancel
    ) -> Checked:
        """Read a snapshot again, or a share of it, and compare it with its digests. Defects raise nothing."""
        how = Checking(share=share, connections=self._connections, progress=progress, cancel=cancel)
        return check(self.repository(), guest=guest, snapshot=snapshot, how=how)

    def mend(self, copy: LocalCopy, *, found: Checked, progress: ByteProgress, cancel: Cancel) -> None:
        """Repair what ``found`` names, from an intact copy. May be repeated."""
        repository = self.repository()
        folder = self._state / repository.id
        means = Means(
            upload=intents.new_token(),
            host=socket.gethostname(),
            connections=self._connections,
            now=self._clock.now,
        )
        try:
            with _alone(folder), closing(BlockIndex(folder / "blocks.sqlite")) as index:
                mend(repository, copy=copy, found=found, means=means, index=index, progress=progress, cancel=cancel)
        except OSError as error:
            raise disk_failure(error, doing=f"repair snapshot {copy.snapshot.id} in the replica") from error

    def reader(self, snapshot: Snapshot) -> Callable[[str, int], bytes]:
        """Return what reads a block, by disk and number."""
        entry, repository = self._entry(snapshot), self.repository()
        sizes = {disk.target: disk.size_bytes for disk in snapshot.manifest.disks}
        disks = {
            disk.target: PackedDisk(repository, root=bytes.fromhex(disk.root), size_bytes=sizes[disk.target])
            for disk in entry.body.disks
            if disk.target in sizes
        }

        def read(target: str, number: int) -> bytes:
            try:
                return disks[target].read(number * BLOCK_BYTES, BLOCK_BYTES)
            except (KeyError, DriverError) as error:
                if isinstance(error, DriverError) and error.transient:
                    raise
                raise damaged(entry.name, what=f"block {number} of {target} is not to be had") from error

        return read

    def _entry(self, snapshot: Snapshot) -> PackedSnapshot:
        entry = self.repository().snapshot(snapshot.manifest.guest, snapshot=snapshot.id)
        if entry.body.manifest != snapshot.manifest:
            raise damaged(entry.name, what="it was another a moment ago")
        return entry


def _prefix(guest: str | None) -> str:
    return "snapshots/" if guest is None else guest_prefix(guest)


def _is_revoked(entry: PackedSnapshot | Absence) -> bool:
    return isinstance(entry, Absence) and entry.reason == "revoked"


def _token(repository: Repository, *, path: Path, name: str) -> str:
    """Return the token of the upload that a dead process of this host left, or a new one, and remember it.

    One that a collector ended, or is about to, is not taken up again.
    """
    try:
        token = path.read_text(encoding="ascii").strip()
    except (FileNotFoundError, UnicodeDecodeError):
        token = ""
    if _TOKEN.match(token) and intents.exists(repository.store, upload=token):
        entry = repository.entry(name)
        if not isinstance(entry, Absence) or entry.upload != token:
            return token
    token = intents.new_token()
    replace_file(path, data=f"{token}\n".encode(), mode=0o600)
    return token


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold sending to one repository. Raises BusyError where another process of this host sends, OSError."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(folder / "sending.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(
                "another process of this host sends to the replica", remedy="wait until it is done and try again"
            ) from error
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
