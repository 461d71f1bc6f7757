"""The NBD server: a Unix socket, a thread for each client, and a pool for the requests that have to wait."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from vmsnap.errors import BugError, DriverError, PreconditionError, VmsnapError
from vmsnap.exports.cache import BLOCK_BYTES
from vmsnap.exports.disk import UNIT_BYTES, LazyDisk
from vmsnap.exports.fetching import StoppedError, Urgency
from vmsnap.nbd.session import NbdProtocolError, Request, Session
from vmsnap.nbd.wire import Command, Export, Fault

LONGEST_SOCKET_PATH = 107
"""Bytes of ``sun_path`` without its final zero, see unix(7)."""
_RECEIVE_BYTES = 64 << 10
_WAITING_REQUESTS = 64
_WAITING_OF_A_CLIENT = 32
_LOG = logging.getLogger(__name__)


class _Client:
    """One connection. Replies may be sent by any thread."""

    def __init__(self, connection: socket.socket, *, exports: Mapping[str, Export]) -> None:
        self.connection = connection
        self.session = Session(exports)
        self.places = threading.BoundedSemaphore(_WAITING_OF_A_CLIENT)
        self._sending = threading.Lock()

    def send(self, data: bytes) -> None:
        """Send bytes. Raises OSError where the client is gone."""
        if data:
            with self._sending:
                self.connection.sendall(data)

    def close(self) -> None:
        """End the connection; its thread then ends too."""
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


class NbdServer:
    """Serves disks by their names, read-only. ``reader`` (user, group) may connect besides root."""

    def __init__(
        self, path: Path, *, disks: Mapping[str, tuple[int, LazyDisk]], reader: tuple[int, int] | None
    ) -> None:
        self._path = path
        self._disks = {name: disk for name, (_, disk) in disks.items()}
        self._exports = {
            name: Export(name=name, size_bytes=size_bytes, block_bytes=BLOCK_BYTES)
            for name, (size_bytes, _) in disks.items()
        }
        self._reader = reader
        self._lock = threading.Lock()
        self._clients: set[_Client] = set()
        self._threads: set[threading.Thread] = set()
        self._pool = ThreadPoolExecutor(max_workers=_WAITING_REQUESTS, thread_name_prefix="vmsnap-nbd-request")
        self._stopping = False
        self._listener: socket.socket | None = None

    def start(self) -> None:
        """Listen. Raises DriverError, PreconditionError."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._path.unlink(missing_ok=True)
            # Nobody can connect before it listens, and by then it is its reader's.
            listener.bind(str(self._path))
            self._path.chmod(0o600)
            if self._reader is not None:
                os.chown(self._path, *self._reader)
            listener.listen(16)
        except OSError as error:
            listener.close()
            if len(os.fsencode(self._path)) > LONGEST_SOCKET_PATH:
                raise PreconditionError(
                    f"the path of the socket {self._path} is too long", remedy="choose a shorter [runtime] path"
                ) from error
            raise DriverError(f"nobody can listen on {self._path}: {error.strerror or error}") from error
        self._listener = listener
        self._thread(self._accept, name="vmsnap-nbd-listen")

    def stop(self) -> None:
        """End. Clients are cut off without an answer: they come back when there is a server again."""
        with self._lock:
            self._stopping = True
            clients, threads = tuple(self._clients), tuple(self._threads)
        if self._listener is not None:
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        for client in clients:
            client.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        for thread in threads:
            thread.join(timeout=5.0)

    def _thread(self, target: object, *, name: str) -> None:
        def run() -> None:
            try:
                target()  # type: ignore[operator]
            finally:
                with self._lock:
                    self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=run, name=name, daemon=True)
        with self._lock:
            if self._stopping:
                return
            self._threads.add(thread)
        thread.start()

    def _accept(self) -> None:
        listener = self._listener
        while listener is not None and not self._stopping:
            try:
                connection, _ = listener.accept()
            except OSError as error:
                if not self._stopping:
                    _LOG.error("no more clients can connect to %s: %s", self._path, error)
                return
            client = _Client(connection, exports=self._exports)
            with self._lock:
                self._clients.add(client)
            self._thread(lambda client=client: self._serve(client), name="vmsnap-nbd-client")

    def _serve(self, client: _Client) -> None:
        try:
            with client.connection:
                client.send(client.session.pending())
                while not client.session.closed:
                    data = client.connection.recv(_RECEIVE_BYTES)
                    if not data:
                        return
                    requests = client.session.receive(data)
                    client.send(client.session.pending())
                    for request in requests:
                        self._take(client, request)
        except NbdProtocolError as error:
            _LOG.warning("a client of %s was cut off: %s", self._path, error.brief)
        except OSError as error:
            _LOG.info("a client of %s is gone: %s", self._path, error)
        except RuntimeError:
            if not self._stopping:  # the pool takes nothing any more
                raise
        finally:
            with self._lock:
                self._clients.discard(client)

    def _take(self, client: _Client, request: Request) -> None:
        export = client.session.export
        assert export is not None  # noqa: S101 - there are no requests before
        disk = self._disks[export.name]
        if request.command is Command.FLUSH or (
            request.command is Command.READ and disk.ready(request.offset, request.length)
        ):
            self._answer(client, request, disk=disk)
            return
        client.places.acquire()

        def work() -> None:
            try:
                self._answer(client, request, disk=disk)
            except OSError as error:
                _LOG.info("a client of %s is gone: %s", self._path, error)
            finally:
                client.places.release()

        self._pool.submit(work)

    def _answer(self, client: _Client, request: Request, *, disk: LazyDisk) -> None:
        session = client.session
        try:
            match request.command:
                case Command.READ:
                    reply = session.data(request, data=disk.read(request.offset, request.length))
                case Command.BLOCK_STATUS:
                    reply = session.status(request, runs=tuple(disk.runs(request.offset, request.length)))
                case Command.CACHE:
                    for unit in range(
                        request.offset // UNIT_BYTES, (request.offset + request.length - 1) // UNIT_BYTES + 1
                    ):
                        disk.fetch(unit, urgency=Urgency.AHEAD)
                    reply = session.done(request)
                case _:
                    reply = session.done(request)
        except StoppedError:
            client.close()
            return
        except VmsnapError as error:
            reply = session.failed(request, fault=Fault.EIO, message=error.brief)
        except Exception as error:  # noqa: BLE001 - the guest gets an error, and the server goes on
            bug = BugError(f"a request could not be answered: {error!r}")
            _LOG.error("%s", bug.brief, exc_info=True)
            reply = session.failed(request, fault=Fault.EIO, message=bug.brief)
        client.send(reply)
