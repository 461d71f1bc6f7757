"""A snapshot of made-up disks, as files of a local store, for the tests of packs."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from vmsnap.model.ids import RunId, SnapshotId
from vmsnap.model.manifest import DiskRecord, Snapshot
from vmsnap.ports.objects import ObjectStore
from vmsnap.ports.replica import DiskFile, LocalCopy, Sent
from vmsnap.ports.store import DiskContent
from vmsnap.stores.blocks import BLOCK_BYTES, HOLE, digest_of
from vmsnap.stores.packs.index import BlockIndex
from vmsnap.stores.packs.intents import new_token
from vmsnap.stores.packs.reading import PackedDisk
from vmsnap.stores.packs.repository import Repository, initialise
from vmsnap.stores.packs.uploading import Means, upload
from vmsnap.testing.cancels import NeverCancelled
from vmsnap.testing.store_contract import sample_manifest

NOW = datetime(2026, 11, 21, 2, tzinfo=UTC)
KEY = bytes(range(32))
_ZEROES = bytes(BLOCK_BYTES)


def block(seed: int) -> bytes:
    """Return a block that compresses to about a half, the same for the same seed; 0 is a hole."""
    if seed == 0:
        return bytes(BLOCK_BYTES)
    return random.Random(seed).randbytes(BLOCK_BYTES // 2).ljust(BLOCK_BYTES, b"\1")  # noqa: S311


def _digest(data: bytes) -> bytes:
    return HOLE if data == _ZEROES else digest_of(memoryview(data))


@dataclass(frozen=True, kw_only=True)
class Local:
    """A folder that stands for a local store of images."""

    folder: Path

    def snapshot(
        self, number: int = 1, *, guest: str = "db", disks: Mapping[str, bytes], nvram: bytes | None = None
    ) -> LocalCopy:
        """Write disks, and return them as a snapshot to upload."""
        snapshot = SnapshotId(f"{number:010x}")
        folder = self.folder / snapshot
        folder.mkdir()
        records, contents = [], []
        for target, data in disks.items():
            starts = range(0, len(data), BLOCK_BYTES)
            digests = b"".join(_digest(data[at : at + BLOCK_BYTES]) for at in starts)
            image, digest_file = folder / f"{target}.raw", folder / f"{target}.digests"
            image.write_bytes(data)
            digest_file.write_bytes(digests)
            record = DiskRecord(
                target=target,
                image=image.name,
                digests=digest_file.name,
                digests_sha256=hashlib.sha256(digests).hexdigest(),
                size_bytes=len(data),
                data_bytes=0,
                new_bytes=0,
            )
            records.append(record)
            contents.append(DiskContent(record=record, image=image, digests=digest_file))
        files = () if nvram is None else (DiskFile(name="nvram.fd", data=nvram),)
        manifest = sample_manifest(
            RunId(snapshot),
            guest=guest,
            disks=tuple(records),
            captured=NOW + timedelta(hours=number),
            nvram=None if nvram is None else "nvram.fd",
        )
        return LocalCopy(snapshot=Snapshot(manifest=manifest), disks=tuple(contents), files=files)


def send(repository: Repository, *, copy: LocalCopy, index: Path, token: str | None = None) -> Sent:
    """Upload a snapshot with an index of its own file."""
    means = Means(upload=token or new_token(), host="here", connections=2, now=lambda: NOW)
    opened = BlockIndex(index)
    try:
        return upload(
            repository,
            copy=copy,
            means=means,
            index=opened,
            progress=lambda _done, _total: None,
            cancel=NeverCancelled(),
        )
    finally:
        opened.close()


def fresh(store: ObjectStore, *, key: bytes | None = None) -> Repository:
    """Make a repository."""
    return initialise(store, key=key, now=NOW)


def disks_of(repository: Repository, *, guest: str = "db", number: int = 1) -> dict[str, bytes]:
    """Read all disks of a snapshot."""
    found = repository.snapshot(guest, snapshot=SnapshotId(f"{number:010x}")).body
    sizes = {disk.target: disk.size_bytes for disk in found.manifest.disks}
    return {
        disk.target: PackedDisk(repository, root=bytes.fromhex(disk.root), size_bytes=sizes[disk.target]).read(
            0, sizes[disk.target]
        )
        for disk in found.disks
    }
