"""Writing disks' pending data out before a guest stops: QEMU flushes every disk inside the pause."""

from __future__ import annotations

import logging
import os
import threading
from types import TracebackType
from typing import Self

_LOG = logging.getLogger(__name__)


class FlushedDisks:
    """Flushes images that QEMU has open, beside the caller, when told to. What cannot be flushed here, QEMU will flush.

    fdatasync(2) works through any descriptor of a file, so QEMU need not be asked.
    """

    def __init__(self, paths: tuple[str, ...]) -> None:
        self._paths = paths
        self._descriptors: list[int] = []
        self._wanted = threading.Event()
        self._over = False
        self._thread = threading.Thread(target=self._run, name="vmsnap-flush", daemon=True)

    def __enter__(self) -> Self:
        for path in self._paths:
            try:
                self._descriptors.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            except OSError as error:
                _LOG.debug("%s is not flushed beforehand: %s", path, error)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over = True
        self._wanted.set()
        self._thread.join()
        for descriptor in self._descriptors:
            os.close(descriptor)

    def flush(self) -> None:
        """Flush once more, soon; returns at once."""
        self._wanted.set()

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            if self._over:
                return
            for descriptor in self._descriptors:
                try:
                    os.fdatasync(descriptor)
                except OSError as error:
                    _LOG.debug("a disk could not be flushed beforehand: %s", error)
