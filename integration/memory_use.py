"""What runs take of the host's memory beside their guests, looked at all the while: memory images and clones."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from vmsnap.hypervisors.libvirt.memory import host_memory


class MemoryUse:
    """Looks every ``interval_s`` while the block runs. ``runtime`` is vmsnap's folder of memory images."""

    def __init__(self, runtime: Path, *, interval_s: float = 0.01) -> None:
        self._runtime = runtime
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-use", daemon=True)
        self.peak_bytes = 0  # of images and clones together; the pipe between them holds some megabytes more

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.peak_bytes = max(self.peak_bytes, sum(host_memory(self._runtime).taken_bytes.values()))
