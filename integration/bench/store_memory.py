"""One process that stores, sends, verifies and restores a sparse disk of 2 TiB, and prints the most memory that it had."""

from __future__ import annotations

import os
import random
import sys
from datetime import timedelta
from pathlib import Path

from vmsnap.linux.heap import keep_heaps_small
from vmsnap.model.ids import new_run_id
from vmsnap.ports.replica import LocalCopy
from vmsnap.ports.store import DiskContent
from vmsnap.state.clock import SystemClock
from vmsnap.stores.blocks import BLOCK_BYTES, DIGEST_BYTES, block_count
from vmsnap.stores.images import ImagesStore
from vmsnap.stores.objects.directory import DirectoryObjects
from vmsnap.stores.packs.replica import PacksReplica
from vmsnap.testing.cancels import NeverCancelled
from vmsnap.testing.fake_disks import FakeDiskView
from vmsnap.testing.store_contract import NOON, no_progress, sample_clean, sample_manifest

SIZE_BYTES = 2 << 40
_STRETCHES = 1500
_STRETCH_BLOCKS = 8


def main(place: Path) -> None:
    keep_heaps_small()  # as the program does that has a replica
    source = place / "source.raw"
    chance = random.Random(1)
    descriptor = os.open(source, os.O_RDWR | os.O_CREAT)
    os.ftruncate(descriptor, SIZE_BYTES)
    for _ in range(_STRETCHES):
        at = chance.randrange(block_count(SIZE_BYTES) - _STRETCH_BLOCKS) * BLOCK_BYTES
        os.pwrite(descriptor, chance.randbytes(_STRETCH_BLOCKS * BLOCK_BYTES), at)
    os.fsync(descriptor)
    os.close(descriptor)
    (place / "store").mkdir()
    (place / "packs").mkdir()
    store, identity = ImagesStore(place / "store"), new_run_id()
    staging = store.stage(identity, guest="bench")
    view = FakeDiskView(source)
    record = store.write_disk(staging, view=view, progress=no_progress, cancel=NeverCancelled(), hint=None)
    manifest = sample_manifest(identity, guest="bench", disks=(record,), captured=NOON + timedelta(hours=1))
    snapshot = store.publish(staging, manifest=manifest, clean=sample_clean(identity))
    replica = PacksReplica(
        lambda: DirectoryObjects(place / "packs"),
        key=lambda: bytes(range(32)),
        state=place / "state",
        connections=16,
        clock=SystemClock(),
    )
    copy = LocalCopy(snapshot=snapshot, disks=store.contents(snapshot))
    replica.send(copy, retain_until=None, progress=no_progress, cancel=NeverCancelled())
    assert store.verify(snapshot, progress=no_progress, cancel=NeverCancelled())[1] == ()
    found = replica.check("bench", snapshot=snapshot.id, share=None, progress=no_progress, cancel=NeverCancelled())
    assert found.defects == ()
    content = DiskContent(record=record, image=place / "image", digests=place / "digests")
    for path, size in ((content.image, SIZE_BYTES), (content.digests, block_count(SIZE_BYTES) * DIGEST_BYTES)):
        with path.open("wb") as file:
            file.truncate(size)
    replica.fetch_disk(snapshot, content=content, progress=no_progress, cancel=NeverCancelled())
    print(_peak_bytes())


def _peak_bytes() -> int:
    """Return the most memory of this program; getrusage(2) would count the process that started it as well, from before exec."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
