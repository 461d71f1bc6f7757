from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from vmsnap.errors import VerificationError
from vmsnap.exports.cache import BLOCK_BYTES, BlockCache
from vmsnap.exports.disk import UNIT_BYTES, LazyDisk
from vmsnap.exports.fetching import CachedDisk, Fetcher, StoppedError, Urgency
from vmsnap.exports.hydrating import Hydrator
from vmsnap.testing.memory_blocks import MemoryBlocks
from vmsnap.testing.threads import no_thread_left


def image(blocks: int, *, share: float = 0.7, seed: int = 1) -> bytes:
    chance = random.Random(seed)
    parts = [chance.randbytes(BLOCK_BYTES) if chance.random() < share else bytes(BLOCK_BYTES) for _ in range(blocks)]
    return b"".join(parts) + b"the short end"


@contextmanager
def lazily(
    source: MemoryBlocks, folder: Path, *, most: int | None = None
) -> Iterator[tuple[LazyDisk, Fetcher, CachedDisk]]:
    cache = BlockCache(
        folder / "vda.raw", size_bytes=source.size_bytes, identity=source.identity, floor=0, most_bytes=most
    )
    fetcher = Fetcher(now=lambda: datetime.now(UTC), workers=4)
    cached = CachedDisk(target="vda", source=source, cache=cache)
    with no_thread_left():
        fetcher.start()
        yield LazyDisk(cached, fetcher=fetcher), fetcher, cached
        fetcher.stop()
    cache.close()


@pytest.mark.parametrize("most", [None, 0, 20 * BLOCK_BYTES])
def test_reads_anywhere_are_right_with_a_cache_of_any_size(tmp_path: Path, most: int | None) -> None:
    source = MemoryBlocks(data=image(100))
    chance = random.Random(2)
    with lazily(source, tmp_path, most=most) as (disk, _, _):

        def read(_: int) -> bool:
            offset = chance.randrange(source.size_bytes - 1)
            length = min(chance.choice([1, 512, 4096, 300_000]), source.size_bytes - offset)
            return disk.read(offset, length) == source.data[offset : offset + length]

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read, range(300)))
    if most is None:
        assert len(source.reads) <= 100


def test_a_unit_is_fetched_once_however_many_want_it(tmp_path: Path) -> None:
    source = MemoryBlocks(data=image(8, share=1.0), latency_seconds=0.05)
    with lazily(source, tmp_path) as (disk, _, _), ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: disk.read(n * 512, 512), range(8)))
    assert b"".join(found) == source.data[:4096]
    assert source.reads == [(0, 4)]


def test_who_reads_in_a_row_is_read_ahead_for_and_who_does_not_is_not(tmp_path: Path) -> None:
    source = MemoryBlocks(data=image(200, share=1.0))
    with lazily(source, tmp_path) as (disk, fetcher, cached):
        for unit in (30, 10, 20):
            disk.read(unit * UNIT_BYTES, 4096)
        assert len(source.reads) == 3
        for offset in range(0, 4 * UNIT_BYTES, 4096):
            disk.read(offset, 4096)
        while fetcher.queued():
            time.sleep(0.01)
        ahead = [unit for unit in range(4, 10) if cached.cache.has(unit * 4)]
        assert ahead == [4, 5, 6, 7], "4 read, 4 ahead"


def test_a_guest_waits_while_the_replica_is_away_and_sees_no_error(tmp_path: Path) -> None:
    source = MemoryBlocks(data=image(8, share=1.0))
    with lazily(source, tmp_path) as (disk, fetcher, _), ThreadPoolExecutor(1) as pool:
        for away in (source.unreachable, source.forbidden):
            away.set()
            # Backwards: what is read ahead would wait too, and on its own.
            waiting = pool.submit(disk.read, UNIT_BYTES if away is source.unreachable else 0, 512)
            while fetcher.tally.waiting is None:
                time.sleep(0.01)
            assert not waiting.done()
            assert fetcher.tally.waiting_since is not None
            away.clear()
            assert len(waiting.result(timeout=10)) == 512
            assert fetcher.tally.waiting is None


def test_a_damaged_block_fails_alone_is_told_and_heals(tmp_path: Path) -> None:
    source = MemoryBlocks(data=image(8, share=1.0), damaged={2})
    with lazily(source, tmp_path) as (disk, fetcher, cached):
        with pytest.raises(VerificationError):
            disk.read(2 * BLOCK_BYTES, 512)
        assert disk.read(BLOCK_BYTES, BLOCK_BYTES) == source.data[BLOCK_BYTES : 2 * BLOCK_BYTES]
        assert not cached.cache.has(2)
        assert list(fetcher.tally.damage) == [("vda", 2)]
        source.damaged.clear()
        assert disk.read(2 * BLOCK_BYTES, 512) == source.data[2 * BLOCK_BYTES : 2 * BLOCK_BYTES + 512]
        assert not fetcher.tally.damage


def test_whoever_waits_when_the_export_ends_is_told_so(tmp_path: Path) -> None:
    source = MemoryBlocks(data=image(8, share=1.0))
    source.unreachable.set()
    with lazily(source, tmp_path) as (disk, fetcher, _), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(disk.read, 0, 512)
        while fetcher.tally.waiting is None:
            time.sleep(0.01)
        fetcher.stop()
        with pytest.raises(StoppedError):
            waiting.result(timeout=5)
        with pytest.raises(StoppedError):
            disk.read(0, 512)


def test_holes_are_told_and_cost_nothing(tmp_path: Path) -> None:
    source = MemoryBlocks(data=bytes(3 * BLOCK_BYTES) + b"x" * 10)
    with lazily(source, tmp_path) as (disk, _, cached):
        assert [(run.length, run.hole) for run in disk.runs(1000, 1 << 30)] == [
            (3 * BLOCK_BYTES - 1000, True),
            (10, False),
        ]
        assert disk.read(0, BLOCK_BYTES) == bytes(BLOCK_BYTES)
        assert cached.cache.kept_bytes <= BLOCK_BYTES


def test_hydrating_brings_everything_and_leaves_guests_the_way(tmp_path: Path) -> None:
    gate = threading.Event()

    class Gated(MemoryBlocks):
        def read(self, first: int, count: int) -> bytes:
            if first != 388:
                gate.wait(10)
                gate.set()  # a guest that is not let through has waited long enough
            return super().read(first, count)

    source = Gated(data=image(400, share=1.0))
    with lazily(source, tmp_path) as (disk, fetcher, cached):
        hydrator = Hydrator([(cached, disk)], fetcher=fetcher)
        hydrator.start()
        hydrator.hurry()
        while fetcher.queued() < 16:  # all that it wants at a time
            time.sleep(0.01)
        assert disk.read(390 * BLOCK_BYTES, 512) == source.data[390 * BLOCK_BYTES : 390 * BLOCK_BYTES + 512]
        assert source.reads == [(388, 4)], "what hydrates is not before a guest"
        gate.set()
        assert hydrator.hydrated.wait(20)
        assert hydrator.data_bytes == 401 * BLOCK_BYTES
        assert cached.cache.whole
        fetcher.stop()
        hydrator.stop()
    assert (tmp_path / "vda.raw").read_bytes() == source.data


def test_it_is_not_hydrated_while_a_block_is_damaged(tmp_path: Path) -> None:
    source = MemoryBlocks(data=image(12, share=1.0), damaged={1})
    with lazily(source, tmp_path) as (disk, fetcher, cached):
        hydrator = Hydrator([(cached, disk)], fetcher=fetcher)
        hydrator.hurry()
        hydrator.start()
        while cached.cache.next_missing(2) is not None:
            time.sleep(0.01)
        assert not hydrator.hydrated.wait(0.1)
        hydrator.stop()


def test_what_is_urgent_moves_up(tmp_path: Path) -> None:
    gate = threading.Event()

    class Gated(MemoryBlocks):
        def read(self, first: int, count: int) -> bytes:
            gate.wait(5)
            return super().read(first, count)

    source = Gated(data=image(80, share=1.0))
    with lazily(source, tmp_path) as (_, fetcher, cached):
        for unit in range(20):
            fetcher.want(cached, unit=unit, urgency=Urgency.HYDRATE)
        urgent = fetcher.want(cached, unit=19, urgency=Urgency.GUEST)
        gate.set()
        urgent.result(timeout=5)
        while fetcher.queued():
            time.sleep(0.01)
    assert (76, 4) in source.reads[:4]
