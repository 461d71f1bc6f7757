"""Showing while an upload goes on that it lives."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from types import TracebackType
from typing import Self

from vmsnap.errors import DriverError, VmsnapError
from vmsnap.ports.objects import ObjectStore
from vmsnap.stores.packs.intents import Intent, renew

RENEWED_EVERY = timedelta(minutes=5)
_log = logging.getLogger(__name__)


class Heartbeat:
    """Renews an intent every few minutes, in a thread, from ``with`` to its end. The intent itself stays."""

    def __init__(self, store: ObjectStore, *, intent: Intent, now: Callable[[], datetime]) -> None:
        self._store = store
        self._intent = intent
        self._now = now
        self._stop = threading.Event()
        self._lost = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def check(self) -> None:
        """Raise DriverError where a collector took the upload for dead."""
        if self._lost.is_set():
            raise DriverError(
                f"the upload {self._intent.record.upload} was taken for dead while it was on",
                remedy="run 'vmsnap replicate' again: what was uploaded is used where it is still there",
            )

    def _beat(self) -> None:
        while not self._stop.wait(RENEWED_EVERY.total_seconds()):
            try:
                if not renew(self._store, intent=self._intent, now=self._now()):
                    self._lost.set()
                    return
            except VmsnapError as error:
                _log.warning("the intent of upload %s was not renewed: %s", self._intent.record.upload, error.brief)
