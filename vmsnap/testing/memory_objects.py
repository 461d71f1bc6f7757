"""An object store in memory, and faults at every call of any object store.

``MemoryBucket`` is the place, which outlives a process; ``MemoryObjects`` is what a process has of it. ``FaultyObjects``
goes round any ``ObjectStore`` (this one, a directory, a real server): it numbers the calls, and lets chosen ones go wrong.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import TypeVar

from vmsnap.errors import (
    BugError,
    DriverError,
    HeldError,
    ObjectConflictError,
    ObjectNotFoundError,
    StoreUnreachableError,
)
from vmsnap.model.guest import Finding, Severity
from vmsnap.ports.objects import ObjectInfo, ObjectStore, StoredObject
from vmsnap.testing.memory_state import ProcessDied

T = TypeVar("T")


def _utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(kw_only=True)
class _Kept:
    data: bytes
    version: str
    retained_until: datetime | None


@dataclass(kw_only=True)
class MemoryBucket:
    """Objects by name. ``locks``: it can lock objects, by the clock ``now``."""

    locks: bool = True
    now: Callable[[], datetime] = _utc_now
    guard: threading.RLock = field(default_factory=threading.RLock)
    objects: dict[str, _Kept] = field(default_factory=dict)
    versions: int = 0

    def damage(self, name: str, *, data: bytes) -> None:
        """Put other bytes in an object's place, as a bad disk or a careless hand would."""
        self._write(name, data=data, retain_until=self.objects[name].retained_until)

    def lose(self, name: str) -> None:
        """Let an object be gone, locked or not."""
        del self.objects[name]

    def _write(self, name: str, *, data: bytes, retain_until: datetime | None) -> ObjectInfo:
        self.versions += 1
        until = retain_until if self.locks else None
        kept = _Kept(data=bytes(data), version=f"v{self.versions}", retained_until=until)
        self.objects[name] = kept
        return _info(name, kept=kept)


class MemoryObjects:
    """The port ``ObjectStore`` over a bucket in memory."""

    def __init__(self, bucket: MemoryBucket) -> None:
        self._bucket = bucket

    def findings(self) -> tuple[Finding, ...]:
        """Look whether the place can be used."""
        return (Finding(check="objects", severity=Severity.OK, message="objects are kept in memory"),)

    def put(self, name: str, *, data: bytes, retain_until: datetime | None = None) -> ObjectInfo:
        """Write an object, over one of that name where there is one."""
        _check(name)
        with self._bucket.guard:
            return self._bucket._write(name, data=data, retain_until=retain_until)  # noqa: SLF001

    def put_new(self, name: str, *, data: bytes, retain_until: datetime | None = None) -> ObjectInfo:
        """Write an object that must not be there yet."""
        with self._bucket.guard:
            if name in self._bucket.objects:
                raise ObjectConflictError(f"there is an object {name} already", remedy="read it")
            return self.put(name, data=data, retain_until=retain_until)

    def replace(self, name: str, *, data: bytes, version: str) -> ObjectInfo:
        """Write an object over the one of that version."""
        with self._bucket.guard:
            kept = self._bucket.objects.get(name)
            if kept is None or kept.version != version:
                raise ObjectConflictError(f"the object {name} is another now", remedy="read it again")
            return self.put(name, data=data)

    def get(self, name: str) -> StoredObject:
        """Read a whole object."""
        with self._bucket.guard:
            kept = self._kept(name)
            return StoredObject(info=_info(name, kept=kept), data=kept.data)

    def get_range(self, name: str, *, offset: int, length: int) -> bytes:
        """Read a part of an object."""
        with self._bucket.guard:
            data = self._kept(name).data
        if offset < 0 or length < 0 or offset + length > len(data):
            raise DriverError(f"the object {name} ends at {len(data)}, before {offset + length}", remedy="verify it")
        return data[offset : offset + length]

    def info(self, name: str) -> ObjectInfo:
        """Describe an object without reading it."""
        with self._bucket.guard:
            return _info(name, kept=self._kept(name))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield the objects whose names begin so, as they were when the listing began."""
        with self._bucket.guard:
            found = [
                _info(name, kept=kept) for name, kept in sorted(self._bucket.objects.items()) if name.startswith(prefix)
            ]
        yield from found

    def delete(self, name: str) -> None:
        """Remove an object. Content where it is gone."""
        with self._bucket.guard:
            kept = self._bucket.objects.get(name)
            if kept is None:
                return
            if kept.retained_until is not None and kept.retained_until > self._bucket.now():
                raise HeldError(f"the object {name} is locked until {kept.retained_until}", remedy="wait")
            del self._bucket.objects[name]

    def retain(self, name: str, *, until: datetime) -> None:
        """Lock an object for at least so long, never shorter than before."""
        if not self._bucket.locks:
            return
        with self._bucket.guard:
            kept = self._kept(name)
            if kept.retained_until is None or kept.retained_until < until:
                kept.retained_until = until

    def _kept(self, name: str) -> _Kept:
        _check(name)
        kept = self._bucket.objects.get(name)
        if kept is None:
            raise ObjectNotFoundError(f"there is no object {name}", remedy="look what is there")
        return kept


class ObjectFault(StrEnum):
    """What goes wrong at a call. ``BEFORE``: it has no effect; ``AFTER``: it has all its effect, and nobody hears of it."""

    FAIL_BEFORE = "fails"
    FAIL_AFTER = "fails after the effect"
    DIE_BEFORE = "process dies before"
    DIE_AFTER = "process dies after"


@dataclass(frozen=True, kw_only=True)
class ObjectCall:
    """One call that was made: which, counted from 0, of which method, for which object or prefix."""

    number: int
    method: str
    name: str


def _nothing(call: ObjectCall) -> None:
    """Let a call be made."""


class FaultyObjects:
    """An ``ObjectStore`` whose calls of the numbers in ``faults`` go wrong. Calls of all threads count.

    ``on_call`` is told of each call before it is made, in its thread: a test may wait there, or raise. A process that died
    does nothing any more: from then on every call, of any thread, raises ``ProcessDied`` and has no effect. A failing
    listing yields the first half of what there is.
    """

    def __init__(
        self,
        inner: ObjectStore,
        *,
        faults: Mapping[int, ObjectFault] | None = None,
        on_call: Callable[[ObjectCall], None] = _nothing,
    ) -> None:
        self._inner = inner
        self._faults = dict(faults or {})
        self._on_call = on_call
        self._guard = threading.Lock()
        self.calls: list[ObjectCall] = []
        self.dead = False

    def findings(self) -> tuple[Finding, ...]:
        """Look whether the place can be used: it is no call, for it tells of faults and raises none."""
        return self._inner.findings()

    def put(self, name: str, *, data: bytes, retain_until: datetime | None = None) -> ObjectInfo:
        """Write an object."""
        return self._call("put", name, lambda: self._inner.put(name, data=data, retain_until=retain_until))

    def put_new(self, name: str, *, data: bytes, retain_until: datetime | None = None) -> ObjectInfo:
        """Write an object that must not be there yet."""
        return self._call("put_new", name, lambda: self._inner.put_new(name, data=data, retain_until=retain_until))

    def replace(self, name: str, *, data: bytes, version: str) -> ObjectInfo:
        """Write an object over the one of that version."""
        return self._call("replace", name, lambda: self._inner.replace(name, data=data, version=version))

    def get(self, name: str) -> StoredObject:
        """Read a whole object."""
        return self._call("get", name, lambda: self._inner.get(name))

    def get_range(self, name: str, *, offset: int, length: int) -> bytes:
        """Read a part of an object."""
        return self._call("get_range", name, lambda: self._inner.get_range(name, offset=offset, length=length))

    def info(self, name: str) -> ObjectInfo:
        """Describe an object."""
        return self._call("info", name, lambda: self._inner.info(name))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield the objects whose names begin so."""
        call = self._count("list", prefix)
        fault = self._faults.get(call.number)
        if fault is None:
            yield from self._inner.list(prefix)
            return
        if fault in {ObjectFault.FAIL_AFTER, ObjectFault.DIE_AFTER}:
            found = list(self._inner.list(prefix))
            yield from found[: len(found) // 2]
        self._fail(call, fault=fault)

    def delete(self, name: str) -> None:
        """Remove an object."""
        self._call("delete", name, lambda: self._inner.delete(name))

    def retain(self, name: str, *, until: datetime) -> None:
        """Lock an object."""
        self._call("retain", name, lambda: self._inner.retain(name, until=until))

    def _call(self, method: str, name: str, function: Callable[[], T]) -> T:
        call = self._count(method, name)
        fault = self._faults.get(call.number)
        if fault is None:
            return function()
        if fault in {ObjectFault.FAIL_AFTER, ObjectFault.DIE_AFTER}:
            function()
        self._fail(call, fault=fault)
        msg = "a fault always raises"
        raise AssertionError(msg)

    def _fail(self, call: ObjectCall, *, fault: ObjectFault) -> None:
        if fault in {ObjectFault.DIE_BEFORE, ObjectFault.DIE_AFTER}:
            self.dead = True
            raise ProcessDied
        raise StoreUnreachableError(
            f"injected at call {call.number}, {call.method} {call.name}", remedy="none: this is a test"
        )

    def _count(self, method: str, name: str) -> ObjectCall:
        with self._guard:
            if self.dead:
                raise ProcessDied
            call = ObjectCall(number=len(self.calls), method=method, name=name)
            self.calls.append(call)
        self._on_call(call)
        return call


def _info(name: str, *, kept: _Kept) -> ObjectInfo:
    return ObjectInfo(name=name, size_bytes=len(kept.data), version=kept.version, retained_until=kept.retained_until)


def _check(name: str) -> None:
    parts = name.split("/")
    allowed = all(character.isascii() and (character.isalnum() or character in "-_./") for character in name)
    if not allowed or any(part in {"", ".", ".."} for part in parts):
        raise BugError(f"{name!r} is no name of an object")
