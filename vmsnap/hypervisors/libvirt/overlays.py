"""Overlays: qcow2 files over a disk that stays as it is. Their names carry the run's id."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from vmsnap.errors import DriverError, NotCleanError
from vmsnap.hypervisors.libvirt import copies
from vmsnap.hypervisors.libvirt.background import BackgroundDetail
from vmsnap.hypervisors.libvirt.tools import run_tool, translated_os
from vmsnap.hypervisors.libvirt.vcpulimits import VcpuLimit
from vmsnap.linux.writeback import put_on_disk
from vmsnap.model.capture import CapturePlan
from vmsnap.model.guest import Disk, DiskKind
from vmsnap.model.ids import RunId

_NAME = re.compile(r"vmsnap-(?P<run>[0-9a-f]{10})-(?P<target>[A-Za-z0-9]+)\.(?P<role>source|clone)\.qcow2\Z")


class OverlayDetail(BaseModel):
    """One overlay as the journal keeps it: enough to undo it without the process that made it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: str
    overlay: str
    base: str
    base_format: str
    base_kind: DiskKind
    size_bytes: int


class OverlaysDetail(BaseModel):
    """All overlays of one role of one run.

    ``max_downtime_ms`` is what libvirt allowed a migration of the source to pause before the capture lowered it; None
    where it is not known. ``background`` is the same of a capture in mode ``instant``. ``storage``: there are no overlays; a
    capture leaves the source paused for a moment, for its storage. ``vcpu_limits`` are those of the source's vCPUs, where a
    capture may lower them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    uuid: str
    disks: tuple[OverlayDetail, ...]
    storage: bool = False
    max_downtime_ms: int | None = None
    background: BackgroundDetail | None = None
    vcpu_limits: tuple[VcpuLimit, ...] = ()


@dataclass(frozen=True, kw_only=True)
class OverlayName:
    """What the file name of an overlay says."""

    run: RunId
    target: str
    role: str


def parse_name(path: str) -> OverlayName | None:
    """Return what an overlay's file name says, or None for any other file."""
    match = _NAME.match(Path(path).name)
    if match is None:
        return None
    return OverlayName(run=RunId(match["run"]), target=match["target"], role=match["role"])


def describe(plan: CapturePlan, *, role: str) -> OverlaysDetail:
    """Return the overlays of a plan. ``role``: ``source`` for what the guest writes to, ``clone`` for the clone.

    Where the clone reads copies of the disks (``CaptureSettings.on_copies``), its overlays are over those.
    """
    on_copies = role == "clone" and plan.settings.on_copies
    return OverlaysDetail(
        uuid=plan.guest.uuid,
        disks=tuple(
            OverlayDetail(
                target=disk.target,
                overlay=str(_folder(disk, plan.settings.overlay_dir) / f"vmsnap-{plan.run}-{disk.target}.{role}.qcow2"),
                base=str(copies.path_of(plan, disk)) if on_copies else disk.source,
                base_format=disk.image_format,
                base_kind=disk.kind,
                size_bytes=disk.size_bytes,
            )
            for disk in plan.guest.disks
        ),
    )


def _folder(disk: Disk, overlay_dir: str | None) -> Path:
    return Path(overlay_dir) if overlay_dir is not None else Path(disk.source).parent


def create(detail: OverlaysDetail, *, marked: bool = False) -> None:
    """Make the overlay files, on disk when this returns. Existing ones of the same name are made anew.

    ``marked``: see ``create_overlay``. Raises NoSpaceError, ToolError. Mode 0600; libvirt gives them to QEMU's user when it
    opens them.
    """
    for disk in detail.disks:
        create_overlay(
            Path(disk.overlay),
            base=disk.base,
            base_format=disk.base_format,
            size_bytes=disk.size_bytes,
            marked=marked,
        )


def create_overlay(path: Path, *, base: str, base_format: str, size_bytes: int, marked: bool = False) -> None:
    """Make one overlay. The base is not opened (``-u``): it may be in use, and its size is known.

    ``marked``: it says of itself whether QEMU closed it (``require_whole``), by lazy refcounts: QEMU sets its dirty flag before
    it first maps what was written, and takes it away when all is written (docs/interop/qcow2.txt, block/qcow2-cluster.c). What
    is only zeroed or discarded does not set it.
    Raises NoSpaceError, PreconditionError, ToolError.
    """
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", base, "-F", base_format]
    if marked:
        argv += ["-o", "lazy_refcounts=on"]
    with translated_os(f"make the overlay {path}"):
        _create_overlay(path, argv=(*argv, str(path), str(size_bytes)), base=base)


def _create_overlay(path: Path, *, argv: tuple[str, ...], base: str) -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    try:
        run_tool(argv)
        if Path(base).is_file():
            owner = Path(base).stat()
            os.fchown(descriptor, owner.st_uid, owner.st_gid)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make changes of a folder's entries survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def delete(detail: OverlaysDetail) -> None:
    """Remove the files. Content where they are gone. Raises DriverError."""
    for disk in detail.disks:
        path = Path(disk.overlay)
        if parse_name(disk.overlay) is None:
            raise DriverError(f"{path} does not bear the name of an overlay of vmsnap and is left alone")
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise DriverError(f"{path} could not be removed: {error.strerror}") from error


def free_bytes(detail: OverlaysDetail) -> int:
    """Return the least room on any file system that holds one of the overlays."""
    with translated_os("look at the room for overlays"):
        return min(shutil.disk_usage(Path(disk.overlay).parent).free for disk in detail.disks)


def holds_data(path: str) -> bool:
    """Tell whether anything was written to an overlay; a fresh or committed one maps nothing at its own depth.

    Raises ToolError where it cannot be read, or what it is over cannot.
    """
    if not Path(path).exists():
        return False
    mapped = json.loads(run_tool(("qemu-img", "map", "-U", "--output=json", "-f", "qcow2", path), timeout_seconds=120))
    return any(extent["depth"] == 0 for extent in mapped)


def require_whole(detail: OverlaysDetail) -> None:
    """Raise NotCleanError where something that was written to an overlay may be missing in it. Its QEMU must have ended.

    Either QEMU was ended before it closed it: what it wrote since its last flush is lost. Or the host could not write it to its
    disk: a QEMU that keeps flushes back (``rewrite.keep_flushes_back``) does not hear of that. Linux tells whoever asks first
    (Documentation/filesystems/vfs.rst, "Handling errors during writeback"), as long as it remembers the file, which QEMU had
    open until now. For overlays that were made ``marked``. Raises ToolError, PreconditionError.
    """
    for disk in detail.disks:
        argv = ("qemu-img", "info", "-U", "--output=json", "-f", "qcow2", disk.overlay)
        if json.loads(run_tool(argv)).get("dirty-flag", True):
            raise NotCleanError(
                f"QEMU was ended before it had written all of the clone's disk {disk.target}",
                remedy="see /var/log/libvirt/qemu for the clone's log, and the host's for the OOM killer",
            )
        with translated_os(f"open the overlay {disk.overlay}"):
            descriptor = os.open(disk.overlay, os.O_RDONLY | os.O_CLOEXEC)
        try:
            put_on_disk(descriptor)
        except OSError as error:
            raise NotCleanError(
                f"the host could not write all of the clone's disk {disk.target}: {error.strerror}",
                remedy="see the host's kernel log, and the room on what holds the overlays (capture.overlay_dir)",
            ) from error
        finally:
            os.close(descriptor)


def is_below(path: str, *, overlay: str) -> bool:
    """Tell whether an image stands on an overlay, directly or over others. Raises ToolError where it cannot be told."""
    if not Path(overlay).exists():
        return False
    argv = ("qemu-img", "info", "-U", "--backing-chain", "--output=json", path)
    chain = json.loads(run_tool(argv))
    return any(overlay in (image["filename"], image.get("full-backing-filename")) for image in chain)


# QEMU locks bytes of an image it has open (block/file-posix.c): 100 + n while it uses permission n, 200 + n while it
# denies it to others.
_QEMU_LOCKS = range(100, 300)
# struct flock of 64-bit Linux: type, whence, start, length, pid.
_FLOCK = struct.Struct("hhqqi4x")


def is_open(path: str) -> bool:
    """Tell whether a QEMU, or a tool of its, has an image open, whatever libvirt knows of it. Raises DriverError."""
    if not Path(path).exists():
        return False
    with translated_os(f"ask who has {path} open"):
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _QEMU_LOCKS.start, len(_QEMU_LOCKS), 0)
            kind, *_ = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, asked))
        finally:
            os.close(descriptor)
    return bool(kind != fcntl.F_UNLCK)
