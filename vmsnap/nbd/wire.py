"""Numbers and messages of the NBD protocol (proto.md of NetworkBlockDevice/nbd). All numbers are in network byte order."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum, IntFlag

NBD_MAGIC = b"NBDMAGIC"
OPTION_MAGIC = b"IHAVEOPT"
ALLOCATION = b"base:allocation"

GREETING = struct.Struct("!8s8sH")
CLIENT_FLAGS = struct.Struct("!I")
OPTION = struct.Struct("!8sII")
REQUEST = struct.Struct("!IHHQQI")
REQUEST_MAGIC = 0x25609513
_OPTION_REPLY = struct.Struct("!QIII")
_OPTION_REPLY_MAGIC = 0x3E889045565A9
_SIMPLE_REPLY = struct.Struct("!IIQ")
_SIMPLE_REPLY_MAGIC = 0x67446698
_CHUNK = struct.Struct("!IHHQI")
_CHUNK_MAGIC = 0x668E33EF
_CHUNK_DONE = 1
_NO_ZEROES_BYTES = 124


class Handshake(IntFlag):
    """Flags of the greeting and of the client's answer to it."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class Option(IntEnum):
    """What a client asks for before it reads."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class OptionReply(IntEnum):
    """Kinds of answers to an option."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = (1 << 31) + 1
    ERR_INVALID = (1 << 31) + 3
    ERR_UNKNOWN = (1 << 31) + 6
    ERR_TOO_BIG = (1 << 31) + 9


class Info(IntEnum):
    """Kinds of information about an export."""

    EXPORT = 0
    BLOCK_SIZE = 3


class Transmission(IntFlag):
    """What an export can do."""

    HAS_FLAGS = 1
    READ_ONLY = 2
    SEND_FLUSH = 4
    SEND_DF = 128
    CAN_MULTI_CONN = 256
    SEND_CACHE = 1024


class Command(IntEnum):
    """Requests to an export."""

    READ = 0
    WRITE = 1
    DISCONNECT = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(IntFlag):
    """Flags of a request."""

    FUA = 1
    DF = 4
    REQ_ONE = 8


class _Chunk(IntEnum):
    NONE = 0
    OFFSET_DATA = 1
    BLOCK_STATUS = 5
    ERROR = (1 << 15) + 1


class Fault(IntEnum):
    """Error numbers; they are those of Linux."""

    EPERM = 1
    EIO = 5
    EINVAL = 22
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


@dataclass(frozen=True, kw_only=True)
class Export:
    """One disk that is served, read-only. ``block_bytes``: what is best to read at once."""

    name: str
    size_bytes: int
    block_bytes: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """A stretch of a disk. ``hole``: nothing is stored there, it reads as zeroes."""

    length: int
    hole: bool


FLAGS = (
    Transmission.HAS_FLAGS
    | Transmission.READ_ONLY
    | Transmission.SEND_FLUSH
    | Transmission.SEND_DF
    | Transmission.CAN_MULTI_CONN
    | Transmission.SEND_CACHE
)


def option_reply(option: int, *, kind: OptionReply, data: bytes = b"") -> bytes:
    """Return an answer to an option."""
    return _OPTION_REPLY.pack(_OPTION_REPLY_MAGIC, option, kind, len(data)) + data


def export_info(export: Export) -> bytes:
    """Return the payload of NBD_INFO_EXPORT."""
    return struct.pack("!HQH", Info.EXPORT, export.size_bytes, FLAGS)


def block_size_info(export: Export, *, largest: int) -> bytes:
    """Return the payload of NBD_INFO_BLOCK_SIZE: smallest, preferred and largest request."""
    return struct.pack("!HIII", Info.BLOCK_SIZE, 1, export.block_bytes, largest)


def old_export_reply(export: Export, *, no_zeroes: bool) -> bytes:
    """Return the answer to NBD_OPT_EXPORT_NAME, which has no frame."""
    return struct.pack("!QH", export.size_bytes, FLAGS) + (b"" if no_zeroes else bytes(_NO_ZEROES_BYTES))


def meta_context(number: int, *, name: bytes) -> bytes:
    """Return the payload of NBD_REP_META_CONTEXT."""
    return struct.pack("!I", number) + name


def simple_reply(cookie: int, *, fault: Fault | None = None, data: bytes = b"") -> bytes:
    """Return a simple reply; ``data`` only where a read succeeded."""
    return _SIMPLE_REPLY.pack(_SIMPLE_REPLY_MAGIC, fault or 0, cookie) + data


def done_chunk(cookie: int) -> bytes:
    """Return the structured reply to what needs no data."""
    return _chunk(cookie, kind=_Chunk.NONE, size=0)


def data_chunk(cookie: int, *, offset: int, data: bytes) -> bytes:
    """Return the structured reply to a read that succeeded, whole."""
    return _chunk(cookie, kind=_Chunk.OFFSET_DATA, size=8 + len(data)) + struct.pack("!Q", offset) + data


def status_chunk(cookie: int, *, number: int, runs: Iterable[Run]) -> bytes:
    """Return the structured reply to a question about allocation. A hole has both flags: HOLE (1) and ZERO (2)."""
    body = b"".join(struct.pack("!II", run.length, 3 if run.hole else 0) for run in runs)
    return _chunk(cookie, kind=_Chunk.BLOCK_STATUS, size=4 + len(body)) + struct.pack("!I", number) + body


def error_chunk(cookie: int, *, fault: Fault, message: str) -> bytes:
    """Return the structured reply to what failed, with a line for the client's log."""
    text = message.encode()[:1024]
    return _chunk(cookie, kind=_Chunk.ERROR, size=6 + len(text)) + struct.pack("!IH", fault, len(text)) + text


def _chunk(cookie: int, *, kind: _Chunk, size: int) -> bytes:
    return _CHUNK.pack(_CHUNK_MAGIC, _CHUNK_DONE, kind, cookie, size)
