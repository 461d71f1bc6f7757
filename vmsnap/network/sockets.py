"""TCP connections opened inside a fence's namespace. The host's routing and resolver never see the clone."""

from __future__ import annotations

import ipaddress
import socket
from datetime import timedelta

from vmsnap.errors import DriverError, GuestUnreachableError
from vmsnap.network import netns
from vmsnap.ports.guest import Connector


def connector_into(namespace: str) -> Connector:
    """Return a connector whose sockets live in ``namespace``, whatever thread uses them.

    It takes addresses, not names: inside a fence there is no DNS. It raises GuestUnreachableError.
    """

    def connect(host: str, port: int, timeout: timedelta) -> socket.socket:
        try:
            return netns.inside(namespace, action=lambda: _connect(host, port=port, timeout=timeout))
        except (OSError, ValueError) as exc:
            raise GuestUnreachableError(
                f"no connection to {host} port {port} inside the fence {namespace}: {exc}",
                remedy="the clone's network, its firewall or the service may not be ready",
            ) from exc
        except DriverError as exc:
            raise GuestUnreachableError(exc.brief, details=exc.details, remedy=exc.remedy) from exc

    return connect


def answers(namespace: str, *, host: str, port: int, timeout: timedelta) -> bool:
    """Tell whether something at the address speaks TCP: it accepts the connection, or refuses it itself.

    Raises DriverError where the namespace is gone.
    """
    try:
        netns.inside(namespace, action=lambda: _connect(host, port=port, timeout=timeout)).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return True


def _connect(host: str, *, port: int, timeout: timedelta) -> socket.socket:
    address = ipaddress.ip_address(host)
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout.total_seconds())
        connection.connect((str(address), port))
        connection.settimeout(None)
    except BaseException:
        connection.close()
        raise
    return connection
