"""Reading disk images without a second reader of their formats."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from vmsnap.model.capture import DiskImage
from vmsnap.model.drain import FileSystemState
from vmsnap.model.ids import RunId
from vmsnap.model.journal import Resource
from vmsnap.ports.owner import Owner


@dataclass(frozen=True, kw_only=True)
class Extent:
    """A stretch of a disk. ``data`` False: it reads as zeroes and need not be read."""

    offset: int
    length: int
    data: bool


class DiskView(Protocol):
    """One disk as a plain read-only file of its bytes."""

    @property
    def target(self) -> str:
        """Return the disk's name in its guest."""

    @property
    def path(self) -> Path:
        """Return a raw, read-only file with the disk's bytes, there until the export is closed."""

    @property
    def size_bytes(self) -> int:
        """Return the disk's size."""

    def extents(self) -> Iterator[Extent]:
        """Yield extents that cover the disk, in order, without gaps or overlaps."""

    def written(self) -> Iterator[tuple[int, int]]:
        """Yield the stretches (offset, length) that the image itself holds, in order: not what it stands on.

        They may be too many, never too few: elsewhere the disk is what the image stands on. All of it where that is nothing.
        """


class DiskExport(Owner, Protocol):
    """Makes views of images, whatever their format and chain."""

    def resource(self, run: RunId, *, guest: str) -> Resource:
        """Name the export."""

    def open(self, run: RunId, *, images: tuple[DiskImage, ...]) -> tuple[DiskView, ...]:
        """Make the views, in the images' order. The images must not change while they are open."""


@dataclass(frozen=True, kw_only=True)
class FileRequest:
    """A file of a guest, named by the UUID of its file system and its path from that file system's root."""

    file_system_uuid: str
    path: str


@dataclass(frozen=True, kw_only=True)
class FileContent:
    """What was found: ``content`` None where there is no such file."""

    request: FileRequest
    content: bytes | None


class DiskInspector(Protocol):
    """Looks into the file systems of disks, offline, without the host's kernel mounting them."""

    def file_systems(self, views: tuple[DiskView, ...], *, timeout: timedelta) -> tuple[FileSystemState, ...]:
        """Return the state of every file system found on the disks. Swap and empty partitions are left out.

        A kind whose state cannot be told is reported as not clean, with the reason in ``observed``.
        Raises ToolError.
        """

    def read_files(
        self, views: tuple[DiskView, ...], *, requests: tuple[FileRequest, ...], timeout: timedelta
    ) -> tuple[FileContent, ...]:
        """Read small files (up to 1 MiB). Raises PreconditionError for a file system that cannot be read here."""
