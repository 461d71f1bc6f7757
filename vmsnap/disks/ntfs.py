"""NTFS, by a reader of its own: none of the tools tells a volume's state without a file of the volume's own length.

Layout: the "NTFS documentation" of the Linux-NTFS project, and ``layout.h`` and ``logfile.h`` of ntfs-3g. Windows keeps no
flag on a volume that is mounted; what tells that it was not dismounted is its journal, ``$LogFile``: clients that are still
in it, or its fast-restart format (2.0), which a shutdown turns back into 1.1. Everything on the disk was written by the
guest: each number is looked at before it is used, and each loop has an end.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from vmsnap.disks.ntfs_records import (
    Attribute,
    DamagedError,
    FileName,
    attributes,
    entries,
    fixed_up,
    references,
)
from vmsnap.disks.verdict import LARGEST_FILE_BYTES, Verdict, not_a_file, path_parts, too_large
from vmsnap.errors import PreconditionError, ToolError

KIND = "ntfs"

_BOOT = struct.Struct("<11xHB26xQQQb3xb")
_MFT, _LOGFILE, _VOLUME, _ROOT = 0, 2, 3, 5
_ATTRIBUTE_LIST, _VOLUME_INFORMATION, _DATA, _INDEX_ROOT, _INDEX_ALLOCATION = 0x20, 0x70, 0x80, 0x90, 0xA0
_FOLDERS = "$I30"
_HIBERNATION_FILE = "hiberfil.sys"
_HIBERNATED = (b"hibr", b"HIBR", b"HORM")
# Flags of $VOLUME_INFORMATION: a check of the volume is due, or was not finished.
_DIRTY = {0x0001: "dirty", 0x0002: "log is being resized", 0x0010: "change journal is being deleted"}
_DIRTY |= {0x0004: "upgrade is due", 0x4000: "chkdsk is under way"}
_NO_CLIENT = 0xFFFF
_IS_CLEAN = 0x0002
_FAST_RESTART = (2, 0)
_KNOWN_LOGS = ((1, 0), (1, 1))
_COMPRESSED_OR_ENCRYPTED = 0x40FF
_MOST_RECORDS = 4096
_MOST_BLOCKS = 65536
_MOST_CLUSTER_BYTES = 2 << 20
_MOST_RECORD_BYTES = 64 << 10
_RESTART_BYTES = 64 << 10
_MOST_VALUE_BYTES = 16 << 20
_DAMAGE = (DamagedError, struct.error, IndexError, UnicodeError)


def state(disk: Path, *, offset: int) -> Verdict:
    """Return the state of the file system that begins at ``offset``. Raises OSError."""
    try:
        with disk.open("rb") as file:
            volume = Volume(file, offset=offset)
            marks = [*_flags(volume), *_log(volume), *_hibernation(volume)]
    except _DAMAGE as error:
        return Verdict(clean=False, observed=f"damaged: {error}")
    return Verdict(clean=not marks, observed=", ".join(marks) or "dismounted, journal closed")


def read_file(disk: Path, *, offset: int, path: str) -> bytes | None:
    """Return a file's bytes, or None where there is no such file. Names are found whatever their case, as Windows does.

    Raises PreconditionError for paths that cannot be read, links, large, compressed and encrypted files; ToolError.
    """
    try:
        with disk.open("rb") as file:
            volume = Volume(file, offset=offset)
            record = _ROOT
            parts = path_parts(path)
            for depth, part in enumerate(parts, 1):
                found = _named(volume, record, name=part.decode("utf-8", "surrogateescape"))
                if found is None:
                    return None
                if found.is_link or found.is_folder == (depth == len(parts)):
                    raise not_a_file(path)
                record = found.record
            if not parts:
                raise not_a_file(path)
            return _content(volume, record, path=path)
    except _DAMAGE as error:
        raise ToolError(
            f"NTFS is damaged where {path} is looked for: {error}", remedy="check the file system in the guest"
        ) from error
    except OSError as error:
        raise ToolError(f"{disk} cannot be read: {error.strerror}", remedy="look at this host's log") from error


@dataclass(frozen=True, kw_only=True)
class _Geometry:
    sector_bytes: int
    cluster_bytes: int
    record_bytes: int
    index_bytes: int
    mft_cluster: int
    clusters: int


class Volume:
    """One volume: its records, and the bytes of their attributes. Methods raise DamagedError, OSError."""

    def __init__(self, file: BinaryIO, *, offset: int) -> None:
        self._file = file
        self._offset = offset
        self._geometry = _geometry(self._read(0, 512))
        first = self._geometry.mft_cluster * self._geometry.cluster_bytes
        self._mft: Attribute | None = None
        record = self._fixed(self._read(first, self._geometry.record_bytes))
        own = tuple(attributes(record))
        self._mft = next((one for one in own if one.kind == _DATA and not one.name), None)
        if self._mft is None or self._mft.is_resident:
            raise DamagedError("no table of files")
        if any(one.kind == _ATTRIBUTE_LIST for one in own):
            self._mft = self._joined([self._mft, *self._elsewhere(_MFT, own=own, kind=_DATA, name="")])

    def _read(self, start: int, length: int) -> bytes:
        self._file.seek(self._offset + start)
        data = self._file.read(length)
        if len(data) != length:
            raise DamagedError("it is cut short")
        return data

    def _fixed(self, data: bytes) -> bytes:
        return fixed_up(data, signature=b"FILE")

    def _record(self, number: int) -> bytes:
        size = self._geometry.record_bytes
        if self._mft is None:
            raise DamagedError("no table of files")
        return self._fixed(self.bytes_of(self._mft, start=number * size, length=size))

    def attribute(self, record: int, *, kind: int, name: str = "") -> Attribute | None:
        """Return an attribute of a file, all its parts joined, or None."""
        own = tuple(attributes(self._record(record)))
        found = [one for one in own if (one.kind, one.name) == (kind, name)]
        found += self._elsewhere(record, own=own, kind=kind, name=name)
        return self._joined(found) if found else None

    def _elsewhere(self, record: int, *, own: tuple[Attribute, ...], kind: int, name: str) -> Iterator[Attribute]:
        """Yield the parts of an attribute that lie in other records, which the attribute list of a file names."""
        for listing in own:
            if listing.kind == _ATTRIBUTE_LIST:
                named = references(self.bytes_of(listing), kind=kind, name=name)
                for other in sorted(set(named) - {record})[:_MOST_RECORDS]:
                    yield from (one for one in attributes(self._record(other)) if (one.kind, one.name) == (kind, name))

    def _joined(self, parts: list[Attribute]) -> Attribute:
        if len(parts) == 1:
            return parts[0]
        in_order = sorted(parts, key=lambda part: part.first_cluster)
        if in_order[0].first_cluster or any(part.is_resident for part in parts):
            raise DamagedError("parts of an attribute do not fit together")
        return in_order[0].with_runs(tuple(run for part in in_order for run in part.runs))

    def bytes_of(self, attribute: Attribute, *, start: int = 0, length: int | None = None) -> bytes:
        """Return a stretch of an attribute's value. What was never written reads as zeroes."""
        wanted = min(attribute.size_bytes - start, attribute.size_bytes if length is None else length)
        if wanted < 0 or (length is not None and wanted < length):
            raise DamagedError("an attribute is too short")
        if wanted > _MOST_VALUE_BYTES:
            raise DamagedError("an attribute is too long")
        if attribute.is_resident:
            return attribute.value[start : start + wanted]
        geometry, data, position = self._geometry, bytearray(), 0
        for count, cluster in attribute.runs:
            run_bytes = count * geometry.cluster_bytes
            first, last = max(position, start), min(position + run_bytes, start + wanted)
            if first < last and cluster is None:
                data += bytes(last - first)
            elif first < last and cluster is not None:
                if not 0 <= cluster <= geometry.clusters - count:
                    raise DamagedError("clusters outside the volume")
                data += self._read(cluster * geometry.cluster_bytes + first - position, last - first)
            position += run_bytes
        written = max(0, min(len(data), attribute.written_bytes - start))
        if len(data) != wanted:
            raise DamagedError("an attribute has too few clusters")
        return bytes(data[:written]) + bytes(wanted - written)

    def names(self, folder: int) -> Iterator[FileName]:
        """Yield the names in a folder, short names for DOS left out."""
        root = self.attribute(folder, kind=_INDEX_ROOT, name=_FOLDERS)
        if root is None or not root.is_resident:
            raise DamagedError("a folder without an index")
        blocks = self.attribute(folder, kind=_INDEX_ALLOCATION, name=_FOLDERS)
        size = self._geometry.index_bytes
        # Numbers of blocks count clusters, or sectors where a block is smaller than a cluster.
        unit = self._geometry.cluster_bytes if size >= self._geometry.cluster_bytes else 512
        waiting, seen = [(root.value, 16)], set[int]()
        while waiting:
            data, header = waiting.pop()
            for name, below in entries(data, header=header):
                if name is not None:
                    yield name
                if below is None or below in seen:
                    continue
                seen.add(below)
                if blocks is None or len(seen) > _MOST_BLOCKS:
                    raise DamagedError("a folder's index leads nowhere")
                block = self.bytes_of(blocks, start=below * unit, length=size)
                block = fixed_up(block, signature=b"INDX")
                waiting.append((block, 24))


def _geometry(boot: bytes) -> _Geometry:
    sector, per_cluster, sectors, mft, _, record, index = _BOOT.unpack_from(boot)
    if boot[3:11] != b"NTFS    " or sector not in (512, 1024, 2048, 4096):
        raise DamagedError("the boot sector makes no sense")
    cluster = sector * (per_cluster if per_cluster <= 0x80 else 1 << (256 - per_cluster))
    sizes = [1 << -size if size < 0 else size * cluster for size in (record, index)]
    if not 512 <= cluster <= _MOST_CLUSTER_BYTES or not all(512 <= size <= _MOST_RECORD_BYTES for size in sizes):
        raise DamagedError("the boot sector makes no sense")
    return _Geometry(
        sector_bytes=sector,
        cluster_bytes=cluster,
        record_bytes=sizes[0],
        index_bytes=sizes[1],
        mft_cluster=mft,
        clusters=sectors * sector // cluster,
    )


def _flags(volume: Volume) -> Iterator[str]:
    information = volume.attribute(_VOLUME, kind=_VOLUME_INFORMATION)
    if information is None or len(information.value) < 12:
        raise DamagedError("no $VOLUME_INFORMATION")
    (flags,) = struct.unpack_from("<H", information.value, 10)
    yield from (text for bit, text in _DIRTY.items() if flags & bit)


def _log(volume: Volume) -> Iterator[str]:
    """Yield what the journal says against the volume. A journal that was wiped (all ones) was closed before."""
    log = volume.attribute(_LOGFILE, kind=_DATA)
    if log is None or log.size_bytes < 2 * _RESTART_BYTES:
        raise DamagedError("no $LogFile")
    start = volume.bytes_of(log, length=2 * _RESTART_BYTES)
    if start.count(0xFF) == len(start):
        return
    page_bytes = struct.unpack_from("<I", start, 16)[0]
    if start[:4] not in (b"RSTR", b"CHKD") or page_bytes not in (512 << shift for shift in range(8)):
        raise DamagedError("$LogFile does not begin with a restart page")
    found = [
        _restart(start[place : place + page_bytes]) for place in (0, page_bytes) if start[place : place + 4] == b"RSTR"
    ]
    if not found:
        yield "chkdsk has changed the volume, and Windows has not mounted it since"
        return
    _, version, in_use, flags = max(found)
    if version == _FAST_RESTART:
        yield "journal in the format for fast restarts: not shut down, or hibernated"
    elif version not in _KNOWN_LOGS:
        yield f"journal of the unknown version {version[0]}.{version[1]}"
    if in_use != _NO_CLIENT and not flags & _IS_CLEAN:
        yield "journal in use"


def _restart(page: bytes) -> tuple[int, tuple[int, int], int, int]:
    page = fixed_up(page, signature=b"RSTR")
    area, minor, major = struct.unpack_from("<Hhh", page, 24)
    number, _, _, in_use, flags = struct.unpack_from("<QHHHH", page, area)
    return number, (major, minor), in_use, flags


def _hibernation(volume: Volume) -> Iterator[str]:
    found = _named(volume, _ROOT, name=_HIBERNATION_FILE)
    if found is None or found.is_folder:
        return
    data = volume.attribute(found.record, kind=_DATA)
    if data is not None and data.size_bytes >= 4 and volume.bytes_of(data, length=4) in _HIBERNATED:
        yield "hibernated"


def _named(volume: Volume, folder: int, *, name: str) -> FileName | None:
    folded: FileName | None = None
    for entry in volume.names(folder):
        if entry.name == name:
            return entry
        if entry.name.casefold() == name.casefold():
            folded = entry
    return folded


def _content(volume: Volume, record: int, *, path: str) -> bytes:
    data = volume.attribute(record, kind=_DATA)
    if data is None:
        raise DamagedError("a file without data")
    if data.flags & _COMPRESSED_OR_ENCRYPTED:
        raise PreconditionError(
            f"the file {path} is compressed or encrypted by NTFS",
            remedy="take the attribute off the database's folder (compact /u, cipher /d)",
        )
    if data.size_bytes > LARGEST_FILE_BYTES:
        raise too_large(path, size_bytes=data.size_bytes)
    return volume.bytes_of(data)
