"""``ExportFolders``: disks of a snapshot as files in a folder that an operator names, whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from vmsnap.disks.tools import run_tool
from vmsnap.errors import NoSpaceError, PreconditionError
from vmsnap.linux.reflink import clone
from vmsnap.model.ids import RunId
from vmsnap.model.journal import Resource, ResourceKind
from vmsnap.ports.clock import Cancel

_LONGEST = timedelta(hours=24)
_STEP = 8 << 20


class LocalFolders:
    """Exports into folders of this host. Files in the making are ``.vmsnap-RUN-NAME``."""

    @property
    def kinds(self) -> frozenset[ResourceKind]:
        """Return the kinds of resource that this owner releases."""
        return frozenset({ResourceKind.EXPORTED_FILES})

    def resource(self, run: RunId, *, guest: str, folder: Path) -> Resource:
        """Name what a run has in the folder that is not whole yet."""
        return Resource(kind=ResourceKind.EXPORTED_FILES, run=run, guest=guest, name=str(folder.absolute()))

    def begin(self, resource: Resource, *, names: tuple[str, ...]) -> None:
        """Make the folder where it is not there. Raises PreconditionError where it has a file of one of the names."""
        folder = Path(resource.name)
        with _translated(folder):
            folder.mkdir(exist_ok=True)
        for name in names:
            _refuse_if_there(folder / name)

    def draft(self, resource: Resource, *, name: str) -> Path:
        """Return the path where a file is to be made that will have that name."""
        return Path(resource.name) / f".vmsnap-{resource.run}-{name}"

    def copy(self, source: Path, *, draft: Path) -> None:
        """Copy a raw image, sharing its blocks where the file system can, holes as holes."""
        with _translated(draft), source.open("rb") as data, draft.open("xb") as file:
            size = os.fstat(data.fileno()).st_size
            try:
                clone(source=data.fileno(), target=file.fileno())
            except OSError:
                _copy_data(data.fileno(), target=file.fileno(), size=size)
            os.ftruncate(file.fileno(), size)

    def convert(self, source: Path, *, draft: Path, cancel: Cancel) -> None:
        """Make a qcow2 image of a raw one. Raises ToolError."""
        cancel.check()
        run_tool(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(source), str(draft)], timeout=_LONGEST)

    def finish(self, resource: Resource, *, name: str) -> Path:
        """Put a file on the disk and give it its name. Raises PreconditionError where there is one of that name."""
        draft, path = self.draft(resource, name=name), Path(resource.name) / name
        with _translated(path):
            descriptor = os.open(draft, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            try:
                os.link(draft, path)
            except FileExistsError:
                _refuse_if_there(path)
            except OSError:  # a file system without hard links
                _refuse_if_there(path)
                draft.rename(path)
            draft.unlink(missing_ok=True)
        return path

    def release(self, resource: Resource, *, deadline: timedelta) -> None:
        """Remove what is not whole; files that have their names stay."""
        del deadline
        folder = Path(resource.name)
        with _translated(folder):
            for path in folder.glob(f".vmsnap-{resource.run}-*"):
                path.unlink(missing_ok=True)

    def owned(self) -> tuple[Resource, ...]:
        """Return nothing: the folders are the operators', and the journal knows them."""
        return ()


def _copy_data(source: int, *, target: int, size: int) -> None:
    """Copy a file's data; what is a hole stays one. Raises OSError."""
    position = 0
    while position < size:
        try:
            start = os.lseek(source, position, os.SEEK_DATA)
        except OSError:
            return  # nothing but a hole is left
        position = min(os.lseek(source, start, os.SEEK_HOLE), size)
        while start < position:
            os.lseek(target, start, os.SEEK_SET)
            start += os.sendfile(target, source, start, min(_STEP, position - start))


def _refuse_if_there(path: Path) -> None:
    if path.exists():
        raise PreconditionError(f"{path} is there already", remedy="name another folder, or remove the file")


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise NoSpaceError(f"no space left to write {path}", remedy="name a folder with more room") from error
        raise PreconditionError(
            f"cannot write {path}: {error.strerror or error}", remedy="name a folder that vmsnap may write"
        ) from error
