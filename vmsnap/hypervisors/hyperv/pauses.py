"""How long a guest stood still while Hyper-V exported it: it does not say, so it is looked at while that goes on."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

from vmsnap.errors import VmsnapError
from vmsnap.model.capture import PausePart

_RUNNING = "Running"
# Clocks of two machines and the time that an answer takes: less than this says nothing.
_NOISE_MS = 250.0


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One look at a guest. ``began`` and ``ended`` are our monotonic clock in seconds around it; uptime is the guest's."""

    began: float
    ended: float
    state: str
    uptime_ms: float


@dataclass(frozen=True, kw_only=True)
class Pause:
    """How long it stood still. ``at_most``: nothing was seen of it, and all that is known is that it was not longer."""

    ms: float
    at_most: bool
    parts: tuple[PausePart, ...]


def pause_of(samples: Sequence[Sample], *, export_ms: float) -> Pause:
    """Return what samples tell of the pause within an export that took ``export_ms``.

    Two things can tell: a state that is not Running, from the last look before to the first one after; and an uptime that
    falls behind our clock. The longer of them counts. Where neither does, the export's time is all that is known.
    """
    by_state = _not_running_ms(samples)
    behind = _behind_ms(samples)
    if by_state <= 0 and behind <= _NOISE_MS:
        return Pause(
            ms=export_ms,
            at_most=True,
            parts=(PausePart(name="at most: the export as a whole, of which Hyper-V tells nothing", ms=export_ms),),
        )
    name = "not running, as looked at" if by_state >= behind else "uptime that stood still"
    longer = min(max(by_state, behind), export_ms)
    return Pause(ms=longer, at_most=False, parts=(PausePart(name=name, ms=longer),))


def _not_running_ms(samples: Sequence[Sample]) -> float:
    pairs = itertools.pairwise(samples)
    seen = [(before, after) for before, after in pairs if {before.state, after.state} != {_RUNNING}]
    return sum(after.ended - before.began for before, after in seen) * 1000


def _behind_ms(samples: Sequence[Sample]) -> float:
    if len(samples) < 2:
        return 0.0
    first, last = samples[0], samples[-1]
    # The least that our clock went on between the two looks.
    ours = (last.began - first.ended) * 1000
    return ours - (last.uptime_ms - first.uptime_ms)


class PauseWatch:
    """Looks at a guest again and again, in a thread of its own, while the block runs. A look that fails is left out."""

    def __init__(self, look: Callable[[], tuple[str, float]], *, interval_seconds: float = 0.25) -> None:
        self._look = look
        self._interval_seconds = interval_seconds
        self._stop = threading.Event()
        self._samples: list[Sample] = []
        self._thread = threading.Thread(target=self._watch, name="vmsnap-pause-watch", daemon=True)
        self._began = 0.0
        self._ended = 0.0
        self.started = datetime.now(UTC)
        self.ended = self.started

    def __enter__(self) -> Self:
        self._sample()
        self._thread.start()
        self.started, self._began = datetime.now(UTC), time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended, self._ended = datetime.now(UTC), time.monotonic()
        self._stop.set()
        self._thread.join()
        if kind is None:
            self._sample()

    @property
    def seconds(self) -> float:
        """Return how long the block took."""
        return self._ended - self._began

    @property
    def pause(self) -> Pause:
        """Return what is known of the pause."""
        return pause_of(self._samples, export_ms=self.seconds * 1000)

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_seconds):
            self._sample()

    def _sample(self) -> None:
        began = time.monotonic()
        try:
            state, uptime_ms = self._look()
        except VmsnapError:
            return
        self._samples.append(Sample(began=began, ended=time.monotonic(), state=state, uptime_ms=uptime_ms))
