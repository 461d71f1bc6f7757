"""What may take a frame off a link before any bridge, and so any rule of a fence, sees it.

That is programs at XDP, filters of traffic control (tc(8)) at a link's ingress and egress, and nft chains bound to a device
(nft(8), hook ``ingress``). A program of the host may put one on every new link: to watch traffic, to shape it, to send it on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from fnmatch import fnmatchcase
from typing import Any

from pyroute2 import IPRoute

from vmsnap.network import rules
from vmsnap.network.links import translated

_TIMEOUT = timedelta(seconds=30)
# include/uapi/linux/pkt_sched.h: TC_H_INGRESS with TC_H_MIN_INGRESS and _EGRESS, and the older queueing discipline alone.
_PARENTS = (0xFFFFFFF2, 0xFFFFFFF3, 0xFFFF0000)
_HOOKED = ("clsact", "ingress")
# What libvirt limits a NIC's traffic with: it drops frames, and sends none on.
_HARMLESS = frozenset({"police"})
_DEVICES = re.compile(r"\bdevices?\b\s*=?\s*(\{[^}]*\}|\S+)")


def on_links(found: Mapping[int, str]) -> Iterator[str]:
    """Say what sits on these links (their names by index). Raises DriverError, ToolError."""
    with translated("look at traffic control"), IPRoute() as route:
        for message in route.get_links(*found):
            if message.get(("xdp", "xdp_attached")):
                yield f"{found[message['index']]} has an XDP program"
        hooked = {
            message["index"]
            for message in route.get_qdiscs()
            if message["index"] in found and _kind(message) in _HOOKED
        }
        for index in sorted(hooked):
            for parent in _PARENTS:
                for message in route.get_filters(index=index, parent=parent):
                    for action in sorted({_kind(message)} & {"bpf"} | _actions(message) - _HARMLESS):
                        yield f"{found[index]} has a filter of traffic control with the action {action}"
    yield from _chains_on(found.values())


def _kind(message: Any) -> str:
    return message.get("kind") or ""


def _actions(item: Any) -> set[str]:
    """Return the actions of a filter: they lie at different depths for different kinds of filters."""
    found = set()
    for name, value in item.get("attrs", ()) if hasattr(item, "get") else ():
        if name == "TCA_ACT_KIND":
            found.add(str(value))
        for child in value if isinstance(value, list | tuple) else (value,):
            found |= _actions(child)
    return found


def _chains_on(names: Iterable[str]) -> Iterator[str]:
    # As text: nft 1.0.6 leaves the device out of its JSON.
    for line in rules.chains().splitlines():
        for devices in _DEVICES.findall(line):
            patterns = [pattern.strip('",;') for pattern in devices.strip("{}").replace(",", " ").split()]
            for name in names:
                if any(fnmatchcase(name, pattern) for pattern in patterns):
                    yield f"{name} has an nft chain of its own: {line.strip()}"
