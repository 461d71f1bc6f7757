"""From a staging folder to a snapshot: stage, write, and publish by one rename."""

from __future__ import annotations

import logging
import os
import re
import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from vmsnap.errors import BugError, ConfigError, PreconditionError, SafetyError
from vmsnap.model.drain import CleanShutdown
from vmsnap.model.hints import BlockSet, DiskHint, may_differ, why_full
from vmsnap.model.ids import RunId, SnapshotId
from vmsnap.model.manifest import DiskRecord, Manifest, Marks, Pin, ReadRecord, Snapshot
from vmsnap.ports.disks import DiskView
from vmsnap.ports.store import Staging
from vmsnap.stores.blocks import DIGEST_BYTES, Scope, block_count, file_digest
from vmsnap.stores.hinted import own_blocks, read_blocks, write_blocks
from vmsnap.stores.layout import (
    DISK_SUFFIXES,
    HOLDS,
    MANIFEST,
    MARKS,
    REMOVED,
    Layout,
    digests_name,
    image_name,
    make_folder,
    replace_file,
    sync_folder,
    write_new_file,
    written_name,
)
from vmsnap.stores.references import not_ahead
from vmsnap.stores.writer import Base, DiskFiles, Written, write_disk

_log = logging.getLogger(__name__)

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,100}\Z")
_READ_ONLY = 0o400
_RESERVED = frozenset({MANIFEST, REMOVED, MARKS, HOLDS})


@dataclass(frozen=True, kw_only=True)
class Publisher:
    """Makes snapshots in one store. Its methods raise OSError, which the store translates."""

    layout: Layout

    def stage(self, run: RunId, *, guest: str) -> None:
        """Make the staging folder. Raises BugError where the run has one."""
        make_folder(self.layout.guest(guest))
        folder = self.layout.staging(guest, run=run)
        try:
            folder.mkdir(mode=0o711)
        except FileExistsError:
            raise BugError(
                f"run {run} has a staging folder already: {folder}", remedy="run 'vmsnap reconcile'"
            ) from None

    def write_disk(
        self, staging: Staging, *, view: DiskView, base: Snapshot | None, scope: Scope, hint: DiskHint | None
    ) -> DiskRecord:
        """Write one disk over ``base``, where that has the disk and is sound, and return its record."""
        folder = self.folder(staging)
        files = DiskFiles(image=folder / image_name(view.target), digests=folder / digests_name(view.target))
        own = own_blocks(view)
        before = None if base is None else self._sound_base(base, target=view.target)
        reason = why_full(
            hint,
            base=None if base is None else base.id,
            before=None if before is None else before.record,
            size_bytes=scope.size_bytes,
        )
        may_differ_in = None
        if reason is None and hint is not None and hint.written is not None and before is not None:
            previous = before.own_blocks()
            if previous is None:
                reason = f"{before.record.written}, which says where the clone before wrote, is missing or damaged"
            else:
                may_differ_in = may_differ(by_guest=hint.written, by_clone=own, by_previous_clone=previous)
        over = None if before is None else before.base(may_differ_in)
        written = write_disk(view, files=files, base=over, scope=scope)
        list_name = written_name(view.target)
        return DiskRecord(
            target=view.target,
            image=files.image.name,
            digests=files.digests.name,
            digests_sha256=written.digests_sha256,
            size_bytes=scope.size_bytes,
            data_bytes=written.data_bytes,
            new_bytes=written.new_bytes,
            written=list_name,
            written_sha256=write_blocks(folder / list_name, blocks=own),
            read=_read_record(written, since=None if base is None else base.id, before=before, reason=reason),
        )

    def add_file(self, staging: Staging, *, name: str, source: Path) -> None:
        """Copy a small file into the staging folder."""
        if not _FILE_NAME.match(name) or name in _RESERVED or name.endswith(DISK_SUFFIXES):
            raise ConfigError(f"{name!r} cannot be the name of a file in a snapshot", remedy="use letters and digits")
        target = self.folder(staging) / name
        with source.open("rb") as data:
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _READ_ONLY)
            with os.fdopen(descriptor, "wb") as file:
                shutil.copyfileobj(data, file)
                file.flush()
                os.fsync(descriptor)

    def publish(self, staging: Staging, *, manifest: Manifest, clean: CleanShutdown) -> Snapshot:
        """Write the manifest into the staging folder, put everything on the disk and rename the folder."""
        _check_evidence(staging, manifest=manifest, clean=clean)
        _check_disks(self.folder(staging), manifest=manifest, copied=False)
        return self._publish(staging, manifest=manifest)

    def publish_copy(self, staging: Staging, *, manifest: Manifest, pin: Pin | None) -> Snapshot:
        """Do the same with a manifest that was published elsewhere, over disks that were received, and pin it."""
        if manifest.guest != staging.guest:
            raise SafetyError(f"snapshot {manifest.id} is not of guest {staging.guest!r}", remedy="report it")
        if self.layout.snapshot(staging.guest, snapshot=manifest.id).exists():
            raise PreconditionError(
                f"snapshot {manifest.id} of {staging.guest!r} is in the local store already, or what is left of it",
                remedy=f"'vmsnap verify {manifest.id}' tells whether it is whole; 'vmsnap prune' removes what is left",
            )
        _check_disks(self.folder(staging), manifest=manifest, copied=True)
        marks = Marks(pin=pin)
        if pin is not None:
            # In the staging folder: the one rename that makes the snapshot exist makes its pin exist, too.
            write_marks(self.folder(staging), marks=marks)
        self._publish(staging, manifest=manifest)
        return Snapshot(manifest=manifest, marks=marks)

    def _publish(self, staging: Staging, *, manifest: Manifest) -> Snapshot:
        folder = self.folder(staging)
        write_new_file(folder / MANIFEST, data=manifest.model_dump_json(indent=2).encode() + b"\n", mode=_READ_ONLY)
        sync_folder(folder)
        folder.rename(self.layout.snapshot(staging.guest, snapshot=manifest.id))
        sync_folder(folder.parent)
        return Snapshot(manifest=manifest)

    def folder(self, staging: Staging) -> Path:
        """Return a staging folder. Raises BugError where the run has none."""
        folder = self.layout.staging(staging.guest, run=staging.run)
        if not folder.is_dir():
            raise BugError(f"run {staging.run} has no staging folder", remedy="report it")
        return folder

    def _sound_base(self, base: Snapshot, *, target: str) -> _Before | None:
        """Return the disk in the snapshot before, or None where it is new or its digests are not to be trusted."""
        record = next((disk for disk in base.manifest.disks if disk.target == target), None)
        if record is None:
            return None
        folder = self.layout.snapshot(base.manifest.guest, snapshot=base.id)
        files = DiskFiles(image=folder / record.image, digests=folder / record.digests)
        try:
            with files.digests.open("rb") as digests:
                sound = (
                    files.image.stat().st_size == record.size_bytes
                    and os.fstat(digests.fileno()).st_size == block_count(record.size_bytes) * DIGEST_BYTES
                    and file_digest(digests.fileno()) == record.digests_sha256
                )
            reason = "they are not what its manifest vouches for"
        except OSError as error:
            sound, reason = False, error.strerror or str(error)
        if not sound:
            _log.warning(
                "the image or digests of %s in snapshot %s cannot be built upon (%s): the disk is written whole; "
                "run 'vmsnap verify %s'",
                *(target, base.id, reason, base.id),
            )
            return None
        return _Before(record=record, folder=folder)


def write_marks(folder: Path, *, marks: Marks) -> None:
    """Replace the marks in a snapshot's folder, or in one in the making, atomically. Raises OSError."""
    replace_file(folder / MARKS, data=marks.model_dump_json(indent=2).encode() + b"\n", mode=0o600)


@dataclass(frozen=True, kw_only=True)
class _Before:
    """A disk in the snapshot before, found sound."""

    record: DiskRecord
    folder: Path

    def base(self, may_differ: BlockSet | None) -> Base:
        files = DiskFiles(image=self.folder / self.record.image, digests=self.folder / self.record.digests)
        return Base(files=files, data_bytes=self.record.data_bytes, may_differ=may_differ)

    def own_blocks(self) -> BlockSet | None:
        if self.record.written is None:
            return None
        path = self.folder / self.record.written
        return read_blocks(path, sha256=self.record.written_sha256, size_bytes=self.record.size_bytes)


def _read_record(
    written: Written, *, since: SnapshotId | None, before: _Before | None, reason: str | None
) -> ReadRecord:
    look = written.look
    if look is None:
        return ReadRecord(read_bytes=written.read_bytes, full_because=reason)
    if look.mismatch is not None:
        return ReadRecord(
            read_bytes=written.read_bytes,
            full_because=f"the hint since {since} is wrong: {look.mismatch}",
            sampled_blocks=look.sampled_blocks,
            mismatch=f"{look.mismatch} since {since}",
        )
    row = 0 if before is None or before.record.read is None else before.record.read.hinted_in_a_row
    return ReadRecord(
        read_bytes=written.read_bytes, since=since, sampled_blocks=look.sampled_blocks, hinted_in_a_row=row + 1
    )


def _check_evidence(staging: Staging, *, manifest: Manifest, clean: CleanShutdown) -> None:
    runs = {staging.run, manifest.run, RunId(manifest.id), clean.run}
    if len(runs) > 1 or manifest.guest != staging.guest or manifest.clean.made != clean.made:
        raise SafetyError(
            f"the evidence of a clean shutdown of run {clean.run} is not of run {staging.run}: nothing is published",
            details=f"manifest: snapshot {manifest.id}, run {manifest.run}, guest {manifest.guest!r}",
            remedy="report it",
        )


def _check_disks(folder: Path, *, manifest: Manifest, copied: bool) -> None:
    """Raise SafetyError where the disks are not those of the manifest. A copy has no lists of where its clone wrote."""
    staged = {entry.name: entry.stat().st_size for entry in folder.iterdir()}
    listed = {disk.image: disk.size_bytes for disk in manifest.disks}
    listed |= {disk.digests: block_count(disk.size_bytes) * DIGEST_BYTES for disk in manifest.disks}
    lists = {disk.written for disk in manifest.disks if disk.written is not None and not copied}
    listed |= {name: staged.get(name, 0) for name in lists}
    images = {name: size for name, size in staged.items() if name.endswith(DISK_SUFFIXES)}
    if images != listed:
        raise SafetyError(
            f"the manifest of snapshot {manifest.id} does not list the disks that were stored",
            details=f"stored: {images}; listed: {listed}",
            remedy="report it",
        )
    if manifest.machine.nvram is not None and manifest.machine.nvram not in staged:
        raise SafetyError(f"snapshot {manifest.id} lacks the file {manifest.machine.nvram}", remedy="report it")


def usable_base(snapshots: tuple[Snapshot, ...], *, now: datetime) -> SnapshotId | None:
    """Return the newest snapshot to build upon: one with bad blocks, or dated ahead of the clock, is passed over."""
    for snapshot in reversed(not_ahead(snapshots, now=now)):
        verification = snapshot.marks.verification
        if verification is None or verification.bad_blocks == 0:
            return snapshot.id
    return None
