"""Notifications by ``apprise``: mail, chat, pagers and so on, each by a URL.

URLs hold tokens and passwords: no log line and no error of vmsnap's names more of one than its place in the list and its kind
(``slack``). The logs of apprise, and of the HTTP library it uses, are kept silent: they name hosts and paths.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum

from apprise import Apprise, AppriseAsset, NotifyFormat, NotifyType, PersistentStoreMode

from vmsnap.model.guest import Finding, Severity

_LOG = logging.getLogger(__name__)
_SCHEMA = re.compile(r"\s*([A-Za-z][A-Za-z0-9.+-]{0,30}):/")
_SPEAK_OF_URLS = ("apprise", "urllib3", "requests")


class Tone(Enum):
    """How a message sounds, for services that colour it."""

    BAD = NotifyType.FAILURE
    WORRYING = NotifyType.WARNING
    GOOD = NotifyType.SUCCESS


@dataclass(frozen=True, kw_only=True)
class Message:
    """What is sent: a line, and plain text."""

    title: str
    body: str
    tone: Tone


class Channels:
    """All ways by which somebody is told. A URL that apprise cannot use is left out, with a line in the log."""

    def __init__(self, urls: Sequence[str], *, timeout: timedelta) -> None:
        _silence()
        self._timeout = timeout
        self._channels: list[tuple[str, Apprise]] = []
        self._sending: dict[str, _Delivery] = {}
        for number, url in enumerate(urls, start=1):
            opened = _open(url)
            if opened is None:
                _LOG.error(
                    "notifications: %s is no URL that can be used; 'vmsnap doctor' says more", _name(number, url)
                )
            else:
                self._channels.append((_name(number, url), opened))

    @property
    def is_empty(self) -> bool:
        """Tell whether there is nobody to tell."""
        return not self._channels

    def send(self, message: Message) -> bool:
        """Send a message by all; tell whether any took it. Returns within the timeout, and raises nothing.

        What takes longer goes on in a thread that nobody waits for. Until it is done that channel gets nothing more: its
        messages would come late and all at once.
        """
        for name, apprise in self._channels:
            before = self._sending.get(name)
            if before is not None and before.is_alive():
                _LOG.warning("notifications: %s still hangs in an earlier message, and is passed over", name)
                continue
            self._sending[name] = _Delivery(name, apprise=apprise, message=message)
            self._sending[name].start()
        deadline = time.monotonic() + self._timeout.total_seconds()
        for name, delivery in self._sending.items():
            if delivery.message is message:
                delivery.join(max(0.0, deadline - time.monotonic()))
                if not delivery.succeeded:
                    _LOG.warning("notifications: %s %s", name, "hangs" if delivery.is_alive() else "took no message")
        return any(delivery.succeeded and delivery.message is message for delivery in self._sending.values())


class _Delivery(threading.Thread):
    """One message on its way by one channel."""

    def __init__(self, name: str, *, apprise: Apprise, message: Message) -> None:
        super().__init__(name=f"vmsnap-{name}", daemon=True)
        self._apprise = apprise
        self.message = message
        self.succeeded = False

    def run(self) -> None:
        """Send it. Never raises: what a plugin's bug says may hold the URL."""
        message = self.message
        try:
            self.succeeded = bool(
                self._apprise.notify(
                    title=message.title,
                    body=message.body,
                    notify_type=message.tone.value,
                    body_format=NotifyFormat.TEXT,
                )
            )
        except Exception:  # noqa: BLE001 - as the docstring says
            self.succeeded = False


def findings_of(urls: Sequence[str]) -> tuple[Finding, ...]:
    """Return what can be told of notification URLs without sending anything."""
    _silence()
    return tuple(_finding(number, url) for number, url in enumerate(urls, start=1))


def _finding(number: int, url: str) -> Finding:
    name = _name(number, url)
    if _open(url) is not None:
        return Finding(
            check="notifications", severity=Severity.OK, message=f"{name} has the form of its service's URLs"
        )
    return Finding(
        check="notifications",
        severity=Severity.WARNING,
        message=f"{name} is no URL that apprise can use: nobody will be told by it",
        remedy="compare it with its service's page in apprise's documentation: json://HOST/PATH, mailto://USER:PASSWORD@HOST",
    )


def _open(url: str) -> Apprise | None:
    # In this thread, and nothing written to disk: threads and deadlines are ours.
    asset = AppriseAsset(
        app_id="vmsnap", app_desc="vmsnap", async_mode=False, storage_mode=PersistentStoreMode.MEMORY, service_timeout=0
    )
    try:
        plugin = Apprise.instantiate(url, asset=asset)
        apprise = Apprise(asset=asset)
        return apprise if plugin is not None and apprise.add(plugin) else None
    except Exception:  # noqa: BLE001 - whatever a plugin does with a URL it does not like
        return None


def _name(number: int, url: str) -> str:
    """Return how to speak of a channel without telling its secret."""
    schema = _SCHEMA.match(url)
    return f"channel {number}" + (f" ({schema[1].lower()})" if schema is not None else "")


def _silence() -> None:
    for name in _SPEAK_OF_URLS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.CRITICAL + 1)
        logger.propagate = False
