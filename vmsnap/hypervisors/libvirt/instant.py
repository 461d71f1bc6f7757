"""Mode ``instant``: the guest stands still once, for its devices and disks; its memory streams into the clone afterwards.

For guests that write memory faster than it can be copied. Everything that can be done before the guest stops is done before:
overlays, fence, a clone that waits for its stream, and QEMU's own preparation of the guest's memory, which takes the longest
and grows with it. For the last, QEMU is told to migrate while the guest runs, into a full pipe: it prepares, and waits with
its first write. Only then the guest is stopped and its disks are switched, and the pipe is emptied. So QEMU cannot have
protected the memory before the disks were switched, nor let the guest go on. From QEMU 8.2 on it cannot be kept waiting there,
and prepares while the guest stands still.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import libvirt

from vmsnap.errors import DeadlineError, DriverError, NoSpaceError, PreconditionError, SafetyError, VmsnapError
from vmsnap.hypervisors.libvirt import background, memory, overlays, save_image
from vmsnap.hypervisors.libvirt.background import BackgroundDetail
from vmsnap.hypervisors.libvirt.clones import clone_of, clone_xml
from vmsnap.hypervisors.libvirt.connection import Connection, translated
from vmsnap.hypervisors.libvirt.events import Pause, PauseRecorder
from vmsnap.hypervisors.libvirt.flushing import FlushedDisks
from vmsnap.hypervisors.libvirt.monitor import Monitor
from vmsnap.hypervisors.libvirt.processes import pid_of
from vmsnap.hypervisors.libvirt.receiver import CloneReceiver
from vmsnap.hypervisors.libvirt.relayed import RelayedStream
from vmsnap.hypervisors.libvirt.request import request_for
from vmsnap.hypervisors.libvirt.watchdog import Watchdog
from vmsnap.hypervisors.libvirt.xml import parse, unparse
from vmsnap.model.capture import Capture, CaptureMode, CapturePlan, PausePart
from vmsnap.model.isolation import FencePlan
from vmsnap.ports.clock import Cancel, Clock

_LOG = logging.getLogger(__name__)
_FLAGS = (
    libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT
)
_SAVED = libvirt.VIR_DOMAIN_XML_SECURE | libvirt.VIR_DOMAIN_XML_MIGRATABLE
_WATCH_SECONDS = 0.1
_PAUSE_POLL_SECONDS = 0.002
_READY_SECONDS = 120
_PREPARING_SECONDS = 60
_FLUSHING_SECONDS = 5
_THREAD_SECONDS = 2
_RESUME_SECONDS = 30
_ENDING_SECONDS = 60
_GIVE_BACK_SECONDS = 60
_SHORTEST_STALL = timedelta(seconds=2)
# Where this process hangs: how long the guest may stand still beyond the promised pause before the watchdog lets it go on.
_WATCHDOG_SLACK_SECONDS = 10
DISKS_PART = "stop and disks"
MEMORY_PART = "devices and memory protection"


@dataclass(frozen=True, kw_only=True)
class InstantRequest:
    """What a capture in mode ``instant`` needs beside its plan. ``folder`` is the run's own, ``nvram`` the clone's."""

    plan: CapturePlan
    fence: FencePlan
    folder: Path
    nvram: str | None
    reason: str


class InstantCapture:
    """One capture in mode ``instant``."""

    def __init__(self, connection: Connection, *, request: InstantRequest, clock: Clock) -> None:
        self._connection = connection
        self._request = request
        self._plan = request.plan
        self._guest = request.plan.guest.name
        self._clock = clock
        self._detail = overlays.describe(request.plan, role="source")
        self._stopped_here = False

    def run(self, *, cancel: Cancel) -> tuple[Capture, CloneReceiver]:
        """Capture; return with the clone as its stream has ended: libvirt may not be done with it yet.

        The guest runs when this returns or raises, and QEMU is as it was; see ports.hypervisor for the errors.
        """
        domain = self._connection.domain(self._guest)
        held = background.can_be_held(self._qemu_version())
        started = self._clock.monotonic()
        until = started + self._plan.settings.timeout.total_seconds()
        receiver = CloneReceiver(
            self._connection,
            clone=clone_of(self._plan.run, guest=self._guest).name,
            fifo=self._request.folder / memory.FIFO_NAME,
            header=self._header(domain),
        )
        stall = max(_SHORTEST_STALL, self._plan.settings.max_pause)
        with (
            self._given_back(domain),
            self._watchdog() as watchdog,
            receiver,
            FlushedDisks(tuple(disk.base for disk in self._detail.disks)) as disks,
            self._going_on(watchdog),
            RelayedStream(sink=receiver.sink, held=held, stall=stall, writer_pid=self._pid()) as stream,
            PauseRecorder(self._connection.get(), domain) as recorder,
        ):
            receiver.wait_until_it_reads(timeout_seconds=_READY_SECONDS, cancel=cancel)
            receiver.close_ends()
            monitor = Monitor(domain)
            monitor.give_file(stream.writer, name=background.STREAM)
            stream.close_writer()
            disks.flush()
            if held:
                switched = self._stop_while_it_waits(domain, stream=stream, watchdog=watchdog, cancel=cancel)
            else:
                disks.wait(timeout_seconds=_FLUSHING_SECONDS)
                switched = self._stop_before_it_begins(domain, stream=stream, watchdog=watchdog)
            pause = self._pause(recorder, switched=switched)
            self._stopped_here = False
            watchdog.pause_is_over()
            info = self._watch(monitor, stream=stream, receiver=receiver, until=until, cancel=cancel)
        return self._capture(pause, switched=switched, info=info, started=started), receiver

    def _pid(self) -> int:
        pid = pid_of(self._guest)
        if pid is None:
            raise PreconditionError(
                f"the process of {self._guest!r} is not known, so it could not be let go on if its memory stream broke",
                remedy='set capture.mode = "live"',
            )
        return pid

    def _qemu_version(self) -> int:
        with translated("ask for QEMU's version"):
            version: int = self._connection.get().getVersion()
        return version

    def _header(self, domain: Any) -> bytes:
        """Return the header that libvirt itself would write for this guest, with the clone's XML in it."""
        with translated(f"describe {self._guest!r}"):
            saved = domain.XMLDesc(_SAVED)
            cpu = parse(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_SECURE)).find("cpu")
        # libvirt's cookie holds the CPU as QEMU has it, which the XML that may be migrated leaves open (qemu_domain.c).
        cookie = "<cookie/>" if cpu is None else f"<cookie>{unparse(cpu)}</cookie>"
        xml = clone_xml(saved, plan=self._plan, fence=self._request.fence, nvram=self._request.nvram)
        return save_image.make_header(xml=xml, cookie=cookie)

    @contextmanager
    def _given_back(self, domain: Any) -> Iterator[None]:
        """Set what QEMU needs, and give it back whatever happens, libvirtd restarted meanwhile included."""
        monitor = Monitor(domain)
        detail = background.describe(domain)
        try:
            background.allow(monitor)
            yield
        finally:
            self._give_back(detail)

    def _give_back(self, detail: BackgroundDetail) -> None:
        until = time.monotonic() + _GIVE_BACK_SECONDS
        while True:
            try:
                domain = self._connection.domain(self._guest)
                with translated(f"look at {self._guest!r}"):
                    active = domain.isActive()
                if active:
                    background.give_back(domain, detail=detail, until=until)
            except VmsnapError as error:
                if time.monotonic() > until:
                    # The release of the overlays tries again, and raises.
                    _LOG.error("QEMU's settings for %r could not be given back: %s", self._guest, error.brief)
                    return
                time.sleep(_WATCH_SECONDS)
            else:
                return

    @contextmanager
    def _going_on(self, watchdog: Watchdog) -> Iterator[None]:
        """Let the guest go on where the block ends with it stopped for the capture. The stream is cut by then."""
        try:
            yield
        finally:
            if self._stopped_here:
                self._ensure_running()
                watchdog.pause_is_over()

    def _ensure_running(self) -> None:
        until = time.monotonic() + _RESUME_SECONDS
        while True:
            try:
                domain = self._connection.domain(self._guest)
                with translated(f"resume {self._guest!r}"):
                    if domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
                        domain.resume()
                    if domain.state()[0] != libvirt.VIR_DOMAIN_PAUSED:
                        return
            except VmsnapError as error:
                if time.monotonic() > until:
                    raise SafetyError(
                        f"it is not known whether {self._guest!r} runs: {error.brief}",
                        remedy=f"look with 'virsh domstate --reason {self._guest}', and 'virsh resume' it if it is "
                        "paused; then 'vmsnap reconcile'",
                    ) from error
            time.sleep(_WATCH_SECONDS)

    def _disks_request(self, domain: Any) -> str:
        return request_for(domain, detail=self._detail, image=None)

    def _watchdog(self) -> Watchdog:
        limit_seconds = self._plan.settings.max_pause.total_seconds() + _WATCHDOG_SLACK_SECONDS
        return Watchdog(
            self._connection.uri,
            uuid=self._plan.guest.uuid,
            limit_seconds=limit_seconds,
            folder=self._request.folder,
        )

    def _stop_while_it_waits(
        self, domain: Any, *, stream: RelayedStream, watchdog: Watchdog, cancel: Cancel
    ) -> datetime:
        """Let QEMU prepare, stop the guest, switch its disks, and let QEMU take it. Returns when the disks were switched."""
        monitor = Monitor(domain)
        monitor.ask("migrate", uri=f"fd:{background.STREAM}")
        self._wait_prepared(monitor, cancel=cancel)
        switched = self._stop_and_switch(domain, watchdog=watchdog)
        if monitor.migration().get("status") != "setup":
            raise DriverError("QEMU took the guest's memory before its disks were switched; nothing of it is used")
        stream.let_flow()
        return switched

    def _wait_prepared(self, monitor: Monitor, *, cancel: Cancel) -> None:
        began = time.monotonic()
        while (waits := background.waits_for_reader(self._guest)) is not True:
            cancel.check()
            info = monitor.migration()
            if info.get("status") != "setup":
                raise DriverError(
                    f"QEMU gave up before the guest was stopped: {info.get('error-desc', info.get('status'))}",
                    remedy=f"see /var/log/libvirt/qemu/{self._guest}.log",
                )
            took = time.monotonic() - began
            if took > (_THREAD_SECONDS if waits is None else _PREPARING_SECONDS):
                # What is left of the preparation makes the pause longer, and nothing else.
                _LOG.info("it cannot be told whether QEMU is prepared")
                return
            time.sleep(_PAUSE_POLL_SECONDS)

    def _stop_before_it_begins(self, domain: Any, *, stream: RelayedStream, watchdog: Watchdog) -> datetime:
        """Stop the guest, switch its disks, let QEMU prepare and take it, and let it go on where QEMU does not."""
        monitor = Monitor(domain)
        stream.let_flow()
        switched = self._stop_and_switch(domain, watchdog=watchdog)
        monitor.ask("migrate", uri=f"fd:{background.STREAM}")
        until = time.monotonic() + _RESUME_SECONDS
        while not background.has_begun(info := monitor.migration()):
            if background.is_over(info) or time.monotonic() > until:
                raise DriverError(f"QEMU did not take the guest: {info.get('error-desc', info.get('status'))}")
            time.sleep(_PAUSE_POLL_SECONDS)
        with translated(f"resume {self._guest!r}"):
            if domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
                domain.resume()
        return switched

    def _stop_and_switch(self, domain: Any, *, watchdog: Watchdog) -> datetime:
        xml = self._disks_request(domain)
        with translated(f"stop {self._guest!r}"):
            if domain.state()[0] != libvirt.VIR_DOMAIN_RUNNING:
                raise PreconditionError(
                    f"{self._guest!r} was stopped by somebody else",
                    remedy=f"start the backup again when it runs: virsh resume {self._guest}",
                )
            watchdog.claim_next_pause()
            self._stopped_here = True
            domain.suspend()
        with translated(f"switch the disks of {self._guest!r} to their overlays"):
            domain.snapshotCreateXML(xml, _FLAGS)
        return datetime.now(tz=UTC)

    def _pause(self, recorder: PauseRecorder, *, switched: datetime) -> Pause:
        pause = recorder.pause(timeout_seconds=_RESUME_SECONDS)
        if pause is None:
            raise DriverError("QEMU did not say that the guest goes on")
        # Stopped twice: somebody let it go on in between, and QEMU stopped it again for its memory.
        if pause.times != 1 or not pause.stopped < switched < pause.resumed:
            raise SafetyError(
                "the guest went on before it was taken: its memory and its disks are not of one instant",
                details=f"stopped {pause.stopped}, switched {switched}, went on {pause.resumed}, stopped {pause.times} times",
                remedy='start the backup again, or set capture.mode = "live"',
            )
        return pause

    def _watch(
        self, monitor: Monitor, *, stream: RelayedStream, receiver: CloneReceiver, until: float, cancel: Cancel
    ) -> dict[str, Any]:
        """Watch until QEMU has written the whole stream. Returns its MigrationInfo."""
        settings = self._plan.settings
        while True:
            info = monitor.migration()
            if info.get("status") == "completed":
                # QEMU has written everything; some of it may be on its way yet.
                stream.require_ended(timeout_seconds=_ENDING_SECONDS)
                return info
            cancel.check()
            failure = stream.failure()
            receiver.require_alive()
            if failure is not None:
                raise failure
            if background.is_over(info):
                raise DriverError(f"QEMU gave up on the memory stream: {info.get('error-desc', info.get('status'))}")
            if self._clock.monotonic() > until:
                raise DeadlineError(
                    f"the capture did not end within {settings.timeout}",
                    remedy="raise capture.timeout in the policy, or capture at a quieter time",
                )
            if overlays.free_bytes(self._detail) < settings.min_overlay_free_bytes // 2:
                raise NoSpaceError(
                    "the file system of the overlays is running full; the capture was given up",
                    remedy="make room, or set capture.overlay_dir",
                )
            time.sleep(_WATCH_SECONDS)

    def _capture(self, pause: Pause, *, switched: datetime, info: dict[str, Any], started: float) -> Capture:
        length = pause.resumed - pause.stopped
        if length > self._plan.settings.max_pause:
            _LOG.warning("the pause took %s, the policy wishes %s at most", length, self._plan.settings.max_pause)
        parts = ((DISKS_PART, switched - pause.stopped), (MEMORY_PART, pause.resumed - switched))
        return Capture(
            mode=CaptureMode.INSTANT,
            reason=self._request.reason,
            captured=pause.stopped,
            resumed=pause.resumed,
            pause_ms=length / timedelta(milliseconds=1),
            ram_bytes=int(info.get("ram", {}).get("transferred", 0)),
            seconds=self._clock.monotonic() - started,
            parts=tuple(PausePart(name=name, ms=took / timedelta(milliseconds=1)) for name, took in parts),
        )
