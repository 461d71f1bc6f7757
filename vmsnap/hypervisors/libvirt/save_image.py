"""libvirt's save image: writing its header, and reading and replacing the domain XML in it.

Layout (libvirt, src/qemu/qemu_saveimage.h): a header of 92 bytes in native byte order, then ``data_len`` bytes that hold
the XML, NUL, an optional cookie XML, NUL and padding; then the migration stream. The XML may be replaced as long as
XML and cookie fit into ``data_len``, because the stream's place in the file must not change.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO

from vmsnap.errors import DriverError

_FIELDS = 19
_HEADER = struct.Struct(f"=16s{_FIELDS}I")
_MAGIC = b"LibvirtQemudSave"
_MAGIC_UNFINISHED = b"LibvirtQemudPart"
_VERSION = 2
_FORMAT_RAW = 0
_COOKIE_OFFSET_FIELD = 4
_LONGEST_DATA = 64 << 20


@dataclass(frozen=True, kw_only=True)
class SaveImageHeader:
    """What the header of a save image says. ``data_len`` bytes follow the 92 of the header itself."""

    fields: tuple[int, ...]
    data_len: int
    was_running: bool
    xml: str
    cookie: bytes | None


def make_header(*, xml: str, cookie: str) -> bytes:
    """Return what comes before the migration stream, for a guest that was running. ``cookie`` is libvirt's own XML."""
    data = xml.encode("utf-8") + b"\0"
    cookie_offset = len(data)
    data += cookie.encode("utf-8") + b"\0"
    was_running = 1
    fields = (_VERSION, len(data), was_running, _FORMAT_RAW, cookie_offset)
    return _HEADER.pack(_MAGIC, *fields, *(0,) * (_FIELDS - len(fields))) + data


def read_header(file: BinaryIO) -> SaveImageHeader:
    """Read the header at the file's position.

    Raises DriverError for a file that is no finished save image of version 2, or one that is compressed.
    """
    raw = file.read(_HEADER.size)
    if len(raw) < _HEADER.size:
        raise DriverError(f"the memory image has {len(raw)} bytes of its 92-byte header")
    magic, *fields = _HEADER.unpack(raw)
    if magic == _MAGIC_UNFINISHED:
        raise DriverError("the memory image is unfinished: libvirt did not complete the capture")
    if magic != _MAGIC:
        raise DriverError(f"the memory image does not begin as libvirt's do: {magic!r}")
    version, data_len, was_running, image_format, cookie_offset = fields[:5]
    if version != _VERSION:
        raise DriverError(f"the memory image has format version {version}, vmsnap knows {_VERSION}")
    if image_format != _FORMAT_RAW:
        raise DriverError(
            f"the memory image is compressed (format {image_format})",
            remedy='set snapshot_image_format = "raw" in /etc/libvirt/qemu.conf and restart libvirtd',
        )
    if not 0 < data_len <= _LONGEST_DATA:
        raise DriverError(f"the memory image announces {data_len} bytes of XML")
    data = file.read(data_len)
    if len(data) < data_len:
        raise DriverError("the memory image ends inside its XML")
    xml, separator, _ = data.partition(b"\0")
    if not separator:
        raise DriverError("the XML of the memory image is not ended by a zero byte")
    try:
        text = xml.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DriverError(f"the XML of the memory image is not UTF-8: {error}") from error
    cookie = None
    if cookie_offset:
        if cookie_offset >= data_len:
            raise DriverError("the cookie of the memory image lies outside its header")
        cookie = data[cookie_offset:].partition(b"\0")[0]
    return SaveImageHeader(
        fields=tuple(fields),
        data_len=data_len,
        was_running=bool(was_running),
        xml=text,
        cookie=cookie,
    )


def replace_xml(file: BinaryIO, *, xml: str) -> None:
    """Put another XML into the image at the file's beginning; the cookie and the stream stay as they are.

    The file must be open for reading and writing. May be repeated. Raises DriverError where the XML does not fit.
    """
    file.seek(0)
    header = read_header(file)
    data = xml.encode("utf-8") + b"\0"
    fields = list(header.fields)
    fields[_COOKIE_OFFSET_FIELD] = 0
    if header.cookie is not None:
        fields[_COOKIE_OFFSET_FIELD] = len(data)
        data += header.cookie + b"\0"
    if len(data) > header.data_len:
        raise DriverError(f"the clone's XML needs {len(data)} bytes, the memory image has room for {header.data_len}")
    file.seek(0)
    file.write(_HEADER.pack(_MAGIC, *fields) + data.ljust(header.data_len, b"\0"))
    file.flush()
