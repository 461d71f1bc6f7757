"""Joining connections in user space: one accepted on the host, one opened inside a fence.

The host's routing never sees the VM, and the VM sees only connections that the relay opened: it has nothing to connect
to. Each direction is copied by a thread of its own. The end of one direction (RFC 9293, section 3.6) is passed on alone,
so that protocols that half-close work; a reset of one side resets the other.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable

from vmsnap.errors import VmsnapError
from vmsnap.ports.service import Opener

_LOG = logging.getLogger(__name__)
_BUFFER_BYTES = 256 << 10
_MOST_CONNECTIONS = 256
_STOP_SECONDS = 5.0
_NO_DESCRIPTORS_PAUSE_SECONDS = 0.2
_KEEP_ALIVE_SECONDS = 60
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 s: closing sends a reset (socket(7))


class TcpRelay:
    """Serves one listener until closed. The listener belongs to it from then on. Thread-safe."""

    def __init__(self, listener: socket.socket, *, opener: Opener, most: int = _MOST_CONNECTIONS) -> None:
        """``most`` connections are relayed at once; further ones are refused."""
        self._listener = listener
        self._opener = opener
        self._most = most
        self._address: tuple[str, int] = listener.getsockname()[:2]
        self._lock = threading.Lock()
        self._connections: set[_Connection] = set()
        self._closed = False
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._accept_all, name="vmsnap-relay", daemon=True)
        self._thread.start()

    @property
    def address(self) -> tuple[str, int]:
        """Return where clients connect."""
        return self._address

    def close(self) -> None:
        """End the listener and reset every connection. May be repeated."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            connections = tuple(self._connections)
        os.write(self._wake_write, b"x")
        self._thread.join(_STOP_SECONDS)
        for connection in connections:
            connection.reset()
        for connection in connections:
            connection.join(_STOP_SECONDS)
        if not self._thread.is_alive():
            os.close(self._wake_read)
            os.close(self._wake_write)

    def _accept_all(self) -> None:
        self._listener.setblocking(False)
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self._wake_read, select.POLLIN)
        with self._listener:
            while True:
                if any(descriptor == self._wake_read for descriptor, _ in poll.poll()):
                    return
                try:
                    client, _ = self._listener.accept()
                except OSError as error:  # the client is gone again, or there are no file descriptors left
                    _LOG.warning("no connection was accepted at %s port %d: %s", *self._address, error)
                    time.sleep(_NO_DESCRIPTORS_PAUSE_SECONDS)
                    continue
                self._begin(client)

    def _begin(self, client: socket.socket) -> None:
        connection = _Connection(client, opener=self._opener, ended=self._forget)
        with self._lock:
            accepted = not self._closed and len(self._connections) < self._most
            if accepted:
                self._connections.add(connection)
        if accepted:
            connection.start()
        else:
            _LOG.warning("refused a connection to %s port %d: %d are relayed already", *self._address, self._most)
            _close(client, reset=True)

    def _forget(self, connection: _Connection) -> None:
        with self._lock:
            self._connections.discard(connection)


class _Connection:
    """One client, and its connection in the VM."""

    def __init__(self, client: socket.socket, *, opener: Opener, ended: Callable[[_Connection], None]) -> None:
        self._client = client
        self._inner: socket.socket | None = None
        self._opener = opener
        self._ended = ended
        self._lock = threading.Lock()
        self._is_reset = False
        self._sinks: set[socket.socket] = set()
        self._thread = threading.Thread(target=self._run, name="vmsnap-relayed", daemon=True)

    def start(self) -> None:
        """Open the connection in the VM, and copy until both directions have ended."""
        self._thread.start()

    def join(self, seconds: float) -> None:
        """Wait for the end. Content where it was never started."""
        if self._thread.ident is not None:
            self._thread.join(seconds)

    def reset(self) -> None:
        """End both sides at once, so that each peer sees a reset."""
        with self._lock:
            self._is_reset = True
            for side in (self._client, self._inner):
                if side is not None:
                    # It wakes the thread that waits for the side. Ending our own direction as well would tell the
                    # peer of an orderly end before the reset; that is only done where a thread is stuck sending.
                    how = socket.SHUT_RDWR if side in self._sinks else socket.SHUT_RD
                    with contextlib.suppress(OSError):  # not connected any more, or closed
                        side.shutdown(how)

    def _run(self) -> None:
        try:
            try:
                inner = self._opener()
            except VmsnapError as error:
                _LOG.warning("a connection was not relayed: %s", error.brief)
                self.reset()
                return
            with self._lock:
                self._inner = inner
                if self._is_reset:
                    return
            self._copy_both(inner)
        finally:
            with self._lock:
                _close(self._client, reset=self._is_reset)
                if self._inner is not None:
                    _close(self._inner, reset=self._is_reset)
            self._ended(self)

    def _copy_both(self, inner: socket.socket) -> None:
        try:
            for side in (self._client, inner):
                side.setblocking(True)
                side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                side.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                side.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEP_ALIVE_SECONDS)
        except OSError as error:  # reset by its peer already
            _LOG.info("a connection was not relayed: %s", error)
            self.reset()
            return
        back = threading.Thread(
            target=self._copy, kwargs={"source": inner, "sink": self._client}, name="vmsnap-relayed-back", daemon=True
        )
        back.start()
        self._copy(source=self._client, sink=inner)
        back.join()

    def _copy(self, *, source: socket.socket, sink: socket.socket) -> None:
        """Copy one direction to its end, and pass the end on."""
        buffer = memoryview(bytearray(_BUFFER_BYTES))
        try:
            while (count := source.recv_into(buffer)) > 0 and self._send(buffer[:count], sink=sink):
                pass
            with self._lock:
                if not self._is_reset:
                    sink.shutdown(socket.SHUT_WR)
        except OSError:
            self.reset()

    def _send(self, data: memoryview, *, sink: socket.socket) -> bool:
        """Send, as long as it takes; return whether to go on."""
        with self._lock:
            if self._is_reset:
                return False
            self._sinks.add(sink)
        try:
            sink.sendall(data)
        finally:
            with self._lock:
                self._sinks.discard(sink)
        return True


def _close(side: socket.socket, *, reset: bool) -> None:
    if reset:
        with contextlib.suppress(OSError):
            side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    side.close()
