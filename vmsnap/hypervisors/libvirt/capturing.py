"""Captures and the clones made of them, in whichever mode a plan has."""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import ExitStack
from pathlib import Path

import libvirt

from vmsnap.errors import NotConvergingError
from vmsnap.hypervisors.libvirt import boot, copies, definitions, memory
from vmsnap.hypervisors.libvirt.capture import LiveCapture
from vmsnap.hypervisors.libvirt.clones import Clones
from vmsnap.hypervisors.libvirt.connection import Connection, translated
from vmsnap.hypervisors.libvirt.instant import InstantCapture, InstantRequest
from vmsnap.hypervisors.libvirt.receiver import CloneReceiver
from vmsnap.hypervisors.libvirt.storage import AtRest
from vmsnap.hypervisors.libvirt.tools import translated_os
from vmsnap.hypervisors.libvirt.watchdog import Watchdog
from vmsnap.model.capture import Capture, CaptureMode, CapturePlan, Clone, Detach, DiskSnapshot, OnNoConvergence
from vmsnap.model.ids import RunId
from vmsnap.model.isolation import FencePlan
from vmsnap.ports.clock import Cancel, Clock

_LOG = logging.getLogger(__name__)
_WATCHDOG_SLACK_SECONDS = 2
_LOADING_SECONDS = 120
MEMORY_FOLDER = "memory"
CLONE_NVRAM = "nvram.clone.fd"


def make_runtime(runtime: Path, run: RunId) -> Path:
    """Make a run's own folder, which QEMU may walk through, and return it. Raises PreconditionError, DriverError."""
    folder = runtime / run
    with translated_os(f"make {folder}"):
        runtime.mkdir(mode=0o711, parents=True, exist_ok=True)
        folder.mkdir(mode=0o711, exist_ok=True)
    return folder


class Captures:
    """All captures of one driver. ``runtime`` is the folder of the runs' own folders."""

    def __init__(self, connection: Connection, *, clones: Clones, runtime: Path, clock: Clock) -> None:
        self._connection = connection
        self._clones = clones
        self._runtime = runtime
        self._clock = clock
        self._receivers: dict[RunId, CloneReceiver] = {}

    def capture(self, plan: CapturePlan, *, fence: FencePlan, cancel: Cancel) -> Capture:
        """Capture in the plan's mode, or in mode ``instant`` what does not converge. See ports.hypervisor."""
        capture = self._take(plan, fence=fence, cancel=cancel)
        # From now on the guest writes to its overlays: after a power cut it must start on them.
        definitions.settle()
        return capture

    def _take(self, plan: CapturePlan, *, fence: FencePlan, cancel: Cancel) -> Capture:
        if plan.choice.mode is CaptureMode.INSTANT:
            return self._instantly(plan, fence=fence, reason=plan.choice.reason, cancel=cancel)
        try:
            capture = self._capture(plan, cancel=cancel)
        except NotConvergingError as error:
            if plan.settings.on_no_convergence is not OnNoConvergence.INSTANT:
                raise
            _LOG.warning("taking the guest in mode instant: %s", error.brief)
            memory.discard_image(self._memory(plan))
            return self._instantly(plan, fence=fence, reason=f"not live: {error.brief}", cancel=cancel)
        if plan.settings.detach is Detach.REFLINK:
            copies.fill(copies.describe(plan))
        return capture

    def _memory(self, plan: CapturePlan) -> Path:
        return self._runtime / plan.run / MEMORY_FOLDER

    def _capture(self, plan: CapturePlan, *, cancel: Cancel) -> Capture:
        if plan.choice.mode is CaptureMode.BOOT:
            return boot.BootCapture(self._connection, plan=plan, clock=self._clock).run(cancel=cancel)
        settings = plan.settings
        by_storage = settings.disk_snapshot is DiskSnapshot.STORAGE
        may_suspend = settings.on_no_convergence is OnNoConvergence.SUSPEND
        longest = settings.storage_timeout if by_storage else settings.max_pause
        folder = self._memory(plan)
        with ExitStack() as watched:
            watchdog = None
            if by_storage or may_suspend:
                limit_seconds = longest.total_seconds() + _WATCHDOG_SLACK_SECONDS
                watchdog = watched.enter_context(
                    Watchdog(self._connection.uri, uuid=plan.guest.uuid, limit_seconds=limit_seconds, folder=folder)
                )
            capture = LiveCapture(
                self._connection,
                plan=plan,
                memory_folder=folder,
                clock=self._clock,
                at_rest=AtRest(plan) if by_storage else None,
                watchdog=watchdog if may_suspend else None,
            )
            return capture.run(cancel=cancel)

    def _instantly(self, plan: CapturePlan, *, fence: FencePlan, reason: str, cancel: Cancel) -> Capture:
        nvram = self._prepare_nvram(plan)
        request = InstantRequest(plan=plan, fence=fence, folder=self._memory(plan), nvram=nvram, reason=reason)
        capture = InstantCapture(self._connection, request=request, clock=self._clock)
        taken, self._receivers[plan.run] = capture.run(cancel=cancel)
        return taken

    def restore(self, plan: CapturePlan, *, fence: FencePlan) -> Clone:
        """Make the clone, paused, or take the one that the capture has made already. See ports.hypervisor."""
        receiver = self._receivers.pop(plan.run, None)
        if receiver is not None:
            receiver.wait_complete(timeout_seconds=_LOADING_SECONDS)
            return self._clones.accept(plan, fence=fence, nvram=self.nvram(plan))
        nvram = self._prepare_nvram(plan)
        if plan.choice.mode is CaptureMode.BOOT:
            make_runtime(self._runtime, plan.run)
            domain = self._connection.domain(plan.guest.name)
            with translated(f"describe {plan.guest.name!r}"):
                text = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_MIGRATABLE)
            xml = boot.clone_xml(text, plan=plan, fence=fence, nvram=nvram)
            return self._clones.create(plan, fence=fence, xml=xml, nvram=nvram)
        return self._clones.restore(plan, fence=fence, image=self._memory(plan) / memory.IMAGE_NAME, nvram=nvram)

    def _prepare_nvram(self, plan: CapturePlan) -> str | None:
        nvram = self.nvram(plan)
        if nvram is not None and plan.guest.nvram is not None:
            make_runtime(self._runtime, plan.run)
            with translated_os(f"copy the firmware variables {plan.guest.nvram}"):
                shutil.copyfile(plan.guest.nvram, nvram)
                owner = Path(plan.guest.nvram).stat()
                os.chown(nvram, owner.st_uid, owner.st_gid)
                Path(nvram).chmod(0o600)
        return nvram

    def nvram(self, plan: CapturePlan) -> str | None:
        """Return the path of the clone's firmware variables, or None where the guest has none."""
        return None if plan.guest.nvram is None else str(self._runtime / plan.run / CLONE_NVRAM)
