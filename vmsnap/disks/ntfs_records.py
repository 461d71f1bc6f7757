"""The records of NTFS: bytes in, values out. Raises DamagedError for what makes no sense."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace

_STRIDE = 512
_END = 0xFFFFFFFF
_RECORD = (1 << 48) - 1
_HAS_BELOW, _IS_LAST = 1, 2
_DOS_NAME = 2
_FOLDER_FLAG, _LINK_FLAG = 0x10000000, 0x400
_MOST_RUNS = 1 << 16

Run = tuple[int, int | None]
"""Clusters: how many, and where the first is; None: never written, they read as zeroes."""


class DamagedError(Exception):
    """What is on the disk is not what NTFS writes."""


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """One attribute of a file, or a part of one. ``written_bytes``: how much of its size was ever written."""

    kind: int
    name: str
    flags: int
    is_resident: bool
    value: bytes = b""
    first_cluster: int = 0
    size_bytes: int = 0
    written_bytes: int = 0
    runs: tuple[Run, ...] = ()

    def with_runs(self, runs: tuple[Run, ...]) -> Attribute:
        """Return the same attribute over other clusters."""
        return replace(self, runs=runs)


@dataclass(frozen=True, kw_only=True)
class FileName:
    """One name in a folder, and the number of the file's record. ``is_link``: a junction, a symbolic link or the like."""

    name: str
    record: int
    is_folder: bool
    is_link: bool


def fixed_up(data: bytes, *, signature: bytes) -> bytes:
    """Return a record as it was before its sectors were marked: a torn write shows in the marks.

    NTFS marks each 512 bytes, whatever the sectors of the volume are.
    """
    place, count = struct.unpack_from("<HH", data, 4)
    if data[:4] != signature:
        raise DamagedError(f"a record without its signature {signature.decode()}")
    if count != len(data) // _STRIDE + 1 or place + 2 * count > _STRIDE - 2:
        raise DamagedError(f"a {signature.decode()} record whose marks make no sense")
    mark, whole = data[place : place + 2], bytearray(data)
    for index in range(1, count):
        end = index * _STRIDE
        if data[end - 2 : end] != mark:
            raise DamagedError(f"a {signature.decode()} record was written in part only")
        whole[end - 2 : end] = data[place + 2 * index : place + 2 * index + 2]
    return bytes(whole)


def attributes(record: bytes) -> Iterator[Attribute]:
    """Yield the attributes of a file's record."""
    (place,) = struct.unpack_from("<H", record, 20)
    while True:
        kind, length = struct.unpack_from("<II", record, place)
        if kind == _END:
            return
        if length < 24 or place + length > len(record):
            raise DamagedError("an attribute that leads out of its record")
        yield _attribute(record[place : place + length], kind=kind)
        place += length


def _attribute(data: bytes, *, kind: int) -> Attribute:
    is_resident = data[8] == 0
    name_at, flags = struct.unpack_from("<HH", data, 10)
    name = data[name_at : name_at + 2 * data[9]].decode("utf-16-le", "surrogatepass")
    if is_resident:
        size, at = struct.unpack_from("<IH", data, 16)
        if at + size > len(data):
            raise DamagedError("a value that leads out of its attribute")
        value = data[at : at + size]
        return Attribute(kind=kind, name=name, flags=flags, is_resident=True, value=value, size_bytes=size)
    first, _, at = struct.unpack_from("<QQH", data, 16)
    # Sizes stand in the first part of an attribute alone.
    _, size, written = struct.unpack_from("<QQQ", data, 40) if first == 0 else (0, 0, 0)
    return Attribute(
        kind=kind,
        name=name,
        flags=flags,
        is_resident=False,
        first_cluster=first,
        size_bytes=size,
        written_bytes=written,
        runs=tuple(runs(data[at:])),
    )


def runs(data: bytes) -> Iterator[Run]:
    """Yield the runs of clusters that a mapping describes."""
    place, cluster = 0, 0
    for _ in range(_MOST_RUNS):
        if place >= len(data) or data[place] == 0:
            return
        count_bytes, offset_bytes = data[place] & 15, data[place] >> 4
        count_at, offset_at = place + 1, place + 1 + count_bytes
        place = offset_at + offset_bytes
        count = int.from_bytes(data[count_at:offset_at], "little")
        if not 1 <= count_bytes <= 8 or offset_bytes > 8 or place > len(data) or count == 0:
            raise DamagedError("a run of clusters that makes no sense")
        if offset_bytes == 0:
            yield count, None
        else:
            cluster += int.from_bytes(data[offset_at:place], "little", signed=True)
            yield count, cluster
    raise DamagedError("too many runs of clusters")


def references(listing: bytes, *, kind: int, name: str) -> Iterator[int]:
    """Yield the records in which the parts of an attribute lie, from an attribute list."""
    place = 0
    while place + 26 <= len(listing):
        found, length, name_length, name_at = struct.unpack_from("<IHBB", listing, place)
        if length < 26:
            raise DamagedError("an attribute list that makes no sense")
        start = place + name_at
        found_name = listing[start : start + 2 * name_length].decode("utf-16-le", "surrogatepass")
        if (found, found_name) == (kind, name):
            yield struct.unpack_from("<Q", listing, place + 16)[0] & _RECORD
        place += length


def entries(data: bytes, *, header: int) -> Iterator[tuple[FileName | None, int | None]]:
    """Yield the entries of a folder's index: a name, and the number of the block with the names before it; None for either.

    ``header`` is where the index's header lies.
    """
    first, end = struct.unpack_from("<II", data, header)
    place, end = header + first, header + end
    if end > len(data):
        raise DamagedError("an index that leads out of its block")
    while place + 16 <= end:
        reference, length, key_length, flags = struct.unpack_from("<QHHH", data, place)
        if length < 16 or place + length > end:
            raise DamagedError("an entry of an index that makes no sense")
        below = struct.unpack_from("<Q", data, place + length - 8)[0] if flags & _HAS_BELOW else None
        is_last = bool(flags & _IS_LAST)
        yield None if is_last else _file_name(data[place + 16 : place + 16 + key_length], reference), below
        if is_last:
            return
        place += length
    raise DamagedError("an index without an end")


def _file_name(key: bytes, reference: int) -> FileName | None:
    (flags,) = struct.unpack_from("<I", key, 56)
    length, namespace = key[64], key[65]
    if namespace == _DOS_NAME:
        return None
    return FileName(
        name=key[66 : 66 + 2 * length].decode("utf-16-le", "surrogatepass"),
        record=reference & _RECORD,
        is_folder=bool(flags & _FOLDER_FLAG),
        is_link=bool(flags & _LINK_FLAG),
    )
