"""A hypervisor's driver over ``FakeHost``. Make a new one for each process: it keeps nothing between calls.

It passes ``hypervisor_contract`` and behaves as the libvirt driver does where the port leaves room.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta

from vmsnap.errors import (
    BugError,
    DeadlineError,
    DriverError,
    NoSpaceError,
    NotCleanError,
    PreconditionError,
    SafetyError,
)
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
from vmsnap.model.guest import Disk, DiskKind, Finding, Guest, GuestState, Nic, Severity
from vmsnap.model.ids import RunId
from vmsnap.model.isolation import FencePlan, FencePort, IsolationProof
from vmsnap.model.journal import Resource, ResourceKind
from vmsnap.model.manifest import MachineRecord
from vmsnap.ports.clock import Cancel, Clock
from vmsnap.ports.guest import AgentChannel
from vmsnap.testing.fake_access import FakeAgentChannel
from vmsnap.testing.fake_environments import FakeEnvironments, environment_disks
from vmsnap.testing.fake_guest import FakeGuest
from vmsnap.testing.fake_host import DISK_BYTES, RAM_BYTES, FakeHost, ImageFile, Machine, MemoryImage

_OVERLAY = re.compile(r"/images/vmsnap-(?P<run>[0-9a-f]{10})-(?P<target>vd[a-h])\.(?P<role>source|clone)\.qcow2\Z")
_COPY = re.compile(r"/images/vmsnap-(?P<run>[0-9a-f]{10})-(?P<target>vd[a-h])\.base\Z")
_UUIDS = uuid.UUID("0d3c3f04-51f5-5f0e-9d1c-3c1b0a2f7f11")
_KINDS = {"source": ResourceKind.SOURCE_OVERLAYS, "clone": ResourceKind.CLONE_OVERLAYS}


class FakeHypervisor(FakeEnvironments):
    """``ports.hypervisor.Hypervisor`` over a ``FakeHost``."""

    def __init__(self, host: FakeHost, *, clock: Clock) -> None:
        super().__init__(host)
        self._clock = clock

    @property
    def kinds(self) -> frozenset[ResourceKind]:
        """Return the kinds of resource that this owner releases."""
        return frozenset(
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

    # Looking

    def guests(self) -> tuple[str, ...]:
        """Return the names of all guests."""
        return tuple(sorted(machine.name for machine in self._host.sources()))

    def host_findings(self) -> tuple[Finding, ...]:
        """Look whether the host answers."""
        return (Finding(check="fake", severity=Severity.OK, message=f"knows {len(self.guests())} guests"),)

    def inspect(self, guest: str) -> Guest:
        """Describe a guest."""
        self._host.live_on()
        machine = self._host.machine(guest)
        if machine.run is not None:
            raise PreconditionError(f"{guest!r} is a clone or an environment that vmsnap made")
        return Guest(
            name=machine.name,
            uuid=machine.uuid,
            state=machine.state,
            memory_bytes=RAM_BYTES,
            vcpus=1,
            disks=tuple(
                Disk(target=target, kind=DiskKind.FILE, source=path, image_format="qcow2", size_bytes=DISK_BYTES)
                for target, path in machine.live.items()
            ),
            nics=tuple(
                Nic(index=index, mac=mac, attached_to="br0", addresses=machine.addresses)
                for index, mac in enumerate(machine.macs)
            ),
            has_agent_channel=machine.has_agent_channel,
            nvram=machine.nvram,
        )

    def machine(self, guest: Guest) -> MachineRecord:
        """Return what makes a VM again."""
        return MachineRecord(
            hypervisor="fake",
            definition=f"the machine of {guest.name}",
            uuid=guest.uuid,
            memory_bytes=guest.memory_bytes,
            vcpus=guest.vcpus,
            nvram=guest.nvram,
            macs=tuple(nic.mac for nic in guest.nics),
        )

    def choose_mode(self, guest: Guest, *, settings: CaptureSettings) -> ModeChoice:
        """Return the mode to capture this guest in."""
        del guest
        if settings.mode is CaptureChoice.AUTO:
            return ModeChoice(mode=CaptureMode.LIVE, reason="auto: every fake guest converges")
        return ModeChoice(mode=CaptureMode(settings.mode), reason="the policy says so")

    def findings(self, guest: Guest, *, settings: CaptureSettings) -> tuple[Finding, ...]:
        """Look whether the guest can be captured now."""
        found = list(self._host.findings)
        if guest.state is not GuestState.RUNNING:
            found.append(_refusal("state", f"the guest is {guest.state}"))
        found += [
            _refusal(f"disk {disk.target}", f"it is already on an overlay of vmsnap: {disk.source}")
            for disk in guest.disks
            if "vmsnap-" in disk.source
        ]
        if self._host.free_bytes < settings.min_overlay_free_bytes:
            found.append(_refusal("overlays", "too little room"))
        return (*found, Finding(check="fake", severity=Severity.OK, message="can be captured"))

    # Capturing

    def settle(self, guest: Guest, *, settings: CaptureSettings) -> CaptureSettings:
        """Choose what ``auto`` comes to."""
        del guest
        if settings.disk_snapshot is DiskSnapshot.STORAGE:
            return replace(settings, detach=Detach.LATE)
        if settings.detach is not Detach.AUTO:
            return settings
        return replace(settings, detach=Detach.REFLINK if self._host.has_reflinks else Detach.LATE)

    def clone_memory_bytes(self, guest: Guest, *, settings: CaptureSettings) -> int:
        """Return what image and clone take."""
        del settings
        return guest.memory_bytes

    def host_memory(self) -> HostMemory:
        """Return what memory the host has left."""
        taken = dict.fromkeys(self._host.memory, RAM_BYTES)
        taken |= {m.run: RAM_BYTES for m in self._host.machines.values() if m.run is not None and m.transient}
        return HostMemory(available_bytes=self._host.memory_bytes - sum(taken.values()), taken_bytes=taken)

    def memory_resource(self, plan: CapturePlan) -> Resource:
        """Name the place of the memory image."""
        return self._memory(plan.run, guest=plan.guest.name)

    def _memory(self, run: RunId, *, guest: str) -> Resource:
        return Resource(kind=ResourceKind.MEMORY, run=run, guest=guest, name=f"/run/vmsnap/{run}/memory")

    def prepare_memory(self, plan: CapturePlan) -> None:
        """Make the place of the memory image."""
        self._host.memory[plan.run] = MemoryImage(of_guest=plan.guest.name)

    def overlays_resource(self, plan: CapturePlan) -> Resource:
        """Name the source's overlays."""
        return _overlays(plan, role="source")

    def clone_overlays_resource(self, plan: CapturePlan) -> Resource:
        """Name the clone's overlays."""
        return _overlays(plan, role="clone")

    def prepare_overlays(self, plan: CapturePlan) -> None:
        """Make the source's overlays."""
        if self._host.free_bytes < plan.settings.min_overlay_free_bytes:
            raise NoSpaceError("the file system of the overlays has too little room", remedy="make room")
        if plan.settings.disk_snapshot is DiskSnapshot.OVERLAY:
            self._make_overlays(plan, role="source")

    def prepare_clone_overlays(self, plan: CapturePlan) -> None:
        """Make the clone's overlays."""
        self._make_overlays(plan, role="clone")

    def _make_overlays(self, plan: CapturePlan, *, role: str) -> None:
        self._host.live_on()
        for disk in plan.guest.disks:
            path = _overlay(plan.run, target=disk.target, role=role)
            on_copy = role == "clone" and plan.settings.on_copies
            backing = _copy(plan.run, target=disk.target) if on_copy else disk.source
            self._host.files[path] = ImageFile(path=path, backing=backing)
            self._host.between(f"{role} overlay of {disk.target} made")

    def copies_resource(self, plan: CapturePlan) -> Resource:
        """Name the copies."""
        return _copies(plan.run, guest=plan.guest.name, targets=tuple(disk.target for disk in plan.guest.disks))

    def prepare_copies(self, plan: CapturePlan) -> None:
        """Make the copies, empty."""
        if not self._host.has_reflinks:
            raise PreconditionError("the disks cannot be copied by reflink", remedy="this is a fake")
        for disk in plan.guest.disks:
            path = _copy(plan.run, target=disk.target)
            self._host.files[path] = ImageFile(path=path)
            self._host.between(f"copy of {disk.target} made")

    def _fill_copies(self, plan: CapturePlan) -> None:
        for disk in plan.guest.disks:
            copy = self._host.files[_copy(plan.run, target=disk.target)]
            copy.writes = set(self._host.content(disk.source))
            self._host.between(f"copy of {disk.target} filled")

    def capture(self, plan: CapturePlan, *, fence: FencePlan, cancel: Cancel) -> Capture:
        """Take the guest."""
        host = self._host
        if fence.run not in host.network.fences:
            raise DriverError("the clone's fence was not built before the capture")
        host.live_on()
        source = host.machine(plan.guest.name)
        overlays = _source_overlays(plan)
        takes_memory = plan.choice.mode.takes_memory
        if (takes_memory and plan.run not in host.memory) or not set(overlays.values()) <= set(host.files):
            raise DriverError("the capture was not prepared")
        cancel.check()
        began = self._clock.monotonic()
        stopped = self._clock.now()
        source.state, source.paused_by_capture = GuestState.PAUSED, True
        try:
            host.between("the source stands still")
            for disk in plan.guest.disks:
                clone_overlay = host.files[_overlay(plan.run, target=disk.target, role="clone")]
                clone_overlay.frozen = host.content(disk.source)
            source.live.update(overlays)
            host.between("the source is on its overlays")
            source.persistent.update(overlays)
            if takes_memory:
                host.memory[plan.run].guest = source.guest.clone()
                host.between("the memory is taken")
            else:
                host.crashed[plan.run] = source.guest.crashed()
            if plan.settings.disk_snapshot is DiskSnapshot.STORAGE:
                host.between("the source is left to its storage")
                self._fill_copies(plan)
        except Exception:
            source.state, source.paused_by_capture = GuestState.RUNNING, False
            raise
        source.state, source.paused_by_capture = GuestState.RUNNING, False
        host.live_on()
        if plan.choice.mode is CaptureMode.INSTANT:
            # The memory goes straight into the clone; its place holds nothing.
            self._make_clone(plan, fence=fence, guest=host.memory[plan.run].guest)
            host.memory[plan.run].guest = None
        if plan.settings.detach is Detach.REFLINK:
            self._fill_copies(plan)
        return Capture(
            mode=plan.choice.mode,
            reason=plan.choice.reason,
            captured=stopped,
            resumed=self._clock.now(),
            pause_ms=host.pause / timedelta(milliseconds=1),
            ram_bytes=plan.guest.memory_bytes if takes_memory else 0,
            seconds=self._clock.monotonic() - began,
        )

    # The clone

    def clone_resource(self, plan: CapturePlan) -> Resource:
        """Name the clone."""
        return self._clone_resource(plan.run, guest=plan.guest.name)

    def _clone_resource(self, run: RunId, *, guest: str) -> Resource:
        return Resource(kind=ResourceKind.CLONE, run=run, guest=guest, name=f"vmsnap-clone-{run}")

    def restore_clone(self, plan: CapturePlan, *, fence: FencePlan) -> Clone:
        """Make the clone, paused."""
        host = self._host
        host.live_on()
        image = host.memory.get(plan.run)
        if plan.choice.mode is CaptureMode.INSTANT:
            host.machine(f"vmsnap-clone-{plan.run}")
            return self._clone(plan)
        return self._make_clone(plan, fence=fence, guest=host.crashed.get(plan.run) if image is None else image.guest)

    def _clone(self, plan: CapturePlan) -> Clone:
        return Clone(
            run=plan.run,
            guest=plan.guest.name,
            name=f"vmsnap-clone-{plan.run}",
            uuid=str(uuid.uuid5(_UUIDS, plan.run)),
        )

    def _make_clone(self, plan: CapturePlan, *, fence: FencePlan, guest: FakeGuest | None) -> Clone:
        host = self._host
        overlays = {disk.target: _overlay(plan.run, target=disk.target, role="clone") for disk in plan.guest.disks}
        if guest is None:
            raise DriverError("there is nothing to make the clone of")
        if not set(overlays.values()) <= set(host.files):
            raise DriverError("the clone has no overlays to write to")
        if fence.run != plan.run or tuple(port.mac for port in fence.ports) != tuple(n.mac for n in plan.guest.nics):
            raise SafetyError("the fence is not this clone's")
        clone = self._clone(plan)
        if clone.name in host.machines:
            raise DriverError(f"{clone.name!r} is there already")
        machine = Machine(
            name=clone.name,
            uuid=clone.uuid,
            guest=guest,
            live=overlays,
            persistent=dict(overlays),
            macs=tuple(nic.mac for nic in plan.guest.nics),
            state=GuestState.PAUSED,
            run=plan.run,
            of_guest=plan.guest.name,
            fence=plan.run,
            transient=True,
            host_key=host.machine(plan.guest.name).host_key,
            has_agent_channel=plan.guest.has_agent_channel,
        )
        host.machines[clone.name] = machine
        host.between("the clone is there")
        host.plug(machine)
        return clone

    def resume_clone(self, clone: Clone, *, proof: IsolationProof) -> None:
        """Let the clone run."""
        if proof.run != clone.run:
            raise BugError(f"the proof is of run {proof.run}, the clone of run {clone.run}")
        machine = self._host.machine(clone.name)
        for path in machine.live.values():
            self._host.check_frozen(self._host.files[path], what=f"{clone.name} was resumed")
        fence = self._host.network.fences.get(clone.run)
        if self._host.network.needs_watch and (fence is None or fence.watch is None):
            self._host.violations.append(f"{clone.name} was resumed with nobody watching its fence")
        machine.state = GuestState.RUNNING
        self._host.live_on()

    def clone_state(self, clone: Clone) -> GuestState:
        """Return the clone's state."""
        return self._host.machine(clone.name).state

    def agent(self, domain: str) -> AgentChannel:
        """Return the line to a VM's agent."""
        return FakeAgentChannel(self._host, domain=domain)

    def set_link(self, domain: str, *, mac: str, up: bool) -> None:
        """Pull or plug a cable."""
        machine = self._host.machine(domain)
        if machine.run is None or mac not in machine.macs:
            raise BugError(f"{domain!r} is not vmsnap's, or has no interface {mac}")
        machine.links[mac] = up

    def replug_nic(self, clone: Clone, *, port: FencePort, deadline: timedelta) -> None:
        """Take a NIC out and put it back."""
        self._host.replug(clone.name, mac=port.mac, wait=lambda: self._clock.sleep(deadline))

    def shut_down_clone(self, clone: Clone, *, agent_answers: bool, deadline: timedelta, cancel: Cancel) -> str:
        """Ask the clone's guest to power off."""
        host = self._host
        host.live_on()
        machine = host.machines.get(clone.name)
        if machine is None:
            raise NotCleanError("the clone ended before it was asked to shut down")
        cancel.check()
        if host.shutdown == "hangs":
            self._clock.sleep(deadline)
            raise DeadlineError(f"the clone did not power off within {deadline}", remedy="raise the deadline")
        host.forget(machine, in_order=host.shutdown == "in order")
        if host.shutdown != "in order":
            raise NotCleanError("the clone ended, but not by a shutdown of its guest", details=host.shutdown)
        return "guest agent" if agent_answers else "ACPI"

    def clone_images(self, plan: CapturePlan) -> tuple[DiskImage, ...]:
        """Return the clone's disk images."""
        host = self._host
        host.live_on()
        if f"vmsnap-clone-{plan.run}" in host.machines or plan.run not in host.ended:
            raise BugError("the clone is not off")
        images = []
        for disk in plan.guest.disks:
            path = _overlay(plan.run, target=disk.target, role="clone")
            host.check_frozen(host.files[path], what=f"the disks of run {plan.run} were read")
            images.append(
                DiskImage(target=disk.target, path=path, image_format="qcow2", size_bytes=disk.size_bytes),
            )
        host.offline(tuple(images), host.ended[plan.run])
        return tuple(images)

    def clone_nvram(self, plan: CapturePlan) -> str | None:
        """Return the path of the clone's firmware variables."""
        return plan.guest.nvram

    def overlay_free_bytes(self, plan: CapturePlan) -> int:
        """Return the room left."""
        del plan
        return self._host.free_bytes

    def source_is_home(self, guest: Guest) -> bool:
        """Tell whether the guest's definitions are on its own disks."""
        self._host.live_on()
        machine = self._host.machine(guest.name)
        home = {disk.target: disk.source for disk in guest.disks}
        return machine.live == home and machine.persistent == home

    def work_on(self, guest: str) -> tuple[str, ...]:
        """Return the job that a test has put on a guest."""
        job = self._host.jobs.get(guest)
        return () if job is None else (job,)

    # Owning

    def release(self, resource: Resource, *, deadline: timedelta) -> None:
        """Remove a resource of one of this driver's kinds."""
        del deadline
        host = self._host
        host.live_on()
        if resource.kind is ResourceKind.MEMORY:
            host.memory.pop(resource.run, None)
        elif resource.kind is ResourceKind.SOURCE_OVERLAYS:
            self._return_source(resource)
        elif resource.kind is ResourceKind.CLONE_OVERLAYS or resource.kind is ResourceKind.DISK_COPIES:
            self._delete(json.loads(resource.detail).values())
        elif resource.kind in (ResourceKind.CLONE, ResourceKind.ENVIRONMENT):
            machine = host.machines.get(resource.name)
            if machine is not None and machine.run == resource.run:
                host.forget(machine, in_order=False)
        elif resource.kind is ResourceKind.ENVIRONMENT_DISKS:
            prefix = f"/environments/{resource.run}/"
            self._delete([path for path in host.files if path.startswith(prefix)])
        else:
            raise BugError(f"this driver owns no {resource.kind}")
        host.live_on()

    def _delete(self, paths: Iterable[str]) -> None:
        for path in tuple(paths):
            self._host.delete(path)
            self._host.between(f"{path.rsplit('/', 1)[1]} deleted")

    def _return_source(self, resource: Resource) -> None:
        """Put the source back on its own disks, whatever of them it is on, and delete the overlays."""
        host = self._host
        overlays: dict[str, str] = json.loads(resource.detail)
        source = host.machines.get(resource.guest)
        if source is not None:
            if source.paused_by_capture:
                source.state, source.paused_by_capture = GuestState.RUNNING, False
            for target, path in overlays.items():
                self._commit(source, target=target, path=path)
        elif any(path in host.files and host.files[path].writes for path in overlays.values()):
            raise DriverError(f"the guest {resource.guest!r} is gone, and its overlays hold what it wrote last")
        self._delete(overlays.values())

    def _commit(self, source: Machine, *, target: str, path: str) -> None:
        host = self._host
        overlay = host.files.get(path)
        if path in tuple(host.chain(source.live[target]))[1:]:
            raise SafetyError(f"{target} of {source.name!r} is on {source.live[target]}, which no run made")
        if overlay is None or overlay.backing is None or path not in {source.live[target], source.persistent[target]}:
            return
        host.files[overlay.backing].writes |= overlay.writes
        host.between(f"{target} is committed")
        for definition, name in ((source.live, "live"), (source.persistent, "persistent")):
            if definition[target] == path:
                definition[target] = overlay.backing
            host.between(f"{target} is back, {name}")
        host.live_on()

    def owned(self) -> tuple[Resource, ...]:
        """Return what exists and bears a run's tag."""
        host = self._host
        host.live_on()
        found = [self._memory(run, guest=image.of_guest) for run, image in host.memory.items()]
        overlays: dict[tuple[RunId, str, str], dict[str, str]] = {}
        for path, file in host.files.items():
            match = _OVERLAY.match(path)
            if match is not None:
                of_guest = next((m.name for m in host.sources() if file.backing in self._own_disks(m)), "")
                overlays.setdefault((RunId(match["run"]), match["role"], of_guest), {})[match["target"]] = path
        found += [
            _overlays_resource(run, guest=guest, role=role, paths=paths)
            for (run, role, guest), paths in overlays.items()
        ]
        copied: dict[RunId, list[str]] = {}
        for path in host.files:
            match = _COPY.match(path)
            if match is not None:
                copied.setdefault(RunId(match["run"]), []).append(match["target"])
        found += [_copies(run, guest="", targets=tuple(targets)) for run, targets in copied.items()]
        runs = sorted({path.split("/")[2] for path in host.files if path.startswith("/environments/")})
        found += [environment_disks(RunId(run), guest="") for run in runs]
        for machine in host.made():
            kind = ResourceKind.CLONE if machine.transient else ResourceKind.ENVIRONMENT
            run = machine.run or RunId("")
            found.append(Resource(kind=kind, run=run, guest=machine.of_guest, name=machine.name))
        return tuple(found)

    def _own_disks(self, machine: Machine) -> set[str]:
        """Return a guest's disks, and those its overlays are over."""
        paths = set(machine.live.values()) | set(machine.persistent.values())
        backing = {self._host.files[path].backing for path in paths if path in self._host.files}
        return paths | {path for path in backing if path is not None}


def _overlay(run: RunId, *, target: str, role: str) -> str:
    return f"/images/vmsnap-{run}-{target}.{role}.qcow2"


def _copy(run: RunId, *, target: str) -> str:
    return f"/images/vmsnap-{run}-{target}.base"


def _copies(run: RunId, *, guest: str, targets: tuple[str, ...]) -> Resource:
    return Resource(
        kind=ResourceKind.DISK_COPIES,
        run=run,
        guest=guest,
        name=f"copies of the disks of {guest}",
        detail=json.dumps({target: _copy(run, target=target) for target in targets}),
    )


def _source_overlays(plan: CapturePlan) -> dict[str, str]:
    if plan.settings.disk_snapshot is DiskSnapshot.STORAGE:
        return {}
    return {disk.target: _overlay(plan.run, target=disk.target, role="source") for disk in plan.guest.disks}


def _overlays(plan: CapturePlan, *, role: str) -> Resource:
    paths = {disk.target: _overlay(plan.run, target=disk.target, role=role) for disk in plan.guest.disks}
    paths = _source_overlays(plan) if role == "source" else paths
    return _overlays_resource(plan.run, guest=plan.guest.name, role=role, paths=paths)


def _overlays_resource(run: RunId, *, guest: str, role: str, paths: dict[str, str]) -> Resource:
    return Resource(
        kind=_KINDS[role], run=run, guest=guest, name=f"{role} overlays of {guest}", detail=json.dumps(paths)
    )


def _refusal(check: str, message: str) -> Finding:
    return Finding(check=check, severity=Severity.REFUSAL, message=message, remedy="run 'vmsnap reconcile'")
