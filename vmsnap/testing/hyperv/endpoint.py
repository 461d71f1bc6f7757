"""A WinRM endpoint on the loopback interface, which unmodified clients of PowerShell remoting talk to.

It speaks HTTP and HTTPS, Basic, Negotiate (NTLM), CredSSP and client certificates, with encrypted messages, and harms
requests as a test asks. What a pipeline does is the business of a dispatcher.
"""

from __future__ import annotations

import logging
import socket
import ssl
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import cast

from vmsnap.testing.hyperv import soap
from vmsnap.testing.hyperv.authentication import Accounts, Authentication, is_encrypted
from vmsnap.testing.hyperv.dispatch import Dispatcher
from vmsnap.testing.hyperv.service import Quotas, Service, User
from vmsnap.testing.hyperv.soap import Request, WsmanFaultError
from vmsnap.testing.hyperv.wirefaults import FaultPlan, Harm, WireFault

_log = logging.getLogger(__name__)
_SOAP_TYPE = "application/soap+xml;charset=UTF-8"
EVERY_MECHANISM = frozenset({"Basic", "Negotiate", "CredSSP", "Certificate"})
USER, PASSWORD = "vmsnap", "Gr8-Secret"
"""The account there is unless a test names others."""


@dataclass(frozen=True, kw_only=True)
class Tls:
    """HTTPS: the service's certificate with its key, and whose client certificates are taken for which account."""

    certificate: Path
    client_authority: Path | None = None
    client_users: dict[str, str] = field(default_factory=dict)
    """By the common name of the certificate."""


@dataclass(frozen=True, kw_only=True)
class EndpointSettings:
    """What an endpoint is like. ``connection_idle_seconds``: when HTTP.sys drops a connection nobody uses."""

    users: dict[str, User] = field(default_factory=lambda: {USER: User(password=PASSWORD)})
    mechanisms: frozenset[str] = frozenset({"Negotiate"})
    tls: Tls | None = None
    allow_unencrypted: bool = False
    quotas: Quotas = field(default_factory=Quotas)
    configurations: frozenset[str] = frozenset({"Microsoft.PowerShell"})
    connection_idle_seconds: float = 120.0


class Endpoint:
    """A running endpoint. ``faults`` may be armed at any time; ``log`` has the operations that were acted upon."""

    def __init__(self, dispatcher: Dispatcher, *, settings: EndpointSettings | None = None) -> None:
        self.settings = settings or EndpointSettings()
        self.faults = FaultPlan()
        self.log: list[str] = []
        self.service = Service(
            dispatcher,
            users=self.settings.users,
            quotas=self.settings.quotas,
            configurations=self.settings.configurations,
        )
        self.accounts = Accounts(self.settings.users)
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._server = _Server(self)
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, name="endpoint", daemon=True
        )
        self._thread.start()

    @property
    def port(self) -> int:
        """Return the TCP port on 127.0.0.1."""
        return int(self._server.server_address[1])

    def cut_connections(self) -> None:
        """End every connection, as a broken network does. Pipelines go on."""
        with self._lock:
            for connection in self._sockets:
                _cut(connection)

    def close(self) -> None:
        """Stop listening and end every connection. May be repeated."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self.service.drop_shells()
        self.cut_connections()

    def opened(self, connection: socket.socket) -> None:
        """Take note of a connection."""
        with self._lock:
            self._sockets.add(connection)

    def closed(self, connection: socket.socket) -> None:
        """Forget a connection."""
        with self._lock:
            self._sockets.discard(connection)


@contextmanager
def running(dispatcher: Dispatcher, *, settings: EndpointSettings | None = None) -> Iterator[Endpoint]:
    """Run an endpoint inside the block."""
    endpoint = Endpoint(dispatcher, settings=settings)
    try:
        yield endpoint
    finally:
        endpoint.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = False

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        super().__init__(("127.0.0.1", 0), _Handler)
        self.tls = _tls_context(endpoint.settings.tls)

    def finish_request(self, request: object, client_address: object) -> None:
        connection = cast("socket.socket", request)
        connection.settimeout(self.endpoint.settings.connection_idle_seconds)
        if self.tls is not None:
            try:
                connection = self.tls.wrap_socket(connection, server_side=True)
            except OSError:
                return  # a client that does not trust the certificate says so by hanging up
        self.endpoint.opened(connection)
        try:
            _Handler(connection, client_address, self)
        finally:
            self.endpoint.closed(connection)
            connection.close()

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002
        """Keep quiet of clients that hang up, which is what is tested, but not of our own faults."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            _log.error("the endpoint failed", exc_info=error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "Microsoft-HTTPAPI/2.0"
    sys_version = ""
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.endpoint = cast("_Server", self.server).endpoint
        settings = self.endpoint.settings
        self.authentication = Authentication(
            self.endpoint.accounts,
            mechanisms=settings.mechanisms,
            certificate_user=_certificate_user(self.connection, settings.tls),
        )

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name of the base class
        """Keep quiet."""

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        verdict = self.authentication.judge(self.headers.get("Authorization", ""))
        if verdict.user is None:
            ending = [("Connection", "close")] if verdict.is_final else []
            self._send(401, headers=[*(("WWW-Authenticate", text) for text in verdict.challenges), *ending])
            return
        tokens = [("WWW-Authenticate", verdict.token)] if verdict.token else []
        if not content:
            self._send(200, headers=tokens)
            return
        kind = self.headers.get("Content-Type", "")
        try:
            request = soap.parse(self._opened(content, kind=kind))
        except ValueError:
            self._send(400)
            return
        answer = self._answer(request, user=verdict.user)
        if answer is None:
            self.close_connection = True
            _cut(self.connection)
            return
        status, message = answer
        if is_encrypted(kind) and message:
            sealed_kind, sealed = self.authentication.encrypt(message)
            self._send(status, content=sealed, headers=[("Content-Type", sealed_kind), *tokens])
        else:
            self._send(status, content=message, headers=[("Content-Type", _SOAP_TYPE), *tokens])

    def _opened(self, content: bytes, *, kind: str) -> bytes:
        """Return the message. Raises ValueError for one that should have been encrypted."""
        if is_encrypted(kind):
            return self.authentication.decrypt(content)
        settings = self.endpoint.settings
        if settings.tls is None and not settings.allow_unencrypted:
            raise ValueError("AllowUnencrypted is false")
        return content

    def _answer(self, request: Request, *, user: str) -> tuple[int, bytes] | None:
        """Act upon a request. None: the connection ends here."""
        service = self.endpoint.service
        fault = self.endpoint.faults.strike(request.operation, text=lambda: service.text_of(request))
        if fault is not None and (struck := _before(fault, request=request)) is not _GO_ON:
            return struck
        self.endpoint.log.append(request.operation)
        answer = service.handle(request, user=user)
        if fault is not None and fault.harm is Harm.SLOW:
            threading.Event().wait(fault.seconds)
        return None if fault is not None and fault.harm is Harm.CUT_AFTER else answer

    def _send(self, status: int, *, content: bytes = b"", headers: list[tuple[str, str]] | None = None) -> None:
        self.send_response(status)
        for name, value in headers or ():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


_GO_ON = (0, b"")


def _before(fault: WireFault, *, request: Request) -> tuple[int, bytes] | None:
    if fault.harm is Harm.CUT_BEFORE:
        return None
    if fault.harm is Harm.UNAVAILABLE:
        return 503, b""
    if fault.harm is Harm.FAULT:
        return 500, soap.fault(request, error=WsmanFaultError(fault.code, "Ein Fehler ist aufgetreten."))
    return _GO_ON


def _cut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _tls_context(tls: Tls | None) -> ssl.SSLContext | None:
    if tls is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls.certificate)
    if tls.client_authority is not None:
        context.load_verify_locations(tls.client_authority)
        context.verify_mode = ssl.CERT_OPTIONAL
    return context


def _certificate_user(connection: socket.socket, tls: Tls | None) -> str | None:
    if tls is None or not isinstance(connection, ssl.SSLSocket):
        return None
    certificate = connection.getpeercert() or {}
    for part in cast("tuple[tuple[tuple[str, str], ...], ...]", certificate.get("subject", ())):
        for name, value in part:
            if name == "commonName":
                return tls.client_users.get(value)
    return None
