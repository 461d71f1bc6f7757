"""Faults at port calls: every call that a workflow makes to the outside is numbered, and one or more of them go wrong.

``Faults.world`` wraps a ``World`` so that each method of each port object, and of each object a port hands out
(journals, locks, disk views, controls, channels, connectors), passes here. Values of the model pass as they are. The
clock is left alone: it cannot fail, and a death between two calls is a death after the first.

A process that dies does nothing any more: from then on every call raises ``ProcessDied`` and has no effect, and what
the kernel frees with a process (locks) is free.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import Enum, StrEnum
from ipaddress import IPv4Address
from pathlib import Path
from socket import socket
from types import GeneratorType, TracebackType
from typing import Any, TypeVar

from pydantic import BaseModel

from vmsnap.errors import CancelledError, DriverError, VmsnapError
from vmsnap.model.journal import Resource
from vmsnap.testing.memory_state import ProcessDied
from vmsnap.workflow.world import World

T = TypeVar("T")
_PLAIN = (
    str,
    bytes,
    int,
    float,
    type(None),
    datetime,
    timedelta,
    Path,
    Enum,
    BaseModel,
    BaseException,
    socket,
    IPv4Address,
)
_COLLECTIONS = (frozenset, set, dict, list, GeneratorType)


class Mode(StrEnum):
    """What goes wrong at a call. ``BEFORE``: it has no effect; ``AFTER``: it has all its effect."""

    FAIL_BEFORE = "fails"
    FAIL_AFTER = "fails after the effect"
    BUG_BEFORE = "raises RuntimeError"
    BUG_AFTER = "raises RuntimeError after the effect"
    DIE_BEFORE = "process dies before"
    DIE_AFTER = "process dies after"
    CANCEL = "a signal comes"


DEATHS = frozenset({Mode.DIE_BEFORE, Mode.DIE_AFTER})


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that goes wrong: at the call of this number, counted from 0."""

    call: int
    mode: Mode


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call that was made. ``inside``: a place within a driver's operation, where only death can strike."""

    number: int
    name: str
    inside: bool = False


class FaultCancel:
    """The port ``Cancel``."""

    def __init__(self) -> None:
        self.asked = False

    def is_set(self) -> bool:
        """Tell whether the run shall stop."""
        return self.asked

    def check(self) -> None:
        """Raise CancelledError where the run shall stop."""
        if self.asked:
            raise CancelledError("stopped by a signal")


class Faults:
    """The faults of one process, and the record of its calls. ``on_death`` is called once, at the death.

    Calls of other threads than the one that made this are neither counted nor hit, so that counting is the same every
    time; they end with the process.
    """

    def __init__(self, *faults: Fault, on_death: Callable[[], None] = lambda: None) -> None:
        self._faults = {fault.call: fault.mode for fault in faults}
        self._on_death = on_death
        self._thread = threading.get_ident()
        self._open: list[AbstractContextManager[Any]] = []
        self.calls: list[Call] = []
        self.hit: list[Call] = []
        self.dead = False
        self.cancel = FaultCancel()

    def world(self, world: World) -> World:
        """Return the world with every port wrapped."""
        wrapped = {
            field.name: self.wrap(getattr(world, field.name), name=field.name)
            for field in dataclasses.fields(world)
            if field.name != "clock"
        }
        return replace(world, **wrapped)

    def wrap(self, value: T, *, name: str) -> T:
        """Return a port object wrapped, and any value of the model as it is."""
        wrapped: Any = value
        if isinstance(value, tuple):
            wrapped = tuple(self.wrap(item, name=f"{name}[{index}]") for index, item in enumerate(value))
        elif not _is_value(value):
            wrapped = _Port(value, faults=self, name=name)
        same: T = wrapped
        return same

    def point(self, name: str) -> None:
        """Pass a place inside a driver's operation (``FakeHost.between``)."""
        if self._is_other_thread():
            return
        call = self._count(name, inside=True)
        if self._faults.get(call.number) in DEATHS:
            self.hit.append(call)
            self.die()

    def call(self, name: str, function: Callable[..., T], /, *args: object, **kwargs: object) -> T:
        """Make a call, unless it goes wrong."""
        if self._is_other_thread():
            return function(*args, **kwargs)
        call = self._count(name, inside=False)
        mode = self._faults.get(call.number)
        if mode is None:
            return function(*args, **kwargs)
        self.hit.append(call)
        if mode is Mode.CANCEL:
            self.cancel.asked = True
            return function(*args, **kwargs)
        if mode in {Mode.FAIL_AFTER, Mode.BUG_AFTER, Mode.DIE_AFTER}:
            # A refusal that belongs to a good run is an effect too.
            with suppress(VmsnapError):
                function(*args, **kwargs)
        if mode in DEATHS:
            self.die()
        if mode in {Mode.BUG_BEFORE, Mode.BUG_AFTER}:
            msg = f"injected at call {call.number}, {call.name}"
            raise RuntimeError(msg)
        raise DriverError(f"injected at call {call.number}, {call.name}", remedy="none: this is a test")

    def die(self) -> None:
        """End the process at once. Always raises ProcessDied."""
        self.end()
        raise ProcessDied

    def end(self) -> None:
        """End the process without raising: what it still held is free, what it still does has no effect."""
        if not self.dead:
            self.dead = True
            self._on_death()
            while self._open:
                self._open.pop().__exit__(None, None, None)

    def entered(self, context: AbstractContextManager[Any]) -> None:
        """Remember a lock that is held."""
        self._open.append(context)

    def left(self, context: AbstractContextManager[Any]) -> None:
        """Forget a lock that was let go."""
        if context in self._open:
            self._open.remove(context)

    def _is_other_thread(self) -> bool:
        if threading.get_ident() == self._thread:
            return False
        if self.dead:
            raise SystemExit
        return True

    def _count(self, name: str, *, inside: bool) -> Call:
        if self.dead:
            raise ProcessDied
        call = Call(number=len(self.calls), name=name, inside=inside)
        self.calls.append(call)
        return call


def _is_value(value: object) -> bool:
    return isinstance(value, (*_PLAIN, *_COLLECTIONS)) or dataclasses.is_dataclass(value)


class _Port:
    """One port object, or a function, whose calls are counted. Reading a property is no call."""

    def __init__(self, target: Any, *, faults: Faults, name: str) -> None:
        self._vmsnap_target = target
        self._vmsnap_faults = faults
        self._vmsnap_name = name

    def __getattr__(self, attribute: str) -> Any:
        name = f"{self._vmsnap_name}.{attribute}"
        value = getattr(self._vmsnap_target, attribute)
        if not callable(value):
            return self._vmsnap_faults.wrap(value, name=name)
        return _Port(value, faults=self._vmsnap_faults, name=name)

    def __call__(self, *args: object, **kwargs: object) -> Any:
        faults, name = self._vmsnap_faults, self._vmsnap_name
        about = "".join(f" {item.kind}" for item in args if isinstance(item, Resource))
        return faults.wrap(faults.call(name + about, self._vmsnap_target, *args, **kwargs), name=f"{name}()")

    def __enter__(self) -> Any:
        faults, target = self._vmsnap_faults, self._vmsnap_target

        def enter() -> object:
            entered: object = target.__enter__()
            faults.entered(target)
            return entered

        return faults.wrap(faults.call(f"{self._vmsnap_name}.enter", enter), name=self._vmsnap_name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        faults, target = self._vmsnap_faults, self._vmsnap_target

        def leave() -> None:
            faults.left(target)
            # The error goes on by itself; a generator in between would only raise it a second time.
            target.__exit__(None, None, None)

        faults.call(f"{self._vmsnap_name}.exit", leave)
