"""The last DHCP exchange of each watched NIC: ``STATE/exchanges/MAC.json``, for its owner's eyes: it holds nonces."""

from __future__ import annotations

import json
from datetime import datetime
from ipaddress import IPv4Address
from pathlib import Path

from vmsnap.errors import BugError, DriverError
from vmsnap.model.isolation import Exchange
from vmsnap.state.files import make_private_folder, read_if_there, remove_if_there, write_replace

FORMAT_VERSION = 1
_NONCE_BYTES = 16  # RFC 6704


class FileExchanges:
    """The port ``Exchanges``. Each change is on disk, whole, when its method returns."""

    def __init__(self, state: Path) -> None:
        self._folder = state / "exchanges"

    def put(self, exchange: Exchange) -> None:
        """Record an exchange instead of the one before it. Raises NoSpaceError, PreconditionError, DriverError."""
        make_private_folder(self._folder)
        write_replace(self._path(exchange.mac), data=_encode(exchange))

    def get(self, mac: str) -> Exchange | None:
        """Return the last exchange of a NIC. Raises DriverError for a damaged record."""
        path = self._path(mac)
        data = read_if_there(path)
        return None if data is None else _decode(data, path=path)

    def forget(self, mac: str) -> None:
        """Forget a NIC's exchange. Content where there is none."""
        remove_if_there(self._path(mac))

    def _path(self, mac: str) -> Path:
        return self._folder / f"{mac_bytes(mac).hex('-')}.json"


def mac_bytes(mac: str) -> bytes:
    """Return the six bytes of a MAC in any of its spellings. Raises BugError for anything else."""
    try:
        data = bytes.fromhex(mac.replace(":", "").replace("-", ""))
    except ValueError as error:
        raise BugError(f"{mac!r} is no MAC address") from error
    if len(data) != 6:
        raise BugError(f"{mac!r} is no MAC address")
    return data


def _encode(exchange: Exchange) -> bytes:
    record = {
        "version": FORMAT_VERSION,
        "mac": exchange.mac,
        "address": str(exchange.address),
        "server": str(exchange.server),
        "xid": exchange.xid,
        "seen": exchange.seen.isoformat(),
        "nonce": None if exchange.nonce is None else exchange.nonce.hex(),
        "client": exchange.client,
        "vlan": exchange.vlan,
    }
    return (json.dumps(record, indent=2) + "\n").encode("ascii")


def _decode(data: bytes, *, path: Path) -> Exchange:
    try:
        record = json.loads(data)
        exchange = Exchange(
            mac=str(record["mac"]),
            address=IPv4Address(record["address"]),
            server=IPv4Address(record["server"]),
            xid=int(record["xid"]),
            seen=datetime.fromisoformat(record["seen"]),
            nonce=None if record["nonce"] is None else bytes.fromhex(record["nonce"]),
            client=str(record["client"]),
            vlan=None if record["vlan"] is None else int(record["vlan"]),
        )
        whole = record["version"] == FORMAT_VERSION and len(exchange.nonce or bytes(_NONCE_BYTES)) == _NONCE_BYTES
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path) from error
    if not whole:
        raise _damaged(path)
    return exchange


def _damaged(path: Path) -> DriverError:
    # Nothing of its text is shown: part of it may be the nonce.
    return DriverError(
        f"'{path}' is damaged and describes no DHCP exchange",
        remedy="remove it; the next exchange of the guest is recorded anew",
    )
