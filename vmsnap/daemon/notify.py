"""Telling systemd how the daemon is: the protocol of sd_notify(3), datagrams of ``KEY=VALUE`` lines on a socket.

Nothing here raises: the daemon works as well where nobody listens.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import MutableMapping
from datetime import timedelta

_LOG = logging.getLogger(__name__)
_LONGEST_STATUS = 400


class Systemd:
    """The service manager, where ``NOTIFY_SOCKET`` names one. May be used from one thread."""

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        # Taken out, so that no tool that vmsnap starts can speak in its name.
        self._address = environment.pop("NOTIFY_SOCKET", "")
        usec, pid = environment.pop("WATCHDOG_USEC", ""), environment.pop("WATCHDOG_PID", "")
        wanted = usec.isascii() and usec.isdigit() and int(usec) > 0 and pid in ("", str(os.getpid()))
        self.watchdog = timedelta(microseconds=int(usec)) if wanted else None
        """How long systemd waits for ``alive`` before it ends the daemon; None: for ever (sd_watchdog_enabled(3))."""

    def ready(self) -> None:
        """The daemon is up, or has reloaded."""
        self._send("READY=1")

    def reloading(self) -> None:
        """The daemon reads its configuration again; ``ready`` ends that. The time is what Type=notify-reload needs."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        """The daemon is about to end."""
        self._send("STOPPING=1")

    def alive(self) -> None:
        """The daemon's loop goes round."""
        if self.watchdog is not None:
            self._send("WATCHDOG=1")

    def status(self, text: str) -> None:
        """Say in one line what the daemon does; 'systemctl status' shows it."""
        line = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
        self._send(f"STATUS={line[:_LONGEST_STATUS]}")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.settimeout(1)
                sender.sendto(message.encode(), address)
        except OSError as error:
            _LOG.debug("systemd was not told %r: %s", message, error)
