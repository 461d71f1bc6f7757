"""Links of a fence: made, read and removed over netlink, with errors of vmsnap."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from vmsnap.errors import DriverError, PreconditionError

_IPV6 = Path("/proc/sys/net/ipv6")
BRIDGE_SETTINGS = {
    # A bridge hands frames to the groups 01:80:c2:00:00:03 to :0f (LLDP, 802.1X, ...) to the host's own protocols, past
    # its filter, unless told to bridge them as all others. The first three groups it lets nobody have.
    "br_group_fwd_mask": 0xFFF8,
    "br_stp_state": 0,
    "br_mcast_snooping": 0,
    "br_nf_call_iptables": 0,
    "br_nf_call_ip6tables": 0,
    "br_nf_call_arptables": 0,
}
"""What holds for every bridge of a fence."""
BRIDGE_IPV4_SETTINGS = {"arp_ignore": 8, "forwarding": 0}
"""The same in ``net.ipv4.conf``: a bridge that answers no ARP and is nobody's router."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """One link as the kernel reports it.

    ``lower`` is the index of the link it sits on, or of a veth's other end; ``lower_elsewhere`` says that this index
    counts in another namespace. ``ipv6_off`` is None where the kernel has no IPv6. ``settings`` are a bridge's.
    """

    name: str
    index: int
    kind: str | None
    alias: str | None
    master: int | None
    mtu: int
    is_up: bool
    lower: int | None
    lower_elsewhere: bool
    ipv6_off: bool | None
    mac: str
    settings: tuple[tuple[str, int], ...]


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Turn the errors of netlink and of files into vmsnap's: ``what`` could not be done."""
    try:
        yield
    except NetlinkError as exc:
        if exc.code == errno.EPERM:
            raise PreconditionError(f"cannot {what}: not permitted", remedy="vmsnap has to run as root") from exc
        if exc.code in {errno.EOPNOTSUPP, errno.EAFNOSUPPORT}:
            raise PreconditionError(
                f"cannot {what}: {exc}", remedy="the kernel lacks bridge or veth; load the module or change the kernel"
            ) from exc
        raise DriverError(f"cannot {what}: {exc}", remedy="run 'vmsnap reconcile', then try again") from exc
    except OSError as exc:
        raise DriverError(f"cannot {what}: {exc}", remedy="run 'vmsnap reconcile', then try again") from exc


@contextmanager
def _content_with(code: int) -> Iterator[None]:
    """Let one error of netlink pass: what was asked for is so already."""
    try:
        yield
    except NetlinkError as exc:
        if exc.code != code:
            raise


def all_links() -> tuple[Link, ...]:
    """Return every link of the calling thread's namespace. Raises DriverError."""
    with translated("list the network links"), IPRoute() as route:
        return tuple(_view(message) for message in route.get_links())


def _view(message: Any) -> Link:
    kind = message.get(("linkinfo", "kind"))
    settings = tuple((name, message.get(("linkinfo", "data", name))) for name in BRIDGE_SETTINGS)
    ipv6_off = message.get(("af_spec", "af_inet6", "inet6_conf", "disable_ipv6"))
    return Link(
        name=message.get("ifname"),
        index=message["index"],
        kind=kind,
        alias=message.get("ifalias"),
        master=message.get("master"),
        mtu=message.get("mtu"),
        is_up=message["state"] == "up",
        lower=message.get("link"),
        lower_elsewhere=message.get("link_netnsid") is not None,
        ipv6_off=None if ipv6_off is None else bool(ipv6_off),
        mac=message.get("address") or "",
        settings=settings if kind == "bridge" else (),
    )


def find(name: str) -> Link | None:
    """Return the link of that name in the calling thread's namespace, or None."""
    return next((link for link in all_links() if link.name == name), None)


def addresses() -> dict[int, tuple[str, ...]]:
    """Return the IPv4 and IPv6 addresses of every link that has one, by the link's index."""
    found: dict[int, tuple[str, ...]] = {}
    with translated("list the network addresses"), IPRoute() as route:
        for message in route.get_addr():
            text = f"{message.get('address')}/{message['prefixlen']}"
            found[message["index"]] = (*found.get(message["index"], ()), text)
    return found


def routes() -> tuple[str, ...]:
    """Return the routes of the main tables, each as ``destination``, with ``default`` for a default route."""
    found = []
    with translated("list the routes"), IPRoute() as route:
        for message in route.get_routes(table=254):
            destination = message.get("dst")
            found.append(f"{destination}/{message['dst_len']}" if destination else "default")
    return tuple(found)


def gateways() -> tuple[str, ...]:
    """Return the IPv4 gateways of the calling thread's namespace."""
    with translated("list the routes"), IPRoute() as route:
        found = {message.get("gateway") for message in route.get_default_routes(family=socket.AF_INET)}
    return tuple(sorted(gateway for gateway in found if gateway))


def add_bridge(name: str, *, alias: str, mtu: int | None) -> None:
    """Make a bridge that is nobody's router: no address, no IPv6, no spanning tree, no host firewall; set it up.

    The host neither answers ARP there, which it otherwise does for any address of its own, nor routes what comes from
    there: a firewall manager may flush the fence's rules long after they were proven.
    """
    with translated(f"make the bridge {name}"), IPRoute() as route:
        route.link("add", ifname=name, kind="bridge", **BRIDGE_SETTINGS)
        index = route.link_lookup(ifname=name)[0]
        if mtu is not None:  # set on its own: an MTU given at birth shrinks to that of the smallest port
            route.link("set", index=index, mtu=mtu)
        route.link("set", index=index, ifalias=alias)
        switch_ipv6_off(name)
        route_nothing(name)
        route.link("set", index=index, state="up")


def route_nothing(bridge: str) -> None:
    """Make a bridge nobody's router (again): whoever writes the host's ``ip_forward`` changes that of every link."""
    for setting, value in BRIDGE_IPV4_SETTINGS.items():
        path = f"conf/{bridge}/{setting}"
        if get_ipv4(path) != value:
            set_ipv4(path, value=value)


def add_veth(name: str, *, peer: str, namespace: Path, alias: str, mtu: int | None) -> None:
    """Make a veth pair whose far end is born in ``namespace``; the near end stays down and without a master."""
    with translated(f"make the veth pair {name}, {peer}"), IPRoute() as route:
        descriptor = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
        try:
            far: dict[str, Any] = {"ifname": peer, "net_ns_fd": descriptor}
            near: dict[str, Any] = {"ifname": name, "kind": "veth"}
            if mtu is not None:
                far["mtu"] = near["mtu"] = mtu
            route.link("add", peer=far, **near)
        finally:
            os.close(descriptor)
        index = route.link_lookup(ifname=name)[0]
        route.link("set", index=index, ifalias=alias)
        switch_ipv6_off(name)


def join_bridge(name: str, *, bridge: str) -> None:
    """Make a link a port of a bridge and set it up."""
    with translated(f"put {name} into the bridge {bridge}"), IPRoute() as route:
        master = route.link_lookup(ifname=bridge)[0]
        index = route.link_lookup(ifname=name)[0]
        route.link("set", index=index, master=master)
        route.link("set", index=index, state="up")


def set_up(name: str, *, alias: str | None = None) -> None:
    """Set a link up, and its alias where one is given."""
    with translated(f"set the link {name} up"), IPRoute() as route:
        index = route.link_lookup(ifname=name)[0]
        if alias is not None:
            route.link("set", index=index, ifalias=alias)
        route.link("set", index=index, state="up")


def set_down(name: str) -> None:
    """Set a link down, or return where there is none. Raises DriverError."""
    with translated(f"set the link {name} down"), IPRoute() as route:
        for index in route.link_lookup(ifname=name):
            try:
                route.link("set", index=index, state="down")
            except NetlinkError as exc:
                if exc.code != errno.ENODEV:
                    raise


def remove(name: str) -> None:
    """Remove a link, or return where there is none. Raises DriverError."""
    with translated(f"remove the link {name}"), IPRoute() as route:
        for index in route.link_lookup(ifname=name):
            try:
                route.link("del", index=index)
            except NetlinkError as exc:
                if exc.code != errno.ENODEV:
                    raise


def add_address(interface: str, *, address: str, prefix: int) -> None:
    """Give an interface an IPv4 address, or return where it has it."""
    with translated(f"give {interface} the address {address}/{prefix}"), IPRoute() as route:
        index = route.link_lookup(ifname=interface)[0]
        with _content_with(errno.EEXIST):
            route.addr("add", index=index, address=address, prefixlen=prefix)


def remove_address(interface: str, *, address: str, prefix: int) -> None:
    """Take an address away, or return where the interface does not have it or is gone."""
    with translated(f"take {address}/{prefix} from {interface}"), IPRoute() as route:
        for index in route.link_lookup(ifname=interface):
            try:
                route.addr("del", index=index, address=address, prefixlen=prefix)
            except NetlinkError as exc:
                if exc.code not in {errno.EADDRNOTAVAIL, errno.ENODEV}:
                    raise


def add_host_route(destination: str, *, interface: str, source: str) -> None:
    """Reach one address directly over an interface, speaking as ``source``. Whatever route there was is replaced."""
    with translated(f"route {destination} over {interface}"), IPRoute() as route:
        index = route.link_lookup(ifname=interface)[0]
        route.route("replace", dst=f"{destination}/32", oif=index, prefsrc=source, scope=253)


def remove_host_route(destination: str, *, interface: str) -> None:
    """Remove what ``add_host_route`` made, or return where it is gone."""
    with translated(f"remove the route to {destination}"), IPRoute() as route:
        for index in route.link_lookup(ifname=interface):
            try:
                route.route("del", dst=f"{destination}/32", oif=index, scope=253)
            except NetlinkError as exc:
                if exc.code not in {errno.ESRCH, errno.ENODEV}:
                    raise


def switch_ipv6_off(name: str) -> None:
    """Switch IPv6 off on an interface (or on ``all``, ``default``) and lose its IPv6 addresses. Raises DriverError."""
    if _IPV6.exists():
        _write(_IPV6 / "conf" / name / "disable_ipv6", value=1)


def set_ipv4(setting: str, *, value: int) -> None:
    """Set one setting of ``net.ipv4`` in the calling thread's namespace, such as ``ip_forward``."""
    _write(Path("/proc/sys/net/ipv4") / setting, value=value)


def get_ipv4(setting: str) -> int:
    """Read one setting of ``net.ipv4`` in the calling thread's namespace."""
    path = Path("/proc/sys/net/ipv4") / setting
    with translated(f"read {path}"):
        return int(path.read_text(encoding="ascii"))


def _write(path: Path, *, value: int) -> None:
    with translated(f"write {path}"):
        path.write_text(f"{value}\n", encoding="ascii")
