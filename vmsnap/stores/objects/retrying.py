"""Making calls again that failed for a reason that passes: one decorator, and an object store that uses it."""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import ParamSpec, TypeVar

from vmsnap.errors import ObjectConflictError, ObjectNotFoundError, VmsnapError
from vmsnap.model.guest import Finding
from vmsnap.ports.clock import Clock
from vmsnap.ports.objects import ObjectInfo, ObjectStore, StoredObject

_LOG = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long to go on. The waits double from ``first`` up to ``longest``, each a random part of that, half at least."""

    give_up_after: timedelta = timedelta(minutes=5)
    first: timedelta = timedelta(milliseconds=200)
    longest: timedelta = timedelta(seconds=20)


class Repeating:
    """The decorator: ``repeating(function)`` calls the function until it ends otherwise than by an error marked transient.

    Only for what may be repeated. Gives up, with the last error, where the next wait would end after ``give_up_after``, or
    where a wait was cut short, as the clock does for a run that is cancelled.
    """

    def __init__(
        self, *, clock: Clock, patience: Patience | None = None, part: Callable[[], float] = random.random
    ) -> None:
        self._clock = clock
        self._patience = patience or Patience()
        self._part = part

    def __call__(self, function: Callable[P, T]) -> Callable[P, T]:
        """Return the function as one that goes on."""

        @functools.wraps(function)
        def repeated(*args: P.args, **kwargs: P.kwargs) -> T:
            began = self._clock.monotonic()
            wait = self._patience.first
            attempts = 0
            while True:
                attempts += 1
                try:
                    return function(*args, **kwargs)
                except VmsnapError as error:
                    if not error.transient:
                        raise
                    failed = self._clock.monotonic()
                    pause = wait * (1.0 + self._part()) / 2
                    if timedelta(seconds=failed - began) + pause > self._patience.give_up_after:
                        raise self._given_up(error, attempts=attempts, seconds=failed - began) from error
                    _LOG.log(
                        logging.WARNING if attempts == 1 else logging.INFO,
                        "%s; trying again in %.1f s", error.brief, pause.total_seconds(),
                    )  # fmt: skip
                    self._clock.sleep(pause)
                    if self._clock.monotonic() - failed < pause.total_seconds() * 0.9:
                        raise
                    wait = min(wait * 2, self._patience.longest)

        return repeated

    @staticmethod
    def _given_up(error: VmsnapError, *, attempts: int, seconds: float) -> VmsnapError:
        tried = f"tried {attempts} times in {seconds:.0f} s"
        details = f"{error.details}\n{tried}" if error.details else tried
        return type(error)(error.brief, details=details, remedy=error.remedy)


class RetryingObjects:
    """An object store whose calls are made again where they fail for a reason that passes.

    A write with a condition whose first answer was lost may have done its work: where it is then refused, and the object
    holds just what was to be written, it counts as done. So what writers race for must name its writer.
    """

    def __init__(self, inner: ObjectStore, *, repeating: Repeating) -> None:
        self._inner = inner
        self._repeating = repeating

    def findings(self) -> tuple[Finding, ...]:
        """Look whether the place can be used, once: somebody waits for the answer."""
        return self._inner.findings()

    def put(self, name: str, *, data: bytes, retain_until: datetime | None = None) -> ObjectInfo:
        """Write an object."""
        return self._repeating(self._inner.put)(name, data=data, retain_until=retain_until)

    def put_new(self, name: str, *, data: bytes, retain_until: datetime | None = None) -> ObjectInfo:
        """Write an object that must not be there yet."""
        return self._conditional(
            name, data=data, write=lambda: self._inner.put_new(name, data=data, retain_until=retain_until)
        )

    def replace(self, name: str, *, data: bytes, version: str) -> ObjectInfo:
        """Write an object over the one of that version."""
        return self._conditional(name, data=data, write=lambda: self._inner.replace(name, data=data, version=version))

    def get(self, name: str) -> StoredObject:
        """Read a whole object."""
        return self._repeating(self._inner.get)(name)

    def get_range(self, name: str, *, offset: int, length: int) -> bytes:
        """Read a part of an object."""
        return self._repeating(self._inner.get_range)(name, offset=offset, length=length)

    def info(self, name: str) -> ObjectInfo:
        """Describe an object."""
        return self._repeating(self._inner.info)(name)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield the objects whose names begin so. A listing that is cut is begun anew, and goes on behind what it gave."""
        last = ""
        listing = self._inner.list(prefix)

        @self._repeating
        def following() -> ObjectInfo | None:
            nonlocal listing
            try:
                return next((one for one in listing if one.name > last), None)
            except VmsnapError:
                listing = self._inner.list(prefix)
                raise

        while (one := following()) is not None:
            last = one.name
            yield one

    def delete(self, name: str) -> None:
        """Remove an object."""
        self._repeating(self._inner.delete)(name)

    def retain(self, name: str, *, until: datetime) -> None:
        """Lock an object."""
        self._repeating(self._inner.retain)(name, until=until)

    def _conditional(self, name: str, *, data: bytes, write: Callable[[], ObjectInfo]) -> ObjectInfo:
        in_doubt = False

        @self._repeating
        def attempt() -> ObjectInfo:
            nonlocal in_doubt
            try:
                return write()
            except ObjectConflictError:
                written = self._written(name, data=data) if in_doubt else None
                if written is None:
                    raise
                return written
            except VmsnapError as error:
                in_doubt = in_doubt or error.transient
                raise

        return attempt()

    def _written(self, name: str, *, data: bytes) -> ObjectInfo | None:
        """Return the object, where it holds just these bytes."""
        try:
            found = self.get(name)
        except ObjectNotFoundError:
            return None
        return found.info if found.data == data else None
