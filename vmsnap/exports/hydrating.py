"""Fetching what no guest has asked for, in disk order, once the guest is quiet."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import groupby

from vmsnap.errors import VmsnapError
from vmsnap.exports.cache import BLOCK_BYTES
from vmsnap.exports.disk import LazyDisk
from vmsnap.exports.fetching import UNIT_BLOCKS, CachedDisk, Fetched, Fetcher, StoppedError, Urgency

_LOG = logging.getLogger(__name__)
_STRIDE_BLOCKS = 2048
_OUTSTANDING = 16
_AGAIN_SECONDS = 30.0
_POLL_SECONDS = 0.2
QUIET_SECONDS = 20.0
"""How long a guest must not have waited for the replica before anything is fetched that it did not ask for."""
LATEST_SECONDS = 600.0
"""After which it begins nevertheless: a guest's reads go first anyway."""


class Hydrator:
    """Fetches whole disks, one after another, over and over until nothing is missing and all of it is on disk."""

    def __init__(
        self,
        disks: Sequence[tuple[CachedDisk, LazyDisk]],
        *,
        fetcher: Fetcher,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._disks = disks
        self._fetcher = fetcher
        self._monotonic = monotonic
        self._stopping = threading.Event()
        self._hurry = threading.Event()
        self._places = threading.BoundedSemaphore(_OUTSTANDING)
        self._thread = threading.Thread(target=self._run, name="vmsnap-hydrate", daemon=True)
        self.hydrated = threading.Event()
        self._counted: dict[str, int] = {}

    def start(self) -> None:
        """Begin, in a thread."""
        self._thread.start()

    def hurry(self) -> None:
        """Do not wait until the guest is quiet."""
        self._hurry.set()

    def stop(self) -> None:
        """End. The fetcher is stopped first."""
        self._stopping.set()
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        try:
            if not all(cached.cache.whole for cached, _ in self._disks):
                self._wait_for_quiet()
            while not self._stopping.is_set():
                whole = [self._hydrate(cached) for cached, _ in self._disks]
                if all(whole):
                    _LOG.info("everything is here")
                    self.hydrated.set()
                    return
                self._stopping.wait(_AGAIN_SECONDS)
        except StoppedError:
            return
        except Exception:  # noqa: BLE001 - logged; a guest does not depend on it
            _LOG.exception("hydrating has stopped; the guest is served as before")

    def _wait_for_quiet(self) -> None:
        latest = self._monotonic() + LATEST_SECONDS
        missed, since = -1, self._monotonic()
        while not self._stopping.is_set() and not self._hurry.wait(_POLL_SECONDS):
            now, count = self._monotonic(), sum(lazy.missed for _, lazy in self._disks)
            if count != missed:
                missed, since = count, now
            # One that has not read anything yet has not begun.
            if now >= latest or (missed > 0 and now - since >= QUIET_SECONDS):
                return

    def _hydrate(self, disk: CachedDisk) -> bool:
        """Fetch what is missing of a disk; tell whether nothing is any more, on disk too."""
        cache = disk.cache
        data = 0
        for first in range(0, cache.count, _STRIDE_BLOCKS):
            if self._stopping.is_set():
                return False
            count = min(_STRIDE_BLOCKS, cache.count - first)
            holes = self._holes(disk, first=first, count=count)
            if holes is None:
                return False
            data += holes.count(False)
            if not any(cache.missing(first, count)):
                continue
            start = first
            for hole, group in groupby(holes):
                length = len(list(group))
                if hole:
                    cache.put_holes(start, length)
                start += length
            self._bring(disk, first=first, count=count)
        self._counted[disk.target] = data * BLOCK_BYTES
        for _ in range(_OUTSTANDING):
            self._places.acquire()
        for _ in range(_OUTSTANDING):
            self._places.release()
        return cache.whole and cache.flush() and cache.whole

    @property
    def data_bytes(self) -> int | None:
        """Return how much data all disks have; None as long as it is not counted."""
        return sum(self._counted.values()) if len(self._counted) == len(self._disks) else None

    def _holes(self, disk: CachedDisk, *, first: int, count: int) -> list[bool] | None:
        try:
            return list(disk.source.holes(first, count))
        except VmsnapError as error:
            _LOG.info("hydrating waits: %s", error.brief)
            return None

    def _bring(self, disk: CachedDisk, *, first: int, count: int) -> None:
        cache = disk.cache
        for unit in range(first // UNIT_BLOCKS, (first + count - 1) // UNIT_BLOCKS + 1):
            blocks = min(UNIT_BLOCKS, cache.count - unit * UNIT_BLOCKS)
            if not any(cache.missing(unit * UNIT_BLOCKS, blocks)):
                continue
            while not cache.keeping or not self._places.acquire(timeout=_POLL_SECONDS):
                if self._stopping.wait(0 if cache.keeping else _POLL_SECONDS):
                    return
            self._fetcher.want(disk, unit=unit, urgency=Urgency.HYDRATE).add_done_callback(self._came)

    def _came(self, _result: Future[Fetched]) -> None:
        self._places.release()
