"""A look that may hang, at a hypervisor for example, taken in a thread of its own so that nobody waits for it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta

_LOG = logging.getLogger(__name__)


class Probe:
    """Looks at most once each ``every``, and remembers what it saw. For one thread at a time."""

    def __init__(self, look: Callable[[], Mapping[str, int]], *, every: timedelta) -> None:
        self._look = look
        self._every = every
        self._seen: Mapping[str, int] = {}
        self._thread: threading.Thread | None = None
        self._began: float | None = None

    def seen(self, *, patience: timedelta) -> Mapping[str, int]:
        """Return what was seen last, and look again where that is long ago, waiting for it no longer than ``patience``."""
        late = self._began is None or time.monotonic() - self._began >= self._every.total_seconds()
        if late and (self._thread is None or not self._thread.is_alive()):
            self._began = time.monotonic()
            self._thread = threading.Thread(target=self._work, name="vmsnap-probe", daemon=True)
            self._thread.start()
        if self._thread is not None:
            self._thread.join(patience.total_seconds())
        return self._seen

    def _work(self) -> None:
        try:
            self._seen = self._look()
        except Exception as error:  # noqa: BLE001 - one figure less
            self._seen = {}
            _LOG.info("the room for overlays could not be looked at: %s", error)
