"""Copies of the source's frozen disks that share their blocks (reflinks): the clone is over them, production goes home.

A copy lies beside its disk, and so does what a qcow2 disk names by a relative path. It is filled while the disk is
read-only under the source's overlay, so it is of the instant of the capture.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import re
import shutil
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from vmsnap.errors import DriverError, NoSpaceError, PreconditionError
from vmsnap.hypervisors.libvirt.tools import run_tool, translated_os
from vmsnap.linux import reflink
from vmsnap.model.capture import CaptureMode, CapturePlan, CaptureSettings, Detach, DiskSnapshot, OnNoConvergence
from vmsnap.model.guest import Disk, DiskKind, Finding, Guest, Severity
from vmsnap.model.ids import RunId
from vmsnap.model.journal import Resource, ResourceKind

_NAME = re.compile(r"vmsnap-(?P<run>[0-9a-f]{10})-(?P<target>[A-Za-z0-9]+)\.base\Z")
# linux/fs.h. btrfs shares blocks only between files that have this flag, or between files that have not.
_GET_FLAGS = 0x80086601
_SET_FLAGS = 0x40086602
_NO_COW = 0x00800000
_NO_REFLINK = frozenset({errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOSYS, errno.EXDEV})


class CopyDetail(BaseModel):
    """One copy as the journal keeps it. ``remove``: the command that removes it, empty for a file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: str
    path: str
    disk: str
    remove: tuple[str, ...] = ()


class CopiesDetail(BaseModel):
    """All copies of one run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    copies: tuple[CopyDetail, ...]


def parse_name(path: str) -> tuple[RunId, str] | None:
    """Return run and target from a copy's file name, or None for any other file."""
    match = _NAME.match(Path(path).name)
    return None if match is None else (RunId(match["run"]), match["target"])


def path_of(plan: CapturePlan, disk: Disk) -> Path:
    """Return where a disk's copy lies: beside it, or where the policy says that its storage shows snapshots."""
    name = f"vmsnap-{plan.run}-{disk.target}.base"
    folder, own = Path(disk.source).parent, Path(disk.source).name
    if plan.settings.storage is None:
        return folder / name
    path = plan.settings.storage.path
    return Path(path.replace("{folder}", str(folder)).replace("{disk}", own).replace("{name}", name))


def describe(plan: CapturePlan) -> CopiesDetail:
    """Return the copies of a plan."""
    return CopiesDetail(
        copies=tuple(
            CopyDetail(
                target=disk.target,
                path=str(path_of(plan, disk)),
                disk=disk.source,
                remove=_filled(plan, disk=disk.source, path=str(path_of(plan, disk))),
            )
            for disk in plan.guest.disks
        )
    )


def _filled(plan: CapturePlan, *, disk: str, path: str) -> tuple[str, ...]:
    if plan.settings.storage is None:
        return ()
    return filled(plan.settings.storage.remove, source=disk, snapshot=path)


def filled(template: tuple[str, ...], *, source: str, snapshot: str) -> tuple[str, ...]:
    """Return a command of the policy with its placeholders replaced."""
    return tuple(word.replace("{source}", source).replace("{snapshot}", snapshot) for word in template)


def resource(run: RunId, *, guest: str, detail: tuple[CopyDetail, ...]) -> Resource:
    """Return the resource of a run's copies."""
    return Resource(
        kind=ResourceKind.DISK_COPIES,
        run=run,
        guest=guest,
        name=f"copies of the disks of {guest}",
        detail=CopiesDetail(copies=detail).model_dump_json(),
    )


def obstacle(disk: Disk) -> str | None:
    """Return why a disk cannot be copied by reflink, or None. Leaves nothing."""
    if disk.kind is not DiskKind.FILE:
        return f"disk {disk.target} is a block device"
    folder = Path(disk.source).parent
    try:
        if Path(disk.source).stat().st_dev != folder.stat().st_dev:
            return f"disk {disk.target} is a link to another file system"
        if not reflink.can_reflink(folder):
            return f"the file system of disk {disk.target} ({folder}) has no reflinks"
    except OSError as error:
        return f"{folder} of disk {disk.target} cannot be used: {error.strerror}"
    return None


def _obstacles(guest: Guest, *, settings: CaptureSettings, mode: CaptureMode) -> tuple[str, ...]:
    if may_be_instant(settings, mode):
        return ("in mode instant the clone opens its disks before the capture",)
    return tuple(reason for disk in guest.disks if (reason := obstacle(disk)) is not None)


def may_be_instant(settings: CaptureSettings, mode: CaptureMode) -> bool:
    """Tell whether a capture in this mode may become one in mode ``instant``."""
    falls_back = mode is CaptureMode.LIVE and settings.on_no_convergence is OnNoConvergence.INSTANT
    return mode is CaptureMode.INSTANT or falls_back


def settle(guest: Guest, *, settings: CaptureSettings, mode: CaptureMode) -> Detach:
    """Return what the policy's choice comes to: ``auto`` is ``reflink`` where every disk can be copied so."""
    if settings.disk_snapshot is DiskSnapshot.STORAGE:
        return Detach.LATE
    if settings.detach is not Detach.AUTO:
        return settings.detach
    return Detach.LATE if _obstacles(guest, settings=settings, mode=mode) else Detach.REFLINK


def check(guest: Guest, *, settings: CaptureSettings, mode: CaptureMode) -> Finding:
    """Say when production leaves its overlays, and refuse what the policy insists on and the host cannot do."""
    at_once = "production is back on its own disks at once, the clone is on copies by reflink"
    late = "production is on overlays until the clone's disks are stored"
    obstacles = () if settings.detach is Detach.LATE else _obstacles(guest, settings=settings, mode=mode)
    if settings.detach is Detach.REFLINK and obstacles:
        return Finding(
            check="detach",
            severity=Severity.REFUSAL,
            message=f"production cannot go home at once: {'; '.join(obstacles)}",
            remedy='set capture.detach = "auto"; disks have to be on XFS (reflink=1), btrfs or ZFS 2.2, the mode not instant',
        )
    why = f": {'; '.join(obstacles)}" if obstacles else ""
    message = late + why if obstacles or settings.detach is Detach.LATE else at_once
    return Finding(check="detach", severity=Severity.OK, message=message)


def free_bytes(detail: CopiesDetail) -> int:
    """Return the least room on any file system of the copies: what production rewrites takes room of its own there."""
    with translated_os("look at the room for copies"):
        return min(shutil.disk_usage(Path(copy.path).parent).free for copy in detail.copies)


def create(detail: CopiesDetail, *, min_free_bytes: int) -> None:
    """Make the copies, empty: of the disk's owner, readable for it alone. Existing ones are made anew.

    Raises NoSpaceError, PreconditionError, DriverError.
    """
    if free_bytes(detail) < min_free_bytes:
        raise NoSpaceError(
            "the file system of the guest's disks has too little room for what production rewrites during a run",
            remedy='make room, lower capture.min_overlay_free_mib, or set capture.detach = "late"',
        )
    for copy in detail.copies:
        with translated_os(f"make {copy.path}"):
            _create(copy)


def _create(copy: CopyDetail) -> None:
    path = Path(copy.path)
    # Made anew, not cut short: on btrfs the flag below can be changed only while nothing was ever written.
    path.unlink(missing_ok=True)
    disk = os.open(copy.disk, os.O_RDONLY)
    try:
        made = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600)
        try:
            _take_over_no_cow(disk=disk, made=made)
            owner = os.fstat(disk)
            os.fchown(made, owner.st_uid, owner.st_gid)
        finally:
            os.close(made)
    finally:
        os.close(disk)


def _take_over_no_cow(*, disk: int, made: int) -> None:
    before, wanted = _flags(disk), _flags(made)
    if before is None or wanted is None or (before ^ wanted) & _NO_COW == 0:
        return
    fcntl.ioctl(made, _SET_FLAGS, array.array("l", [wanted ^ _NO_COW]), True)


def _flags(descriptor: int) -> int | None:
    flags = array.array("l", [0])
    try:
        fcntl.ioctl(descriptor, _GET_FLAGS, flags, True)
    except OSError as error:
        if error.errno in (errno.ENOTTY, errno.EOPNOTSUPP):
            return None
        raise
    return flags[0]


def fill(detail: CopiesDetail) -> None:
    """Let each copy share its disk's blocks. The disks must be read-only now. Raises PreconditionError, DriverError.

    Nothing is put on the disk: a copy is of no use to anybody after a power cut.
    """
    for copy in detail.copies:
        with translated_os(f"copy {copy.disk} by reflink"):
            disk = os.open(copy.disk, os.O_RDONLY)
            try:
                made = os.open(copy.path, os.O_WRONLY | os.O_NOFOLLOW)
                try:
                    reflink.clone(source=disk, target=made)
                except OSError as error:
                    if error.errno in _NO_REFLINK:
                        raise PreconditionError(
                            f"disk {copy.target} cannot be copied by reflink: {error.strerror}",
                            remedy='set capture.detach = "late"',
                        ) from error
                    raise
                finally:
                    os.close(made)
            finally:
                os.close(disk)


def delete(detail: CopiesDetail) -> None:
    """Remove the copies. Content where they are gone. Raises DriverError."""
    for copy in detail.copies:
        if copy.remove:
            _remove_by_command(copy)
            continue
        if parse_name(copy.path) is None:
            raise DriverError(f"{copy.path} does not bear the name of a copy of vmsnap and is left alone")
        try:
            Path(copy.path).unlink(missing_ok=True)
        except OSError as error:
            raise DriverError(f"{copy.path} could not be removed: {error.strerror}") from error


def _remove_by_command(copy: CopyDetail) -> None:
    if not Path(copy.path).exists():
        return
    run_tool(copy.remove)
    if Path(copy.path).exists():
        raise DriverError(
            f"{copy.remove[0]} reported success, and {copy.path} is still there",
            remedy="correct capture.storage.remove, and remove the snapshot by hand",
        )
