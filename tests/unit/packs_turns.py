"""Real uploads, removals and collectors, each in threads of its own, of which one call of the object store is made at a time.

Every call waits at a gate until a test lets it through: so a test decides who is next, who stands still, and who dies where.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from vmsnap.errors import VmsnapError
from vmsnap.ports.objects import ObjectStore
from vmsnap.testing.memory_objects import FaultyObjects, ObjectCall
from vmsnap.testing.memory_state import ProcessDied

_PATIENCE_SECONDS = 30


class Actor:
    """One process: what it does, and the gate of its calls."""

    def __init__(self, place: ObjectStore, *, name: str, work: Callable[[ObjectStore], object]) -> None:
        self.name = name
        self.failure: BaseException | None = None
        self.trace: list[str] = []
        self._changed = threading.Condition()
        self._waiting = 0
        self._through = 0
        self._next: list[ObjectCall] = []
        self._dead = False
        self.ended = False
        self._store = FaultyObjects(place, on_call=self._gate)
        self._work = work
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        self._settle()

    def step(self, calls: int) -> None:
        """Let some calls through, one after another."""
        for _ in range(calls):
            with self._changed:
                if self.ended:
                    return
                self._waiting -= 1
                self._through += 1
                self._changed.notify_all()
            self._settle()

    def die(self) -> None:
        """End the process where it is: no call of it has any effect from now on."""
        with self._changed:
            self._dead = True
            self._changed.notify_all()
        self._thread.join(_PATIENCE_SECONDS)
        assert not self._thread.is_alive(), f"{self.name} does not end"

    def to(self, method: str, prefix: str) -> None:
        """Let calls through until the one that is next is of that method, for a name that begins so."""
        while not any(call.method == method and call.name.startswith(prefix) for call in self._next):
            assert not self.ended, f"{self.name} never comes to {method} {prefix}: {self.failure}"
            self.step(1)

    def finish(self) -> None:
        """Let all calls through."""
        while not self.ended:
            self.step(1)

    def _run(self) -> None:
        try:
            self._work(self._store)
        except (VmsnapError, ProcessDied) as error:
            self.failure = error
        except BaseException as error:
            self.failure = error
            raise
        finally:
            with self._changed:
                self.ended = True
                self._changed.notify_all()

    def _gate(self, call: ObjectCall) -> None:
        with self._changed:
            self._waiting += 1
            self._next.append(call)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._through or self._dead)
            self._next.remove(call)
            if self._dead:
                self._store.dead = True
                raise ProcessDied
            self._through -= 1
            self._changed.notify_all()
            self.trace.append(f"{self.name}: {call.method} {call.name}")

    def _settle(self) -> None:
        """Wait until the process has ended or waits at the gate."""
        with self._changed:
            ready = self._changed.wait_for(
                lambda: self.ended or (self._waiting > 0 and self._through == 0), _PATIENCE_SECONDS
            )
        assert ready, f"{self.name} neither ends nor calls: {self.trace[-3:]}"
