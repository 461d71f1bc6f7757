"""Writing an image past the page cache where that is possible: a whole disk would push everything else out of it."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Sequence

_BUFFER_BYTES = 1 << 20
_ALIGNMENT = 4096


class ImageWriter:
    """Writes to an open file, from several threads, each its own part. Close it before the file.

    Direct writes (open(2), O_DIRECT) need aligned memory, offsets and lengths; what does not fit, such as the end of an odd
    disk, and whole files on file systems that cannot do it, go the usual way.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._local = threading.local()
        try:
            self._direct: int | None = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:
            self._direct = None

    def close(self) -> None:
        """Let go."""
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None

    def write(self, parts: Sequence[memoryview], *, offset: int) -> None:
        """Write parts one after another, at most 1 MiB in all. Raises OSError."""
        buffer: memoryview | None = getattr(self._local, "buffer", None)
        if buffer is None:
            buffer = self._local.buffer = memoryview(mmap.mmap(-1, _BUFFER_BYTES))
        length = 0
        for part in parts:
            buffer[length : length + len(part)] = part
            length += len(part)
        aligned = length - length % _ALIGNMENT if self._direct is not None and offset % _ALIGNMENT == 0 else 0
        done = self._write_directly(buffer[:aligned], offset=offset)
        while done < length:
            done += os.pwrite(self._descriptor, buffer[done:length], offset + done)

    def _write_directly(self, data: memoryview, *, offset: int) -> int:
        """Return how many bytes were written: fewer where a direct write is refused."""
        done, direct = 0, self._direct
        while direct is not None and done < len(data):
            try:
                written = os.pwrite(direct, data[done:], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                return done
            done += written
            if written % _ALIGNMENT:
                return done
        return done
