"""What a guest wrote since a snapshot, from dirty bitmaps of the running QEMU.

A bitmap is only ever kept in QEMU's memory, for disks of any format: it lives exactly as long as the process that sees all
writes has the disk open. Whatever can change a disk behind its back (a guest that is off, a disk that is restored or replaced,
a snapshot that is reverted to) needs that process to end, and the bitmap ends with it. In the image itself a bitmap would
survive a restart, and with it the restoring of an older copy of the image; while it is there, ``qemu-img snapshot -a`` refuses
to work, and QEMU writes it to the disk in the middle of the pause.

The bitmap is on the node of the guest's own disk. During a run that node lies read-only under the overlay; the commit writes to
it, and so the bitmap knows of those writes as well. QEMU: docs/interop/bitmaps.rst; libvirt leaves bitmaps alone that are not
persistent (measured with libvirt 9.0 and QEMU 7.2).
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from vmsnap.errors import BugError, DriverError
from vmsnap.hypervisors.libvirt.capturing import make_runtime
from vmsnap.hypervisors.libvirt.connection import Connection, translated
from vmsnap.hypervisors.libvirt.monitor import Monitor, MonitorError, was_used
from vmsnap.hypervisors.libvirt.tools import run_tool, translated_os
from vmsnap.model.capture import CapturePlan
from vmsnap.model.guest import Disk, Guest
from vmsnap.model.hints import HINT_BLOCK_BYTES, BlockSet, DiskHint
from vmsnap.model.ids import RunId, SnapshotId
from vmsnap.model.journal import Resource, ResourceKind

_NAME = re.compile(r"vmsnap-(?P<run>[0-9a-f]{10})-(?P<target>[A-Za-z0-9]+)(?P<copy>-copy)?\Z")
_FOLDER = "hints"
_MAP_SECONDS = 120
_GONE_SECONDS = 5
_POLL_SECONDS = 0.01


@dataclass(frozen=True, kw_only=True)
class _Bitmap:
    """One bitmap of vmsnap in a QEMU, and the file of the node it is on."""

    node: str
    file: str
    name: str
    run: RunId
    target: str
    is_copy: bool
    usable: bool


class LibvirtHints:
    """Implements ports.hints.ChangeHints for one libvirt URI. ``runtime`` is the folder of the runs' own folders."""

    kinds = frozenset({ResourceKind.HINTS})

    def __init__(self, uri: str, *, runtime: Path) -> None:
        self._connection = Connection(uri)
        self._runtime = runtime

    def resource(self, plan: CapturePlan) -> Resource:
        """Name the bitmaps of a run."""
        return Resource(
            kind=ResourceKind.HINTS,
            run=plan.run,
            guest=plan.guest.name,
            name=f"notes of what {plan.guest.name} writes",
            detail=plan.guest.uuid,
        )

    def begin(self, plan: CapturePlan) -> None:
        """Add a bitmap to each disk. Raises DriverError where one cannot be had."""
        monitor = self._monitor(plan.guest.uuid)
        nodes = {
            device["inserted"]["file"]: device["inserted"]["node-name"]
            for device in monitor.ask("query-block")
            if "inserted" in device
        }
        for disk in plan.guest.disks:
            if disk.source not in nodes:
                raise DriverError(f"QEMU does not say which of its nodes disk {disk.target} is")
            name = _name(plan.run, disk.target)
            monitor.ask("block-dirty-bitmap-add", node=nodes[disk.source], name=name, granularity=HINT_BLOCK_BYTES)

    def read(self, plan: CapturePlan, *, since: SnapshotId) -> tuple[DiskHint, ...]:
        """Return what the guest wrote since a snapshot, over NBD from its QEMU."""
        monitor = self._monitor(plan.guest.uuid)
        found = {bitmap.name: bitmap for bitmap in _bitmaps(monitor)}
        sources: dict[str, _Bitmap] = {}
        hints: dict[str, DiskHint] = {}
        for disk in plan.guest.disks:
            bitmap = found.get(_name(RunId(since), disk.target))
            reason = _why_not(bitmap, disk=disk, since=since)
            if bitmap is not None and reason is None:
                sources[disk.target] = bitmap
            else:
                hints[disk.target] = DiskHint(target=disk.target, since=since, reason=reason or "")
        if sources:
            with self._served(monitor, run=plan.run) as address:
                for disk in plan.guest.disks:
                    if disk.target in sources:
                        written = _read_one(monitor, bitmap=sources[disk.target], run=plan.run, address=address)
                        blocks = BlockSet.of(written, size_bytes=disk.size_bytes)
                        hints[disk.target] = DiskHint(target=disk.target, since=since, written=blocks)
        return tuple(hints[disk.target] for disk in plan.guest.disks)

    def keep(self, guest: Guest, *, run: RunId | None) -> None:
        """Remove all bitmaps of a guest but those of one run."""
        monitor = self._monitor_if_used(guest.uuid)
        if monitor is not None:
            _remove(monitor, (bitmap for bitmap in _bitmaps(monitor) if bitmap.run != run))

    def known_since(self, guest: Guest) -> tuple[SnapshotId, ...]:
        """Return the snapshots since which all disks have bitmaps."""
        monitor = self._monitor_if_used(guest.uuid)
        if monitor is None:
            return ()
        at: dict[RunId, set[str]] = {}
        sources = {disk.target: disk.source for disk in guest.disks}
        for bitmap in _bitmaps(monitor):
            if bitmap.usable and not bitmap.is_copy and sources.get(bitmap.target) == bitmap.file:
                at.setdefault(bitmap.run, set()).add(bitmap.target)
        return tuple(SnapshotId(run) for run, targets in at.items() if targets == set(sources))

    def release(self, resource: Resource, *, deadline: timedelta) -> None:
        """Remove a run's bitmaps, and what is left of a reading of them. Content where the guest is off or gone."""
        del deadline
        if resource.kind not in self.kinds:
            raise BugError(f"hints are no {resource.kind}")
        monitor = self._monitor_if_used(resource.detail)
        folder = self._runtime / resource.run / _FOLDER
        if monitor is not None:
            _stop_serving(monitor, run=resource.run, began=folder.exists())
            _remove(
                monitor,
                (bitmap for bitmap in _bitmaps(monitor) if bitmap.run == resource.run or bitmap.is_copy),
            )
        self._remove_folder(folder)

    def owned(self) -> tuple[Resource, ...]:
        """Return nothing: which bitmaps are still of use, only a backup knows, and it ends the others."""
        return ()

    def _monitor(self, uuid: str) -> Monitor:
        domain = self._connection.find_by_uuid(uuid)
        if domain is None:
            raise DriverError("the guest is gone")
        return Monitor(domain)

    def _monitor_if_used(self, uuid: str) -> Monitor | None:
        """Return the monitor of a guest that runs and whose monitor was used since it was started, or None."""
        domain = self._connection.find_by_uuid(uuid)
        if domain is None:
            return None
        with translated("look at a guest"):
            active = bool(domain.isActive())
        return Monitor(domain) if active and was_used(domain) else None

    @contextmanager
    def _served(self, monitor: Monitor, *, run: RunId) -> Iterator[Path]:
        """Let QEMU serve what it is told to, at a socket in a folder that root alone may enter."""
        folder = make_runtime(self._runtime, run) / _FOLDER
        with translated_os(f"make {folder}"):
            folder.mkdir(mode=0o700)
            server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            address = folder / "nbd"
            with translated_os(f"listen at {address}"):
                server.bind(str(address))
                server.listen()
            name = f"vmsnap-{run}-nbd"
            monitor.give_file(server.fileno(), name=name)
            try:
                monitor.ask("nbd-server-start", addr={"type": "fd", "data": {"str": name}})
            except MonitorError:
                monitor.take_file_back(name)
                raise
            try:
                yield address
            finally:
                monitor.ask("nbd-server-stop")
        finally:
            server.close()
            self._remove_folder(folder)

    def _remove_folder(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            folder.parent.rmdir()


def _name(run: RunId, target: str) -> str:
    return f"vmsnap-{run}-{target}"


def _bitmaps(monitor: Monitor) -> Iterator[_Bitmap]:
    """Yield all bitmaps of vmsnap."""
    for node in monitor.ask("query-named-block-nodes", flat=True):
        for entry in node.get("dirty-bitmaps", ()):
            match = _NAME.match(entry.get("name", ""))
            if match is not None:
                yield _Bitmap(
                    node=node["node-name"],
                    file=node["file"],
                    name=match[0],
                    run=RunId(match["run"]),
                    target=match["target"],
                    is_copy=match["copy"] is not None,
                    usable=_is_usable(entry),
                )


def _is_usable(entry: dict[str, Any]) -> bool:
    return bool(entry["recording"]) and not entry["busy"] and not entry.get("inconsistent", False)


def _why_not(bitmap: _Bitmap | None, *, disk: Disk, since: SnapshotId) -> str | None:
    if bitmap is None:
        return f"QEMU has no notes since snapshot {since}: the guest was started anew, or its disk is another one now"
    if bitmap.file != disk.source:
        return f"the notes since snapshot {since} are of {bitmap.file}, and disk {disk.target} is on {disk.source} now"
    if not bitmap.usable:
        return f"somebody uses or has stopped the notes since snapshot {since}"
    return None


def _read_one(monitor: Monitor, *, bitmap: _Bitmap, run: RunId, address: Path) -> Iterable[tuple[int, int]]:
    """Return the stretches that a bitmap has marked. Of a bitmap that goes on, QEMU serves a copy only."""
    copy, export = f"{bitmap.name}-copy", f"vmsnap-{run}-{bitmap.target}"
    add = {"node": bitmap.node, "name": copy, "granularity": HINT_BLOCK_BYTES, "disabled": True}
    merge = {"node": bitmap.node, "target": copy, "bitmaps": [bitmap.name]}
    actions = [
        {"type": "block-dirty-bitmap-add", "data": add},
        {"type": "block-dirty-bitmap-merge", "data": merge},
    ]
    monitor.ask("transaction", actions=actions)
    try:
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
            text = run_tool(
                ("qemu-img", "map", "--output=json", "--image-opts", f"{options},{context}"),
                timeout_seconds=_MAP_SECONDS,
            )
        finally:
            _end_export(monitor, export)
    finally:
        monitor.ask("block-dirty-bitmap-remove", node=bitmap.node, name=copy)
    return tuple(parse_bitmap(text))


def _escaped(path: Path) -> str:
    """Return a path as a value in QEMU's lists of options, where a comma is doubled."""
    return str(path).replace(",", ",,")


def parse_bitmap(text: str) -> Iterator[tuple[int, int]]:
    """Yield the stretches (offset, length) that a bitmap has marked, from ``qemu-img map`` of an NBD export of it.

    QEMU's NBD client shows a marked stretch as one without data (block/nbd.c, ``x-dirty-bitmap``). Raises DriverError.
    """
    try:
        for entry in json.loads(text):
            if not entry["data"]:
                yield int(entry["start"]), int(entry["length"])
    except (ValueError, KeyError, TypeError) as error:
        raise DriverError("qemu-img map printed something that makes no sense", details=text[:200]) from error


def _end_export(monitor: Monitor, export: str) -> None:
    """End an export, and wait until QEMU has let go of its node and its bitmap."""
    monitor.ask("block-export-del", id=export, mode="hard")
    until = time.monotonic() + _GONE_SECONDS
    while time.monotonic() < until:
        if all(one["id"] != export for one in monitor.ask("query-block-exports")):
            return
        time.sleep(_POLL_SECONDS)


def _stop_serving(monitor: Monitor, *, run: RunId, began: bool) -> None:
    """Stop the server that a dead run left: one with its exports, or with none where it had begun to serve."""
    exports = [one["id"] for one in monitor.ask("query-block-exports")]
    mine = [export for export in exports if export.startswith(f"vmsnap-{run}-")]
    for export in mine:
        _end_export(monitor, export)
    if mine or (began and not exports):
        with suppress(MonitorError):
            monitor.ask("nbd-server-stop")


def _remove(monitor: Monitor, bitmaps: Iterable[_Bitmap]) -> None:
    """Remove bitmaps. One that somebody else has removed meanwhile is gone as well."""
    for bitmap in tuple(bitmaps):
        try:
            monitor.ask("block-dirty-bitmap-remove", node=bitmap.node, name=bitmap.name)
        except MonitorError as error:
            if "not found" not in str(error):
                raise
