"""One client's session with a read-only NBD server: bytes in, requests and bytes out. Sans-IO, fixed newstyle.

``receive`` takes what came and returns the requests in it; ``pending`` returns what is to be sent before anything else.
Requests may be answered in any order, with the bytes that ``data``, ``status``, ``done`` and ``failed`` make.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from vmsnap.errors import DriverError
from vmsnap.nbd import wire
from vmsnap.nbd.wire import Command, CommandFlag, Export, Fault, Handshake, Option, OptionReply, Run

LARGEST_REQUEST = 32 << 20
"""What the protocol lets a client assume where nothing else is agreed."""
_LONGEST_OPTION = 64 << 10
_LONGEST_NAME = 4096
_CONTEXT = 1
_FLAGS_OF: Mapping[int, int] = {
    Command.READ: CommandFlag.DF,
    Command.FLUSH: 0,
    Command.CACHE: 0,
    Command.BLOCK_STATUS: CommandFlag.REQ_ONE,
}


class NbdProtocolError(DriverError):
    """The client speaks no NBD, or breaks its rules so that no answer can be framed. Its connection is to be closed."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request to an export. ``command`` is READ, BLOCK_STATUS, CACHE or FLUSH, and lies inside the export."""

    cookie: int
    command: Command
    offset: int = 0
    length: int = 0
    one: bool = False


class _State(Enum):
    FLAGS = auto()
    OPTIONS = auto()
    REQUESTS = auto()
    PAYLOAD = auto()
    CLOSED = auto()


class Session:
    """One connection. Not thread-safe, but for the four makers of replies."""

    def __init__(self, exports: Mapping[str, Export]) -> None:
        self._exports = exports
        self._export: Export | None = None
        self._state = _State.FLAGS
        self._buffer = bytearray()
        self._skip = 0
        self._no_zeroes = False
        self._structured = False
        self._context_of: str | None = None
        flags = Handshake.FIXED_NEWSTYLE | Handshake.NO_ZEROES
        self._out = bytearray(wire.GREETING.pack(wire.NBD_MAGIC, wire.OPTION_MAGIC, flags))

    @property
    def export(self) -> Export | None:
        """Return the export that the client reads; None before it chose one."""
        return self._export

    @property
    def closed(self) -> bool:
        """Tell whether the client has said that it is done."""
        return self._state is _State.CLOSED

    def pending(self) -> bytes:
        """Return what is to be sent now, once."""
        out = bytes(self._out)
        self._out.clear()
        return out

    def receive(self, data: bytes) -> tuple[Request, ...]:
        """Take bytes of any count; return the requests that are whole. Raises NbdProtocolError."""
        self._buffer += data
        requests: list[Request] = []
        while self._step(requests):
            pass
        return tuple(requests)

    def data(self, request: Request, *, data: bytes) -> bytes:
        """Return the answer to a read."""
        if self._structured:
            return wire.data_chunk(request.cookie, offset=request.offset, data=data)
        return wire.simple_reply(request.cookie, data=data)

    def status(self, request: Request, *, runs: Sequence[Run]) -> bytes:
        """Return the answer to a question about allocation. The runs begin at the request's offset."""
        return wire.status_chunk(request.cookie, number=_CONTEXT, runs=runs[:1] if request.one else runs)

    def done(self, request: Request) -> bytes:
        """Return the answer to a request that wants no data."""
        return self._done(request.cookie)

    def failed(self, request: Request, *, fault: Fault, message: str) -> bytes:
        """Return the answer to a request that failed."""
        return self._failed(request.cookie, fault=fault, message=message)

    def _done(self, cookie: int) -> bytes:
        return wire.done_chunk(cookie) if self._structured else wire.simple_reply(cookie)

    def _failed(self, cookie: int, *, fault: Fault, message: str) -> bytes:
        if self._structured:
            return wire.error_chunk(cookie, fault=fault, message=message)
        return wire.simple_reply(cookie, fault=fault)

    def _step(self, requests: list[Request]) -> bool:
        """Handle what is next in the buffer; tell whether there was enough of it."""
        match self._state:
            case _State.FLAGS:
                return self._take_flags()
            case _State.OPTIONS:
                return self._take_option()
            case _State.REQUESTS:
                return self._take_request(requests)
            case _State.PAYLOAD:
                return self._take_payload()
            case _State.CLOSED:
                self._buffer.clear()
                return False

    def _take(self, count: int) -> bytes | None:
        if len(self._buffer) < count:
            return None
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    def _take_flags(self) -> bool:
        taken = self._take(wire.CLIENT_FLAGS.size)
        if taken is None:
            return False
        (number,) = wire.CLIENT_FLAGS.unpack(taken)
        if number & ~(Handshake.FIXED_NEWSTYLE | Handshake.NO_ZEROES) or not number & Handshake.FIXED_NEWSTYLE:
            raise NbdProtocolError(f"the client's handshake flags {number:#x} are not those of fixed newstyle")
        self._no_zeroes = bool(number & Handshake.NO_ZEROES)
        self._state = _State.OPTIONS
        return True

    def _take_option(self) -> bool:
        if len(self._buffer) < wire.OPTION.size:
            return False
        magic, option, length = wire.OPTION.unpack_from(self._buffer)
        if magic != wire.OPTION_MAGIC or length > _LONGEST_OPTION:
            raise NbdProtocolError(f"the client sent no NBD option (magic {magic!r}, {length} bytes)")
        taken = self._take(wire.OPTION.size + length)
        if taken is None:
            return False
        self._answer_option(option, data=taken[wire.OPTION.size :])
        return True

    def _answer_option(self, option: int, *, data: bytes) -> None:
        handler = self._handlers.get(option)
        if handler is None:
            self._reply(option, OptionReply.ERR_UNSUP)
            return
        try:
            handler(self, option, data)
        except (struct.error, UnicodeDecodeError):
            self._reply(option, OptionReply.ERR_INVALID)

    def _reply(self, option: int, kind: OptionReply, data: bytes = b"") -> None:
        self._out += wire.option_reply(option, kind=kind, data=data)

    def _on_export_name(self, _option: int, data: bytes) -> None:
        export = self._exports.get(data.decode("utf-8", "replace"))
        if export is None:
            raise NbdProtocolError("the client wants an export that is not here", details=data[:200].hex())
        self._begin(export)
        self._out += wire.old_export_reply(export, no_zeroes=self._no_zeroes)

    def _on_abort(self, option: int, _data: bytes) -> None:
        self._reply(option, OptionReply.ACK)
        self._state = _State.CLOSED

    def _on_list(self, option: int, data: bytes) -> None:
        if data:
            self._reply(option, OptionReply.ERR_INVALID)
            return
        for name in self._exports:
            encoded = name.encode()
            self._reply(option, OptionReply.SERVER, struct.pack("!I", len(encoded)) + encoded)
        self._reply(option, OptionReply.ACK)

    def _on_info(self, option: int, data: bytes) -> None:
        name, rest = _name_from(data)
        (count,) = struct.unpack_from("!H", rest)
        wanted = struct.unpack(f"!{count}H", rest[2:])
        export = self._exports.get(name)
        if export is None:
            self._reply(option, OptionReply.ERR_UNKNOWN)
            return
        self._reply(option, OptionReply.INFO, wire.export_info(export))
        if wire.Info.BLOCK_SIZE in wanted:
            self._reply(option, OptionReply.INFO, wire.block_size_info(export, largest=LARGEST_REQUEST))
        self._reply(option, OptionReply.ACK)
        if option == Option.GO:
            self._begin(export)

    def _begin(self, export: Export) -> None:
        self._export = export
        self._state = _State.REQUESTS
        if self._context_of != export.name:
            self._context_of = None

    def _on_structured_reply(self, option: int, data: bytes) -> None:
        if data:
            self._reply(option, OptionReply.ERR_INVALID)
            return
        self._structured = True
        self._reply(option, OptionReply.ACK)

    def _on_meta_context(self, option: int, data: bytes) -> None:
        name, rest = _name_from(data)
        (count,) = struct.unpack_from("!I", rest)
        rest = rest[4:]
        queries: list[bytes] = []
        for _ in range(count):
            query, rest = _counted(rest)
            queries.append(query)
        setting = option == Option.SET_META_CONTEXT
        if setting:
            self._context_of = None
        if rest or (setting and not self._structured):
            self._reply(option, OptionReply.ERR_INVALID)
            return
        if name not in self._exports:
            self._reply(option, OptionReply.ERR_UNKNOWN)
            return
        listed = not setting and (not queries or b"base:" in queries)
        if listed or wire.ALLOCATION in queries:
            number = _CONTEXT if setting else 0
            self._reply(option, OptionReply.META_CONTEXT, wire.meta_context(number, name=wire.ALLOCATION))
            if setting:
                self._context_of = name
        self._reply(option, OptionReply.ACK)

    _handlers: Mapping[int, Callable[[Session, int, bytes], None]] = {
        Option.EXPORT_NAME: _on_export_name,
        Option.ABORT: _on_abort,
        Option.LIST: _on_list,
        Option.INFO: _on_info,
        Option.GO: _on_info,
        Option.STRUCTURED_REPLY: _on_structured_reply,
        Option.LIST_META_CONTEXT: _on_meta_context,
        Option.SET_META_CONTEXT: _on_meta_context,
    }

    def _take_request(self, requests: list[Request]) -> bool:
        taken = self._take(wire.REQUEST.size)
        if taken is None:
            return False
        magic, flags, command, cookie, offset, length = wire.REQUEST.unpack(taken)
        if magic != wire.REQUEST_MAGIC:
            raise NbdProtocolError(f"the client sent no NBD request (magic {magic:#x})")
        if command == Command.DISCONNECT:
            self._state = _State.CLOSED
            return True
        if command == Command.WRITE:
            if length > LARGEST_REQUEST:
                raise NbdProtocolError(f"the client wants to write {length} bytes at once to a read-only export")
            self._skip, self._state = length, _State.PAYLOAD
        refusal = self._refusal(command, flags=flags, offset=offset, length=length)
        if refusal is not None:
            fault, message = refusal
            self._out += self._failed(cookie, fault=fault, message=message)
            return True
        one = bool(flags & CommandFlag.REQ_ONE)
        requests.append(Request(cookie=cookie, command=Command(command), offset=offset, length=length, one=one))
        return True

    def _refusal(self, command: int, *, flags: int, offset: int, length: int) -> tuple[Fault, str] | None:
        if command in (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES):
            return Fault.EPERM, "the export is read-only"
        allowed = _FLAGS_OF.get(command)
        if allowed is None:
            return Fault.EINVAL, f"there is no command {command}"
        if flags & ~(allowed | CommandFlag.FUA):
            return Fault.EINVAL, f"the flags {flags:#x} make no sense for command {command}"
        if command == Command.BLOCK_STATUS and self._context_of is None:
            return Fault.EINVAL, "no meta context was negotiated"
        return None if command == Command.FLUSH else self._out_of_range(command, offset=offset, length=length)

    def _out_of_range(self, command: int, *, offset: int, length: int) -> tuple[Fault, str] | None:
        assert self._export is not None  # noqa: S101 - requests are taken only once there is an export
        if offset + length > self._export.size_bytes or not length:
            return Fault.EINVAL, "the request is empty, or beyond the end of the export"
        if command == Command.READ and length > LARGEST_REQUEST:
            return Fault.EOVERFLOW, f"{length} bytes are too many to read at once"
        return None

    def _take_payload(self) -> bool:
        passed = min(self._skip, len(self._buffer))
        del self._buffer[:passed]
        self._skip -= passed
        if self._skip:
            return False
        self._state = _State.REQUESTS
        return True


def _name_from(data: bytes) -> tuple[str, bytes]:
    name, rest = _counted(data)
    if len(name) > _LONGEST_NAME:
        raise struct.error
    return name.decode(), rest


def _counted(data: bytes) -> tuple[bytes, bytes]:
    """Return a byte string that a 32-bit count comes before, and what is after it. Raises struct.error."""
    (length,) = struct.unpack_from("!I", data)
    if len(data) < 4 + length:
        raise struct.error
    return data[4 : 4 + length], data[4 + length :]
