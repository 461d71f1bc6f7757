"""A whole installation whose hypervisor is the Hyper-V driver itself, over the simulated host.

Everything else is as in ``vmsnap.testing.world``: the store, the state and the disk ports are in memory. Guests are those of
the fakes, reached by their agent; the line that Hyper-V has instead is tested with its driver.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from vmsnap.errors import HostUnreachableError, IsolationError
from vmsnap.hypervisors.hyperv.addressing import HyperVAddressing
from vmsnap.hypervisors.hyperv.driver import HyperVHypervisor
from vmsnap.hypervisors.hyperv.fence import HyperVFence, SwitchWatch
from vmsnap.hypervisors.hyperv.host import Host
from vmsnap.hypervisors.hyperv.responder import Responder
from vmsnap.hypervisors.hyperv.tags import RunFolders, TagKind, read_tag
from vmsnap.model.drain import FileSystemState
from vmsnap.model.guest import GuestState
from vmsnap.model.isolation import FencePlan, IsolationProof
from vmsnap.ports.clock import Clock
from vmsnap.ports.guest import AgentChannel
from vmsnap.ports.owner import Owner
from vmsnap.testing.fake_access import FakeAgentChannel
from vmsnap.testing.fake_guest import FILE_SYSTEM_UUID, FakeGuest
from vmsnap.testing.fake_host import FakeHost, Machine
from vmsnap.testing.fake_network import FenceState, NetworkWorld
from vmsnap.testing.fake_postgresql import FakeCluster
from vmsnap.testing.faults import Faults
from vmsnap.testing.hyperv.failures import Speech
from vmsnap.testing.hyperv.machine import HyperVHost
from vmsnap.testing.hyperv.orphans import Orphanage, OrphaningRunner
from vmsnap.testing.hyperv.running import TwinRunner
from vmsnap.testing.hyperv.values import (
    Controller,
    HardDiskDrive,
    VirtualMachine,
    VMNetworkAdapter,
    VMState,
)
from vmsnap.testing.hyperv.vhd import write_headers
from vmsnap.testing.world import FakeWorld, disk_bytes
from vmsnap.workflow.world import World

RESPONDER_VM = "clones' dhcp"
EXPORTS = "D:\\vmsnap"
DISK_BYTES = 256 * 1024
_LATER_DISKS_UUID = "00000000-0000-4000-8000-0000000000{:02x}"
_STATES = {VMState.RUNNING: GuestState.RUNNING, VMState.OFF: GuestState.SHUT_OFF, VMState.SAVED: GuestState.PAUSED}

ScriptHook = Callable[[str], None]


class DatabaseGuest:
    """What runs in a VM (``values.Inside``): a guest of the fakes. ``writes`` are what its disks hold, by disk.

    ``obeys``, ``ends_in_order``: see ``values.Inside``. ``heartbeat`` False: nothing in it answers the host.
    """

    shutdown_takes = 1

    def __init__(self, guest: FakeGuest, *, disks: int) -> None:
        self.guest = guest
        self.writes: tuple[set[str], ...] = tuple(set() for _ in range(disks))
        self.obeys = True
        self.ends_in_order = True
        self.heartbeat = True

    def captured(self) -> DatabaseGuest:
        """Return the same guest at this instant."""
        return self.with_guest(self.guest.clone())

    def booted(self) -> DatabaseGuest:
        """Return the guest as it comes up from its disks."""
        return self.with_guest(self.guest.crashed())

    def with_guest(self, guest: FakeGuest) -> DatabaseGuest:
        """Return the same disks with another guest on them."""
        other = DatabaseGuest(guest, disks=0)
        other.writes = tuple(set(words) for words in self.writes)
        other.obeys, other.ends_in_order, other.heartbeat = self.obeys, self.ends_in_order, self.heartbeat
        return other

    def ended(self, *, in_order: bool) -> tuple[Path | None, ...]:
        """Answer no more. The disks stay as they are: what they hold is told beside."""
        del in_order
        self.guest.answers = False
        return ()


class MirroredHost(FakeHost):
    """The host as the fakes see it: the guests in its VMs. What is asked of it is asked of the simulated host."""

    def __init__(self, machine: HyperVHost, *, network: NetworkWorld) -> None:
        self.hyperv = machine
        super().__init__(network=network)
        self.written = 0

    def live_on(self) -> None:
        """Let every running VM write to its disks, and show the VMs as they are now."""
        for vm in self.hyperv.vms:
            inside = vm.truth.inside
            if vm.state is VMState.RUNNING and isinstance(inside, DatabaseGuest):
                self.written += 1
                for index, words in enumerate(inside.writes):
                    words.add(f"{vm.name}/{_target(vm.hard_drives[index])}/{self.written}")
        self.mirror()

    def mirror(self) -> None:
        """Show the VMs and fences as they are now."""
        self.machines = {vm.name: self._shown(vm) for vm in self.hyperv.vms}
        fences = [tag.run for tag in (read_tag(switch.notes) for switch in self.hyperv.switches) if tag is not None]
        plans = {run: FencePlan.for_macs(run, guest="", macs=()) for run in fences}
        self.network.fences = {run: FenceState(plan=plan) for run, plan in plans.items()}

    def _shown(self, vm: VirtualMachine) -> Machine:
        inside = vm.truth.inside
        guest = inside.guest if isinstance(inside, DatabaseGuest) else FakeGuest()
        tag = read_tag(vm.notes)
        promised = {word for words in inside.writes for word in words} if isinstance(inside, DatabaseGuest) else set()
        return Machine(
            name=vm.name,
            uuid=vm.id,
            guest=guest,
            live={},
            persistent={},
            macs=(),
            state=_STATES.get(vm.state, GuestState.OTHER),
            run=None if tag is None else tag.run,
            transient=tag is not None and tag.kind is TagKind.CLONE,
            promised=promised,
        )

    def sources(self) -> Iterator[Machine]:
        """Yield the VMs that no run made."""
        self.mirror()
        return super().sources()

    def harm(self) -> list[str]:
        """Return everything that is wrong with production now."""
        self.mirror()
        return [*self.violations, *self.hyperv.harm()]


class _NoLogins:
    """``GuestLogins`` of guests that are reached by their agent."""

    def login(self, guest: str) -> None:
        """Return None."""


class AgentHypervisor(HyperVHypervisor):
    """The driver, with an agent as the line into its guests."""

    def __init__(self, host: Host, *, clock: Clock, mirror: MirroredHost) -> None:
        super().__init__(host, clock=clock, logins=_NoLogins())
        self._mirror = mirror

    def agent(self, domain: str) -> AgentChannel:
        """Return the line to a guest's agent."""
        return FakeAgentChannel(self._mirror, domain=domain)


class _Fence(HyperVFence):
    """The fence, whose watches end with their process, as threads do."""

    def __init__(self, host: Host, *, watches: list[SwitchWatch], responder: Responder | None) -> None:
        super().__init__(host, responder=responder)
        self._watches = watches

    def watch(self, plan: FencePlan, *, proof: IsolationProof, alarm: Callable[[IsolationError], None]) -> SwitchWatch:
        """Watch a proven fence."""
        watch = super().watch(plan, proof=proof, alarm=alarm)
        self._watches.append(watch)
        return watch


class HyperVWorld(FakeWorld):
    """An installation beside a Hyper-V host with one running PostgreSQL guest, ``db``. See ``FakeWorld``.

    ``script``: called with the name of each script before (``NAME: before``) and after it ran, in the process's own thread;
    it may raise. ``orphanage``: where a process with faults dies in the middle of a script, which goes on later.
    """

    def __init__(self, folder: Path, *, disks: int = 1, speech: Speech | None = None) -> None:
        self.machine = HyperVHost(folder / "host", speech=speech)
        self.machine.add_switch("LAN")
        self.machine.files.make_folder(EXPORTS)
        self.machine.on_end = self._show
        self.script: ScriptHook = _nothing
        self.orphanage: Orphanage | None = None
        self.has_responder = False
        self._faults: Faults | None = None
        self._watches: list[SwitchWatch] = []
        super().__init__(folder, disks=disks)
        self.host = self.mirror = MirroredHost(self.machine, network=self.network)

    def add_guest(self, name: str, *, disks: int = 1) -> FakeGuest:
        """Put another PostgreSQL guest on the host."""
        inside = self.add_vm(name, disks=disks).truth.inside
        assert isinstance(inside, DatabaseGuest)  # noqa: S101 - it was made a line above
        return inside.guest

    def add_vm(self, name: str, *, disks: int = 1) -> VirtualMachine:
        """Put another running VM with PostgreSQL on the host, with disks of their own names on volume C."""
        number = len(self.machine.vms)
        folder = f"C:\\VMs\\{number}"
        self.machine.files.make_folder(folder)
        drives = [
            HardDiskDrive(
                path=f"{folder}\\disk{index}.vhdx", controller_location=index, controller_type=Controller.SCSI
            )
            for index in range(disks)
        ]
        for drive in drives:
            if not self.machine.files.exists(drive.path):
                write_headers(self.machine.files.local(drive.path), size_bytes=DISK_BYTES)
        vm = VirtualMachine(
            name=name,
            id=str(uuid.uuid5(uuid.NAMESPACE_OID, f"{number}")),
            state=VMState.RUNNING,
            hard_drives=drives,
            network_adapters=[VMNetworkAdapter(mac_address=f"00155D0000{number + 1:02X}", switch_name="LAN")],
        )
        vm.truth.inside = DatabaseGuest(FakeGuest(clusters=(FakeCluster(will_finish=2, will_hang=1),)), disks=disks)
        return self.machine.add_vm(vm)

    def add_responder(self, *, serves: str = "198.18.7.") -> VirtualMachine:
        """Put a VM with a DHCP server on the host that clones may be given an address by; say where ``db`` lives now."""
        self.has_responder = True
        for vm in self.machine.vms:
            for index, adapter in enumerate(vm.network_adapters):
                adapter.ip_addresses = (f"10.0.0.{index + 1}",)
        vm = VirtualMachine(
            name=RESPONDER_VM,
            state=VMState.RUNNING,
            notes="vmsnap responder\nGives clones addresses.",
            network_adapters=[VMNetworkAdapter(mac_address="00155D00FF01")],
        )
        vm.truth.serves = serves
        return self.machine.add_vm(vm)

    def process(self, faults: Faults | None = None) -> World:
        """Return the drivers of a fresh process."""
        self._faults = faults
        world = super().process(None)
        host = self.connect()
        responder = Responder(host, name=RESPONDER_VM, clock=self.clock) if self.has_responder else None
        fence = _Fence(host, watches=self._watches, responder=responder)
        world = replace(
            world,
            hypervisor=AgentHypervisor(host, clock=self.clock, mirror=self.mirror),
            fence=fence,
            addressing=HyperVAddressing(host, fence=fence, responder=responder, clock=self.clock),
        )
        if faults is None:
            return world
        if self.orphanage is None:
            self.machine.between = faults.point
        return faults.world(world)

    def connect(self) -> Host:
        """Return the Hyper-V host as a driver of the present process reaches it."""
        folders = RunFolders(root=EXPORTS, mounted=str(self.machine.files.local(EXPORTS)))
        if self.orphanage is not None and self._faults is not None:
            died = self._faults.die
            return Host(OrphaningRunner(self.machine, orphanage=self.orphanage, died=died), folders=folders)
        faults, thread = self._faults, threading.get_ident()

        def pass_by(place: str) -> None:
            if threading.get_ident() != thread:
                # Watches have threads of their own; what goes wrong is counted in the process's own thread alone.
                if faults is not None and faults.dead:
                    raise HostUnreachableError("the process that asked is dead", remedy="this is a fake")
                return
            if faults is not None:
                faults.point(place)
            self.script(place)

        runner = TwinRunner(
            self.machine,
            before=lambda name: pass_by(f"{name}: before"),
            after=lambda name: pass_by(f"{name}: after"),
        )
        return Host(runner, folders=folders)

    def end(self) -> None:
        """End the present process."""
        self.machine.between = self.script = _nothing
        self._faults = None
        while self._watches:
            self._watches.pop().close()
        super().end()

    @property
    def owners(self) -> tuple[Owner, ...]:
        """Return the owners of resources, without faults."""
        host = self.connect()
        hypervisor = AgentHypervisor(host, clock=self.clock, mirror=self.mirror)
        return (hypervisor, HyperVFence(host), self.services, self.export, self.store)

    def stored_target(self, index: int = 0) -> str:
        """Return what the first guest's disks are called."""
        return _target(self.machine.vms[0].hard_drives[index])

    def _show(self, vm: VirtualMachine, in_order: bool) -> None:  # noqa: FBT001 - a hook of the host
        """Let export and inspector show the disks of a VM that ended."""
        inside = vm.truth.inside
        if not isinstance(inside, DatabaseGuest):
            return
        self.inspector.states = {}
        for index, (drive, words) in enumerate(zip(vm.hard_drives, inside.writes, strict=False)):
            path = str(self.machine.files.local(drive.path))
            self.export.contents[path] = {0: disk_bytes(frozenset(words))}
            identity = FILE_SYSTEM_UUID if index == 0 else _LATER_DISKS_UUID.format(index)
            observed = "state clean, 0 errors" if in_order else "state clean, needs_recovery, 0 errors"
            state = FileSystemState(disk=_target(drive), kind="ext4", uuid=identity, clean=in_order, observed=observed)
            self.inspector.states[_target(drive)] = (state,)
        self.inspector.files = {
            (FILE_SYSTEM_UUID, path): content
            for cluster in inside.guest.clusters
            for path, content in cluster.files().items()
        }


def _target(drive: HardDiskDrive) -> str:
    return f"{drive.controller_type.lower()}-{drive.controller_number}-{drive.controller_location}"


def _nothing(_: str) -> None:
    """Stand for a hook nobody set."""
