"""The dead-man's ping: one HTTP request each time that all is well, to a service that sounds the alarm when none comes."""

from __future__ import annotations

import logging
import threading
from datetime import timedelta
from http.client import HTTPException
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from vmsnap import __version__
from vmsnap.model.guest import Finding, Severity

_LOG = logging.getLogger(__name__)


class DeadManPing:
    """Pings one URL, which is a secret: whoever knows it can keep the alarm silent."""

    def __init__(self, url: str, *, method: str, timeout: timedelta) -> None:
        self._url = url
        self._method = method
        self._timeout = timeout
        self._sending: threading.Thread | None = None

    def send(self) -> None:
        """Send a ping in a thread of its own, waiting for it at most the timeout. Raises nothing, and is not repeated."""
        if self._sending is not None and self._sending.is_alive():
            _LOG.warning("the dead-man's ping before this one still hangs")
            return
        self._sending = threading.Thread(target=self._send, name="vmsnap-ping", daemon=True)
        self._sending.start()
        self._sending.join(self._timeout.total_seconds())

    def _send(self) -> None:
        if not _usable(self._url):
            _LOG.error("dead_man_url is no URL that can be pinged; 'vmsnap doctor' says more")
            return
        try:
            request = Request(  # noqa: S310 - http and https only
                self._url,
                data=b"" if self._method == "POST" else None,
                method=self._method,
                headers={"User-Agent": f"vmsnap/{__version__}"},
            )
            with urlopen(request, timeout=self._timeout.total_seconds()):  # noqa: S310
                return
        except (OSError, HTTPException, ValueError) as error:
            # What the error says may hold the URL.
            _LOG.warning("the dead-man's ping was not taken (%s)", type(error).__name__)


def ping_findings(url: str | None) -> tuple[Finding, ...]:
    """Return what can be told of the URL without sending anything."""
    if url is None:
        return ()
    if _usable(url):
        return (Finding(check="dead-man's ping", severity=Severity.OK, message="dead_man_url is a URL"),)
    return (
        Finding(
            check="dead-man's ping",
            severity=Severity.WARNING,
            message="dead_man_url is no URL that can be pinged",
            remedy="it begins with https:// or http:// and names a host",
        ),
    )


def _usable(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False
