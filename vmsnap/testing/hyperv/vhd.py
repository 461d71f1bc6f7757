"""What a virtual hard disk's own headers say of it: kind, size, identity, parent.

VHDX: [MS-VHDX], sections 2.2 (header), 2.5 (region table), 2.6 (metadata, parent locator). VHD: "Virtual Hard Disk Image Format
Specification" 1.0, footer. Only headers are read and written here; data is QEMU's business, or nobody's.
"""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from vmsnap.testing.hyperv.values import VhdType

_KIB = 1024
_HEADERS = (64 * _KIB, 128 * _KIB)
_REGION_TABLES = (192 * _KIB, 256 * _KIB)
_TABLE_BYTES = 4096
_METADATA_READ = 80 * _KIB
_METADATA_PLACE = 2048 * _KIB
_METADATA_LENGTH = 1024 * _KIB
_METADATA = uuid.UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e")
_FILE_PARAMETERS = uuid.UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
_DISK_SIZE = uuid.UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
_DISK_ID = uuid.UUID("beca12ab-b2e6-4523-93ef-c309e000c746")
_PARENT_LOCATOR = uuid.UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")
_LOCATOR_TYPE = uuid.UUID("b04aefb7-d19e-4a81-b789-25b8e9445913")
_LEAVE_ALLOCATED, _HAS_PARENT = 1, 2
_VHD_TYPES = {2: VhdType.FIXED, 3: VhdType.DYNAMIC, 4: VhdType.DIFFERENCING}
_BLOCK = 32 * 1024 * _KIB


class NotAVhdError(ValueError):
    """The file is no VHD and no VHDX, or its headers make no sense."""


@dataclass(frozen=True, kw_only=True)
class VhdFacts:
    """What the headers say. ``linkage`` is what a child must have been made over: it changes with the data's author."""

    vhd_format: str
    vhd_type: VhdType
    size_bytes: int
    disk_id: str
    linkage: str
    parent_path: str = ""
    parent_linkage: str = ""


def read_facts(path: Path) -> VhdFacts:
    """Read a file's headers. Raises NotAVhdError, OSError."""
    with path.open("rb", buffering=0) as file:
        try:
            if file.read(8) == b"vhdxfile":
                place, length = _metadata_region(_read(file, _REGION_TABLES[0], _TABLE_BYTES))
                region = _read(file, place, min(length, _METADATA_READ))
                return _vhdx(region, linkage=_linkage([_read(file, header, 64) for header in _HEADERS]))
            file.seek(-512, 2)
            return _vhd(file.read(512))
        except (struct.error, OSError, ValueError, KeyError) as error:
            raise NotAVhdError(f"{path.name}: {error}") from error


def _read(file: FileIO, place: int, length: int) -> bytes:
    file.seek(place)
    return file.read(length)


def _metadata_region(table: bytes) -> tuple[int, int]:
    if table[:4] != b"regi":
        raise NotAVhdError("no region table")
    (count,) = struct.unpack_from("<I", table, 8)
    for index in range(count):
        raw, place, length, _ = struct.unpack_from("<16sQII", table, 16 + 32 * index)
        if uuid.UUID(bytes_le=raw) == _METADATA:
            return place, length
    raise NotAVhdError("no metadata region")


def _linkage(headers: list[bytes]) -> str:
    newest = max(headers, key=lambda header: int(struct.unpack_from("<Q", header, 8)[0]))
    return str(uuid.UUID(bytes_le=newest[32:48]))


def _vhdx(region: bytes, *, linkage: str) -> VhdFacts:
    if region[:8] != b"metadata":
        raise NotAVhdError("no metadata table")
    (count,) = struct.unpack_from("<H", region, 10)
    items: dict[uuid.UUID, bytes] = {}
    for index in range(count):
        raw, place, length = struct.unpack_from("<16sII", region, 32 + 32 * index)
        items[uuid.UUID(bytes_le=raw)] = region[place : place + length]
    _, flags = struct.unpack_from("<II", items[_FILE_PARAMETERS])
    parent = _locator(items[_PARENT_LOCATOR]) if flags & _HAS_PARENT else {}
    alone = VhdType.FIXED if flags & _LEAVE_ALLOCATED else VhdType.DYNAMIC
    return VhdFacts(
        vhd_format="VHDX",
        vhd_type=VhdType.DIFFERENCING if flags & _HAS_PARENT else alone,
        size_bytes=struct.unpack("<Q", items[_DISK_SIZE])[0],
        disk_id=str(uuid.UUID(bytes_le=items[_DISK_ID])),
        linkage=linkage,
        parent_path=parent.get("absolute_win32_path", ""),
        parent_linkage=parent.get("parent_linkage", "").strip("{}"),
    )


def _locator(item: bytes) -> dict[str, str]:
    (count,) = struct.unpack_from("<H", item, 18)
    found = {}
    for index in range(count):
        key, value, key_length, value_length = struct.unpack_from("<IIHH", item, 20 + 12 * index)
        found[item[key : key + key_length].decode("utf-16-le")] = item[value : value + value_length].decode("utf-16-le")
    return found


def _vhd(footer: bytes) -> VhdFacts:
    if footer[:8] != b"conectix":
        raise NotAVhdError("neither VHDX nor VHD")
    size, kind = struct.unpack_from(">Q", footer, 48)[0], struct.unpack_from(">I", footer, 60)[0]
    identity = str(uuid.UUID(bytes=footer[68:84]))
    return VhdFacts(vhd_format="VHD", vhd_type=_VHD_TYPES[kind], size_bytes=size, disk_id=identity, linkage=identity)


def write_headers(
    path: Path, *, size_bytes: int, vhd_type: VhdType = VhdType.DYNAMIC, parent: tuple[str, str] | None = None
) -> None:
    """Make a file with the headers of an empty VHDX that Hyper-V would know, its checksums left out. Sparse.

    ``parent``: path on the host, and linkage.
    """
    flags = (_LEAVE_ALLOCATED if vhd_type is VhdType.FIXED else 0) | (_HAS_PARENT if parent else 0)
    items = {
        _FILE_PARAMETERS: struct.pack("<II", _BLOCK, flags),
        _DISK_SIZE: struct.pack("<Q", size_bytes),
        _DISK_ID: uuid.uuid4().bytes_le,
    }
    if parent is not None:
        items[_PARENT_LOCATOR] = _pack_locator({"absolute_win32_path": parent[0], "parent_linkage": f"{{{parent[1]}}}"})
    table = struct.pack("<8sHH20x", b"metadata", 0, len(items))
    content, place = b"", 64 * _KIB
    for key, value in items.items():
        table += struct.pack("<16sIIII", key.bytes_le, place + len(content), len(value), 0, 0)
        content += value
    region = struct.pack("<4sIII", b"regi", 0, 1, 0)
    region += struct.pack("<16sQII", _METADATA.bytes_le, _METADATA_PLACE, _METADATA_LENGTH, 1)
    author = uuid.uuid4().bytes_le
    with path.open("xb") as file:
        for start, data in (
            (0, b"vhdxfile"),
            *(
                (at, struct.pack("<4sIQ16s16s", b"head", 0, number, author, author))
                for number, at in enumerate(_HEADERS)
            ),
            *((at, region) for at in _REGION_TABLES),
            (_METADATA_PLACE, table),
            (_METADATA_PLACE + 64 * _KIB, content),
        ):
            file.seek(start)
            file.write(data)
        file.truncate(_METADATA_PLACE + _METADATA_LENGTH)


def _pack_locator(entries: dict[str, str]) -> bytes:
    head = _LOCATOR_TYPE.bytes_le + struct.pack("<HH", 0, len(entries))
    content, table = b"", b""
    place = len(head) + 12 * len(entries)
    for key, value in entries.items():
        words = (key.encode("utf-16-le"), value.encode("utf-16-le"))
        at = place + len(content)
        table += struct.pack("<IIHH", at, at + len(words[0]), len(words[0]), len(words[1]))
        content += words[0] + words[1]
    return head + table + content
