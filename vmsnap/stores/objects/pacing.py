"""An object store that takes no more than its part of the line."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import datetime, timedelta

from vmsnap.model.guest import Finding
from vmsnap.ports.clock import Clock
from vmsnap.ports.objects import ObjectInfo, ObjectStore, StoredObject


class Pace:
    """So many bytes a second, whoever asks, on average: who wants to go on waits until those before have had their time."""

    def __init__(self, bytes_per_second: float, *, clock: Clock) -> None:
        self._rate = bytes_per_second
        self._clock = clock
        self._guard = threading.Lock()
        self._free_at = clock.monotonic()

    def take(self, count: int) -> None:
        """Wait until it is the turn of ``count`` more bytes."""
        with self._guard:
            now = self._clock.monotonic()
            turn = max(self._free_at, now)
            self._free_at = turn + count / self._rate
        if turn > now:
            self._clock.sleep(timedelta(seconds=turn - now))

    def had(self, count: int) -> None:
        """Count bytes that nobody waited for: those behind them do."""
        with self._guard:
            self._free_at = max(self._free_at, self._clock.monotonic()) + count / self._rate


class PacedObjects:
    """An object store that sends, and receives, at most so many bytes a second: over some time, not within one object."""

    def __init__(self, inner: ObjectStore, *, bytes_per_second: float, clock: Clock) -> None:
        self._inner = inner
        self._sending = Pace(bytes_per_second, clock=clock)
        self._receiving = Pace(bytes_per_second, clock=clock)

    def findings(self) -> tuple[Finding, ...]:
        """Look whether the place can be used."""
        return self._inner.findings()

    def put(self, name: str, *, data: bytes, retain_until: datetime | None = None) -> ObjectInfo:
        """Write an object."""
        self._sending.take(len(data))
        return self._inner.put(name, data=data, retain_until=retain_until)

    def put_new(self, name: str, *, data: bytes, retain_until: datetime | None = None) -> ObjectInfo:
        """Write an object that must not be there yet."""
        self._sending.take(len(data))
        return self._inner.put_new(name, data=data, retain_until=retain_until)

    def replace(self, name: str, *, data: bytes, version: str) -> ObjectInfo:
        """Write an object over the one of that version."""
        self._sending.take(len(data))
        return self._inner.replace(name, data=data, version=version)

    def get(self, name: str) -> StoredObject:
        """Read a whole object. How large it is is known afterwards, so that those behind it wait."""
        self._receiving.take(0)
        found = self._inner.get(name)
        self._receiving.had(len(found.data))
        return found

    def get_range(self, name: str, *, offset: int, length: int) -> bytes:
        """Read a part of an object."""
        self._receiving.take(length)
        return self._inner.get_range(name, offset=offset, length=length)

    def info(self, name: str) -> ObjectInfo:
        """Describe an object."""
        return self._inner.info(name)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield the objects whose names begin so."""
        return self._inner.list(prefix)

    def delete(self, name: str) -> None:
        """Remove an object."""
        self._inner.delete(name)

    def retain(self, name: str, *, until: datetime) -> None:
        """Lock an object."""
        self._inner.retain(name, until=until)
