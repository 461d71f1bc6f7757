from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmsnap.errors import DriverError
from vmsnap.exports.cache import BLOCK_BYTES, BlockCache

SIZE = 40 * BLOCK_BYTES + 100
IDENTITY = b"i" * 32


def block(number: int, *, salt: int = 0) -> bytes:
    length = 100 if number == 40 else BLOCK_BYTES
    return bytes([number + 1 + salt]) * length


def opened(folder: Path, *, identity: bytes = IDENTITY, floor: int = 0, most: int | None = None) -> BlockCache:
    return BlockCache(folder / "vda.raw", size_bytes=SIZE, identity=identity, floor=floor, most_bytes=most)


def test_what_was_put_is_there_and_nothing_else(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    assert list(cache.missing(0, 41)) == [(0, 41)]
    assert cache.put(3, block(3) + block(4))
    cache.put_holes(10, 2)
    assert list(cache.missing(0, 41)) == [(0, 3), (5, 5), (12, 29)]
    assert cache.read(3 * BLOCK_BYTES + 5, BLOCK_BYTES) == (block(3) + block(4))[5 : 5 + BLOCK_BYTES]
    assert cache.read(10 * BLOCK_BYTES, 8) == bytes(8)
    assert cache.next_missing(3) == 5
    cache.close()


def test_what_was_flushed_survives_and_the_rest_is_fetched_again(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    cache.put(0, block(0))
    assert cache.flush()
    cache.put(1, block(1))
    cache.close()
    again = opened(tmp_path)
    assert again.has(0)
    assert not again.has(1)
    assert again.read(0, BLOCK_BYTES) == block(0)
    again.close()


def test_whole_is_when_the_short_last_block_is_there_too(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    for number in range(40):
        cache.put(number, block(number))
    assert not cache.whole
    cache.put(40, block(40))
    assert cache.whole
    assert (tmp_path / "vda.raw").stat().st_size == SIZE
    cache.close()


@pytest.mark.parametrize("change", ["flip", "cut", "empty", "other disk", "no data"])
def test_a_record_that_does_not_fit_is_not_believed(tmp_path: Path, change: str) -> None:
    cache = opened(tmp_path)
    cache.put(0, block(0))
    cache.flush()
    cache.close()
    record, identity = tmp_path / "vda.have", IDENTITY
    data = record.read_bytes()
    if change == "flip":
        record.write_bytes(data[:-1] + b"\x01")
    elif change == "cut":
        record.write_bytes(data[:-1])
    elif change == "empty":
        record.write_bytes(b"")
    elif change == "other disk":
        identity = b"o" * 32
    else:
        (tmp_path / "vda.raw").unlink()
    again = opened(tmp_path, identity=identity)
    assert list(again.missing(0, 41)) == [(0, 41)]
    assert not record.exists()
    again.close()


def test_a_full_disk_makes_it_keep_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = opened(tmp_path)
    cache.put(0, block(0))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        assert not cache.put(1, block(1))
    assert not cache.keeping
    assert not cache.put(2, block(2)), "it rests for a while"
    assert list(cache.missing(0, 3)) == [(1, 2)]
    cache.close()


def test_it_leaves_room_to_guests_and_keeps_to_its_bound(tmp_path: Path) -> None:
    cache = opened(tmp_path, floor=1 << 60)
    assert not cache.put(0, block(0))
    cache.close()
    bounded = opened(tmp_path, most=2 * BLOCK_BYTES)
    assert [bounded.put(number, block(number)) for number in range(4)] == [True, True, False, False]
    bounded.close()


def test_what_could_not_be_synced_counts_as_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = opened(tmp_path)
    cache.put(0, block(0))
    cache.flush()
    cache.put(1, block(1))

    def broken(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", broken)
        assert not cache.flush()
    assert cache.has(0)
    assert not cache.has(1)
    cache.close()


def test_what_cannot_be_read_counts_as_missing(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    cache.put(5, block(5))
    os.truncate(tmp_path / "vda.raw", BLOCK_BYTES)
    assert cache.read(5 * BLOCK_BYTES, 100) is None
    assert not cache.has(5)
    cache.close()


def test_a_place_that_cannot_be_used_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DriverError, match="cannot be opened"):
        opened(tmp_path / "nowhere", floor=0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 40), st.sampled_from(["flush", "die", "power"])), max_size=30))
def test_whatever_dies_a_block_that_counts_has_its_data(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int | str]
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    synced = folder / "synced.raw"
    cache = opened(folder)
    shutil.copyfile(folder / "vda.raw", synced)
    for step in steps:
        if isinstance(step, int):
            cache.put(step, block(step))
        elif step == "flush":
            cache.flush()
            shutil.copyfile(folder / "vda.raw", synced)
        else:
            cache.close()
            if step == "power":  # what was not synced is lost
                shutil.copyfile(synced, folder / "vda.raw")
            cache = opened(folder)
        for number in range(41):
            if cache.has(number):
                expected = block(number)
                assert cache.read(number * BLOCK_BYTES, len(expected)) == expected
    cache.close()
    shutil.rmtree(folder)
