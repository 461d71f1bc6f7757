"""Records of NTFS as bytes. Whole volumes are read in ``integration/test_ntfs.py``, made by the tools of others."""

from __future__ import annotations

import struct
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmsnap.disks.ntfs_records import DamagedError, attributes, entries, fixed_up, references, runs


def marked(body: bytes, *, signature: bytes = b"FILE", mark: bytes = b"\x07\x00") -> bytes:
    """Return a record of two sectors as NTFS writes it: the ends of its sectors put by, and marked."""
    data = bytearray(signature + struct.pack("<HH", 48, 3) + body.ljust(1016, b"\xaa"))
    data[48:54] = mark + data[510:512] + data[1022:1024]
    data[510:512] = data[1022:1024] = mark
    return bytes(data)


def test_marks_are_taken_out_of_a_record() -> None:
    data = fixed_up(marked(bytes(range(256)) * 3), signature=b"FILE")
    assert data[510:512] == bytes([(510 - 8) % 256, (511 - 8) % 256])
    assert data[1022:1024] == b"\xaa\xaa"


@pytest.mark.parametrize("place", [0, 4, 6, 510, 1022])
def test_a_record_that_was_written_in_part_is_damaged(place: int) -> None:
    data = bytearray(marked(b""))
    data[place] ^= 0xFF
    with pytest.raises(DamagedError):
        fixed_up(bytes(data), signature=b"FILE")


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        (b"\x00", []),
        (b"\x11\x04\x10\x00", [(4, 16)]),
        (b"\x21\x18\x34\x56\x00", [(0x18, 0x5634)]),
        (b"\x11\x04\x10\x01\x08\x11\x02\xf8\x00", [(4, 16), (8, None), (2, 8)]),
    ],
)
def test_runs(mapping: bytes, expected: list[tuple[int, int | None]]) -> None:
    assert list(runs(mapping)) == expected


@pytest.mark.parametrize("mapping", [b"\x10", b"\x01\x00", b"\x19\x01", b"\x91\x01" + bytes(9), b"\x88\x01"])
def test_runs_that_make_no_sense_are_damaged(mapping: bytes) -> None:
    with pytest.raises(DamagedError):
        list(runs(mapping))


@given(st.binary(max_size=200), st.integers(0, 120))
def test_nothing_on_a_disk_breaks_the_reader(data: bytes, header: int) -> None:
    for read in (
        lambda: fixed_up(data, signature=b"FILE"),
        lambda: list(attributes(data)),
        lambda: list(runs(data)),
        lambda: list(references(data, kind=0x80, name="")),
        lambda: list(entries(data, header=header)),
    ):
        # What ``ntfs`` takes for damage.
        with suppress(DamagedError, struct.error, IndexError, UnicodeError):
            read()
