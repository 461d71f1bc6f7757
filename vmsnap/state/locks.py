"""Locks as flock(2) on files: the kernel frees them when their process ends, however it ends.

What a lock file says (who, what for, since when) is for messages only. It may be stale; it is never the lock.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vmsnap.errors import BusyError
from vmsnap.model.ids import folder_name
from vmsnap.ports.clock import Clock
from vmsnap.state.files import FILE_MODE, make_private_folder, translated, write_all

FORMAT_VERSION = 1


class FileLocks:
    """The port ``Locks`` over ``STATE/locks``. Descriptors are close-on-exec, so no child keeps a lock alive."""

    def __init__(self, state: Path, *, clock: Clock) -> None:
        self._folder = state / "locks"
        self._clock = clock

    @contextmanager
    def guest(self, guest: str, *, purpose: str) -> Iterator[None]:
        """Hold a guest. Raises BusyError that names who holds it and what for."""
        with self._held(f"guest-{folder_name(guest)}", what=f"guest '{guest}'", purpose=purpose):
            yield

    @contextmanager
    def reconcile(self) -> Iterator[None]:
        """Hold reconciling, one process at a time. Raises BusyError."""
        with self._held("reconcile", what="reconciling", purpose="reconcile"):
            yield

    @contextmanager
    def schedule(self, *, purpose: str = "run --due") -> Iterator[None]:
        """Hold the starting of due runs, one process at a time. Raises BusyError that names who holds it."""
        with self._held("schedule", what="the starting of due runs", purpose=purpose):
            yield

    @contextmanager
    def daemon(self) -> Iterator[None]:
        """Hold being the daemon of this state directory. Raises BusyError that names who holds it."""
        with self._held("daemon", what="the place of the daemon", purpose="daemon"):
            yield

    @contextmanager
    def alarms(self) -> Iterator[None]:
        """Hold the ledger of alarms, one process at a time. Raises BusyError that names who holds it."""
        with self._held("alarms", what="the ledger of alarms", purpose="alarms"):
            yield

    @contextmanager
    def _held(self, name: str, *, what: str, purpose: str) -> Iterator[None]:
        make_private_folder(self._folder)
        path = self._folder / f"{name}.lock"
        with translated(doing="open", path=path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
        try:
            self._take(descriptor, path=path, what=what)
            try:
                self._describe(descriptor, path=path, purpose=purpose)
                yield
            finally:
                # Emptied while still held, so that the next holder's rivals never read our name.
                os.ftruncate(descriptor, 0)
        finally:
            os.close(descriptor)

    def _take(self, descriptor: int, *, path: Path, what: str) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(
                f"{what} is held by {_holder(descriptor)}", remedy="wait until it is done and try again"
            ) from error
        except OSError as error:
            raise BusyError(
                f"cannot lock '{path}': {error.strerror}", remedy="put [state] path on a local file system"
            ) from error

    def _describe(self, descriptor: int, *, path: Path, purpose: str) -> None:
        text = json.dumps(
            {
                "version": FORMAT_VERSION,
                "pid": os.getpid(),
                "purpose": purpose,
                "since": self._clock.now().isoformat(timespec="seconds"),
            }
        )
        with translated(doing="write", path=path):
            os.ftruncate(descriptor, 0)
            write_all(descriptor, f"{text}\n".encode())


def _holder(descriptor: int) -> str:
    """Return who holds a lock, as far as its file tells."""
    try:
        said = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {int(said['pid'])} for {said['purpose']}, since {said['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
