"""Bringing what is missing of a disk: what a guest waits for first, then what it will likely read next, then the rest.

Everything is fetched in units of four blocks. One unit is on its way once, however many want it, and moves up where somebody
in more of a hurry wants it. At most half of the workers hydrate, and none while a guest waits for one that is not begun.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum
from typing import TypeVar

from vmsnap.errors import BugError, PreconditionError, VmsnapError
from vmsnap.exports.cache import BLOCK_BYTES, BlockCache
from vmsnap.ports.exports import BlockSource

UNIT_BLOCKS = 4
WORKERS = 16
_SHORTEST_WAIT_SECONDS = 0.2
_LONGEST_WAIT_SECONDS = 10.0
_LOG = logging.getLogger(__name__)
T = TypeVar("T")

Fetched = Mapping[int, bytes | VmsnapError]
"""What a fetch brought, by block: its data, or why it cannot be had."""


class Urgency(IntEnum):
    """Who wants a unit: a guest that waits, a guest that will, nobody in particular."""

    GUEST = 0
    AHEAD = 1
    HYDRATE = 2


class StoppedError(BugError):
    """The export ends. Whoever waits is to be left alone: it asks again when the export is back."""


@dataclass(frozen=True, kw_only=True)
class CachedDisk:
    """One disk with its cache."""

    target: str
    source: BlockSource
    cache: BlockCache


@dataclass(kw_only=True)
class _Task:
    disk: CachedDisk
    unit: int
    urgency: Urgency
    begun: bool = False
    result: Future[Fetched] = field(default_factory=Future)


@dataclass(kw_only=True)
class Tally:
    """What an export has done and what is wrong, for its status. ``damage``: by disk and block."""

    read_bytes: int = 0
    waiting: str | None = None
    waiting_since: datetime | None = None
    damage: dict[tuple[str, int], str] = field(default_factory=dict)


class Fetcher:
    """The workers. ``now`` tells the time for the status."""

    def __init__(self, *, now: Callable[[], datetime], workers: int = WORKERS) -> None:
        self._now = now
        self._condition = threading.Condition()
        self._stopping = threading.Event()
        self._heap: list[tuple[int, int, _Task]] = []
        self._order = itertools.count()
        self._tasks: dict[tuple[str, int], _Task] = {}
        self._hydrating = 0
        self._most_hydrating = max(1, workers // 2)
        self._waiting: dict[int, str] = {}
        self.tally = Tally()
        self._threads = [
            threading.Thread(target=self._work, name=f"vmsnap-fetch-{number}", daemon=True) for number in range(workers)
        ]

    def start(self) -> None:
        """Begin to work."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End. Who waits gets StoppedError. A read from the replica that is on its way is waited for, briefly."""
        self._stopping.set()
        with self._condition:
            self._condition.notify_all()
            tasks = list(self._tasks.values())
        for task in tasks:
            if not task.result.done():
                task.result.set_exception(StoppedError("the export ends"))
        for thread in self._threads:
            thread.join(timeout=1.0)

    def want(self, disk: CachedDisk, *, unit: int, urgency: Urgency) -> Future[Fetched]:
        """Return what will hold a unit's missing blocks. Raises StoppedError."""
        with self._condition:
            if self._stopping.is_set():
                raise StoppedError("the export ends")
            key = (disk.target, unit)
            task = self._tasks.get(key)
            if task is None:
                task = self._tasks[key] = _Task(disk=disk, unit=unit, urgency=urgency)
            elif urgency < task.urgency and not task.begun:
                task.urgency = urgency
            else:
                return task.result
            heapq.heappush(self._heap, (urgency, next(self._order), task))
            self._condition.notify()
            return task.result

    def queued(self) -> int:
        """Return how many units are wanted and not there."""
        with self._condition:
            return len(self._tasks)

    def _next(self) -> _Task | None:
        """Take what is most urgent. None: the end."""
        with self._condition:
            while not self._stopping.is_set():
                while self._heap and (self._heap[0][2].begun or self._heap[0][0] != self._heap[0][2].urgency):
                    heapq.heappop(self._heap)
                if self._heap and (self._heap[0][0] != Urgency.HYDRATE or self._hydrating < self._most_hydrating):
                    task = heapq.heappop(self._heap)[2]
                    task.begun = True
                    if task.urgency is Urgency.HYDRATE:
                        self._hydrating += 1
                    return task
                self._condition.wait()
        return None

    def _work(self) -> None:
        while (task := self._next()) is not None:
            try:
                result = self._fetch(task)
            except Exception as error:  # noqa: BLE001 - whoever waits is told, and the worker goes on
                outcome: Fetched | Exception = error
            else:
                outcome = result
            with self._condition:
                del self._tasks[task.disk.target, task.unit]
                if task.urgency is Urgency.HYDRATE:
                    self._hydrating -= 1
                    self._condition.notify()
            self._settle(task, outcome)

    def _settle(self, task: _Task, outcome: Fetched | Exception) -> None:
        with self._condition:
            if task.result.done():
                return
            if isinstance(outcome, Exception):
                task.result.set_exception(outcome)
            else:
                task.result.set_result(outcome)

    def _fetch(self, task: _Task) -> Fetched:
        disk, cache = task.disk, task.disk.cache
        first = task.unit * UNIT_BLOCKS
        brought: dict[int, bytes | VmsnapError] = {}
        for run in tuple(cache.missing(first, min(UNIT_BLOCKS, cache.count - first))):
            holes = self._insist(lambda run=run: disk.source.holes(run.first, run.blocks))  # type: ignore[misc]
            if isinstance(holes, VmsnapError):
                brought.update(dict.fromkeys(range(run.first, run.first + run.blocks), holes))
                self._damaged(disk, first=run.first, count=run.blocks, error=holes)
                continue
            start = run.first
            for hole, group in itertools.groupby(holes):
                count = len(list(group))
                if hole:
                    cache.put_holes(start, count)
                    brought.update((block, bytes(_length(disk, block))) for block in range(start, start + count))
                else:
                    self._bring(disk, first=start, count=count, into=brought)
                start += count
        return brought

    def _bring(self, disk: CachedDisk, *, first: int, count: int, into: dict[int, bytes | VmsnapError]) -> None:
        found = self._insist(lambda: disk.source.read(first, count))
        if isinstance(found, VmsnapError):
            if count > 1:
                # One bad block must not take its neighbours with it.
                for block in range(first, first + count):
                    self._bring(disk, first=block, count=1, into=into)
                return
            into[first] = found
            self._damaged(disk, first=first, count=1, error=found)
            return
        disk.cache.put(first, found)
        with self._condition:
            self.tally.read_bytes += len(found)
            for block in range(first, first + count):
                self.tally.damage.pop((disk.target, block), None)
        for block in range(first, first + count):
            start = (block - first) * BLOCK_BYTES
            into[block] = found[start : start + BLOCK_BYTES]

    def _damaged(self, disk: CachedDisk, *, first: int, count: int, error: VmsnapError) -> None:
        with self._condition:
            for block in range(first, first + count):
                text = f"disk {disk.target}, {BLOCK_BYTES} bytes at {block * BLOCK_BYTES}: {error.brief}"
                if self.tally.damage.get((disk.target, block)) != text:
                    _LOG.error("the guest cannot read %s; %s", text, error.remedy or "see 'vmsnap verify --replica'")
                self.tally.damage[disk.target, block] = text

    def _insist(self, read: Callable[[], T]) -> T | VmsnapError:
        """Read until it works, or return why it never will. Raises StoppedError."""
        wait = _SHORTEST_WAIT_SECONDS
        number = threading.get_ident()
        while True:
            try:
                found = read()
            except VmsnapError as error:
                if not error.transient and not isinstance(error, PreconditionError):
                    self._waits(number, None)
                    return error
                self._waits(number, error.brief)
            else:
                self._waits(number, None)
                return found
            if self._stopping.wait(wait):
                raise StoppedError("the export ends")
            wait = min(2 * wait, _LONGEST_WAIT_SECONDS)

    def _waits(self, number: int, why: str | None) -> None:
        """Take note that a worker cannot reach the replica (``why``), or that it could."""
        with self._condition:
            if why is not None:
                self._waiting[number] = why
                if self.tally.waiting_since is None:
                    self.tally.waiting_since = self._now()
                    _LOG.warning("the replica cannot be read, and the guest waits for it: %s", why)
                self.tally.waiting = why
            elif self._waiting.pop(number, None) is not None and not self._waiting:
                self.tally.waiting = self.tally.waiting_since = None
                _LOG.warning("the replica can be read again")


def _length(disk: CachedDisk, block: int) -> int:
    return min(BLOCK_BYTES, disk.source.size_bytes - block * BLOCK_BYTES)
