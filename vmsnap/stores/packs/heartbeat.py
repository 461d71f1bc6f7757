"""Showing while an upload goes on that it lives."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from types import TracebackType
from typing import Self

from vmsnap.errors import DriverError, VmsnapError
from vmsnap.ports.objects import ObjectStore
from vmsnap.stores.packs.intents import Intent, renew

RENEWED_EVERY = timedelta(minutes=5)
LONGEST_UPLOAD = timedelta(days=30)
_log = logging.getLogger(__name__)


class Heartbeat:
    """Renews an intent every few minutes, in a thread, from ``with`` to its end. The intent itself stays."""

    def __init__(self, store: ObjectStore, *, intent: Intent, now: Callable[[], datetime]) -> None:
        self._store = store
        self._intent = intent
        self._now = now
        self._stop = threading.Event()
        self._lost = threading.Event()
        self._renewing = threading.Lock()
        self._began = time.monotonic()
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
        """Raise DriverError where a collector took the upload for dead, or it has gone on for longer than one may."""
        if self._lost.is_set() or time.monotonic() - self._began > LONGEST_UPLOAD.total_seconds():
            raise taken_for_dead(self._intent.record.upload)

    def confirm(self) -> None:
        """Renew the intent now. Raises DriverError as ``check`` does, and what the object store raises."""
        self.check()
        with self._renewing:
            if not renew(self._store, intent=self._intent, now=self._now()):
                self._lost.set()
        self.check()

    def _beat(self) -> None:
        while not self._stop.wait(RENEWED_EVERY.total_seconds()):
            try:
                with self._renewing:
                    alive = renew(self._store, intent=self._intent, now=self._now())
            except VmsnapError as error:
                _log.warning("the intent of upload %s was not renewed: %s", self._intent.record.upload, error.brief)
                continue
            if not alive:
                self._lost.set()
                return


def taken_for_dead(upload: str) -> DriverError:
    """Return the error of an upload that a collector ended."""
    return DriverError(
        f"the upload {upload} was taken for dead while it was on, and nothing was published",
        remedy="run 'vmsnap replicate' again: what was uploaded is used where it is still there",
    )
