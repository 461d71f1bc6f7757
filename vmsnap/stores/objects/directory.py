"""``ObjectStore`` in a directory: a file for each object, written beside its place and renamed into it.

A copy of the directory is a copy of the replica. Where the operating system dies, what a call returned for is there. The
conditions of ``put_new`` and ``replace`` are held by one lock for all processes of all hosts that share the directory, so a
network file system has to have locks (NFS 4 has). There are no retention locks: ``retain`` does nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from vmsnap.errors import BugError, DriverError, ObjectConflictError, ObjectNotFoundError, VmsnapError
from vmsnap.model.guest import Finding, Severity
from vmsnap.ports.objects import ObjectInfo, StoredObject
from vmsnap.stores.layout import disk_failure, free_bytes, sync_folder

_NAME = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*\Z")
_DRAFT = ".draft-"
_DRAFT_LASTS_SECONDS = 24 * 3600
_LOCK = ".lock"
_REMEDY = "is the replica's directory mounted, and may vmsnap read and write it?"


class DirectoryObjects:
    """Keeps objects below ``root``, which must be there."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._guard = threading.Lock()
        self._folders: set[Path] = set()

    def findings(self) -> tuple[Finding, ...]:
        """Look whether the directory is there and can be read and written. Changes nothing."""
        try:
            usable = self._root.is_dir() and os.access(self._root, os.R_OK | os.W_OK | os.X_OK)
            free = free_bytes(self._root) if usable else 0
        except OSError as error:
            return (self._refusal(error.strerror or str(error)),)
        if not usable:
            return (self._refusal("it is no directory that vmsnap may read and write"),)
        message = f"the directory {self._root} can be used, {free:,} bytes are free"
        return (Finding(check="replica", severity=Severity.OK, message=message),)

    def _refusal(self, why: str) -> Finding:
        message = f"the replica's directory {self._root} cannot be used: {why}"
        return Finding(check="replica", severity=Severity.REFUSAL, message=message, remedy=_REMEDY)

    def put(self, name: str, *, data: bytes, retain_until: datetime | None = None) -> ObjectInfo:  # noqa: ARG002
        """Write an object, over one of that name where there is one."""
        path = self._path(name)
        with self._translated(f"write {name}"):
            return self._write(path, name=name, data=data)

    def put_new(self, name: str, *, data: bytes, retain_until: datetime | None = None) -> ObjectInfo:  # noqa: ARG002
        """Write an object that must not be there yet. Raises ObjectConflictError where it is."""
        path = self._path(name)
        with self._translated(f"write {name}"), self._alone():
            if path.is_file():
                raise ObjectConflictError(f"there is an object {name} already", remedy="read it, or use another name")
            return self._write(path, name=name, data=data)

    def replace(self, name: str, *, data: bytes, version: str) -> ObjectInfo:
        """Write an object over the one of that version. Raises ObjectConflictError where it is another, or gone."""
        path = self._path(name)
        with self._translated(f"write {name}"), self._alone():
            try:
                found = _version(path.stat())
            except (FileNotFoundError, NotADirectoryError):
                found = None
            if found != version:
                raise ObjectConflictError(
                    f"the object {name} was changed or removed by somebody else", remedy="read it again"
                )
            return self._write(path, name=name, data=data)

    def get(self, name: str) -> StoredObject:
        """Read a whole object."""
        with self._translated(f"read {name}"), self._opened(name) as descriptor:
            with os.fdopen(os.dup(descriptor), "rb") as file:
                data = file.read()
            return StoredObject(info=_info(name, status=os.fstat(descriptor)), data=data)

    def get_range(self, name: str, *, offset: int, length: int) -> bytes:
        """Read a part of an object. Raises DriverError where the object ends before."""
        with self._translated(f"read {name}"), self._opened(name) as descriptor:
            data = os.pread(descriptor, length, offset)
            while data and len(data) < length:
                part = os.pread(descriptor, length - len(data), offset + len(data))
                if not part:
                    break
                data += part
            if len(data) < length:
                raise DriverError(
                    f"the object {name} ends at byte {offset + len(data)}, before byte {offset + length}",
                    remedy="run 'vmsnap verify --replica'",
                )
            return data

    def info(self, name: str) -> ObjectInfo:
        """Describe an object without reading it."""
        with self._translated(f"look at {name}"), self._opened(name) as descriptor:
            return _info(name, status=os.fstat(descriptor))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield the objects whose names begin so, in the order of their names."""
        with self._translated(f"list {prefix or 'everything'}"):
            yield from self._below(self._root, prefix="", wanted=prefix)

    def _below(self, folder: Path, *, prefix: str, wanted: str) -> Iterator[ObjectInfo]:
        try:
            with os.scandir(folder) as entries:
                # A folder counts with its slash: 'a.b' comes before 'a/b', as names are ordered.
                found = sorted((f"{entry.name}/" if entry.is_dir() else entry.name, entry) for entry in entries)
        except (FileNotFoundError, NotADirectoryError):
            return
        for key, entry in found:
            name = prefix + key
            if key.endswith("/"):
                if name.startswith(wanted) or wanted.startswith(name):
                    yield from self._below(Path(entry.path), prefix=name, wanted=wanted)
            elif key.startswith(_DRAFT):
                _sweep(entry)
            elif name.startswith(wanted) and name != _LOCK:
                with contextlib.suppress(FileNotFoundError):  # removed just now
                    yield _info(name, status=entry.stat())

    def delete(self, name: str) -> None:
        """Remove an object. Content where it is gone."""
        path = self._path(name)
        with self._translated(f"remove {name}"), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
            sync_folder(path.parent)

    def retain(self, name: str, *, until: datetime) -> None:
        """Do nothing: a directory has no locks."""

    def _path(self, name: str) -> Path:
        parts = name.split("/")
        if not _NAME.match(name) or any(part in {".", ".."} or part.startswith(_DRAFT) for part in parts):
            raise BugError(f"{name!r} is no name of an object")
        return self._root.joinpath(*parts)

    @contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        try:
            descriptor = os.open(self._path(name), os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise self._missing(name) from error
        try:
            if not os.path.isfile(f"/proc/self/fd/{descriptor}"):  # noqa: PTH113 - of a descriptor
                raise self._missing(name)
            yield descriptor
        finally:
            os.close(descriptor)

    def _missing(self, name: str) -> VmsnapError:
        return ObjectNotFoundError(f"the replica has no object {name}", remedy="run 'vmsnap verify --replica'")

    def _write(self, path: Path, *, name: str, data: bytes) -> ObjectInfo:
        self._make_folder(path.parent)
        draft = path.with_name(f"{_DRAFT}{secrets.token_hex(8)}")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]
                # The file system's own times are too coarse to tell two quick writes apart.
                now = time.time_ns()
                os.utime(descriptor, ns=(now, now))
                os.fsync(descriptor)
                status = os.fstat(descriptor)
            try:
                draft.replace(path)
            except IsADirectoryError:
                path.rmdir()  # what was under this name is gone
                self._folders.discard(path)
                draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
        return _info(name, status=status)

    def _make_folder(self, folder: Path) -> None:
        if folder in self._folders:
            return
        missing = []
        while folder != self._root and not folder.is_dir():
            missing.append(folder)
            folder = folder.parent
        for each in reversed(missing):
            each.mkdir(mode=0o700, exist_ok=True)
            sync_folder(each.parent)
        self._folders.update(missing)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self._guard:
            descriptor = os.open(self._root / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                yield
            finally:
                os.close(descriptor)

    @contextmanager
    def _translated(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise disk_failure(error, doing=f"{doing} in {self._root}", folder=None) from error


def _sweep(draft: os.DirEntry[str]) -> None:
    """Remove what a writer left that died in mid-write, once nobody can be writing it any more."""
    with contextlib.suppress(OSError):
        if time.time() - draft.stat().st_mtime > _DRAFT_LASTS_SECONDS:
            Path(draft.path).unlink()


def _info(name: str, *, status: os.stat_result) -> ObjectInfo:
    return ObjectInfo(name=name, size_bytes=status.st_size, version=_version(status))


def _version(status: os.stat_result) -> str:
    """Return what differs between two contents of a name: each is a new file with a time of its own."""
    return hashlib.sha256(f"{status.st_ino} {status.st_mtime_ns} {status.st_size}".encode()).hexdigest()[:32]
