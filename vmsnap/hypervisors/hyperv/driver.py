"""The Hyper-V driver: ports.hypervisor over the modules of this room."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from vmsnap.errors import (
    BugError,
    DeadlineError,
    GuestNotFoundError,
    NoSpaceError,
    PreconditionError,
)
from vmsnap.hypervisors.hyperv.clones import Clones, clone_name, export_part
from vmsnap.hypervisors.hyperv.environments import Environments
from vmsnap.hypervisors.hyperv.examination import judge
from vmsnap.hypervisors.hyperv.fence import fence_tag, find_switch
from vmsnap.hypervisors.hyperv.findings import findings_of
from vmsnap.hypervisors.hyperv.guestline import GuestLogins
from vmsnap.hypervisors.hyperv.host import Host
from vmsnap.hypervisors.hyperv.inspect import disk_sources, find_guest, guest_of, nics_of, record_of
from vmsnap.hypervisors.hyperv.removal import Removal
from vmsnap.hypervisors.hyperv.rows import state_of
from vmsnap.hypervisors.hyperv.tags import Part, RunFolders, TagKind
from vmsnap.model.admission import HostMemory
from vmsnap.model.capture import (
    Capture,
    CaptureChoice,
    CaptureMode,
    CapturePlan,
    CaptureSettings,
    Clone,
    Detach,
    DiskImage,
    DiskSnapshot,
    ModeChoice,
)
from vmsnap.model.environment import EnvironmentPlan
from vmsnap.model.guest import Finding, Guest, GuestState, Nic
from vmsnap.model.ids import RunId
from vmsnap.model.isolation import FencePlan, FencePort, IsolationProof
from vmsnap.model.journal import Resource, ResourceKind
from vmsnap.model.manifest import MachineRecord
from vmsnap.ports.clock import Cancel, Clock
from vmsnap.ports.guest import AgentChannel

_BETWEEN = timedelta(seconds=2)
_PARTS = {
    Part.MEMORY: ResourceKind.MEMORY,
    Part.DISKS: ResourceKind.CLONE_OVERLAYS,
    Part.CLONE: ResourceKind.CLONE_OVERLAYS,
    Part.ENVIRONMENT: ResourceKind.ENVIRONMENT_DISKS,
}


class HyperVHypervisor:
    """Implements ports.hypervisor.Hypervisor for one Hyper-V host.

    Nothing of the guest is changed by a capture: it has no overlays, and its clone reads copies that Hyper-V makes.
    """

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

    def __init__(self, host: Host, *, clock: Clock, logins: GuestLogins) -> None:
        self._host = host
        self._logins = logins
        self._clock = clock
        self._clones = Clones(host, clock=clock)
        self._environments = Environments(host, clock=clock)
        self._removal = Removal(host, clock=clock)

    @property
    def _folders(self) -> RunFolders:
        return self._host.folders

    def close(self) -> None:
        """Close the sessions."""
        self._host.close()

    # Looking

    def guests(self) -> tuple[str, ...]:
        """Return the names of all guests."""
        return tuple(sorted({machine.name for machine in self._host.machines() if self._host.run_of(machine) is None}))

    def inspect(self, guest: str) -> Guest:
        """Describe a guest."""
        return guest_of(self._host.describe(find_guest(self._host, guest).id))

    def machine(self, guest: Guest) -> MachineRecord:
        """Return generation, firmware and where disks are plugged in."""
        return record_of(self._host.describe(guest.uuid))

    def choose_mode(self, guest: Guest, *, settings: CaptureSettings) -> ModeChoice:
        """Return the mode to capture this guest in."""
        del guest
        if settings.mode is CaptureChoice.INSTANT:
            raise PreconditionError(
                "capture.mode 'instant' is not there on Hyper-V", remedy="set capture.mode to live, boot or auto"
            )
        if settings.mode is CaptureChoice.AUTO:
            return ModeChoice(mode=CaptureMode.LIVE, reason="auto: Hyper-V exports a running guest with its memory")
        return ModeChoice(mode=CaptureMode(settings.mode), reason="the policy says so")

    def host_findings(self) -> tuple[Finding, ...]:
        """Look at the host, and whether the mounted folder is the one that it exports to."""
        try:
            seen = frozenset(entry.name for entry in Path(self._folders.mounted).iterdir() if entry.is_dir())
        except OSError:
            seen = None
        return judge(
            self._host.examine(),
            folder=self._folders.root,
            mounted=self._folders.mounted,
            seen=seen,
            now=self._clock.now(),
        )

    def findings(self, guest: Guest, *, settings: CaptureSettings) -> tuple[Finding, ...]:
        """Look whether the guest can be captured now."""
        return findings_of(self._host.describe(guest.uuid), room=self._host.room(), settings=settings)

    def settle(self, guest: Guest, *, settings: CaptureSettings) -> CaptureSettings:
        """Return the settings for a guest that is never on overlays, and whose clone is never on reflinks."""
        del guest
        return replace(settings, detach=Detach.LATE, disk_snapshot=DiskSnapshot.OVERLAY)

    def clone_memory_bytes(self, guest: Guest, *, settings: CaptureSettings) -> int:
        """Return the memory of the clone; its image is on a disk."""
        del settings
        return guest.memory_bytes

    def host_memory(self) -> HostMemory:
        """Return what memory the host has left, and what clones take of it."""
        taken: dict[RunId, int] = {}
        for machine in self._host.machines():
            if machine.tag is not None and machine.tag.kind is TagKind.CLONE and machine.state == "Running":
                taken[machine.tag.run] = self._host.describe(machine.id).assigned_bytes
        return HostMemory(available_bytes=self._host.room().free_memory_bytes, taken_bytes=taken)

    # Capturing

    def memory_resource(self, plan: CapturePlan) -> Resource:
        """Name the folder of the export."""
        return self._folder_resource(plan.run, guest=plan.guest.name, part=Part.MEMORY)

    def _folder_resource(self, run: RunId, *, guest: str, part: Part) -> Resource:
        return Resource(kind=_PARTS[part], run=run, guest=guest, name=self._folders.of(run, part))

    def prepare_memory(self, plan: CapturePlan) -> None:
        """Make the folder of the export."""
        self._host.make_folder(plan.run, Part.MEMORY)

    def overlays_resource(self, plan: CapturePlan) -> Resource:
        """Name the guest's disks, which Hyper-V may hold while it exports: releasing waits until it is back on its own."""
        detail = {"id": plan.guest.uuid, "disks": {disk.target: disk.source for disk in plan.guest.disks}}
        name = f"disks of {plan.guest.name}"
        return Resource(
            kind=ResourceKind.SOURCE_OVERLAYS,
            run=plan.run,
            guest=plan.guest.name,
            name=name,
            detail=json.dumps(detail),
        )

    def prepare_overlays(self, plan: CapturePlan) -> None:
        """Look whether there is room; nothing is made for the guest."""
        if self._host.room().free_bytes < plan.settings.min_overlay_free_bytes:
            raise NoSpaceError(
                f"the volume of {self._folders.root} on the Hyper-V host has too little room",
                remedy="make room, set hyperv.export_folder, or lower capture.min_overlay_free_mib",
            )

    def clone_overlays_resource(self, plan: CapturePlan) -> Resource:
        """Name the folder of the clone."""
        return self._folder_resource(plan.run, guest=plan.guest.name, part=Part.CLONE)

    def prepare_clone_overlays(self, plan: CapturePlan) -> None:
        """Make the folder of the clone, and look whether it is seen here: its disks will be read there."""
        self._host.make_folder(plan.run, Part.CLONE)
        folder = self._folders.of(plan.run, Part.CLONE)
        here = self._folders.here(folder)
        if not Path(here).is_dir():
            raise PreconditionError(
                f"{folder} of the Hyper-V host is not found at {here}",
                remedy="mount the share of hyperv.export_folder at hyperv.export_mounted (docs/hyper-v.md)",
            )

    def copies_resource(self, plan: CapturePlan) -> Resource:
        """Name copies that are never made: Hyper-V's own are in the folder of the clone."""
        name = f"copies of {plan.guest.name}"
        return Resource(kind=ResourceKind.DISK_COPIES, run=plan.run, guest=plan.guest.name, name=name)

    def prepare_copies(self, plan: CapturePlan) -> None:
        """Raise BugError: ``settle`` leaves nothing that needs them."""
        raise BugError(f"run {plan.run} asks for copies, which Hyper-V has no use for")

    def overlay_free_bytes(self, plan: CapturePlan) -> int:
        """Return the room left where export and clone grow."""
        del plan
        return self._host.room().free_bytes

    def capture(self, plan: CapturePlan, *, fence: FencePlan, cancel: Cancel) -> Capture:
        """Export the guest as it runs."""
        find_switch(self._host, run=fence.run)
        return self._clones.capture(plan, cancel=cancel)

    # The clone

    def clone_resource(self, plan: CapturePlan) -> Resource:
        """Name the clone."""
        return Resource(kind=ResourceKind.CLONE, run=plan.run, guest=plan.guest.name, name=clone_name(plan.run))

    def restore_clone(self, plan: CapturePlan, *, fence: FencePlan) -> Clone:
        """Make the clone, saved, or off where it boots."""
        clone = self._clones.restore(plan, fence=fence)
        if export_part(plan) is Part.DISKS:
            self._removal.folder(plan.run, Part.DISKS, deadline=timedelta(minutes=5))
        return clone

    def clone_nvram(self, plan: CapturePlan) -> str | None:
        """Return None: firmware variables of Hyper-V are in the VM's own files, and are made anew for test VMs."""
        del plan
        return None

    def resume_clone(self, clone: Clone, *, proof: IsolationProof) -> None:
        """Let the clone run."""
        self._clones.resume(clone, proof=proof)

    def clone_state(self, clone: Clone) -> GuestState:
        """Return the clone's state: a saved one counts as paused."""
        return state_of(self._clones.get(clone.run).state)

    def agent(self, domain: str) -> AgentChannel:
        """Return the line into a VM by PowerShell Direct, with the account of its guest.

        A clone's name leads to the clone or to nobody: what is done in a clone must not be done in a VM that is called so.
        """
        ours = [machine for machine in self._host.machines() if machine.name == domain and machine.tag is not None]
        if len(ours) > 1 or (not ours and domain.startswith(clone_name(RunId("")))):
            raise GuestNotFoundError(f"the Hyper-V host has {len(ours)} VMs of vmsnap's that are called {domain!r}")
        machine = ours[0] if ours else find_guest(self._host, domain)
        guest = domain if machine.tag is None else machine.tag.guest
        return self._host.line(machine.id, guest=guest, login=self._logins.login(guest))

    def set_link(self, domain: str, *, mac: str, up: bool) -> None:
        """Put an adapter of a clone or an environment on its own switch, or on none."""
        machine = next((one for one in self._host.machines() if one.name == domain and one.tag is not None), None)
        if machine is None or machine.tag is None:
            raise BugError(f"{domain!r} is not vmsnap's and is left alone")
        if mac.lower() not in [adapter.mac for adapter in self._host.describe(machine.id).adapters]:
            raise BugError(f"{domain!r} has no adapter {mac}")
        if not up:
            self._host.disconnect(machine.id, tag=machine.tag, macs=[mac])
            return
        run = machine.tag.run
        switch = find_switch(self._host, run=run)
        self._host.connect(machine.id, tag=machine.tag, switch=switch, switch_tag=fence_tag(run), macs=[mac])

    def replug_nic(self, clone: Clone, *, port: FencePort, deadline: timedelta) -> None:
        """Raise PreconditionError: adapters of generation 1 cannot be pulled out, and no address is looked for anyway."""
        del deadline
        raise PreconditionError(
            f"the adapter {port.mac} of {clone.name} stays in: rung 'hot-plug' is not there on Hyper-V",
            remedy="leave it out of isolation.ladder; clones are reached by PowerShell Direct, which needs no address",
        )

    def shut_down_clone(self, clone: Clone, *, agent_answers: bool, deadline: timedelta, cancel: Cancel) -> str:
        """Ask the clone's guest to power off, by its integration service."""
        del agent_answers
        return self._clones.shut_down(clone, deadline=deadline, cancel=cancel)

    def clone_images(self, plan: CapturePlan) -> tuple[DiskImage, ...]:
        """Return the clone's disks as they are seen here."""
        return self._clones.images(plan)

    def source_is_home(self, guest: Guest) -> bool:
        """Tell whether the guest is on its own disks, and no checkpoint is left of an export."""
        description = self._host.describe(guest.uuid)
        now = {target: str(path) for target, path in disk_sources(description).items()}
        return description.checkpoints == 0 and now == {disk.target: disk.source for disk in guest.disks}

    def work_on(self, guest: str) -> tuple[str, ...]:
        """Say that it cannot be told: any machine may be at work on a Hyper-V host."""
        del guest
        return (
            "its things are on a Hyper-V host, and whether a vmsnap on another machine uses them cannot be seen from here",
        )

    # Environments

    def environment_disks_resource(self, plan: EnvironmentPlan) -> Resource:
        """Name the folder of an environment."""
        return self._folder_resource(plan.run, guest=plan.guest, part=Part.ENVIRONMENT)

    def prepare_environment_disks(
        self, plan: EnvironmentPlan, *, images: tuple[DiskImage, ...], nvram: str | None
    ) -> None:
        """Make an environment's disks. Firmware variables of other hypervisors are of no use here."""
        del nvram
        self._environments.prepare_disks(plan, images=images)

    def environment_resource(self, plan: EnvironmentPlan) -> Resource:
        """Name an environment."""
        return Resource(kind=ResourceKind.ENVIRONMENT, run=plan.run, guest=plan.guest, name=plan.name)

    def define_environment(self, plan: EnvironmentPlan, *, machine: MachineRecord, fence: FencePlan | None) -> None:
        """Make an environment, off."""
        self._environments.define(plan, machine=machine, fence=fence)

    def attach_environment(self, plan: EnvironmentPlan, *, machine: MachineRecord, fence: FencePlan | None) -> None:
        """Look what the environment could touch; it stays off."""
        del machine
        self._environments.attach(plan, fence=fence)

    def start_environment(self, plan: EnvironmentPlan, *, proof: IsolationProof | None) -> None:
        """Let an environment boot."""
        self._environments.start(plan, proof=proof)

    def image_reader(self) -> tuple[int, int] | None:
        """Refuse: a VM of Hyper-V has its disks on its host before it starts."""
        raise PreconditionError(
            "a VM of Hyper-V cannot start on disks that are still in the replica",
            remedy="bring the snapshot here with 'vmsnap restore', then provision it",
        )

    def keep_environment_reconnecting(self, name: str) -> None:
        """Look whether it is there: its disks are local."""
        self._environments.find(name)

    def localise_environment(
        self, name: str, *, run: RunId, images: tuple[DiskImage, ...], deadline: timedelta
    ) -> None:
        """Look whether it is there: its disks are local."""
        del run, images, deadline
        self._environments.find(name)

    def environment_state(self, name: str) -> GuestState:
        """Return an environment's state."""
        return state_of(self._environments.find(name).state)

    def environment_nics(self, name: str) -> tuple[Nic, ...]:
        """Return an environment's adapters, with the addresses that its integration services tell."""
        return nics_of(self._host.describe(self._environments.find(name).id).adapters)

    def environment_written_bytes(self, run: RunId) -> int:
        """Return what an environment's disks occupy."""
        return self._environments.written_bytes(run)

    # Owning

    def release(self, resource: Resource, *, deadline: timedelta) -> None:
        """Remove a resource of one of this driver's kinds."""
        run = resource.run
        if resource.kind is ResourceKind.MEMORY:
            self._removal.folder(run, Part.MEMORY, deadline=deadline)
        elif resource.kind is ResourceKind.CLONE_OVERLAYS:
            self._removal.folder(run, None, deadline=deadline)
        elif resource.kind is ResourceKind.ENVIRONMENT_DISKS:
            self._removal.folder(run, None, deadline=deadline)
            self._environments.collect_bases()
        elif resource.kind is ResourceKind.CLONE:
            self._removal.machines(run, kind=TagKind.CLONE, deadline=deadline)
        elif resource.kind is ResourceKind.ENVIRONMENT:
            self._removal.machines(run, kind=TagKind.ENVIRONMENT, deadline=deadline)
        elif resource.kind is ResourceKind.SOURCE_OVERLAYS:
            self._await_home(resource, deadline=deadline)
        elif resource.kind is not ResourceKind.DISK_COPIES:
            raise BugError(f"the Hyper-V driver owns no {resource.kind}")

    def _await_home(self, resource: Resource, *, deadline: timedelta) -> None:
        """Wait until Hyper-V has put the guest back on its own disks, where it took it off them for an export."""
        detail = json.loads(resource.detail)
        until = self._clock.monotonic() + deadline.total_seconds()
        while True:
            try:
                description = self._host.describe(detail["id"])
            except GuestNotFoundError:
                return
            away = [drive for drive in description.drives if drive.parent == detail["disks"].get(drive.target)]
            if not away:
                return
            if self._clock.monotonic() > until:
                raise DeadlineError(
                    f"Hyper-V has not put {resource.guest!r} back on its own disks: it is on {away[0].path}",
                    remedy="the guest runs on, nothing is lost; look with Get-VMSnapshot and Get-VHD whether it still merges",
                )
            self._clock.sleep(_BETWEEN)

    def owned(self) -> tuple[Resource, ...]:
        """Return what bears a run's tag: VMs, and folders."""
        found: list[Resource] = []
        seen: set[RunId] = set()
        planned_before = self._host.planned()  # it may become real meanwhile
        for machine in self._host.machines():
            run = self._host.run_of(machine)
            if run is None:
                continue
            clone = machine.tag is not None and machine.tag.kind is TagKind.CLONE
            seen |= {run} if clone else set()
            kind = ResourceKind.CLONE if clone else ResourceKind.ENVIRONMENT
            guest = "" if machine.tag is None else machine.tag.guest
            found.append(Resource(kind=kind, run=run, guest=guest, name=machine.name))
        for planned in planned_before:
            run = self._folders.run_of(planned.folder)
            if run is not None and run not in seen:
                found.append(Resource(kind=ResourceKind.CLONE, run=run, guest="", name=clone_name(run)))
        for folder in self._host.run_folders():
            parts = folder.parts or (Part.CLONE,)
            kinds = {_PARTS[part]: part for part in parts}
            found.extend(self._folder_resource(folder.run, guest="", part=part) for part in kinds.values())
        return tuple(found)
