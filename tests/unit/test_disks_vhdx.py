"""Where the data of VHDX files is, against what QEMU wrote into them and reads out of them."""

from __future__ import annotations

import struct
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmsnap.disks.vhdx import UntoldError, extents
from vmsnap.ports.disks import Extent

MIB = 1 << 20
GIB = 1 << 30


def _make(
    path: Path,
    *,
    size: int,
    block: int = MIB,
    kind: str = "subformat=dynamic",
    writes: tuple[tuple[int, int], ...] = (),
) -> Path:
    create = ["qemu-img", "create", "-q", "-f", "vhdx", "-o", f"{kind},block_size={block}"]
    subprocess.run([*create, str(path), str(size)], check=True, timeout=60)
    if writes:
        commands = [word for start, length in writes for word in ("-c", f"write -P 0x5a {start} {length}")]
        subprocess.run(["qemu-io", "-f", "vhdx", *commands, str(path)], check=True, timeout=60, capture_output=True)
    return path


def _data(found: list[Extent]) -> set[int]:
    """Return the MiB that hold data."""
    return {
        place
        for extent in found
        if extent.data
        for place in range(extent.offset // MIB, -(-(extent.offset + extent.length) // MIB))
    }


def _covers(found: list[Extent], *, size: int) -> None:
    assert found[0].offset == 0
    assert all(before.offset + before.length == after.offset for before, after in pairwise(found))
    assert all(before.data != after.data for before, after in pairwise(found))
    assert found[-1].offset + found[-1].length == size


@pytest.mark.parametrize("block_mib", [1, 8, 32, 256])
def test_blocks_that_were_written_are_data_also_behind_the_entries_of_bitmaps(tmp_path: Path, block_mib: int) -> None:
    """A bitmap's entry stands after every 4 GiB of blocks with sectors of 512 bytes."""
    size = 13 * GIB + 5 * MIB
    places = (0, 3, 4 * 1024 - 1, 4 * 1024, 4 * 1024 + 1, 8 * 1024 - 1, 8 * 1024, 9000, 13 * 1024 + 4)
    writes = tuple((place * MIB + 4096, 512) for place in places)
    path = _make(tmp_path / "disk.vhdx", size=size, block=block_mib * MIB, writes=writes)
    found = list(extents(path, size_bytes=size))
    _covers(found, size=size)
    blocks = {place // block_mib for place in places}
    expected = {place for place in range(-(-size // MIB)) if place // block_mib in blocks}
    assert _data(found) == expected


def test_an_empty_disk_is_one_hole_and_a_fixed_one_is_data(tmp_path: Path) -> None:
    empty = _make(tmp_path / "empty.vhdx", size=3 * GIB)
    assert list(extents(empty, size_bytes=3 * GIB)) == [Extent(offset=0, length=3 * GIB, data=False)]
    fixed = _make(tmp_path / "fixed.vhdx", size=8 * MIB, kind="subformat=fixed,block_state_zero=off")
    assert list(extents(fixed, size_bytes=8 * MIB)) == [Extent(offset=0, length=8 * MIB, data=True)]


def test_what_is_called_a_hole_reads_as_zeroes_by_qemu(tmp_path: Path) -> None:
    size = 64 * MIB
    path = _make(tmp_path / "disk.vhdx", size=size, writes=((5 * MIB, 3 * MIB), (40 * MIB + 512, 512)))
    raw = tmp_path / "disk.raw"
    subprocess.run(["qemu-img", "convert", "-f", "vhdx", "-O", "raw", str(path), str(raw)], check=True, timeout=60)
    content = raw.read_bytes()
    found = list(extents(path, size_bytes=size))
    assert _data(found) == {5, 6, 7, 40}
    for extent in found:
        part = content[extent.offset : extent.offset + extent.length]
        assert extent.data == any(part)


def test_a_log_that_was_not_replayed_a_parent_and_another_size_are_not_believed(tmp_path: Path) -> None:
    path = _make(tmp_path / "disk.vhdx", size=16 * MIB)
    whole = path.read_bytes()
    for header in (64 << 10, 128 << 10):
        logged = bytearray(whole)
        logged[header + 48 : header + 64] = bytes(range(16))
        path.write_bytes(logged)
        with pytest.raises(UntoldError, match="log"):
            list(extents(path, size_bytes=16 * MIB))
    path.write_bytes(whole)
    with pytest.raises(UntoldError, match="bytes"):
        list(extents(path, size_bytes=17 * MIB))


def test_other_files_tell_nothing(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    for content in (b"", b"vhdxfile", b"x" * MIB, b"vhdxfile" + bytes(MIB)):
        path.write_bytes(content)
        with pytest.raises(UntoldError):
            list(extents(path, size_bytes=MIB))


@given(place=st.integers(0, 3 * MIB), value=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_damage_is_told_or_harmless_and_never_anything_else(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int
) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    origin = folder / "origin.vhdx"
    if not origin.exists():
        _make(origin, size=16 * MIB, writes=((3 * MIB, 512),))
    path = folder / "disk.vhdx"
    content = bytearray(origin.read_bytes())
    content[place : place + 8] = struct.pack("<Q", value)
    path.write_bytes(content)
    try:
        found = list(extents(path, size_bytes=16 * MIB))
    except UntoldError:
        return
    _covers(found, size=16 * MIB)
