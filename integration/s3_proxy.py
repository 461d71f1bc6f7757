"""A way to a server that can be made bad: it cuts, stalls, slows down, or answers in the server's place."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

_PART = 64 * 1024


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """What happens to one connection.

    ``answer``: given instead of the server's. ``cut_request`` and ``cut_answer``: the connection ends after so many bytes
    of it. ``stall``: the answer stops after ``cut_answer`` bytes, and nothing more comes. ``bytes_per_second``: of the answer.
    """

    answer: bytes | None = None
    cut_request: int | None = None
    cut_answer: int | None = None
    stall: bool = False
    bytes_per_second: int | None = None


def http_failure(status: int, code: str) -> bytes:
    """Return what a server answers that cannot do it now."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>for a test</Message></Error>".encode()
    head = f"HTTP/1.1 {status} Trouble\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + body


class Proxy:
    """Passes connections on to a port of 127.0.0.1. Each connection has the next trouble of the list, if there is one.

    Connections that are to be bad, or are passed on at all, carry one request each: it tells clients to close them.
    """

    def __init__(self, port: int) -> None:
        self._server_port = port
        self._troubles: list[Trouble] = []
        self._lock = threading.Lock()
        self._ends: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._accept)]
        self.connections = 0

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut_all()
        for thread in list(self._threads):
            thread.join(timeout=10)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def expect(self, *troubles: Trouble) -> None:
        """Let the next connections have these troubles, and cut those that are there, so that new ones are made."""
        with self._lock:
            self._troubles = list(troubles)
        self.cut_all()

    def cut_all(self) -> None:
        """End all connections."""
        with self._lock:
            ends, self._ends = self._ends, set()
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self.connections += 1
                trouble = self._troubles.pop(0) if self._troubles else Trouble()
                self._ends.add(client)
            thread = threading.Thread(target=self._serve, args=(client, trouble))
            self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket, trouble: Trouble) -> None:
        with client, suppress(OSError):
            if trouble.answer is not None:
                self._answer_instead(client, trouble.answer)
                return
            with socket.create_connection(("127.0.0.1", self._server_port)) as server:
                with self._lock:
                    self._ends.add(server)
                there = threading.Thread(target=self._pass, args=(client, server, trouble.cut_request))
                there.start()
                self._pass_answer(server, client, trouble)
                there.join()

    @staticmethod
    def _answer_instead(client: socket.socket, answer: bytes) -> None:
        """Answer once the whole request is there, so that the client does not see a broken pipe."""
        client.settimeout(5)
        request = b""
        while b"\r\n\r\n" not in request:
            part = client.recv(_PART)
            if not part:
                return
            request += part
        head, _, body = request.partition(b"\r\n\r\n")
        lengths = [line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
        if b"100-continue" in head.lower():
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        missing = int(lengths[0]) - len(body) if lengths else 0
        while missing > 0:
            missing -= len(client.recv(min(_PART, missing)) or bytes(missing))
        client.sendall(answer)

    @staticmethod
    def _pass(source: socket.socket, target: socket.socket, most: int | None) -> None:
        done = 0
        with suppress(OSError):
            while part := source.recv(_PART):
                done += len(part)
                target.sendall(part)
                if most is not None and done >= most:
                    break
            target.shutdown(socket.SHUT_RDWR if most is not None else socket.SHUT_WR)
            if most is not None:
                source.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _pass_answer(server: socket.socket, client: socket.socket, trouble: Trouble) -> None:
        done = 0
        with suppress(OSError):
            while part := server.recv(_PART):
                if trouble.cut_answer is not None and done + len(part) > trouble.cut_answer:
                    client.sendall(part[: trouble.cut_answer - done])
                    while trouble.stall and client.recv(_PART):
                        pass
                    break
                client.sendall(part)
                done += len(part)
                if trouble.bytes_per_second:
                    time.sleep(len(part) / trouble.bytes_per_second)
            for end in (client, server):
                end.shutdown(socket.SHUT_RDWR)
