"""How long it takes to store a disk of which little changed, with a hint and without.

The disk goes the way of a backup: an image, changed here and there after the first snapshot, a clone's overlay over it, served
by the storage daemon, stored on reflinks. The hint is what a bitmap of the same writes says. Reading it from the guest's QEMU
takes a tenth of a second a disk, right after the capture, and is not measured here.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from integration.lab.commands import run
from vmsnap.disks.export import QemuExport
from vmsnap.model.capture import DiskImage
from vmsnap.model.hints import BlockSet, DiskHint
from vmsnap.model.ids import new_run_id
from vmsnap.model.manifest import Snapshot
from vmsnap.stores.images import ImagesStore
from vmsnap.testing.cancels import NeverCancelled
from vmsnap.testing.store_contract import NOON, SECOND, no_progress, sample_clean, sample_manifest

PAGE_BYTES = 8192
GUEST = "bench"
_CLONE_BLOCKS = 64


@dataclass(frozen=True, kw_only=True)
class HintedTimes:
    """Seconds for the first snapshot, and for two of the same changed disk: without a hint and with it."""

    first_s: float
    without_hint_s: float
    with_hint_s: float
    read_bytes: int
    size_bytes: int

    @property
    def hinted_time_vs_full(self) -> float:
        """What share of a full backup's time, the first one's, it takes to store by a hint."""
        return self.with_hint_s / self.first_s

    @property
    def hinted_time_vs_unhinted(self) -> float:
        """What share of the time it takes to read everything, and store the same changes, it takes to store by a hint."""
        return self.with_hint_s / self.without_hint_s


def measure_hinted(image: Path, *, folder: Path, share: float = 0.01, seed: int = 1) -> HintedTimes:
    """Measure on a copy of a raw image, in a folder on a file system with reflinks; what is made there is removed.

    ``share`` of the pages of 8 KiB that hold data are written anew, at random. The folder has to be inside the lab, or
    wherever FUSE can be used, with room for twice the image.
    """
    chance = random.Random(seed)
    source, store_folder, runtime = folder / "source.raw", folder / "store", folder / "run"
    store_folder.mkdir()
    try:
        run(["cp", "--reflink=auto", "--sparse=always", image, source], timeout_s=600)
        store = ImagesStore(store_folder)
        bench = _Bench(store=store, source=source, folder=folder, runtime=runtime)
        first, first_s = bench.store_one(None, number=0)
        written = _change_pages(source, share=share, chance=chance)
        unhinted, without_hint_s = bench.store_one(None, number=1)
        content = bench.checksum(unhinted)
        store.remove(unhinted)
        hint = DiskHint(target="vda", since=first.id, written=BlockSet.of(written, size_bytes=source.stat().st_size))
        hinted, with_hint_s = bench.store_one(hint, number=2)
        read = hinted.manifest.disks[0].read
        assert read is not None
        assert read.since == first.id, read
        assert bench.checksum(hinted) == content
        return HintedTimes(
            first_s=first_s,
            without_hint_s=without_hint_s,
            with_hint_s=with_hint_s,
            read_bytes=read.read_bytes,
            size_bytes=source.stat().st_size,
        )
    finally:
        run(["rm", "-rf", store_folder, source, runtime])


@dataclass(frozen=True, kw_only=True)
class _Bench:
    store: ImagesStore
    source: Path
    folder: Path
    runtime: Path

    def store_one(self, hint: DiskHint | None, *, number: int) -> tuple[Snapshot, float]:
        """Store the disk as a backup does, and return how long reading and storing took."""
        identity = new_run_id()
        overlay = self.folder / f"clone-{number}.qcow2"
        run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", self.source, "-F", "raw", overlay])
        try:
            run(["qemu-io", "-f", "qcow2", "-c", f"write -P 7 1M {_CLONE_BLOCKS * 64}k", overlay])
            self._forget()
            export = QemuExport(runtime_dir=self.runtime)
            size_bytes = self.source.stat().st_size
            image = DiskImage(target="vda", path=str(overlay), image_format="qcow2", size_bytes=size_bytes)
            (view,) = export.open(identity, images=(image,))
            try:
                began = time.monotonic()
                staging = self.store.stage(identity, guest=GUEST)
                record = self.store.write_disk(
                    staging, view=view, progress=no_progress, cancel=NeverCancelled(), hint=hint
                )
                manifest = sample_manifest(identity, guest=GUEST, disks=(record,), captured=NOON + SECOND * number)
                snapshot = self.store.publish(staging, manifest=manifest, clean=sample_clean(identity))
                return snapshot, time.monotonic() - began
            finally:
                export.release(export.resource(identity, guest=GUEST), deadline=timedelta(seconds=30))
        finally:
            overlay.unlink()

    def checksum(self, snapshot: Snapshot) -> str:
        """Return what a stored disk's digests come to."""
        return snapshot.manifest.disks[0].digests_sha256

    def _forget(self) -> None:
        """Put everything on the disk and out of the page cache, so that each store reads it from there."""
        images = [Path(image.path) for one in self.store.snapshots(GUEST) for image in self.store.images(one)]
        for path in (self.source, *images):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def _change_pages(path: Path, *, share: float, chance: random.Random) -> list[tuple[int, int]]:
    """Write pages anew that hold data, and return which (offset, length)."""
    pages = [
        page
        for offset, length in _data(path)
        for page in range(-(-offset // PAGE_BYTES), (offset + length) // PAGE_BYTES)
    ]
    chosen = sorted(chance.sample(pages, max(1, round(len(pages) * share))))
    with path.open("r+b") as file:
        for page in chosen:
            file.seek(page * PAGE_BYTES)
            file.write(chance.randbytes(PAGE_BYTES))
    return [(page * PAGE_BYTES, PAGE_BYTES) for page in chosen]


def _data(path: Path) -> Iterator[tuple[int, int]]:
    for entry in json.loads(run(["qemu-img", "map", "--output=json", "-f", "raw", path])):
        if entry["data"]:
            yield entry["start"], entry["length"]
