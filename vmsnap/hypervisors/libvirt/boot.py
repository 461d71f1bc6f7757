"""Mode ``boot``: only the disks are taken, and the clone boots from them. For guests whose memory cannot be cloned.

The vCPUs run on: QEMU holds the disks' I/O for the moment in which all of them change over to their overlays.
"""

from __future__ import annotations

import copy
import logging
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from datetime import timedelta

import libvirt

from vmsnap.errors import SafetyError
from vmsnap.hypervisors.libvirt import overlays, preflight, rewrite
from vmsnap.hypervisors.libvirt.clones import clone_of
from vmsnap.hypervisors.libvirt.connection import Connection, translated
from vmsnap.hypervisors.libvirt.events import PauseRecorder
from vmsnap.hypervisors.libvirt.inspect import disk_target, memory_bytes, writable_disks
from vmsnap.hypervisors.libvirt.pauses import DISKS
from vmsnap.hypervisors.libvirt.request import request_for
from vmsnap.hypervisors.libvirt.stripping import can_lower_memory, lower_memory, strip
from vmsnap.hypervisors.libvirt.xml import Tag, drop, parse, unparse
from vmsnap.model.capture import Capture, CapturePlan, CaptureSettings, PausePart
from vmsnap.model.guest import Finding, Severity
from vmsnap.model.isolation import FencePlan
from vmsnap.ports.clock import Cancel, Clock

_LOG = logging.getLogger(__name__)
_MIB = 1 << 20
_FLAGS = (
    libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT
)


class BootCapture:
    """One capture in mode ``boot``."""

    def __init__(self, connection: Connection, *, plan: CapturePlan, clock: Clock) -> None:
        self._connection = connection
        self._plan = plan
        self._clock = clock

    def run(self, *, cancel: Cancel) -> Capture:
        """Put the disks on their overlays. See ports.hypervisor for the errors.

        ``pause_ms`` is how long QEMU said that the vCPUs stood still; where it said nothing, they did not, and it is how long
        the change-over took at most.
        """
        domain = self._connection.domain(self._plan.guest.name)
        xml = request_for(domain, detail=overlays.describe(self._plan, role="source"), image=None)
        cancel.check()
        with PauseRecorder(self._connection.get(), domain) as recorder:
            began = self._clock.now()
            with translated(f"capture the disks of {self._plan.guest.name!r}"):
                domain.snapshotCreateXML(xml, _FLAGS)
            ended = self._clock.now()
            pause = recorder.pause(timeout_seconds=0.2)
        stopped, resumed = (began, ended) if pause is None else (pause.stopped, pause.resumed)
        pause_ms = (resumed - stopped) / timedelta(milliseconds=1)
        return Capture(
            mode=self._plan.choice.mode,
            reason=self._plan.choice.reason,
            captured=stopped,
            resumed=resumed,
            pause_ms=pause_ms,
            ram_bytes=0,
            seconds=(ended - began).total_seconds(),
            parts=(PausePart(name=DISKS, ms=pause_ms),),
        )


def clone_xml(text: str, *, plan: CapturePlan, fence: FencePlan, nvram: str | None) -> str:
    """Return the XML of a clone that boots, made of the source's live XML.

    Raises SafetyError where the source was changed after the capture.
    """
    domain = parse(text)
    clone = clone_of(plan.run, guest=plan.guest.name)
    tag = Tag(run=plan.run, kind="clone", guest=plan.guest.name)
    left_out = strip(domain)
    if left_out:
        _LOG.info("the clone goes without: %s", ", ".join(left_out))
    rewrite.set_identity(domain, rewrite.Identity(name=clone.name, uuid=clone.uuid, tag=tag))
    detail = overlays.describe(plan, role="clone")
    try:
        rewrite.set_disks(domain, {disk.target: disk.overlay for disk in detail.disks})
        rewrite.set_nics(
            domain, tuple(rewrite.NicAttachment(bridge=port.bridge, tap=port.tap, mac=port.mac) for port in fence.ports)
        )
    except (KeyError, ValueError) as error:
        raise SafetyError(
            "a disk or a NIC of the guest was added or taken away after the run began", remedy="start the backup again"
        ) from error
    rewrite.keep_flushes_back(domain)
    rewrite.privatise_host_ends(domain)
    rewrite.set_nvram(domain, nvram)
    rewrite.set_life(domain, reboot="destroy", crash="destroy")
    lower_memory(domain, plan.settings.boot_memory_bytes)
    # A generation of its own: libvirt makes one up where none is given, and the guest's random numbers begin anew.
    for generation in domain.findall("genid"):
        generation.text = None
    for tune in domain.findall("cputune"):
        drop(tune, "shares")
    return unparse(domain)


def check_devices(domain: ET.Element) -> Iterator[Finding]:
    """Check for what cannot be left out of a clone that boots, and say what will be."""
    stripped = copy.deepcopy(domain)
    left_out = strip(stripped)
    if left_out:
        yield Finding(
            check="devices",
            severity=Severity.WARNING,
            message=f"the clone will be without: {', '.join(left_out)}",
            remedy="the guest must be able to boot, and its database to start, without them",
        )
    for disk in writable_disks(domain):
        driver = disk.find("driver")
        if driver is not None and driver.get("cache") == "unsafe":
            yield Finding(
                check=f"disk {disk_target(disk)}",
                severity=Severity.REFUSAL,
                message="it has cache='unsafe', which keeps no order of what the guest flushed: its recovery would prove nothing",
                remedy="give its <driver> another cache, or capture the memory as well (capture.mode)",
            )
    yield from preflight.check_devices(stripped)


def clone_memory_bytes(domain: ET.Element, *, settings: CaptureSettings) -> int:
    """Return how much memory the clone will have."""
    own = memory_bytes(domain)
    if settings.boot_memory_bytes is None or not can_lower_memory(domain):
        return own
    return min(own, settings.boot_memory_bytes)


def check_memory(domain: ET.Element, *, settings: CaptureSettings, available_bytes: int) -> Finding:
    """Check that the host has memory for the clone. No memory image is made."""
    needed = clone_memory_bytes(domain, settings=settings) + preflight.KEEP_FREE_BYTES
    text = f"{available_bytes // _MIB} MiB of memory available, the clone needs {needed // _MIB} MiB"
    if available_bytes < needed:
        return Finding(
            check="memory",
            severity=Severity.REFUSAL,
            message=f"the host has {text}",
            remedy="set clone.boot_memory_mib in the policy, run fewer guests or clones, or add memory",
        )
    return Finding(check="memory", severity=Severity.OK, message=text)
