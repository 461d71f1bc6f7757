"""Cutting disks into blocks, and working on them in threads."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmsnap.errors import CancelledError, DriverError
from vmsnap.ports.disks import Extent
from vmsnap.stores.blocks import BLOCK_BYTES, HOLE, Scope, Stretch, digest_of, for_each, read_into, stretches
from vmsnap.testing.cancels import CancelledAtOnce, NeverCancelled
from vmsnap.testing.store_contract import (
    no_progress,
)


@st.composite
def disks(draw: st.DrawFn) -> tuple[int, list[Extent]]:
    lengths = draw(st.lists(st.tuples(st.integers(1, 3 * BLOCK_BYTES), st.booleans()), min_size=1, max_size=12))
    extents, position = [], 0
    for length, data in lengths:
        extents.append(Extent(offset=position, length=length, data=data))
        position += length
    return position, extents


@given(disks())
def test_stretches_cover_every_block_once_and_know_where_data_is(disk: tuple[int, list[Extent]]) -> None:
    size_bytes, extents = disk
    marked: dict[int, bool] = {}
    for stretch in stretches(extents, size_bytes=size_bytes):
        for block in range(stretch.first, stretch.first + stretch.count):
            assert block not in marked
            marked[block] = stretch.data
    assert sorted(marked) == list(range(-(-size_bytes // BLOCK_BYTES)))
    for block, data in marked.items():
        start, end = block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES
        touched = any(one.data and one.offset < end and one.offset + one.length > start for one in extents)
        assert data == touched


def test_a_large_hole_is_a_few_stretches() -> None:
    tebibyte = 1 << 40
    found = list(stretches([Extent(offset=0, length=tebibyte, data=False)], size_bytes=tebibyte))
    assert len(found) == 1024
    assert sum(stretch.count for stretch in found) * BLOCK_BYTES == tebibyte


@pytest.mark.parametrize("size_bytes", [1, 4096, BLOCK_BYTES])
def test_zeroes_have_the_digest_of_a_hole_and_nothing_else_does(size_bytes: int) -> None:
    assert digest_of(memoryview(bytes(size_bytes))) == HOLE
    data = bytes(size_bytes - 1) + b"x"
    assert digest_of(memoryview(data)) == hashlib.sha256(data).digest()


def test_an_error_in_one_thread_ends_the_others_and_is_raised() -> None:
    done: list[int] = []

    def task(stretch: Stretch, _buffer: memoryview) -> None:
        if stretch.first == 64:
            raise OSError(5, "Input/output error")
        done.append(stretch.first)

    scope = Scope(size_bytes=1 << 40, progress=no_progress, cancel=NeverCancelled())
    endless = (Stretch(first=64 * number, count=64, data=True) for number in range(1 << 18))
    with pytest.raises(OSError, match="Input/output error"):
        for_each(endless, scope=scope, task=task)
    assert len(done) < 1000


def test_cancelling_is_raised() -> None:
    scope = Scope(size_bytes=BLOCK_BYTES, progress=no_progress, cancel=CancelledAtOnce())
    with pytest.raises(CancelledError):
        for_each([Stretch(first=0, count=1, data=True)], scope=scope, task=lambda _stretch, _buffer: None)


def test_a_file_that_ends_early_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"abc")
    with path.open("rb") as file:
        buffer = memoryview(bytearray(2))
        read_into(file.fileno(), buffer=buffer, offset=1)
        assert bytes(buffer) == b"bc"
        with pytest.raises(DriverError, match="ended at byte 3"):
            read_into(file.fileno(), buffer=buffer, offset=2)
