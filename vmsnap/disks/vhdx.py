"""Which parts of a VHDX file's disk hold data: QEMU reads such disks, but says of every byte of them that it is data.

Source: [MS-VHDX], Virtual Hard Disk v2 (VHDX) File Format. Only what tells where data is gets read: header, region table, two
items of the metadata, and the block allocation table (BAT). Blocks that QEMU reads as zeroes are holes here, and no others:
those that are not present, undefined, unmapped or zero in a disk without a parent (``block/vhdx.c``, ``vhdx_co_readv``).
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from vmsnap.ports.disks import Extent

_SIGNATURE = b"vhdxfile"
_HEADERS = (64 << 10, 128 << 10)
_HEADER = struct.Struct("<4sIQ16s16s16s")
_REGION_TABLE = 192 << 10
_REGION_HEADER = struct.Struct("<4sIII")
_REGION = struct.Struct("<16sQII")
_MOST_REGIONS = 2047
_METADATA_HEADER = struct.Struct("<8sHH20x")
_METADATA_ENTRY = struct.Struct("<16sIII4x")
_MOST_ITEMS = 2047

_BAT = uuid.UUID("2DC27766-F623-4200-9D64-115E9BFD4A08").bytes_le
_METADATA = uuid.UUID("8B7CA206-4790-4B9A-B8FE-575F050F886E").bytes_le
_FILE_PARAMETERS = uuid.UUID("CAA16737-FA36-4D43-B3B6-33F0AA44E76B").bytes_le
_DISK_SIZE = uuid.UUID("2FA54224-CD1B-4876-B211-5DBED83BF4B8").bytes_le
_SECTOR_SIZE = uuid.UUID("8141BF1D-A96F-4709-BA47-F233A8FAAB5F").bytes_le
_HAS_PARENT = 2

_STATE = 0x7
_HOLES = frozenset({0, 1, 2, 3})
_ENTRIES_AT_ONCE = 64 << 10


class UntoldError(Exception):
    """The file does not tell where its data is, or not in a way that is understood here."""


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where the table is, and what it is of. ``chunk``: so many blocks come before each entry that is not one's."""

    table: int
    table_bytes: int
    block_bytes: int
    chunk: int
    size_bytes: int


def extents(path: Path, *, size_bytes: int) -> Iterator[Extent]:
    """Yield extents that cover a disk of that size: data and holes in turn, as its BAT has them.

    Raises UntoldError, before the first one, for a file with a log that was not replayed, with a parent, or damaged.
    """
    with path.open("rb") as file:
        layout = _layout(file)
        if layout.size_bytes != size_bytes:
            raise UntoldError(f"the disk has {layout.size_bytes} bytes, not {size_bytes}")
        pending: Extent | None = None
        for index, data in enumerate(_blocks(file, layout)):
            start = index * layout.block_bytes
            length = min(layout.block_bytes, size_bytes - start)
            if pending is not None and pending.data == data:
                pending = Extent(offset=pending.offset, length=pending.length + length, data=data)
            else:
                if pending is not None:
                    yield pending
                pending = Extent(offset=start, length=length, data=data)
        if pending is not None:
            yield pending


def _blocks(file: BinaryIO, layout: _Layout) -> Iterator[bool]:
    """Yield for each block of the disk whether it holds data."""
    count = -(-layout.size_bytes // layout.block_bytes)
    entries = count + (count - 1) // layout.chunk
    if entries * 8 > layout.table_bytes:
        raise UntoldError("its table is shorter than its disk")
    file.seek(layout.table)
    place = 0
    while place < entries:
        wanted = min(_ENTRIES_AT_ONCE, entries - place)
        raw = _read(file, wanted * 8)
        for (entry,) in struct.iter_unpack("<Q", raw):
            # After each chunk of blocks there is an entry for their sector bitmap.
            if place % (layout.chunk + 1) != layout.chunk:
                yield entry & _STATE not in _HOLES
            place += 1


def _layout(file: BinaryIO) -> _Layout:
    file.seek(0)
    if _read(file, len(_SIGNATURE)) != _SIGNATURE:
        raise UntoldError("it is no VHDX file")
    _require_replayed(file)
    regions = _regions(file)
    if _BAT not in regions or _METADATA not in regions:
        raise UntoldError("a region is missing")
    items = _items(file, at=regions[_METADATA][0])
    block_bytes, flags = struct.unpack("<II", _item(items, _FILE_PARAMETERS, size=8))
    (size_bytes,) = struct.unpack("<Q", _item(items, _DISK_SIZE, size=8))
    (sector_bytes,) = struct.unpack("<I", _item(items, _SECTOR_SIZE, size=4))
    if flags & _HAS_PARENT:
        raise UntoldError("it stands on another disk")
    if not block_bytes or block_bytes % (1 << 20) or sector_bytes not in (512, 4096) or not size_bytes:
        raise UntoldError(f"blocks of {block_bytes} bytes, sectors of {sector_bytes}")
    table, table_bytes = regions[_BAT]
    chunk = (1 << 23) * sector_bytes // block_bytes
    return _Layout(table=table, table_bytes=table_bytes, block_bytes=block_bytes, chunk=chunk, size_bytes=size_bytes)


def _require_replayed(file: BinaryIO) -> None:
    """Raise UntoldError where either header names a log: the table may be older than the log."""
    for place in _HEADERS:
        file.seek(place)
        signature, _, _, _, _, log = _HEADER.unpack(_read(file, _HEADER.size))
        if signature == b"head" and log != bytes(16):
            raise UntoldError("it has a log")


def _regions(file: BinaryIO) -> dict[bytes, tuple[int, int]]:
    """Return place and length in bytes of each region."""
    file.seek(_REGION_TABLE)
    signature, _, count, _ = _REGION_HEADER.unpack(_read(file, _REGION_HEADER.size))
    if signature != b"regi" or count > _MOST_REGIONS:
        raise UntoldError("it has no table of regions")
    raw = _read(file, count * _REGION.size)
    return {guid: (offset, length) for guid, offset, length, _ in _REGION.iter_unpack(raw)}


def _items(file: BinaryIO, *, at: int) -> dict[bytes, bytes]:
    """Return the items of the metadata."""
    file.seek(at)
    signature, _, count = _METADATA_HEADER.unpack(_read(file, _METADATA_HEADER.size))
    if signature != b"metadata" or count > _MOST_ITEMS:
        raise UntoldError("it has no metadata")
    items = {}
    for guid, offset, length, _ in _METADATA_ENTRY.iter_unpack(_read(file, count * _METADATA_ENTRY.size)):
        if guid in (_FILE_PARAMETERS, _DISK_SIZE, _SECTOR_SIZE):
            file.seek(at + offset)
            items[guid] = _read(file, min(length, 64))
    return items


def _item(items: dict[bytes, bytes], guid: bytes, *, size: int) -> bytes:
    found = items.get(guid, b"")
    if len(found) < size:
        raise UntoldError("an item of the metadata is missing")
    return found[:size]


def _read(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise UntoldError("it ends early")
    return data
