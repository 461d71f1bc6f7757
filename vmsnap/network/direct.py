"""Connections from the host itself, as its routing says."""

from __future__ import annotations

import socket
from datetime import timedelta

from vmsnap.errors import GuestUnreachableError


def connect_directly(host: str, port: int, timeout: timedelta) -> socket.socket:
    """Open a TCP connection from the host, as the host's routing says. Raises GuestUnreachableError."""
    try:
        return socket.create_connection((host, port), timeout=timeout.total_seconds())
    except OSError as error:
        raise GuestUnreachableError(
            f"{host} port {port} cannot be reached from this host: {error}",
            remedy="is the address right, and the guest's SSH server running? Where this host may not reach the guest, "
            "give host_key in the policy's [control.ssh]: only the clone is asked then",
        ) from error
