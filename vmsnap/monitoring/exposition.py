"""Metrics in Prometheus' text format: as a file for node_exporter's textfile collector, and by HTTP."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from socket import AF_INET, AF_INET6, socket
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, generate_latest, make_wsgi_app
from prometheus_client.metrics_core import GaugeMetricFamily

from vmsnap.errors import PreconditionError
from vmsnap.monitoring.metrics import Metric

_READABLE = 0o644
_REQUEST_SECONDS = 10
_MOST_REQUESTS = 8


class Shelf:
    """The metrics of the last look, for whoever asks. Used from several threads."""

    def __init__(self) -> None:
        self._metrics: tuple[Metric, ...] = ()

    def put(self, metrics: tuple[Metric, ...]) -> None:
        """Show these instead of those before."""
        self._metrics = metrics

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Return the metrics as prometheus-client wants them."""
        return [_family(metric) for metric in self._metrics]


def _family(metric: Metric) -> GaugeMetricFamily:
    family = GaugeMetricFamily(metric.name, metric.text, labels=metric.label_names)
    for sample in metric.samples:
        family.add_metric([_label(sample.labels[name]) for name in metric.label_names], sample.value)
    return family


def _label(text: str) -> str:
    """Return a label's value as UTF-8 allows it: a guest's name may hold bytes that are none."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def text_of(metrics: tuple[Metric, ...]) -> bytes:
    """Return the metrics in the text format, version 0.0.4."""
    shelf = Shelf()
    shelf.put(metrics)
    return generate_latest(_registry(shelf))


def _registry(shelf: Shelf) -> CollectorRegistry:
    # Without names of its own, the registry does not look at the collector before somebody asks.
    registry = CollectorRegistry(auto_describe=False)
    registry.register(shelf)
    return registry


def write_textfile(path: Path, *, metrics: tuple[Metric, ...]) -> None:
    """Replace a file by the metrics at once, readable for everybody: node_exporter has a user of its own.

    Raises PreconditionError. The draft's name ends in a way that node_exporter passes over (it reads ``*.prom``).
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _READABLE)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                os.fchmod(stream.fileno(), _READABLE)
                stream.write(text_of(metrics))
                stream.flush()
                os.fsync(stream.fileno())
            draft.replace(path)
        finally:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
    except OSError as error:
        raise PreconditionError(
            f"cannot write the metrics to '{path}': {error.strerror or error}",
            remedy="make the folder that node_exporter's --collector.textfile.directory names, or change [metrics] textfile",
        ) from error


class Endpoint:
    """An HTTP server that answers every GET with the metrics of the last look: asking costs no look of its own."""

    def __init__(self, address: IPv4Address | IPv6Address, *, port: int, shelf: Shelf) -> None:
        """Listen. Raises PreconditionError where that cannot be."""
        family = AF_INET6 if address.version == 6 else AF_INET
        try:
            self._server = _Server(str(address), port, family=family)
        except OSError as error:
            raise PreconditionError(
                f"cannot listen for Prometheus at {address} port {port}: {error.strerror or error}",
                remedy="give another [metrics] listen in vmsnap.toml, or end what uses the port",
            ) from error
        self._server.set_app(make_wsgi_app(_registry(shelf)))
        self._thread = threading.Thread(target=self._server.serve_forever, name="vmsnap-metrics", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """Return the port."""
        return int(self._server.server_port)

    def close(self) -> None:
        """Stop listening. May be repeated."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(WSGIRequestHandler):
    timeout = _REQUEST_SECONDS  # somebody who connects and says nothing keeps no thread for ever

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name of the base class
        """Say nothing: a scrape every few seconds is no news."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, address: str, port: int, *, family: int) -> None:
        self.address_family = family
        self._room = threading.BoundedSemaphore(_MOST_REQUESTS)
        super().__init__((address, port), _Handler)

    def server_bind(self) -> None:
        """Bind, without asking the DNS for a name of the address, as the base class would."""
        TCPServer.server_bind(self)
        host, port = self.server_address[:2]
        self.server_name, self.server_port = str(host), int(port)
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread; hang up where too many are being answered."""
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: socket | tuple[bytes, socket], client_address: Any) -> None:
        """Say nothing: whoever asked has gone away."""
