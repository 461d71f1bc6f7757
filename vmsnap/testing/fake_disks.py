"""Fakes of the disk ports: views over small sparse files, and an inspector that says what a test tells it.

They keep their state in memory and in one folder, so a test can let a workflow 'die' and reconcile with the same fakes.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path

from vmsnap.errors import PreconditionError
from vmsnap.model.capture import DiskImage
from vmsnap.model.drain import FileSystemState
from vmsnap.model.ids import RunId, folder_name, is_run_id
from vmsnap.model.journal import Resource, ResourceKind
from vmsnap.ports.disks import DiskView, Extent, FileContent, FileRequest

_STEP = 64 * 1024


class FakeDiskView:
    """A view of a file. Holes in the file are told as holes.

    ``own``: the stretches (offset, length) that the image holds itself; None: all of it.
    """

    def __init__(self, path: Path, *, target: str = "vda", own: tuple[tuple[int, int], ...] | None = None) -> None:
        self._path = path
        self._target = target
        self._own = own

    @staticmethod
    def make(
        path: Path,
        *,
        content: Mapping[int, bytes],
        size_bytes: int,
        target: str = "vda",
        own: tuple[tuple[int, int], ...] | None = None,
    ) -> FakeDiskView:
        """Write a sparse file of ``size_bytes`` with ``content`` (bytes by offset), and return its view."""
        with path.open("wb") as file:
            for offset, data in content.items():
                file.seek(offset)
                file.write(data)
            file.truncate(size_bytes)
        return FakeDiskView(path, target=target, own=own)

    @property
    def target(self) -> str:
        """Return the disk's name in its guest."""
        return self._target

    @property
    def path(self) -> Path:
        """Return the file."""
        return self._path

    @property
    def size_bytes(self) -> int:
        """Return the file's size."""
        return self._path.stat().st_size

    def extents(self) -> Iterator[Extent]:
        """Yield the file's own stretches of data and holes, data in whole steps of 64 KiB."""
        size_bytes = self.size_bytes
        position = 0
        with self._path.open("rb") as file:
            while position < size_bytes:
                start, end = _next_data(file.fileno(), position=position, size_bytes=size_bytes)
                if start > position:
                    yield Extent(offset=position, length=start - position, data=False)
                if end > start:
                    yield Extent(offset=start, length=end - start, data=True)
                position = end

    def written(self) -> Iterator[tuple[int, int]]:
        """Yield what the image holds itself."""
        yield from ((0, self.size_bytes),) if self._own is None else self._own


class FakeDiskExport:
    """``DiskExport`` over files in ``folder``.

    What a disk holds comes from ``contents`` (bytes by offset, by the image's path); without an entry there it is one
    block that depends on the path alone. ``sizes`` overrides an image's size. ``own``: what every image holds itself.
    """

    def __init__(self, folder: Path, *, contents: Mapping[str, Mapping[int, bytes]] | None = None) -> None:
        self._folder = folder
        self.contents: dict[str, Mapping[int, bytes]] = dict(contents or {})
        self.sizes: dict[str, int] = {}
        self.own: tuple[tuple[int, int], ...] | None = None

    @property
    def kinds(self) -> frozenset[ResourceKind]:
        """Return the kinds of resource that this owner releases."""
        return frozenset({ResourceKind.EXPORT})

    def resource(self, run: RunId, *, guest: str) -> Resource:
        """Name the export."""
        return Resource(kind=ResourceKind.EXPORT, run=run, guest=guest, name=f"vmsnap-{run}-export")

    def open(self, run: RunId, *, images: tuple[DiskImage, ...]) -> tuple[DiskView, ...]:
        """Make the views, in the images' order."""
        folder = self._folder / run
        folder.mkdir(parents=True)
        return tuple(
            FakeDiskView.make(
                folder / f"{index}-{folder_name(image.target)}.raw",
                content=self.contents.get(image.path, _made_up(image.path)),
                size_bytes=self.sizes.get(image.path, image.size_bytes),
                target=image.target,
                own=self.own,
            )
            for index, image in enumerate(images)
        )

    def release(self, resource: Resource, *, deadline: timedelta) -> None:
        """Remove the views. Content where there are none."""
        del deadline
        shutil.rmtree(self._folder / resource.run, ignore_errors=True)

    def owned(self) -> tuple[Resource, ...]:
        """Return the exports that exist."""
        if not self._folder.is_dir():
            return ()
        runs = sorted(entry.name for entry in self._folder.iterdir() if is_run_id(entry.name))
        return tuple(self.resource(RunId(run), guest="") for run in runs)


class FakeDiskInspector:
    """``DiskInspector`` that answers from ``states`` (by disk) and ``files`` (by file system UUID and path).

    A disk without an entry in ``states`` has one clean ext4, whose UUID is ``uuid_of(target)``.
    """

    def __init__(self) -> None:
        self.states: dict[str, tuple[FileSystemState, ...]] = {}
        self.files: dict[tuple[str, str], bytes] = {}
        self.unreadable: set[str] = set()

    @staticmethod
    def uuid_of(target: str) -> str:
        """Return the UUID of the made-up file system on a disk."""
        digest = hashlib.sha256(target.encode()).hexdigest()
        return f"{digest[:8]}-{digest[8:12]}-{digest[12:16]}-{digest[16:20]}-{digest[20:32]}"

    def make_dirty(self, target: str, *, observed: str = "state clean, needs_recovery, 0 errors") -> None:
        """Let the made-up file system of a disk be dirty."""
        self.states[target] = (
            FileSystemState(disk=target, kind="ext4", uuid=self.uuid_of(target), clean=False, observed=observed),
        )

    def file_systems(self, views: tuple[DiskView, ...], *, timeout: timedelta) -> tuple[FileSystemState, ...]:
        """Return the states of all disks, in order."""
        del timeout
        return tuple(state for view in views for state in self._states_of(view.target))

    def read_files(
        self, views: tuple[DiskView, ...], *, requests: tuple[FileRequest, ...], timeout: timedelta
    ) -> tuple[FileContent, ...]:
        """Return what ``files`` says. Raises PreconditionError for a UUID on none of the disks or in ``unreadable``."""
        there = {state.uuid for state in self.file_systems(views, timeout=timeout)}
        for request in requests:
            if request.file_system_uuid not in there or request.file_system_uuid in self.unreadable:
                raise PreconditionError(f"the file system {request.file_system_uuid} cannot be read here")
        return tuple(
            FileContent(request=request, content=self.files.get((request.file_system_uuid, request.path)))
            for request in requests
        )

    def _states_of(self, target: str) -> tuple[FileSystemState, ...]:
        clean = FileSystemState(
            disk=target, kind="ext4", uuid=self.uuid_of(target), clean=True, observed="state clean, 0 errors"
        )
        return self.states.get(target, (clean,))


def _made_up(path: str) -> Mapping[int, bytes]:
    return {0: hashlib.sha256(path.encode()).digest() * 16}


def _next_data(descriptor: int, *, position: int, size_bytes: int) -> tuple[int, int]:
    try:
        start = os.lseek(descriptor, position, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return size_bytes, size_bytes
    end = os.lseek(descriptor, start, os.SEEK_HOLE)
    return max(position, start // _STEP * _STEP), min(size_bytes, -(-end // _STEP) * _STEP)
