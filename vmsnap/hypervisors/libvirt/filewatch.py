"""Seeing when other programs open and close files, without touching the files: inotify(7)."""

from __future__ import annotations

import ctypes
import os
import select
import struct
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

from vmsnap.hypervisors.libvirt.pauses import Mark

# linux/inotify.h
_ATTRIB = 0x004
_CLOSE = 0x018
_OPEN = 0x020
_EVENT = struct.Struct("iIII")
_BUFFER_BYTES = 65536
_libc = ctypes.CDLL(None, use_errno=True)
_libc.inotify_init1.argtypes = (ctypes.c_int,)
_libc.inotify_add_watch.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32)


class FileWatch:
    """Notes, while the block runs, when one of the files (path to the part of a pause it belongs to) is opened or closed.

    The moments are those at which this process heard of it: a millisecond late, more on a busy host. Where the system has no
    inotify to give, nothing is noted.
    """

    def __init__(self, files: Mapping[str, str]) -> None:
        self._files = files
        self._parts: dict[int, str] = {}
        self._marks: list[Mark] = []
        self._descriptor = -1
        self._wake, self._waker = -1, -1
        self._thread = threading.Thread(target=self._run, name="vmsnap-files", daemon=True)

    def __enter__(self) -> Self:
        self._descriptor = _libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if self._descriptor < 0:
            return self
        for path, part in self._files.items():
            watch = _libc.inotify_add_watch(self._descriptor, os.fsencode(path), _ATTRIB | _CLOSE | _OPEN)
            if watch >= 0:
                self._parts[watch] = part
        self._wake, self._waker = os.pipe2(os.O_CLOEXEC)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor < 0:
            return
        os.close(self._waker)
        self._thread.join()
        os.close(self._wake)
        os.close(self._descriptor)

    def marks(self) -> tuple[Mark, ...]:
        """Return what was noted so far."""
        return tuple(self._marks)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        poll.register(self._wake, select.POLLIN | select.POLLHUP)
        while True:
            ready = {descriptor for descriptor, _ in poll.poll()}
            if self._descriptor in ready:
                self._note(os.read(self._descriptor, _BUFFER_BYTES), at=datetime.now(tz=UTC))
            if self._wake in ready:
                return

    def _note(self, events: bytes, *, at: datetime) -> None:
        offset = 0
        while offset < len(events):
            watch, _mask, _cookie, length = _EVENT.unpack_from(events, offset)
            offset += _EVENT.size + length
            part = self._parts.get(watch)
            if part is not None:
                self._marks.append(Mark(part=part, at=at))
