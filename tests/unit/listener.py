"""A real HTTP server, on loopback if nothing else is said, that takes notifications and pings, and can misbehave."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Listener:
    """What was sent to it. ``status``: what it answers. While ``hangs`` is set it answers nothing."""

    address: str = "127.0.0.1"
    port: int = 0
    status: int = 200
    requests: list[tuple[str, str, bytes]] = field(default_factory=list)
    hangs: threading.Event = field(default_factory=threading.Event)
    freed: threading.Event = field(default_factory=threading.Event)

    @property
    def messages(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, _, body in self.requests if body.startswith(b"{")]

    @property
    def pings(self) -> list[str]:
        return [f"{method} {path}" for method, path, _ in self.requests if path.startswith("/ping")]

    def url(self, path: str = "/hook/t0ken") -> str:
        return f"json://user:passw0rd@{self.address}:{self.port}{path}"

    def ping_url(self) -> str:
        return f"http://{self.address}:{self.port}/ping/t0ken"


@contextmanager
def listening(address: str = "127.0.0.1") -> Iterator[Listener]:
    """Listen meanwhile."""
    heard = Listener(address)

    class Handler(BaseHTTPRequestHandler):
        def _take(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            heard.requests.append((self.command, self.path, body))
            if heard.hangs.is_set():
                heard.freed.wait(30)
            self.send_response(heard.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST = _take  # noqa: N815 - the names http.server wants

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = False  # so that leaving waits for what is still being answered

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # whoever asked has gone away

    with Server((address, 0), Handler) as server:
        heard.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield heard
        finally:
            heard.freed.set()
            server.shutdown()
            thread.join()


@contextmanager
def threads_ended() -> Iterator[None]:
    """Wait at the end until the threads that began meanwhile have ended: the next test may count them."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(30)
        assert not thread.is_alive(), f"{thread.name} goes on"
