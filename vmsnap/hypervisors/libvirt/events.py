"""Events of one domain, recorded as they arrive."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

import libvirt
import libvirt_qemu

from vmsnap.hypervisors.libvirt import pauses
from vmsnap.hypervisors.libvirt.connection import translated
from vmsnap.hypervisors.libvirt.pauses import Mark
from vmsnap.model.capture import MEMORY_PART

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Pause:
    """When the guest's vCPUs stopped and when they went on, by QEMU's clock; ``marks`` are moments in between.

    ``times``: how often they stopped from the first to the last of these moments.
    """

    stopped: datetime
    resumed: datetime
    times: int = 1
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Event:
    name: str
    at: datetime
    status: str | None
    number: int


class PauseRecorder:
    """Records QEMU's events of one domain that tell of its pause, while the block runs.

    QEMU stamps the events itself (qapi/run-state.json), so the delay of their delivery does not count. MIGRATION and
    MIGRATION_PASS come because libvirt turns QEMU's migration capability ``events`` on.
    """

    def __init__(self, connection: Any, domain: Any) -> None:
        self._connection = connection
        self._domain = domain
        self._changed = threading.Condition()
        self._events: list[_Event] = []
        self._handles: list[int] = []

    def __enter__(self) -> Self:
        with translated("listen to QEMU's events"):
            for event in ("STOP", "RESUME", "MIGRATION", "MIGRATION_PASS"):
                self._handles.append(
                    libvirt_qemu.qemuMonitorEventRegister(self._connection, self._domain, event, self._record, None, 0)
                )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            try:
                libvirt_qemu.qemuMonitorEventDeregister(self._connection, handle)
            except libvirt.libvirtError:
                # The connection broke, and the registration went with it.
                continue

    def _record(
        self, _conn: object, _dom: object, event: str, seconds: int, micros: int, details: str | None, _opaque: object
    ) -> None:
        data = json.loads(details) if details else {}
        at = datetime.fromtimestamp(seconds + micros / 1e6, tz=UTC)
        with self._changed:
            self._events.append(_Event(name=event, at=at, status=data.get("status"), number=data.get("pass", 0)))
            self._changed.notify_all()

    def wait_for_news(self, *, timeout_seconds: float) -> None:
        """Wait until an event arrives, ``wake`` is called, or that long."""
        with self._changed:
            self._changed.wait(timeout=timeout_seconds)

    def wake(self) -> None:
        """Wake who waits for news."""
        with self._changed:
            self._changed.notify_all()

    def passes(self) -> int:
        """Return how many passes over memory were begun (QEMU's dirty-sync count)."""
        with self._changed:
            return max((event.number for event in self._events), default=0)

    def stopped_since(self) -> datetime | None:
        """Return since when the guest stands still with its memory not yet taken; None where it does not."""
        with self._changed:
            events = tuple(self._events)
        stopped = None
        for event in events:
            if event.name == "STOP":
                stopped = stopped or event.at
            elif event.name == "RESUME" or event.status == "completed":
                stopped = None
        return stopped

    def memory_taken(self) -> bool:
        """Tell whether QEMU has written all memory and device state: what is left is libvirt's work, in the pause."""
        with self._changed:
            return any(event.status == "completed" for event in self._events)

    def wait_for_resume(self, *, timeout_seconds: float) -> bool:
        """Wait until the guest has gone on since it last stopped, or that long. Returns whether it has."""
        with self._changed:
            return self._changed.wait_for(self._runs_again, timeout=timeout_seconds)

    def _runs_again(self) -> bool:
        return [event.name for event in self._events if event.name in ("STOP", "RESUME")][-1:] == ["RESUME"]

    def pause(self, *, timeout_seconds: float) -> Pause | None:
        """Return the pause from the first STOP to the last RESUME, waiting for the latter; None where one is missing."""
        with self._changed:
            self._changed.wait_for(lambda: self._complete() is not None, timeout=timeout_seconds)
            return self._complete()

    def _complete(self) -> Pause | None:
        stops = [event.at for event in self._events if event.name == "STOP"]
        resumes = [event.at for event in self._events if event.name == "RESUME"]
        if not stops or not resumes or resumes[-1] < stops[-1]:
            return None
        return Pause(stopped=stops[0], resumed=resumes[-1], times=len(stops), marks=tuple(self._marks()))

    def _marks(self) -> Iterator[Mark]:
        for event in self._events:
            if event.name == "MIGRATION_PASS":
                yield Mark(part=pauses.STOPPING, at=event.at)
            elif event.name == "MIGRATION" and event.status == "completed":
                yield Mark(part=MEMORY_PART, at=event.at)


class LifecycleRecorder:
    """Records lifecycle events of one domain (virDomainEventType) while the block runs."""

    def __init__(self, connection: Any, domain: Any) -> None:
        self._connection = connection
        self._domain = domain
        self._changed = threading.Condition()
        self._seen: list[tuple[int, int]] = []
        self._handle: int | None = None

    def __enter__(self) -> Self:
        with translated("listen to libvirt's events"):
            self._handle = self._connection.domainEventRegisterAny(
                self._domain, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._record, None
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is None:
            return
        try:
            self._connection.domainEventDeregisterAny(self._handle)
        except libvirt.libvirtError:
            return

    def _record(self, _conn: object, _dom: object, event: int, detail: int, _opaque: object) -> None:
        with self._changed:
            self._seen.append((event, detail))
            self._changed.notify_all()

    def wait_for(self, event: int, *, timeout_seconds: float) -> bool:
        """Wait until an event of that type was seen. Returns whether it was."""
        with self._changed:
            return self._changed.wait_for(lambda: any(seen == event for seen, _ in self._seen), timeout=timeout_seconds)

    def details(self, event: int) -> tuple[int, ...]:
        """Return the details of all events of that type seen so far."""
        with self._changed:
            return tuple(detail for seen, detail in self._seen if seen == event)


class ShutdownRecorder:
    """Records why QEMU says that one domain shuts down (qapi/run-state.json, ShutdownCause), while the block runs.

    libvirt's own events tell the guest from the host, but not a power-off from a reset or a panic that ends the domain. Where
    the event cannot be heard there is no reason; nor has QEMU before 4.0 one.
    """

    def __init__(self, connection: Any, domain: Any) -> None:
        self._connection = connection
        self._domain = domain
        self._reasons: list[str] = []
        self._handle: int | None = None

    def __enter__(self) -> Self:
        try:
            self._handle = libvirt_qemu.qemuMonitorEventRegister(
                self._connection, self._domain, "SHUTDOWN", self._record, None, 0
            )
        except libvirt.libvirtError as error:
            _LOG.warning("QEMU's reason for a shutdown cannot be heard: %s", error)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is None:
            return
        try:
            libvirt_qemu.qemuMonitorEventDeregister(self._connection, self._handle)
        except libvirt.libvirtError:
            return

    def _record(
        self,
        _conn: object,
        _dom: object,
        _event: str,
        _seconds: int,
        _micros: int,
        details: str | None,
        _opaque: object,
    ) -> None:
        reason = json.loads(details).get("reason") if details else None
        if isinstance(reason, str):
            self._reasons.append(reason)

    @property
    def reason(self) -> str | None:
        """Return why it shut down: the first reason. What follows is libvirt ending QEMU (``host-signal``)."""
        return self._reasons[0] if self._reasons else None
