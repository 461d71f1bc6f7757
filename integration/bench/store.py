"""The replica against restic and BorgBackup, on one image of PostgreSQL's files: `make bench NAME=store SIZE=8192` (in MiB).

All three write to a directory on the same file system, encrypt and compress; the image is in the page cache for all. vmsnap's
time for a full backup is that of sending a stored snapshot: each block is read, compared with its digest, compressed, sealed and
written with an fsync a pack. `store_s` says what storing it locally took before. What is restored is on the disk, for both, when
the clock stops. The lazy figures are of a guest of the lab whose snapshot is in an S3 server (SeaweedFS).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import zstandard
from rich.console import Console

from integration.bench.hinted import measure_hinted
from integration.bench.store_image import PAGE_BYTES, change_pages, make_image, reflinks
from integration.bench.store_peers import BORG, RESTIC, Repository, folder_bytes
from integration.installation import Installation
from integration.lab.commands import run
from integration.lab.domain import GuestSpec
from integration.lab.guest import LabGuest
from integration.lab.lab import Lab
from integration.lazy_runs import first_sql_from_replica
from integration.s3_server import S3Server
from vmsnap.model.ids import new_run_id
from vmsnap.model.manifest import Snapshot
from vmsnap.ports.replica import LocalCopy
from vmsnap.ports.store import DiskContent
from vmsnap.state.clock import SystemClock
from vmsnap.stores.images import ImagesStore
from vmsnap.stores.objects.directory import DirectoryObjects
from vmsnap.stores.packs.replica import PacksReplica
from vmsnap.testing.cancels import NeverCancelled
from vmsnap.testing.fake_disks import FakeDiskView
from vmsnap.testing.store_contract import NOON, no_progress, sample_clean, sample_manifest

_SHARE = 0.01
_CHUNK_BYTES = 4 * 1024 * 1024
_ROOM = 5


def measure(lab: Lab, console: Console) -> dict[str, object]:
    """Measure all on one image, on a file system of its own that is removed afterwards."""
    size_mib = int(os.environ.get("SIZE") or 8192)
    folder = lab.scratch / "bench-store"
    folder.mkdir()
    try:
        with reflinks(folder, size_mib=size_mib * _ROOM + 1024) as place:
            image = place / "image.raw"
            console.print(f"making an image of {size_mib} MiB ...")
            make_image(image, size_mib=size_mib, folder=folder)
            figures = _Bench(place=place, image=image, console=console).run()
        figures["peak_rss_bytes"] = _peak_rss_bytes(folder)
        return figures | _lazy(lab, folder=folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _lazy(lab: Lab, *, folder: Path) -> dict[str, object]:
    """Measure an environment straight from S3: until it runs, and until its database answers."""
    store = lab.reflink / "bench-lazy"
    store.mkdir()
    vmsnap = Installation(lab, name="bench-lazy", store=store)
    try:
        with S3Server(folder / "s3") as server, LabGuest(lab, GuestSpec(name="bench-lazy")) as guest:
            credential = vmsnap.folder / "replica.toml"
            credential.touch(mode=0o600)
            keys = server.keys()
            credential.write_text(f'access_key = "{keys.access_key}"\nsecret_key = "{keys.secret_key}"\n')
            vmsnap.write_config(
                extra=f'[replica]\nkind = "s3"\nbucket = "{server.bucket()}"\nendpoint = "{server.endpoint}"\n'
                f'credential = "{credential}"\n'
            )
            vmsnap.policy(guest.name)
            made = vmsnap.ok("backup", guest.name)
            vmsnap.ok("replicate", made["snapshot"])
            numbers = first_sql_from_replica(vmsnap, guest, made["snapshot"])
            vmsnap.ok("env", "destroy", numbers.environment)
            return {
                "lazy_running_s": numbers.lazy_running_s,
                "lazy_read_share_at_first_sql": numbers.lazy_read_share_at_first_sql,
                "lazy_first_sql_s": numbers.first_sql_s,
                "lazy_accelerator": lab.accelerator,
            }
    finally:
        shutil.rmtree(store)
        shutil.rmtree(vmsnap.folder)


@dataclass(frozen=True, kw_only=True)
class _Bench:
    place: Path
    image: Path
    console: Console

    def run(self) -> dict[str, object]:
        figures: dict[str, object] = {"image_bytes": self.image.stat().st_size}
        hinted = measure_hinted(self.image, folder=self._folder("hinted"))
        self.console.print(f"hinted: {hinted}")
        sender = _Sender(self.place)
        restic = Repository(RESTIC, folder=self._folder("restic"))
        borg = Repository(BORG, folder=self._folder("borg"))
        stored, store_s = sender.store(self.image, number=1)
        full_s = sender.send(stored)
        packs_bytes = sender.bytes
        self.console.print(f"stored in {store_s:.1f} s, sent in {full_s:.1f} s: {packs_bytes:,} bytes")
        _warm(self.image)
        restic_s = restic.backup(self.image)
        restic_bytes = restic.bytes
        self.console.print(f"restic: {restic_s:.1f} s, {restic_bytes:,} bytes")
        _warm(self.image)
        borg_s = borg.backup(self.image)
        self.console.print(f"borg: {borg_s:.1f} s, {borg.bytes:,} bytes")
        shutil.rmtree(self.place / "borg")
        figures |= {
            "full_speed_vs_restic": restic_s / full_s,
            "full_speed_vs_borg": borg_s / full_s,
            "size_vs_restic": packs_bytes / restic_bytes,
        }
        changed = change_pages(self.image, share=_SHARE)
        second, _ = sender.store(self.image, number=2)
        second_s = sender.send(second)
        second_bytes = sender.bytes - packs_bytes
        restic_second_s = restic.backup(self.image)
        restic_second_bytes = restic.bytes - restic_bytes
        chunks = self._chunk_bytes(changed)
        self.console.print(f"second: {second_bytes:,} bytes, restic {restic_second_bytes:,}, 4 MiB chunks {chunks:,}")
        verify_bytes_per_s = sender.verify(second)
        restore_s = sender.restore(second, self.image)
        restic_restore_s = restic.restore(self.place / "restored")
        run(["cmp", self.image, self.place / "restored" / self.image.relative_to("/")], timeout_s=600)
        self.console.print(f"restore: {restore_s:.1f} s, restic {restic_restore_s:.1f} s")
        return figures | {
            "second_upload_vs_4mib_chunks": second_bytes / chunks,
            "second_upload_vs_restic": second_bytes / restic_second_bytes,
            "hinted_time_vs_full": hinted.hinted_time_vs_full,
            "restore_speed_vs_restic": restic_restore_s / restore_s,
            "verify_bytes_per_s": verify_bytes_per_s,
            "target": "a directory on the same file system for all",
            "store_s": store_s,
            "full_s": full_s,
            "restic_full_s": restic_s,
            "borg_full_s": borg_s,
            "packs_bytes": packs_bytes,
            "restic_bytes": restic_bytes,
            "second_s": second_s,
            "restic_second_s": restic_second_s,
            "second_bytes": second_bytes,
            "restic_second_bytes": restic_second_bytes,
            "chunks_second_bytes": chunks,
            "restore_s": restore_s,
            "restic_restore_s": restic_restore_s,
        }

    def _folder(self, name: str) -> Path:
        made = self.place / name
        made.mkdir()
        return made

    def _chunk_bytes(self, pages: list[int]) -> int:
        """What a store of compressed chunks of 4 MiB would have to upload for these pages."""
        compressor = zstandard.ZstdCompressor(level=3)
        total = 0
        with self.image.open("rb") as file:
            for chunk in sorted({page * PAGE_BYTES // _CHUNK_BYTES for page in pages}):
                file.seek(chunk * _CHUNK_BYTES)
                total += len(compressor.compress(file.read(_CHUNK_BYTES)))
        return total


def _warm(path: Path) -> None:
    """Read a file, so that it is in the page cache as far as it fits."""
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 22):
            pass


class _Sender:
    """vmsnap: a local store and a replica."""

    def __init__(self, place: Path) -> None:
        (place / "store").mkdir()
        self._objects = place / "packs"
        self._objects.mkdir()
        self._target = place / "fetched"
        self._target.mkdir()
        self.images = ImagesStore(place / "store")
        self._replica = PacksReplica(
            lambda: DirectoryObjects(self._objects),
            key=lambda: bytes(range(32)),
            state=place / "state",
            connections=16,
            clock=SystemClock(),
        )

    @property
    def bytes(self) -> int:
        return folder_bytes(self._objects)

    def store(self, image: Path, *, number: int) -> tuple[Snapshot, float]:
        """Store an image as the guest's newest snapshot."""
        identity = new_run_id()
        began = time.monotonic()
        staging = self.images.stage(identity, guest="bench")
        record = self.images.write_disk(
            staging, view=FakeDiskView(image), progress=no_progress, cancel=NeverCancelled(), hint=None
        )
        captured = NOON + timedelta(hours=number)
        manifest = sample_manifest(identity, guest="bench", disks=(record,), captured=captured)
        snapshot = self.images.publish(staging, manifest=manifest, clean=sample_clean(identity))
        return snapshot, time.monotonic() - began

    def send(self, snapshot: Snapshot) -> float:
        """Send a snapshot to the replica."""
        copy = LocalCopy(snapshot=snapshot, disks=self.images.contents(snapshot))
        for disk in copy.disks:
            _warm(disk.image)
        began = time.monotonic()
        self._replica.send(copy, retain_until=None, progress=no_progress, cancel=NeverCancelled())
        return time.monotonic() - began

    def verify(self, snapshot: Snapshot) -> float:
        """Read a local snapshot again; return the bytes of data that were read a second, holes left out."""
        began = time.monotonic()
        _, defects = self.images.verify(snapshot, progress=no_progress, cancel=NeverCancelled())
        assert not defects
        return snapshot.manifest.disks[0].data_bytes / (time.monotonic() - began)

    def restore(self, snapshot: Snapshot, image: Path) -> float:
        """Bring a snapshot back from the replica into files, compare it, and return how long bringing it back took."""
        (record,) = snapshot.manifest.disks
        content = DiskContent(record=record, image=self._target / "image", digests=self._target / "digests")
        began = time.monotonic()
        for path, size in ((content.image, record.size_bytes), (content.digests, record.size_bytes // 65536 * 32)):
            with path.open("wb") as file:
                file.truncate(size)
        self._replica.fetch_disk(snapshot, content=content, progress=no_progress, cancel=NeverCancelled())
        took = time.monotonic() - began
        run(["cmp", content.image, image], timeout_s=600)
        return took


def _peak_rss_bytes(folder: Path) -> int:
    """Return the most memory that a process has had that stores, sends, verifies and restores a sparse disk of 2 TiB."""
    with reflinks(folder, size_mib=8192) as place:
        line = [sys.executable, "-m", "integration.bench.store_memory", str(place)]
        done = subprocess.run(line, check=True, capture_output=True, text=True, timeout=3600)
        return int(done.stdout.split()[-1])
