"""Extents from what ``qemu-img map`` prints."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmsnap.disks.export import parse_map
from vmsnap.errors import ToolError
from vmsnap.ports.disks import Extent

# qemu-img 7.2 on an overlay of 192 KiB: data in the base, data in the overlay, a hole.
TRANSCRIPT = """\
[{ "start": 0, "length": 65536, "depth": 1, "present": true, "zero": false, "data": true, "offset": 327680},
{ "start": 65536, "length": 65536, "depth": 0, "present": true, "zero": false, "data": true, "offset": 393216},
{ "start": 131072, "length": 65536, "depth": 1, "present": false, "zero": true, "data": false}]
"""


def extents(text: str, *, size_bytes: int) -> list[tuple[int, int, bool]]:
    return [(one.offset, one.length, one.data) for one in parse_map(text.splitlines(), size_bytes=size_bytes)]


def test_neighbours_of_one_sort_are_joined() -> None:
    assert extents(TRANSCRIPT, size_bytes=196608) == [(0, 131072, True), (131072, 65536, False)]


def test_written_zeroes_need_not_be_read() -> None:
    line = '[{ "start": 0, "length": 512, "depth": 0, "present": true, "zero": true, "data": true, "offset": 0}]'
    assert extents(line, size_bytes=512) == [(0, 512, False)]


def test_what_is_left_out_counts_as_data() -> None:
    assert extents("", size_bytes=100) == [(0, 100, True)]
    line = '[{ "start": 512, "length": 512, "zero": true}]'
    assert extents(line, size_bytes=2048) == [(0, 512, True), (512, 512, False), (1024, 1024, True)]


def test_what_lies_beyond_the_end_is_cut_off() -> None:
    assert extents(TRANSCRIPT, size_bytes=140000) == [(0, 131072, True), (131072, 8928, False)]
    assert extents(TRANSCRIPT, size_bytes=65536) == [(0, 65536, True)]


@pytest.mark.parametrize(
    "text",
    [
        "qemu-img: rubbish",
        '[{"start": "x", "length": 1, "zero": true}]',
        '[{"length": 1, "zero": true}]',
        "[[1]]",
        '[{"start": 0, "length": 512, "zero": true},\n{"start": 100, "length": 512, "zero": true}]',
        '[{"start": 0, "length": -512, "zero": true}]',
    ],
)
def test_rubbish_is_an_error(text: str) -> None:
    with pytest.raises(ToolError):
        extents(text, size_bytes=4096)


@given(
    entries=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4), st.booleans()), max_size=20),
    size_bytes=st.integers(1, 100),
)
def test_any_listing_covers_the_disk_without_gaps_or_overlaps(
    entries: list[tuple[int, int, bool]], size_bytes: int
) -> None:
    lines, position = [], 0
    zeroes: set[int] = set()
    for gap, length, zero in entries:
        position += gap
        lines.append(json.dumps({"start": position, "length": length, "zero": zero}))
        if zero:
            zeroes.update(range(position, position + length))
        position += length
    found: list[Extent] = list(parse_map(lines, size_bytes=size_bytes))
    covered = [byte for one in found for byte in range(one.offset, one.offset + one.length)]
    assert covered == list(range(size_bytes))
    holes = {byte for one in found if not one.data for byte in range(one.offset, one.offset + one.length)}
    assert holes == {byte for byte in zeroes if byte < size_bytes}
    assert all(before.data != after.data for before, after in pairwise(found))
