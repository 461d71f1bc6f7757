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

import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

from vmsnap.errors import BugError, DriverError
from vmsnap.hypervisors.libvirt.bitmaps import Bitmap, bitmaps_of, name_of, read_bitmap, remove, stop_serving
from vmsnap.hypervisors.libvirt.capturing import make_runtime
from vmsnap.hypervisors.libvirt.connection import Connection, translated
from vmsnap.hypervisors.libvirt.monitor import Monitor, MonitorError, was_used
from vmsnap.hypervisors.libvirt.tools import translated_os
from vmsnap.model.capture import CapturePlan
from vmsnap.model.guest import Disk, Guest
from vmsnap.model.hints import HINT_BLOCK_BYTES, DiskHint
from vmsnap.model.ids import RunId, SnapshotId
from vmsnap.model.journal import Resource, ResourceKind

_FOLDER = "hints"


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
            name = name_of(plan.run, disk.target)
            monitor.ask("block-dirty-bitmap-add", node=nodes[disk.source], name=name, granularity=HINT_BLOCK_BYTES)

    def read(self, plan: CapturePlan, *, since: SnapshotId) -> tuple[DiskHint, ...]:
        """Return what the guest wrote since a snapshot, over NBD from its QEMU."""
        monitor = self._monitor(plan.guest.uuid)
        found = {bitmap.name: bitmap for bitmap in bitmaps_of(monitor)}
        sources: dict[str, Bitmap] = {}
        hints: dict[str, DiskHint] = {}
        for disk in plan.guest.disks:
            bitmap = found.get(name_of(RunId(since), disk.target))
            reason = _why_not(bitmap, disk=disk, since=since)
            if bitmap is not None and reason is None:
                sources[disk.target] = bitmap
            else:
                hints[disk.target] = DiskHint(target=disk.target, since=since, reason=reason or "")
        if sources:
            with self._served(monitor, run=plan.run) as address:
                for disk in plan.guest.disks:
                    if disk.target in sources:
                        blocks = read_bitmap(
                            monitor,
                            bitmap=sources[disk.target],
                            run=plan.run,
                            address=address,
                            size_bytes=disk.size_bytes,
                        )
                        hints[disk.target] = DiskHint(target=disk.target, since=since, written=blocks)
        return tuple(hints[disk.target] for disk in plan.guest.disks)

    def keep(self, guest: Guest, *, run: RunId | None) -> None:
        """Remove all bitmaps of a guest but those of one run."""
        monitor = self._monitor_if_used(guest.uuid)
        if monitor is not None:
            remove(monitor, (bitmap for bitmap in bitmaps_of(monitor) if bitmap.run != run))

    def known_since(self, guest: Guest) -> tuple[SnapshotId, ...]:
        """Return the snapshots since which all disks have bitmaps."""
        monitor = self._monitor_if_used(guest.uuid)
        if monitor is None:
            return ()
        at: dict[RunId, set[str]] = {}
        sources = {disk.target: disk.source for disk in guest.disks}
        for bitmap in bitmaps_of(monitor):
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
            stop_serving(monitor, run=resource.run, began=folder.exists())
            remove(
                monitor,
                (bitmap for bitmap in bitmaps_of(monitor) if bitmap.run == resource.run or bitmap.is_copy),
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


def _why_not(bitmap: Bitmap | None, *, disk: Disk, since: SnapshotId) -> str | None:
    if bitmap is None:
        return f"QEMU has no notes since snapshot {since}: the guest was started anew, or its disk is another one now"
    if bitmap.file != disk.source:
        return f"the notes since snapshot {since} are of {bitmap.file}, and disk {disk.target} is on {disk.source} now"
    if not bitmap.usable:
        return f"somebody uses or has stopped the notes since snapshot {since}"
    return None
