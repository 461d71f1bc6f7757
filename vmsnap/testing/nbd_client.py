"""A small NBD client over a Unix socket, for tests: what a hypervisor reads."""

from __future__ import annotations

import socket
import struct
import time
from types import TracebackType
from typing import Self

_PATIENCE_SECONDS = 20.0


class NbdClient:
    """One connection to one export. Raises OSError with the error number that the server answers."""

    def __init__(self, path: str, *, export: str, patience_seconds: float = _PATIENCE_SECONDS) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        until = time.monotonic() + patience_seconds
        while True:
            try:
                self._socket.connect(path)
                break
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)
        self._socket.settimeout(patience_seconds)
        self._receive(18)
        self._socket.sendall(struct.pack("!I", 3))
        name = export.encode()
        data = struct.pack("!I", len(name)) + name + struct.pack("!H", 0)
        self._socket.sendall(struct.pack("!8sII", b"IHAVEOPT", 7, len(data)) + data)
        self.size_bytes = 0
        while True:
            _magic, _option, kind, length = struct.unpack("!QIII", self._receive(20))
            payload = self._receive(length)
            if kind == 3:
                self.size_bytes = struct.unpack("!HQH", payload)[1]
            elif kind == 1:
                return
            else:
                raise OSError(2, f"the server refused the export {export}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def read(self, offset: int, length: int) -> bytes:
        """Read bytes. Raises ConnectionError where the server goes away."""
        self._socket.sendall(struct.pack("!IHHQQI", 0x25609513, 0, 0, 1, offset, length))
        _magic, number, _cookie = struct.unpack("!IIQ", self._receive(16))
        if number:
            raise OSError(number, "the server answered with an error")
        return self._receive(length)

    def _receive(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            part = self._socket.recv(count - len(data))
            if not part:
                raise ConnectionError("the server has closed the connection")
            data += part
        return bytes(data)
