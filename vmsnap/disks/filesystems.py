"""Looking into the file systems of disks without the host's kernel mounting them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

from vmsnap.disks import btrfs, ext, fat, ntfs, xfs
from vmsnap.disks.probe import AMBIVALENT, Partition, of_whole_disk, partitions, signature
from vmsnap.disks.tools import Deadline
from vmsnap.disks.verdict import Verdict
from vmsnap.disks.window import window
from vmsnap.errors import DriverError, PreconditionError
from vmsnap.model.drain import FileSystemState
from vmsnap.ports.disks import DiskView, FileContent, FileRequest

_LEFT_OUT = frozenset({"swap"})
_READ_ONLY_KINDS = frozenset({"iso9660", "squashfs", "erofs"})
_UNREADABLE = {
    "LVM2_member": "LVM: cannot be read from the host",
    "crypto_LUKS": "LUKS: cannot be read from the host",
    "linux_raid_member": "software RAID: cannot be read from the host",
    "zfs_member": "ZFS: cannot be read from the host",
    "swsuspend": "a hibernated system: it was not shut down",
    AMBIVALENT: "several signatures contradict each other",
    "": "data without a known file system",
}
_READ_STEP = 4 << 20


@dataclass(frozen=True, kw_only=True)
class _Volume:
    view: DiskView
    partition: Partition
    kind: str
    uuid: str


class OfflineInspector:
    """``DiskInspector`` over e2fsprogs, xfsprogs, btrfs-progs and util-linux; FAT and NTFS it reads itself. It mounts nothing."""

    def file_systems(self, views: tuple[DiskView, ...], *, timeout: timedelta) -> tuple[FileSystemState, ...]:
        """Return the state of every file system found on the disks. Swap and empty partitions are left out.

        A kind whose state cannot be told is reported as not clean, with the reason in ``observed``.
        Raises ToolError.
        """
        deadline = Deadline(timeout)
        return tuple(
            _report(volume, verdict=_judge(volume, deadline=deadline))
            for view in views
            for volume in _volumes(view, deadline=deadline)
        )

    def read_files(
        self, views: tuple[DiskView, ...], *, requests: tuple[FileRequest, ...], timeout: timedelta
    ) -> tuple[FileContent, ...]:
        """Read small files (up to 1 MiB). Raises PreconditionError for a file system that cannot be read here."""
        deadline = Deadline(timeout)
        volumes = [volume for view in views for volume in _volumes(view, deadline=deadline)]
        contents = []
        for request in requests:
            volume = _find(volumes, request=request)
            contents.append(FileContent(request=request, content=_read(volume, path=request.path, deadline=deadline)))
        return tuple(contents)


def _volumes(view: DiskView, *, deadline: Deadline) -> Iterator[_Volume]:
    whole = Partition(name="whole disk", offset=0, length=view.size_bytes)
    found = of_whole_disk(signature(view.path, offset=0, length=view.size_bytes, deadline=deadline))
    parts = partitions(view.path, deadline=deadline) if found.table else (whole,)
    for part in parts:
        length = min(part.length, view.size_bytes - part.offset)
        if length <= 0:
            continue
        part_found = (
            found if part is whole else signature(view.path, offset=part.offset, length=length, deadline=deadline)
        )
        if part_found.kind in _LEFT_OUT or (not part_found.kind and _is_empty(view, part)):
            continue
        yield _Volume(view=view, partition=part, kind=part_found.kind, uuid=part_found.uuid)


def _is_empty(view: DiskView, partition: Partition) -> bool:
    end = partition.offset + partition.length
    with view.path.open("rb") as disk:
        for extent in view.extents():
            position, stop = max(extent.offset, partition.offset), min(extent.offset + extent.length, end)
            while extent.data and position < stop:
                disk.seek(position)
                data = disk.read(min(_READ_STEP, stop - position))
                if not data or data.count(0) != len(data):
                    return False
                position += len(data)
    return True


def _judge(volume: _Volume, *, deadline: Deadline) -> Verdict:
    view, part = volume.view, volume.partition
    if volume.kind in ext.KINDS:
        return ext.state(view.path, offset=part.offset, deadline=deadline)
    if volume.kind in _READ_ONLY_KINDS:
        return Verdict(clean=True, observed="never written to")
    if volume.kind in {fat.KIND, ntfs.KIND}:
        judge = fat.state if volume.kind == fat.KIND else ntfs.state
        try:
            return judge(view.path, offset=part.offset)
        except OSError as error:
            raise DriverError(f"disk {view.target} cannot be read: {error.strerror}") from error
    if volume.kind in {xfs.KIND, btrfs.KIND}:
        with window(view, offset=part.offset, length=part.length, deadline=deadline) as image:
            if volume.kind == xfs.KIND:
                return xfs.state(image, deadline=deadline)
            return btrfs.state(image, deadline=deadline)
    return Verdict(clean=False, observed=_UNREADABLE.get(volume.kind, f"{volume.kind}: its state cannot be told here"))


def _report(volume: _Volume, *, verdict: Verdict) -> FileSystemState:
    return FileSystemState(
        disk=volume.view.target,
        kind=volume.kind or "unknown",
        uuid=volume.uuid,
        clean=verdict.clean,
        observed=f"{volume.partition.name}: {verdict.observed}",
    )


def _find(volumes: list[_Volume], *, request: FileRequest) -> _Volume:
    matching = [volume for volume in volumes if volume.uuid and volume.uuid.lower() == request.file_system_uuid.lower()]
    if len(matching) == 1:
        return matching[0]
    found = ", ".join(f"{volume.view.target} {volume.kind} {volume.uuid}" for volume in volumes) or "none"
    reason = "is on none of the disks" if not matching else f"is on {len(matching)} of them"
    raise PreconditionError(
        f"the file system {request.file_system_uuid} {reason}",
        details=f"file systems found: {found}",
        remedy="a file system inside LVM or LUKS, or on a disk that is not backed up, cannot be read from the host",
    )


def _read(volume: _Volume, *, path: str, deadline: Deadline) -> bytes | None:
    view, part = volume.view, volume.partition
    if volume.kind in ext.KINDS:
        return ext.read_file(view.path, offset=part.offset, path=path, deadline=deadline)
    if volume.kind == xfs.KIND:
        with window(view, offset=part.offset, length=part.length, deadline=deadline) as image:
            return xfs.read_file(image, path=path, deadline=deadline)
    if volume.kind == ntfs.KIND:
        return ntfs.read_file(view.path, offset=part.offset, path=path)
    raise PreconditionError(
        f"files on {volume.kind} (disk {view.target}, {part.name}) cannot be read here",
        remedy="ext2, ext3, ext4, XFS and NTFS can; let the engine's reading inside the clone be the evidence",
    )
