"""The libvirt driver: ports.hypervisor over the modules of this room."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import libvirt

from vmsnap.errors import BugError, NoSpaceError, PreconditionError, VmsnapError
from vmsnap.hypervisors.libvirt import (
    addresses,
    background,
    boot,
    commit,
    copies,
    leftovers,
    memory,
    modes,
    overlays,
    preflight,
    served,
    vcpulimits,
)
from vmsnap.hypervisors.libvirt.agent import LibvirtAgentChannel
from vmsnap.hypervisors.libvirt.capturing import CLONE_NVRAM, MEMORY_FOLDER, Captures, make_runtime
from vmsnap.hypervisors.libvirt.clones import Clones, clone_of, state_of
from vmsnap.hypervisors.libvirt.connection import Connection, translated
from vmsnap.hypervisors.libvirt.environments import EnvironmentFolders, Environments
from vmsnap.hypervisors.libvirt.findings import findings_of
from vmsnap.hypervisors.libvirt.inspect import (
    agent_is_connected,
    disk_target,
    guest_from_xml,
    nic_mac,
    nics_from_xml,
    writable_disks,
)
from vmsnap.hypervisors.libvirt.overlays import OverlaysDetail
from vmsnap.hypervisors.libvirt.replug import replug
from vmsnap.hypervisors.libvirt.stopped import StoppedHere
from vmsnap.hypervisors.libvirt.storage import storage_of
from vmsnap.hypervisors.libvirt.xml import child, devices, parse, read_tag, unparse
from vmsnap.model.admission import HostMemory
from vmsnap.model.capture import (
    Capture,
    CaptureMode,
    CapturePlan,
    CaptureSettings,
    Clone,
    DiskImage,
    DiskSnapshot,
    ModeChoice,
    OnNoConvergence,
)
from vmsnap.model.environment import EnvironmentPlan
from vmsnap.model.guest import Finding, Guest, GuestState, Nic, Severity
from vmsnap.model.ids import RunId, is_run_id
from vmsnap.model.isolation import FencePlan, FencePort, IsolationProof
from vmsnap.model.journal import Resource, ResourceKind
from vmsnap.model.manifest import MachineRecord
from vmsnap.ports.clock import Cancel, Clock
from vmsnap.ports.guest import AgentChannel

_LOG = logging.getLogger(__name__)
_LEASES = libvirt.VIR_DOMAIN_INTERFACE_ADDRESSES_SRC_LEASE
_ARP_TABLE = Path("/proc/net/arp")
_AGENT_TIMEOUT = timedelta(seconds=3)


@dataclass(frozen=True, kw_only=True)
class LibvirtFolders:
    """Where the driver keeps things: ``runtime`` is volatile (``/run/vmsnap``), ``environments`` is not."""

    runtime: Path
    environments: Path


class LibvirtHypervisor:
    """Implements ports.hypervisor.Hypervisor for one libvirt URI."""

    kinds = frozenset(
        {
            ResourceKind.MEMORY,
            ResourceKind.SOURCE_OVERLAYS,
            ResourceKind.CLONE_OVERLAYS,
            ResourceKind.DISK_COPIES,
            ResourceKind.CLONE,
            ResourceKind.ENVIRONMENT_DISKS,
            ResourceKind.ENVIRONMENT,
        }
    )

    def __init__(self, uri: str, *, folders: LibvirtFolders, clock: Clock) -> None:
        self._connection = Connection(uri)
        self._folders = folders
        self._clock = clock
        self._clones = Clones(self._connection)
        self._captures = Captures(self._connection, clones=self._clones, runtime=folders.runtime, clock=clock)
        self._environment_folders = EnvironmentFolders(folders.environments)
        self._environments = Environments(self._connection, folders=self._environment_folders)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    # Looking

    def guests(self) -> tuple[str, ...]:
        """Return the names of all guests."""
        mine = {name for name, _ in self._clones.tagged()}
        return tuple(sorted(set(self._connection.names()) - mine))

    def host_findings(self) -> tuple[Finding, ...]:
        """Look whether libvirt answers."""
        message = f"answers, and knows {len(self.guests())} guests"
        return (Finding(check="libvirt", severity=Severity.OK, message=message),)

    def inspect(self, guest: str) -> Guest:
        """Describe a guest."""
        domain = self._connection.domain(guest)
        with translated(f"describe {guest!r}"):
            root = parse(domain.XMLDesc(0))
            if read_tag(root) is not None:
                raise PreconditionError(
                    f"{guest!r} is a clone or an environment that vmsnap made, not a guest to back up",
                    remedy="name the guest that it was made from",
                )
            sizes = {disk_target(disk): domain.blockInfo(disk_target(disk))[0] for disk in writable_disks(root)}
        state = state_of(domain)
        known = self._addresses(domain, root) if state is GuestState.RUNNING else {}
        return guest_from_xml(root, state=state, sizes=sizes, addresses=known)

    def _addresses(self, domain: Any, root: Any) -> addresses.Addresses:
        """Return addresses by MAC: from the agent where one is connected, else from leases, else from ARP."""
        if agent_is_connected(root):
            try:
                answer = json.loads(
                    self.agent(domain.name()).send('{"execute":"guest-network-get-interfaces"}', timeout=_AGENT_TIMEOUT)
                )
                if found := addresses.by_agent(answer):
                    return found
            except (VmsnapError, ValueError, KeyError, TypeError):
                # The agent is only one of three witnesses, and a guest may be busy.
                pass
        try:
            if found := addresses.by_lease(domain.interfaceAddresses(_LEASES)):
                return found
        except libvirt.libvirtError as error:
            _LOG.debug("leases of %s: %s", domain.name(), error)
        macs = frozenset(nic_mac(interface) for interface in devices(root).findall("interface"))
        return addresses.by_arp(_ARP_TABLE.read_text(encoding="ascii"), macs=macs)

    def machine(self, guest: Guest) -> MachineRecord:
        """Return the persistent definition, without secrets such as VNC passwords."""
        domain = self._connection.domain(guest.name)
        with translated(f"describe {guest.name!r}"):
            text = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        return MachineRecord(
            hypervisor="libvirt",
            definition=text,
            uuid=guest.uuid,
            memory_bytes=guest.memory_bytes,
            vcpus=guest.vcpus,
            nvram=guest.nvram,
            macs=tuple(nic_mac(interface) for interface in devices(parse(text)).findall("interface")),
        )

    def choose_mode(self, guest: Guest, *, settings: CaptureSettings) -> ModeChoice:
        """Return the mode to capture this guest in."""
        return modes.choose(self._connection, guest=guest, settings=settings)

    def findings(self, guest: Guest, *, settings: CaptureSettings) -> tuple[Finding, ...]:
        """Look whether the guest can be captured now."""
        mode = self.choose_mode(guest, settings=settings).mode
        return findings_of(self._connection, guest=guest, settings=settings, mode=mode)

    # Capturing

    def settle(self, guest: Guest, *, settings: CaptureSettings) -> CaptureSettings:
        """Choose what ``auto`` comes to."""
        mode = self.choose_mode(guest, settings=settings).mode
        settings = modes.settle(self._connection, guest=guest, settings=settings)
        return replace(settings, detach=copies.settle(guest, settings=settings, mode=mode))

    def _runtime(self, run: RunId) -> Path:
        return self._folders.runtime / run

    def clone_memory_bytes(self, guest: Guest, *, settings: CaptureSettings) -> int:
        """Return the most memory that a guest's image and clone take."""
        mode = self.choose_mode(guest, settings=settings).mode
        if mode is CaptureMode.INSTANT:
            return modes.instant_bytes(guest.memory_bytes)
        if mode is CaptureMode.LIVE:
            return preflight.peak_bytes(guest.memory_bytes, settings=settings)
        domain = self._connection.domain(guest.name)
        with translated(f"describe {guest.name!r}"):
            root = parse(domain.XMLDesc(0))
        return boot.clone_memory_bytes(root, settings=settings)

    def host_memory(self) -> HostMemory:
        """Return what memory the host has left, and what each run has taken."""
        return memory.host_memory(self._folders.runtime)

    def memory_resource(self, plan: CapturePlan) -> Resource:
        """Name the tmpfs of the memory image."""
        return self._memory_resource(plan.run, guest=plan.guest.name)

    def _memory_resource(self, run: RunId, *, guest: str) -> Resource:
        folder = self._runtime(run) / MEMORY_FOLDER
        return Resource(kind=ResourceKind.MEMORY, run=run, guest=guest, name=str(folder))

    def prepare_memory(self, plan: CapturePlan) -> None:
        """Mount the tmpfs."""
        folder = make_runtime(self._folders.runtime, plan.run) / MEMORY_FOLDER
        if plan.choice.mode is CaptureMode.INSTANT:
            memory.create_passage(folder)
            return
        image_bytes = preflight.memory_image_bytes(plan.guest.memory_bytes, settings=plan.settings)
        memory.create(folder, image_bytes=image_bytes, swap=plan.settings.swap)

    def overlays_resource(self, plan: CapturePlan) -> Resource:
        """Name the source's overlays, and note what else a capture changes of the source."""
        domain = self._connection.domain(plan.guest.name)
        with translated(f"ask for the longest pause of {plan.guest.name!r}"):
            active = bool(domain.isActive())
            max_downtime_ms = int(domain.migrateGetMaxDowntime()) if active else None
        instantly = copies.may_be_instant(plan.settings, plan.choice.mode)
        slowed = plan.settings.on_no_convergence is OnNoConvergence.THROTTLE
        by_storage = plan.settings.disk_snapshot is DiskSnapshot.STORAGE
        detail = overlays.describe(plan, role="source")
        detail = detail.model_copy(
            update={
                "disks": () if by_storage else detail.disks,
                "storage": by_storage,
                "max_downtime_ms": max_downtime_ms,
                "background": background.describe(domain) if active and instantly else None,
                "vcpu_limits": vcpulimits.find_limits(plan.guest.name) if slowed else (),
            }
        )
        return self._overlays_resource(plan, role="source", kind=ResourceKind.SOURCE_OVERLAYS, detail=detail)

    def _overlays_resource(
        self, plan: CapturePlan, *, role: str, kind: ResourceKind, detail: OverlaysDetail
    ) -> Resource:
        return Resource(
            kind=kind,
            run=plan.run,
            guest=plan.guest.name,
            name=f"{role} overlays of {plan.guest.name}",
            detail=detail.model_dump_json(),
        )

    def prepare_overlays(self, plan: CapturePlan) -> None:
        """Make the overlays the source will write to."""
        detail = overlays.describe(plan, role="source")
        if overlays.free_bytes(detail) < plan.settings.min_overlay_free_bytes:
            raise NoSpaceError(
                "the file system of the overlays has too little room",
                remedy="make room, set capture.overlay_dir, or lower capture.min_overlay_free_mib",
            )
        if plan.settings.disk_snapshot is DiskSnapshot.OVERLAY:
            overlays.create(detail)

    def clone_overlays_resource(self, plan: CapturePlan) -> Resource:
        """Name the overlays the clone will write to."""
        detail = overlays.describe(plan, role="clone")
        return self._overlays_resource(plan, role="clone", kind=ResourceKind.CLONE_OVERLAYS, detail=detail)

    def prepare_clone_overlays(self, plan: CapturePlan) -> None:
        """Make the overlays the clone will write to."""
        overlays.create(overlays.describe(plan, role="clone"), marked=True)

    def copies_resource(self, plan: CapturePlan) -> Resource:
        """Name the copies of the source's disks."""
        return copies.resource(plan.run, guest=plan.guest.name, detail=copies.describe(plan).copies)

    def prepare_copies(self, plan: CapturePlan) -> None:
        """Make the copies, as far as that can be done before."""
        detail = copies.describe(plan)
        storage_of(plan.settings).prepare(detail, min_free_bytes=plan.settings.min_overlay_free_bytes)

    def overlay_free_bytes(self, plan: CapturePlan) -> int:
        """Return the room left where the overlays grow, and the disks that share their blocks with copies."""
        room = [overlays.free_bytes(overlays.describe(plan, role=role)) for role in ("source", "clone")]
        if plan.settings.on_copies and plan.settings.storage is None:
            room.append(copies.free_bytes(copies.describe(plan)))
        return min(room)

    def capture(self, plan: CapturePlan, *, fence: FencePlan, cancel: Cancel) -> Capture:
        """Capture in the plan's mode."""
        return self._captures.capture(plan, fence=fence, cancel=cancel)

    # The clone

    def clone_resource(self, plan: CapturePlan) -> Resource:
        """Name the clone."""
        clone = clone_of(plan.run, guest=plan.guest.name)
        return Resource(kind=ResourceKind.CLONE, run=plan.run, guest=plan.guest.name, name=clone.name)

    def restore_clone(self, plan: CapturePlan, *, fence: FencePlan) -> Clone:
        """Make the clone, paused."""
        return self._captures.restore(plan, fence=fence)

    def clone_nvram(self, plan: CapturePlan) -> str | None:
        """Return the path of the clone's firmware variables, or None where the guest has none."""
        return self._captures.nvram(plan)

    def resume_clone(self, clone: Clone, *, proof: IsolationProof) -> None:
        """Let the clone run."""
        self._clones.resume(clone, proof=proof)

    def clone_state(self, clone: Clone) -> GuestState:
        """Return the clone's state."""
        return state_of(self._connection.domain(clone.name))

    def agent(self, domain: str) -> AgentChannel:
        """Return the line to a domain's agent."""
        return LibvirtAgentChannel(self._connection, domain=domain)

    def set_link(self, domain: str, *, mac: str, up: bool) -> None:
        """Pull or plug a cable of a clone or an environment."""
        found = self._connection.domain(domain)
        self._clones.require_tagged(found, run=None)
        with translated(f"set the link of {mac}"):
            for interface in devices(parse(found.XMLDesc(0))).findall("interface"):
                if nic_mac(interface) == mac.lower():
                    child(interface, "link").set("state", "up" if up else "down")
                    found.updateDeviceFlags(unparse(interface), libvirt.VIR_DOMAIN_AFFECT_LIVE)
                    return
        raise BugError(f"{domain!r} has no interface {mac}")

    def replug_nic(self, clone: Clone, *, port: FencePort, deadline: timedelta) -> None:
        """Take a NIC out of a clone and put it back."""
        found = self._connection.domain(clone.name)
        self._clones.require_tagged(found, run=clone.run)
        replug(found, port=port, deadline=deadline)

    def shut_down_clone(self, clone: Clone, *, agent_answers: bool, deadline: timedelta, cancel: Cancel) -> str:
        """Ask the clone's guest to power off."""
        return self._clones.shut_down(clone, agent_answers=agent_answers, deadline=deadline, cancel=cancel)

    def clone_images(self, plan: CapturePlan) -> tuple[DiskImage, ...]:
        """Return the clone's disk images, which are on the host's disk, whole."""
        detail = overlays.describe(plan, role="clone")
        overlays.require_whole(detail)
        return tuple(
            DiskImage(target=disk.target, path=disk.overlay, image_format="qcow2", size_bytes=disk.size_bytes)
            for disk in detail.disks
        )

    def source_is_home(self, guest: Guest) -> bool:
        """Tell whether the guest runs on its own disks."""
        return commit.is_home(self._connection, guest=guest.name, sources={d.target: d.source for d in guest.disks})

    def work_on(self, guest: str) -> tuple[str, ...]:
        """Return the job that libvirt does on a guest."""
        return leftovers.jobs_on(self._connection, guest)

    # Environments

    def environment_disks_resource(self, plan: EnvironmentPlan) -> Resource:
        """Name an environment's overlays."""
        return Resource(
            kind=ResourceKind.ENVIRONMENT_DISKS,
            run=plan.run,
            guest=plan.guest,
            name=str(self._environment_folders.of(plan)),
        )

    def prepare_environment_disks(
        self, plan: EnvironmentPlan, *, images: tuple[DiskImage, ...], nvram: str | None
    ) -> None:
        """Make an environment's overlays."""
        self._environment_folders.prepare(plan, images=images, nvram=nvram)

    def environment_resource(self, plan: EnvironmentPlan) -> Resource:
        """Name an environment."""
        return Resource(kind=ResourceKind.ENVIRONMENT, run=plan.run, guest=plan.guest, name=plan.name)

    def define_environment(self, plan: EnvironmentPlan, *, machine: MachineRecord, fence: FencePlan | None) -> None:
        """Define an environment."""
        self._environments.define(plan, machine=machine, fence=fence)

    def attach_environment(self, plan: EnvironmentPlan, *, machine: MachineRecord, fence: FencePlan | None) -> None:
        """Create an environment's process, paused."""
        self._environments.attach(plan, fence=fence, nvram=machine.nvram is not None)

    def start_environment(self, plan: EnvironmentPlan, *, proof: IsolationProof | None) -> None:
        """Let an environment boot."""
        self._environments.start(plan, fenced=plan.network is None, proof=proof)

    def keep_environment_reconnecting(self, name: str) -> None:
        """See to it that an environment outlives its export."""
        self._environments.keep_reconnecting(name)

    def localise_environment(
        self, name: str, *, run: RunId, images: tuple[DiskImage, ...], deadline: timedelta
    ) -> None:
        """Put an environment on local images."""
        self._environments.localise(name, run=run, images=images, deadline=deadline)

    def image_reader(self) -> tuple[int, int] | None:
        """Return the user and group of QEMU's processes."""
        return served.reader_of(self._connection)

    def environment_state(self, name: str) -> GuestState:
        """Return an environment's state."""
        return self._environments.state(name)

    def environment_nics(self, name: str) -> tuple[Nic, ...]:
        """Return an environment's NICs and addresses."""
        domain = self._environments.domain(name)
        with translated(f"describe {name!r}"):
            root = parse(domain.XMLDesc(0))
        return nics_from_xml(root, addresses=self._addresses(domain, root))

    def environment_written_bytes(self, run: RunId) -> int:
        """Return what an environment's overlays occupy on disk."""
        return self._environment_folders.written_bytes(run)

    # Owning

    def release(self, resource: Resource, *, deadline: timedelta) -> None:
        """Remove a resource of one of this driver's kinds."""
        if resource.kind is ResourceKind.MEMORY:
            memory.remove(self._runtime(resource.run) / MEMORY_FOLDER)
            self._remove_runtime_if_empty(resource.run)
        elif resource.kind is ResourceKind.SOURCE_OVERLAYS:
            detail = OverlaysDetail.model_validate_json(resource.detail)
            stopped = StoppedHere(self._runtime(resource.run))
            source = commit.SourceReturn(
                self._connection, run=resource.run, guest=resource.guest, detail=detail, stopped=stopped
            )
            source.run(deadline=deadline)
            stopped.over()
            self._remove_runtime_if_empty(resource.run)
        elif resource.kind is ResourceKind.CLONE_OVERLAYS:
            overlays.delete(OverlaysDetail.model_validate_json(resource.detail))
            (self._runtime(resource.run) / CLONE_NVRAM).unlink(missing_ok=True)
            self._remove_runtime_if_empty(resource.run)
        elif resource.kind is ResourceKind.DISK_COPIES:
            copies.delete(copies.CopiesDetail.model_validate_json(resource.detail))
        elif resource.kind in (ResourceKind.CLONE, ResourceKind.ENVIRONMENT):
            self._clones.destroy(resource.name, run=resource.run)
        elif resource.kind is ResourceKind.ENVIRONMENT_DISKS:
            self._environment_folders.remove(resource.run)
        else:
            raise BugError(f"the libvirt driver owns no {resource.kind}")

    def _remove_runtime_if_empty(self, run: RunId) -> None:
        folder = self._runtime(run)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()

    def owned(self) -> tuple[Resource, ...]:
        """Return what bears a run's tag: domains, overlays, memory areas, environment folders."""
        found = [
            Resource(
                kind=ResourceKind.CLONE if tag.kind == "clone" else ResourceKind.ENVIRONMENT,
                run=tag.run,
                guest=tag.guest,
                name=name,
            )
            for name, tag in self._clones.tagged()
        ]
        found.extend(leftovers.image_resources(self._connection))
        if self._folders.runtime.is_dir():
            found.extend(
                self._memory_resource(RunId(entry.name), guest="")
                for entry in sorted(self._folders.runtime.iterdir())
                if is_run_id(entry.name) and (entry / MEMORY_FOLDER).exists()
            )
        found.extend(
            Resource(
                kind=ResourceKind.ENVIRONMENT_DISKS,
                run=RunId(run),
                guest="",
                name=str(self._folders.environments / run),
            )
            for run in self._environment_folders.runs()
        )
        return tuple(found)
