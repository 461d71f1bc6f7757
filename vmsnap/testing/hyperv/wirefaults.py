"""Faults of the wire that a test asks for: where, how often, and what happens there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


class Harm(StrEnum):
    """What happens to a request."""

    CUT_BEFORE = "the connection ends before the request was acted upon"
    CUT_AFTER = "the request was acted upon, and the connection ends before the answer"
    UNAVAILABLE = "HTTP 503, nothing done"
    FAULT = "a fault of WS-Management, nothing done"
    SLOW = "the answer comes late"


@dataclass(frozen=True, kw_only=True)
class WireFault:
    """One fault. It strikes requests of ``operation`` (``Create``, ``Command``, ``Receive``, ...; ``*``: any).

    Of those, only what belongs to a pipeline whose text contains ``containing``. The first ``skip`` pass; ``times`` are
    struck. ``code`` is that of a FAULT, ``seconds`` the delay of a SLOW one.
    """

    harm: Harm
    operation: str = "Command"
    containing: str = ""
    skip: int = 0
    times: int = 1
    code: int = 0
    seconds: float = 0.0


class FaultPlan:
    """The faults of one endpoint. Methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.struck: list[WireFault] = []
        self._armed: list[_Armed] = []

    def add(self, fault: WireFault) -> None:
        """Arm a fault."""
        with self._lock:
            self._armed.append(_Armed(fault))

    def clear(self) -> None:
        """Disarm all."""
        with self._lock:
            self._armed.clear()

    def strike(self, operation: str, *, text: Callable[[], str]) -> WireFault | None:
        """Return the fault that strikes a request. ``text`` gives its pipeline's text, where it has one."""
        with self._lock:
            for armed in self._armed:
                fault = armed.fault
                if fault.operation not in {"*", operation} or (fault.containing and fault.containing not in text()):
                    continue
                armed.seen += 1
                if fault.skip < armed.seen <= fault.skip + fault.times:
                    self.struck.append(fault)
                    return fault
        return None


class _Armed:
    def __init__(self, fault: WireFault) -> None:
        self.fault = fault
        self.seen = 0
