"""The guards of a run: what ends its clone, and the run with it, at once.

Overlay space: a full file system would pause production, so the run dies first. Isolation: see ``FenceWatch``.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from vmsnap.errors import IsolationError, NoSpaceError
from vmsnap.ports.clock import Cancel

_LOG = logging.getLogger(__name__)
_MIB = 1 << 20


class OverlayGuard:
    """A Cancel that also stops the run when overlay space falls below a floor.

    While the block runs a thread looks once an ``interval``; below the floor it calls ``kill_clone`` until that works, so
    that a step which waits for the clone ends at once, and from then on ``check`` raises NoSpaceError.
    """

    def __init__(
        self,
        cancel: Cancel,
        *,
        free_bytes: Callable[[], int],
        floor_bytes: int,
        kill_clone: Callable[[], None],
        interval_seconds: float = 1.0,
    ) -> None:
        self._cancel = cancel
        self._free_bytes = free_bytes
        self._floor_bytes = floor_bytes
        self._kill_clone = kill_clone
        self._interval_seconds = interval_seconds
        self._stop = threading.Event()
        self._reason: NoSpaceError | None = None
        self._thread = threading.Thread(target=self._watch, name="vmsnap-overlay-guard", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def reason(self) -> NoSpaceError | None:
        """Return why the guard stopped the run, or None."""
        return self._reason

    def is_set(self) -> bool:
        """Tell whether the run shall stop."""
        return self._reason is not None or self._cancel.is_set()

    def check(self) -> None:
        """Raise NoSpaceError or CancelledError where the run shall stop."""
        if self._reason is not None:
            raise self._reason
        self._cancel.check()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_seconds):
            if self._reason is None:
                self._reason = self._look()
            if self._reason is not None and self._end_clone():
                return

    def _look(self) -> NoSpaceError | None:
        """Return why the run has to stop, or None, also where it cannot be told."""
        try:
            free = self._free_bytes()
        except Exception as error:  # noqa: BLE001 - a watch that ends at a bug watches no more
            _LOG.debug("overlay space is unknown: %s", error)
            return None
        if free >= self._floor_bytes:
            return None
        reason = NoSpaceError(
            f"the overlays' file system has {free // _MIB} MiB left; the run was given up so that the guest can go on",
            remedy="make room, set capture.overlay_dir, or back up when the guest writes less",
        )
        _LOG.error("%s", reason.brief)
        return reason

    def _end_clone(self) -> bool:
        try:
            self._kill_clone()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is tried again
            _LOG.warning("the clone could not be ended: %s", error)
            return False
        return True


ISOLATION_ALARM = "ISOLATION ALARM"
"""How the log's line of a breach begins; for whoever looks out for it."""


@contextmanager
def alarmed() -> Iterator[None]:
    """Sound the alarm, in the log, for an IsolationError that leaves the block: no clone runs yet that could be ended."""
    try:
        yield
    except IsolationError as error:
        _LOG.critical("%s: %s", ISOLATION_ALARM, error.brief)
        raise


class IsolationGuard:
    """A Cancel that stops the run when its clone's isolation is broken, and ends the clone in that moment.

    ``cut`` takes its links down first, which needs no hypervisor; ``kill_clone`` ends it. ``inner`` goes on meaning what it
    means.
    """

    def __init__(self, inner: Cancel, *, cut: Callable[[], None], kill_clone: Callable[[], None]) -> None:
        self._inner = inner
        self._cut = cut
        self._kill_clone = kill_clone
        self._lock = threading.Lock()
        self._reason: IsolationError | None = None

    @property
    def reason(self) -> IsolationError | None:
        """Return the breach, or None."""
        return self._reason

    def sound(self, breach: IsolationError) -> None:
        """Sound the alarm: the log, the end of the clone, the end of the run. Only the first breach counts."""
        with self._lock:
            if self._reason is not None:
                return
            self._reason = breach
        _LOG.critical("%s: %s", ISOLATION_ALARM, breach.brief)
        for doing, action in (("cut off", self._cut), ("ended", self._kill_clone)):
            try:
                action()
            except Exception as error:  # noqa: BLE001 - the other one may work, and the run's own clean-up tries again
                _LOG.critical("%s: the clone could not be %s: %s", ISOLATION_ALARM, doing, error)

    def is_set(self) -> bool:
        """Tell whether the run shall stop."""
        return self._reason is not None or self._inner.is_set()

    def check(self) -> None:
        """Raise IsolationError, or what the inner one raises, where the run shall stop."""
        if self._reason is not None:
            raise self._reason
        self._inner.check()
