"""Places for clones, as locked files: the kernel frees a place when its process ends, however it ends.

``STATE/admissions/RUN.json`` says whose place it is and what it was promised. The file is a place only while its lock
(flock(2)) is held; what a dead process left is removed by the next that looks. One process looks at a time.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vmsnap.errors import BusyError
from vmsnap.model.admission import HostMemory, Place, refusal
from vmsnap.model.ids import RunId, is_run_id
from vmsnap.state.files import FILE_MODE, make_private_folder, translated, write_all

_PATIENCE_SECONDS = 30
_POLL_SECONDS = 0.05
FORMAT_VERSION = 1


class FileAdmissions:
    """The port ``Admissions`` over ``STATE/admissions``."""

    def __init__(self, state: Path, *, most: int) -> None:
        self._folder = state / "admissions"
        self._most = most

    @contextmanager
    def admitted(self, place: Place, *, look: Callable[[], HostMemory]) -> Iterator[None]:
        """Hold a place for a clone. Raises BusyError where there is none now."""
        descriptor = self._take(place, look=look)
        path = self._path(place.run)
        try:
            yield
        finally:
            try:
                with translated(doing="remove", path=path):
                    path.unlink(missing_ok=True)
            finally:
                os.close(descriptor)

    def _path(self, run: RunId) -> Path:
        return self._folder / f"{run}.json"

    def _take(self, place: Place, *, look: Callable[[], HostMemory]) -> int:
        """Return the descriptor that holds the place."""
        make_private_folder(self._folder)
        with self._alone():
            refused = refusal(place, held=tuple(self._held()), memory=look(), most=self._most)
            if refused is not None:
                raise BusyError(
                    f"there is no room for another clone on this host: {refused}",
                    remedy="wait until one has ended, raise clones_per_host in [limits], or add memory",
                )
            path = self._path(place.run)
            with translated(doing="write", path=path):
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    text = json.dumps(
                        {"version": FORMAT_VERSION, "guest": place.guest, "memory_bytes": place.memory_bytes}
                    )
                    write_all(descriptor, f"{text}\n".encode())
                except BaseException:
                    path.unlink(missing_ok=True)
                    os.close(descriptor)
                    raise
            return descriptor

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let one process look and decide at a time. It takes milliseconds, so the others wait."""
        path = self._folder / "lock"
        with translated(doing="open", path=path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
        try:
            until = time.monotonic() + _PATIENCE_SECONDS
            while not _locked(descriptor):
                if time.monotonic() > until:
                    raise BusyError("another process has been looking for a place for its clone for long")
                time.sleep(_POLL_SECONDS)
            yield
        finally:
            os.close(descriptor)

    def _held(self) -> Iterator[Place]:
        """Return the places that living processes hold; remove what others left. A damaged file holds no memory."""
        for path in sorted(self._folder.glob("*.json")):
            if not is_run_id(path.stem):
                continue
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                if _locked(descriptor):
                    path.unlink(missing_ok=True)
                    continue
                yield _read(descriptor, run=RunId(path.stem))
            finally:
                os.close(descriptor)


def _locked(descriptor: int) -> bool:
    """Tell whether this process got the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(descriptor: int, *, run: RunId) -> Place:
    try:
        said = json.loads(os.pread(descriptor, 4096, 0))
        return Place(run=run, guest=str(said["guest"]), memory_bytes=int(said["memory_bytes"]))
    except (ValueError, KeyError, TypeError):
        return Place(run=run, guest="another guest", memory_bytes=0)
