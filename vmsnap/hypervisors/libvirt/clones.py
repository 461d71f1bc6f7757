"""Clones: restored paused from the memory image, resumed on proof of their fence, shut down by their own guest."""

from __future__ import annotations

import logging
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

import libvirt

from vmsnap.errors import BugError, DeadlineError, GuestNotFoundError, NotCleanError
from vmsnap.hypervisors.libvirt import audit, memory, overlays, rewrite, save_image, yielding
from vmsnap.hypervisors.libvirt.clonelimits import NORMAL_SHARES, limit_memory, set_limits
from vmsnap.hypervisors.libvirt.connection import AGENT_COMMAND_TIMEOUT, Connection, gone, translated
from vmsnap.hypervisors.libvirt.events import LifecycleRecorder, ShutdownRecorder
from vmsnap.hypervisors.libvirt.inspect import nic_mac
from vmsnap.hypervisors.libvirt.processes import FirstToDie
from vmsnap.hypervisors.libvirt.stream import StreamFeeder
from vmsnap.hypervisors.libvirt.xml import Tag, devices, drop, parse, read_tag, unparse
from vmsnap.hypervisors.libvirt.yielding import GivingWay
from vmsnap.model.capture import CapturePlan, Clone
from vmsnap.model.guest import GuestState
from vmsnap.model.ids import RunId
from vmsnap.model.isolation import FencePlan, IsolationProof
from vmsnap.ports.clock import Cancel

_LOG = logging.getLogger(__name__)
_UUIDS = uuid.UUID("6c1e2f0a-7f0b-5a55-9a53-2b8f6f1f9e11")
_BY_ITS_GUEST = "guest-shutdown"
_STARTING = [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_STARTING_UP]
_STARTING_SECONDS = 10
_POLL_SECONDS = 0.05
_NOTHING_TO_DO = (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID)
_STATES = {
    libvirt.VIR_DOMAIN_RUNNING: GuestState.RUNNING,
    libvirt.VIR_DOMAIN_BLOCKED: GuestState.RUNNING,
    libvirt.VIR_DOMAIN_PAUSED: GuestState.PAUSED,
    libvirt.VIR_DOMAIN_SHUTOFF: GuestState.SHUT_OFF,
}


def state_of(domain: Any) -> GuestState:
    """Return a domain's state. Raises GuestNotFoundError where it is gone meanwhile."""
    with translated("read a guest's state"):
        return _STATES.get(domain.state()[0], GuestState.OTHER)


def clone_of(run: RunId, *, guest: str) -> Clone:
    """Return the clone of a run: its name and UUID follow from the run's id."""
    return Clone(run=run, guest=guest, name=f"vmsnap-clone-{run}", uuid=str(uuid.uuid5(_UUIDS, f"clone-{run}")))


def clone_xml(text: str, *, plan: CapturePlan, fence: FencePlan, nvram: str | None) -> str:
    """Return the clone's XML, made of the XML in the memory image. Raises BugError where fence and guest do not match."""
    domain = parse(text)
    clone = clone_of(plan.run, guest=plan.guest.name)
    rewrite.set_identity(
        domain,
        rewrite.Identity(name=clone.name, uuid=clone.uuid, tag=Tag(run=plan.run, kind="clone", guest=plan.guest.name)),
    )
    detail = overlays.describe(plan, role="clone")
    rewrite.set_disks(domain, {disk.target: disk.overlay for disk in detail.disks})
    macs = tuple(nic_mac(interface) for interface in devices(domain).findall("interface"))
    if macs != tuple(port.mac for port in fence.ports):
        raise BugError(f"the fence has ports for {[port.mac for port in fence.ports]}, the guest has {list(macs)}")
    rewrite.set_nics(domain, tuple(rewrite.NicAttachment(bridge=port.bridge, tap=port.tap) for port in fence.ports))
    rewrite.keep_flushes_back(domain)
    rewrite.privatise_host_ends(domain)
    rewrite.set_nvram(domain, nvram)
    rewrite.set_life(domain, reboot="destroy", crash="destroy")
    # It gets its own weight before it runs.
    for tune in domain.findall("cputune"):
        drop(tune, "shares")
    return unparse(domain)


class Clones:
    """All clones of one connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._ways: dict[RunId, GivingWay] = {}

    def restore(self, plan: CapturePlan, *, fence: FencePlan, image: Path, nvram: str | None) -> Clone:
        """Make the clone from the memory image, paused, and check what it could touch. See ports.hypervisor."""
        with image.open("r+b") as file:
            text = save_image.read_header(file).xml
            save_image.replace_xml(file, xml=clone_xml(text, plan=plan, fence=fence, nvram=nvram))
        clone = clone_of(plan.run, guest=plan.guest.name)
        self._giving_way(plan).begin()
        with StreamFeeder(image) as feeder, FirstToDie(clone.name) as doomed:
            with translated("restore the clone"):
                self._connection.get().restoreFlags(str(feeder.path), None, libvirt.VIR_DOMAIN_SAVE_PAUSED)
            feeder.require_fed()
            doomed.require_done()
        memory.discard_image(image.parent)
        return self.accept(plan, fence=fence, nvram=nvram)

    def create(self, plan: CapturePlan, *, fence: FencePlan, xml: str, nvram: str | None) -> Clone:
        """Make a clone that boots, before its first instruction, and check what it could touch. See ports.hypervisor."""
        clone = clone_of(plan.run, guest=plan.guest.name)
        with FirstToDie(clone.name) as doomed:
            with translated("create the clone"):
                self._connection.get().createXML(xml, libvirt.VIR_DOMAIN_START_PAUSED)
            doomed.require_done()
        return self.accept(plan, fence=fence, nvram=nvram)

    def accept(self, plan: CapturePlan, *, fence: FencePlan, nvram: str | None) -> Clone:
        """Check what the clone that libvirt has made, paused, could touch, and return it. See ports.hypervisor."""
        clone = clone_of(plan.run, guest=plan.guest.name)
        domain = self._connection.domain(clone.name)
        if state_of(domain) is not GuestState.PAUSED:
            raise BugError("libvirt made the clone running although it was told not to")
        with translated("describe the clone"):
            live = parse(domain.XMLDesc(0))
        detail = overlays.describe(plan, role="clone")
        audit.require_private(
            live,
            overlays={disk.target: disk.overlay for disk in detail.disks},
            bridges={port.mac: port.bridge for port in fence.ports},
            nvram=nvram,
            name="the clone",
        )
        limit_memory(domain, ram_bytes=plan.guest.memory_bytes)
        with self._giving_way(plan).weighed():
            set_limits(domain, cpu_shares=plan.settings.cpu_shares, limits=plan.settings.limits)
        return clone

    def _giving_way(self, plan: CapturePlan) -> GivingWay:
        """Return what lets a plan's clone give way. One that is to weigh as much as other VMs, or more, does not."""
        if plan.run not in self._ways:
            seconds = yielding.SECONDS if plan.settings.cpu_shares < NORMAL_SHARES else 0
            name = clone_of(plan.run, guest=plan.guest.name).name
            self._ways[plan.run] = GivingWay(name, run=plan.run, seconds=seconds)
        return self._ways[plan.run]

    def resume(self, clone: Clone, *, proof: IsolationProof) -> None:
        """Let the clone run. Raises BugError for a proof of another run."""
        if proof.run != clone.run:
            raise BugError(f"the proof is of run {proof.run}, the clone of run {clone.run}")
        domain = self._connection.domain(clone.name)
        with translated("resume the clone"):
            domain.resume()

    def shut_down(self, clone: Clone, *, agent_answers: bool, deadline: timedelta, cancel: Cancel) -> str:
        """Ask the guest to power off and wait. See ports.hypervisor.

        Only a SHUTDOWN that came from the guest counts: a QEMU that was killed, or crashed, ends as 'stopped' too. A guest
        that resets or panics late in its shutdown ends as one that powered off does, but for the reason that QEMU gives.
        """
        domain = self._connection.find_domain(clone.name)
        if domain is None:
            raise NotCleanError("the clone ended before it was asked to shut down", remedy="see /var/log/libvirt/qemu")
        mode = libvirt.VIR_DOMAIN_SHUTDOWN_GUEST_AGENT if agent_answers else libvirt.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN
        until = time.monotonic() + deadline.total_seconds()
        with (
            LifecycleRecorder(self._connection.get(), domain) as recorder,
            ShutdownRecorder(self._connection.get(), domain) as cause,
        ):
            self._ask(domain, mode)
            while not recorder.wait_for(libvirt.VIR_DOMAIN_EVENT_STOPPED, timeout_seconds=1):
                cancel.check()
                if time.monotonic() > until:
                    raise DeadlineError(
                        f"the clone did not power off within {deadline}",
                        remedy="raise clone.shutdown_deadline; 'journalctl -b -1' of a test VM shows what hung",
                    )
                if self._connection.find_domain(clone.name) is None:
                    recorder.wait_for(libvirt.VIR_DOMAIN_EVENT_STOPPED, timeout_seconds=2)
                    break
            stopped = recorder.details(libvirt.VIR_DOMAIN_EVENT_STOPPED)
            shutdown = recorder.details(libvirt.VIR_DOMAIN_EVENT_SHUTDOWN)
        if libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN not in stopped or not shutdown:
            raise NotCleanError(
                "the clone ended, but not by a shutdown of its guest",
                details=f"libvirt's STOPPED details: {stopped}, SHUTDOWN details: {shutdown}",
                remedy="see /var/log/libvirt/qemu for the clone's log, and the host's for the OOM killer",
            )
        if set(shutdown) != {libvirt.VIR_DOMAIN_EVENT_SHUTDOWN_GUEST}:
            raise NotCleanError("the clone was ended from the host", details=f"SHUTDOWN details: {shutdown}")
        if cause.reason not in (None, _BY_ITS_GUEST):
            raise NotCleanError(
                "the clone ended, but its guest did not power off",
                details=f"QEMU's reason for the shutdown: {cause.reason}",
                remedy="see the end of 'journalctl -b -1' of a test VM, or its console, for a panic or a reset",
            )
        return "guest agent" if agent_answers else "ACPI"

    def _ask(self, domain: Any, mode: int) -> None:
        try:
            domain.shutdownFlags(mode)
        except libvirt.libvirtError as error:
            # The agent goes away while it obeys, so an unanswered request is no failure; the wait will tell.
            if error.get_error_code() not in (
                libvirt.VIR_ERR_AGENT_UNRESPONSIVE,
                AGENT_COMMAND_TIMEOUT,
                libvirt.VIR_ERR_OPERATION_INVALID,
                libvirt.VIR_ERR_NO_DOMAIN,
            ):
                with translated("ask the clone to shut down"):
                    raise
            _LOG.debug("shutdown request: %s", error)

    def destroy(self, name: str, *, run: RunId) -> None:
        """End and forget a domain that bears this run's tag. Content where there is none; leaves any other domain alone."""
        # Another process may have made it give way.
        way = self._ways.pop(run, None) or GivingWay(name, run=run, seconds=0)
        try:
            self._destroy(name, run=run, way=way)
        finally:
            # Afterwards: a clone that is to end does not wait for it.
            way.end()

    def _destroy(self, name: str, *, run: RunId, way: GivingWay) -> None:
        domain = self._connection.find_domain(name)
        if domain is None:
            return
        try:
            with translated(f"describe {name!r}"):
                tag = read_tag(parse(domain.XMLDesc(0)))
            if tag is None or tag.run != run:
                # The name was taken by somebody else's VM, so this run never made one.
                return
            way.cease()
            with translated(f"destroy {name!r}"):
                _wait_started(domain)
                gone(domain.destroy, codes=_NOTHING_TO_DO)
                flags = libvirt.VIR_DOMAIN_UNDEFINE_NVRAM | libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
                flags |= (
                    libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
                )
                gone(lambda: domain.undefineFlags(flags), codes=_NOTHING_TO_DO)
        except GuestNotFoundError:
            return

    def require_tagged(self, domain: Any, *, run: RunId | None) -> Tag:
        """Return a domain's tag. Raises BugError where it has none, or another run's: it is not vmsnap's to touch."""
        with translated("describe a domain"):
            tag = read_tag(parse(domain.XMLDesc(0)))
        if tag is None or (run is not None and tag.run != run):
            raise BugError(f"{domain.name()!r} does not bear the tag of run {run} and is left alone")
        return tag

    def tagged(self) -> tuple[tuple[str, Tag], ...]:
        """Return the names and tags of all domains that vmsnap made."""
        found = []
        with translated("list its guests"):
            domains = self._connection.get().listAllDomains(0)
        for domain in domains:
            try:
                tag = read_tag(parse(domain.XMLDesc(0)))
            except libvirt.libvirtError:
                # It ended between the listing and the question.
                continue
            if tag is not None:
                found.append((domain.name(), tag))
        return tuple(found)


def _wait_started(domain: Any) -> None:
    """Wait, not for long, until libvirt is done with making a domain, where it still is.

    Destroying one at the moment when its memory is complete kills libvirt 9.0's daemon: the thread that restores it goes on
    with a monitor that is closed (qemuProcessStop lets go of the lock before the domain counts as inactive, and
    qemuSaveImageStartVM does not look). One that never gets its memory stays as it is, and may be destroyed.
    """
    until = time.monotonic() + _STARTING_SECONDS
    while domain.state() == _STARTING and time.monotonic() < until:
        time.sleep(_POLL_SECONDS)
