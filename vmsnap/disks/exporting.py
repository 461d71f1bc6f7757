"""``ExportFolders``: disks of a snapshot as files in a folder that an operator names, whole or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from vmsnap.disks.tools import environment, failure, missing
from vmsnap.errors import NoSpaceError, PreconditionError
from vmsnap.linux.reflink import clone
from vmsnap.linux.writeback import put_on_disk
from vmsnap.model.ids import RunId
from vmsnap.model.journal import Resource, ResourceKind
from vmsnap.ports.clock import Cancel

_POLL_SECONDS = 0.2
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

    def create(self, draft: Path, *, size_bytes: int) -> None:
        """Make a file that is all holes, and that nobody but its owner may read: it holds a guest's data."""
        with _translated(draft):
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                os.ftruncate(descriptor, size_bytes)
            finally:
                os.close(descriptor)

    def copy(self, source: Path, *, draft: Path, cancel: Cancel) -> None:
        """Copy a raw image, sharing its blocks where the file system can, holes as holes."""
        self.create(draft, size_bytes=source.stat().st_size)
        with _translated(draft), source.open("rb") as data, draft.open("r+b") as file:
            try:
                clone(source=data.fileno(), target=file.fileno())
            except OSError:
                _copy_data(data.fileno(), target=file.fileno(), cancel=cancel)

    def convert(self, source: Path, *, draft: Path, cancel: Cancel) -> None:
        """Make a qcow2 image of a raw one. Raises ToolError."""
        self.create(draft, size_bytes=0)  # whose mode stays
        command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(source), str(draft)]
        try:
            program = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment()
            )
        except FileNotFoundError as error:
            raise missing(command[0]) from error
        try:
            complaint = _said_until_end(program, cancel=cancel)
        finally:
            program.kill()
            program.wait()
        if program.returncode != 0:
            raise failure(command, status=program.returncode, complaint=complaint)

    def finish(self, resource: Resource, *, name: str) -> Path:
        """Put a file on the disk and give it its name. Raises PreconditionError where there is one of that name."""
        draft, path = self.draft(resource, name=name), Path(resource.name) / name
        with _translated(path):
            descriptor = os.open(draft, os.O_RDONLY)
            try:
                put_on_disk(descriptor)
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


def _said_until_end(program: subprocess.Popen[bytes], *, cancel: Cancel) -> str:
    """Wait for a program, and return what it wrote to its standard error. Raises CancelledError."""
    while True:
        cancel.check()
        try:
            return program.communicate(timeout=_POLL_SECONDS)[1].decode("utf-8", "replace").strip()
        except subprocess.TimeoutExpired:
            continue


def _copy_data(source: int, *, target: int, cancel: Cancel) -> None:
    """Copy a file's data; what is a hole stays one. Raises OSError, CancelledError."""
    position, size = 0, os.fstat(source).st_size
    while position < size:
        try:
            start = os.lseek(source, position, os.SEEK_DATA)
        except OSError:
            return  # nothing but a hole is left
        position = min(os.lseek(source, start, os.SEEK_HOLE), size)
        while start < position:
            cancel.check()
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
