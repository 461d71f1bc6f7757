"""What the kernel says of changes while they happen: links, addresses, traffic control, forwarding tables, nft tables."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from vmsnap.errors import DriverError
from vmsnap.network.production import AF_BRIDGE, PERMANENT

_ROUTE, _NETFILTER = 0, 12  # linux/netlink.h
_GROUPS = 0x1 | 0x4 | 0x8 | 0x10 | 0x100  # RTMGRP_LINK, _NEIGH, _TC, _IPV4_IFADDR, _IPV6_IFADDR
_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
_NFTABLES_GROUP = 7  # NFNLGRP_NFTABLES of linux/netfilter/nfnetlink.h
_HEADER = struct.Struct("=IHHII")
_NEIGHBOUR = struct.Struct("=BxxxiHBB")
_ATTRIBUTE = struct.Struct("=HH")
_LINK = struct.Struct("=BxHiII")
_OLD_LINK, _NEW_NEIGHBOUR, _OLD_NEIGHBOUR = 17, 28, 29  # linux/rtnetlink.h
_IFLA_IFNAME, _IFLA_NEW_NETNSID = 3, 45  # linux/if_link.h
_NDA_LLADDR, _NDA_MASTER = 2, 9
_BUFFER_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Learned:
    """A bridge (its index) learned a MAC at a port (its index)."""

    mac: str
    port: int
    bridge: int


@dataclass(frozen=True, kw_only=True)
class News:
    """What happened since the last look.

    ``changed``: whether any link or address did. ``moved_away`` names links that are in another namespace now, where they
    live on and nobody here sees them.
    """

    changed: bool
    learned: tuple[Learned, ...]
    moved_away: tuple[str, ...]


class LinkNews:
    """Changes of links, addresses and forwarding tables in the calling thread's namespace. Raises DriverError."""

    def __init__(self) -> None:
        self._socket = _netlink(_ROUTE, groups=_GROUPS)

    def fileno(self) -> int:
        """Return the descriptor, for poll."""
        return self._socket.fileno()

    def read(self) -> News:
        """Return what happened since the last look."""
        changed, learned, moved_away = False, list[Learned](), list[str]()
        for data in _datagrams(self._socket):
            if data is None:
                changed = True
                continue
            for kind, body in _messages(data):
                if kind == _NEW_NEIGHBOUR:
                    learned.extend(_learned(body))
                elif kind != _OLD_NEIGHBOUR:
                    changed = True
                if kind == _OLD_LINK:
                    moved_away.extend(_moved_away(body))
        return News(changed=changed, learned=tuple(learned), moved_away=tuple(moved_away))

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()


class RuleNews:
    """Changes of nft tables in the calling thread's namespace. Raises DriverError."""

    def __init__(self, table: str) -> None:
        self._name = table.encode()
        self._socket = _netlink(_NETFILTER, groups=0)
        self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, _NFTABLES_GROUP)

    def fileno(self) -> int:
        """Return the descriptor, for poll."""
        return self._socket.fileno()

    def read(self) -> bool:
        """Return whether a change since the last look may have been one of the tables of that name."""
        news = tuple(_datagrams(self._socket))
        return any(data is None or self._name in data for data in news)

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()


def _netlink(protocol: int, *, groups: int) -> socket.socket:
    try:
        made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        made.setblocking(False)
        made.bind((0, groups))
    except OSError as exc:
        raise DriverError(f"cannot listen to the kernel's news: {exc}", remedy="vmsnap has to run as root") from exc
    return made


def _datagrams(source: socket.socket) -> Iterator[bytes | None]:
    """Yield what is there, and None where something was lost for want of room."""
    while True:
        try:
            yield source.recv(_BUFFER_BYTES)
        except BlockingIOError:
            return
        except OSError as exc:
            yield None
            if exc.errno != errno.ENOBUFS:
                return


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position + _HEADER.size <= len(data):
        length, kind, *_ = _HEADER.unpack_from(data, position)
        if length < _HEADER.size:
            return
        yield kind, data[position + _HEADER.size : position + length]
        position += length + 3 & ~3


def _learned(body: bytes) -> Iterator[Learned]:
    if len(body) < _NEIGHBOUR.size:
        return
    family, port, state, _, _ = _NEIGHBOUR.unpack_from(body)
    if family != AF_BRIDGE or state & PERMANENT:
        return
    attributes = dict(_attributes(body[_NEIGHBOUR.size :]))
    mac, bridge = attributes.get(_NDA_LLADDR, b""), attributes.get(_NDA_MASTER, b"")
    if len(mac) == 6 and len(bridge) == 4:
        yield Learned(mac=mac.hex(":"), port=port, bridge=struct.unpack("=I", bridge)[0])


def _moved_away(body: bytes) -> Iterator[str]:
    """Yield the link's name where it did not end but went elsewhere: the kernel then names the namespace (since 4.15)."""
    attributes = dict(_attributes(body[_LINK.size :]))
    if _IFLA_NEW_NETNSID in attributes:
        yield attributes.get(_IFLA_IFNAME, b"").rstrip(b"\0").decode(errors="replace")


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, position)
        if length < _ATTRIBUTE.size:
            return
        yield kind, data[position + _ATTRIBUTE.size : position + length]
        position += length + 3 & ~3
