"""The dirty bitmaps of vmsnap in a running QEMU: finding them, and reading one over NBD. QEMU: docs/interop/bitmaps.rst."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmsnap.errors import DriverError
from vmsnap.hypervisors.libvirt.monitor import Monitor, MonitorError
from vmsnap.hypervisors.libvirt.tools import run_tool
from vmsnap.model.hints import HINT_BLOCK_BYTES, BlockSet
from vmsnap.model.ids import RunId

_NAME = re.compile(r"vmsnap-(?P<run>[0-9a-f]{10})-(?P<target>[A-Za-z0-9]+)(?P<copy>-copy)?\Z")
_MAP_SECONDS = 120
_GONE_SECONDS = 5
_POLL_SECONDS = 0.01


@dataclass(frozen=True, kw_only=True)
class Bitmap:
    """One bitmap of vmsnap in a QEMU, and the file of the node it is on."""

    node: str
    file: str
    name: str
    run: RunId
    target: str
    is_copy: bool
    usable: bool
    marked_bytes: int


def name_of(run: RunId, target: str) -> str:
    """Return the name of the bitmap that a run begins for a disk."""
    return f"vmsnap-{run}-{target}"


def bitmaps_of(monitor: Monitor) -> Iterator[Bitmap]:
    """Yield all bitmaps of vmsnap."""
    for node in monitor.ask("query-named-block-nodes", flat=True):
        for entry in node.get("dirty-bitmaps", ()):
            match = _NAME.match(entry.get("name", ""))
            if match is not None:
                yield Bitmap(
                    node=node["node-name"],
                    file=node["file"],
                    name=match[0],
                    run=RunId(match["run"]),
                    target=match["target"],
                    is_copy=match["copy"] is not None,
                    usable=_is_usable(entry),
                    marked_bytes=int(entry["count"]),
                )


def _is_usable(entry: dict[str, Any]) -> bool:
    return bool(entry["recording"]) and not entry["busy"] and not entry.get("inconsistent", False)


def read_bitmap(monitor: Monitor, *, bitmap: Bitmap, run: RunId, address: Path, size_bytes: int) -> BlockSet:
    """Return the blocks that a bitmap has marked. Of a bitmap that goes on, QEMU serves a copy only.

    ``address``: the socket of QEMU's NBD server; the folder that it is in is used as well. Raises DriverError, ToolError.
    """
    copy, export = f"{bitmap.name}-copy", f"vmsnap-{run}-{bitmap.target}"
    add = {"node": bitmap.node, "name": copy, "granularity": HINT_BLOCK_BYTES, "disabled": True}
    merge = {"node": bitmap.node, "target": copy, "bitmaps": [bitmap.name]}
    actions = [
        {"type": "block-dirty-bitmap-add", "data": add},
        {"type": "block-dirty-bitmap-merge", "data": merge},
    ]
    monitor.ask("transaction", actions=actions)
    try:
        counted = next(one.marked_bytes for one in bitmaps_of(monitor) if one.name == copy)
        monitor.ask(
            "block-export-add",
            id=export,
            type="nbd",
            node_name=bitmap.node,
            name=export,
            bitmaps=[copy],
            writable=False,
        )
        try:
            options = f"driver=nbd,server.type=unix,server.path={_escaped(address)},export={export}"
            context = f"x-dirty-bitmap=qemu:dirty-bitmap:{copy}"
            # One line a stretch, and a large disk may have millions.
            with address.with_suffix(".map").open("w+", encoding="utf-8") as listing:
                run_tool(
                    ("qemu-img", "map", "--output=json", "--image-opts", f"{options},{context}"),
                    timeout_seconds=_MAP_SECONDS,
                    stdout_to=listing,
                )
                listing.seek(0)
                marked = BlockSet.of(parse_bitmap(listing, size_bytes=size_bytes), size_bytes=size_bytes)
        finally:
            _end_export(monitor, export)
    finally:
        monitor.ask("block-dirty-bitmap-remove", node=bitmap.node, name=copy)
    # The last block of a disk may be counted in part.
    if abs(marked.count * HINT_BLOCK_BYTES - counted) >= HINT_BLOCK_BYTES:
        raise DriverError(f"QEMU counts {counted} bytes that were written, and told of {marked.count} blocks")
    return marked


def _escaped(path: Path) -> str:
    """Return a path as a value in QEMU's lists of options, where a comma is doubled."""
    return str(path).replace(",", ",,")


def parse_bitmap(lines: Iterable[str], *, size_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield the stretches (offset, length) that a bitmap has marked, from ``qemu-img map`` of an NBD export of it.

    The output has an entry a line. QEMU's NBD client shows a marked stretch as one without data (block/nbd.c,
    ``x-dirty-bitmap``). Raises DriverError, also where the answer is not about all of the disk: what it leaves out would be
    taken for unchanged.
    """
    position = 0
    for line in lines:
        text = line.strip().removeprefix("[").removesuffix("]").rstrip(",")
        if not text:
            continue
        try:
            entry = json.loads(text)
            start, length, marked = int(entry["start"]), int(entry["length"]), not entry["data"]
        except (ValueError, KeyError, TypeError) as error:
            raise DriverError("qemu-img map printed something that makes no sense", details=text[:200]) from error
        if start != position:
            break
        position += length
        if marked:
            yield start, length
    if position < size_bytes:
        raise DriverError(f"qemu-img map told of {position} of {size_bytes} bytes")


def _end_export(monitor: Monitor, export: str) -> None:
    """End an export, and wait until QEMU has let go of its node and its bitmap."""
    monitor.ask("block-export-del", id=export, mode="hard")
    until = time.monotonic() + _GONE_SECONDS
    while time.monotonic() < until:
        if all(one["id"] != export for one in monitor.ask("query-block-exports")):
            return
        time.sleep(_POLL_SECONDS)


def stop_serving(monitor: Monitor, *, run: RunId, began: bool) -> None:
    """Stop the server that a dead run left: one with its exports, or with none where it had begun to serve."""
    exports = [one["id"] for one in monitor.ask("query-block-exports")]
    mine = [export for export in exports if export.startswith(f"vmsnap-{run}-")]
    for export in mine:
        _end_export(monitor, export)
    if mine or (began and not exports):
        with suppress(MonitorError):
            monitor.ask("nbd-server-stop")


def remove(monitor: Monitor, bitmaps: Iterable[Bitmap]) -> None:
    """Remove bitmaps. One that somebody else has removed meanwhile is gone as well."""
    for bitmap in tuple(bitmaps):
        try:
            monitor.ask("block-dirty-bitmap-remove", node=bitmap.node, name=bitmap.name)
        except MonitorError as error:
            if "not found" not in str(error):
                raise
