"""A host in memory: image files, guests, clones and environments. It outlives the drivers, as a host outlives a process.

It keeps the rules that a real host enforces by damage: ``violations`` lists what would have harmed somebody. A test that
ends with an empty list, every guest home and nothing lost has shown that a workflow harms nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from ipaddress import IPv4Interface

from vmsnap.errors import BugError, DeadlineError, GuestNotFoundError
from vmsnap.model.capture import DiskImage
from vmsnap.model.command import Command
from vmsnap.model.guest import Finding, GuestState
from vmsnap.model.ids import RunId
from vmsnap.testing.fake_guest import FakeGuest
from vmsnap.testing.fake_network import NetworkWorld

DISK_BYTES = 256 * 1024
RAM_BYTES = 1 << 30


@dataclass
class ImageFile:
    """One image on the host. ``writes`` are what was written to this layer, by the writer's word.

    ``frozen``: for a clone's overlay, what its base held at the capture; the base must not change under it.
    """

    path: str
    backing: str | None = None
    writes: set[str] = field(default_factory=set)
    frozen: frozenset[str] | None = None


@dataclass
class Machine:
    """One VM. ``run`` is the tag of a clone or an environment; a guest has none.

    ``promised`` is every write that the guest was told is on its disk. ``fence`` is the run whose fence it is in.
    ``notes``: the blocks of each disk that were written since a run began to note them.
    """

    name: str
    uuid: str
    guest: FakeGuest
    live: dict[str, str]
    persistent: dict[str, str]
    macs: tuple[str, ...]
    state: GuestState = GuestState.RUNNING
    run: RunId | None = None
    of_guest: str = ""
    fence: RunId | None = None
    transient: bool = False
    promised: set[str] = field(default_factory=set)
    paused_by_capture: bool = False
    addresses: tuple[IPv4Interface, ...] = ()
    host_key: str = "ssh-ed25519 AAAAfake"
    nvram: str | None = None
    has_agent_channel: bool = True
    links: dict[str, bool] = field(default_factory=dict)
    notes: dict[RunId, dict[str, set[int]]] = field(default_factory=dict)
    notes_miss_writes: bool = False

    def note_write(self, target: str, *, block: int) -> None:
        """Add a write to all notes that go on."""
        for disks in self.notes.values():
            if target in disks and not self.notes_miss_writes:
                disks[target].add(block)


@dataclass
class MemoryImage:
    """The place of a run's memory image; ``guest`` is the frozen guest once it was captured."""

    of_guest: str
    guest: FakeGuest | None = None


@dataclass
class Ended:
    """How a clone ended: its guest as it was then, and whether that was a shutdown of its own."""

    guest: FakeGuest
    in_order: bool


def _nothing(_: str) -> None:
    """Stand for a hook nobody set."""


class FakeHost:
    """Everything outside vmsnap's process that a hypervisor's driver can touch.

    ``crashed`` are guests as they boot from disks that were taken while they ran, by run.

    ``between`` is called inside operations that change several things, with a name of the place: a process may die
    there. ``before_command`` is called with a domain's name before each command in it. A test may set ``findings``,
    ``jobs`` (what works on guests, by guest),
    ``free_bytes``, ``has_reflinks``, ``shutdown`` (how a clone ends: ``in order``, ``hangs``, or in any other word's way)
    and ``environments_answer``, and their addresses ``environment_addresses``.
    """

    def __init__(self, *, network: NetworkWorld) -> None:
        self.network = network
        self.files: dict[str, ImageFile] = {}
        self.machines: dict[str, Machine] = {}
        self.memory: dict[RunId, MemoryImage] = {}
        self.crashed: dict[RunId, FakeGuest] = {}
        self.ended: dict[RunId, Ended] = {}
        self.networks = {"default"}
        self.violations: list[str] = []
        self.between: Callable[[str], None] = _nothing
        self.before_command: Callable[[str, Command], None] = lambda _name, _command: None
        self.offline: Callable[[tuple[DiskImage, ...], Ended], None] = lambda _images, _ended: None
        self.findings: list[Finding] = []
        self.jobs: dict[str, str] = {}
        self.free_bytes = 100 << 30
        self.memory_bytes = 100 << 30
        self.shutdown = "in order"
        self.keeps_nics = False
        self.has_reflinks = True
        self.environments_answer = True
        self.environment_addresses: tuple[IPv4Interface, ...] = ()
        self.pause = timedelta(milliseconds=25)
        self._clock_of_writes = 0

    # Guests

    def add_guest(self, name: str, *, guest: FakeGuest, disks: int = 1, index: int = 1) -> Machine:
        """Put a running guest on the host, on its own disks."""
        live = {}
        for number in range(disks):
            target = f"vd{'abcdefgh'[number]}"
            path = f"/images/{name}-{target}.qcow2"
            self.files[path] = ImageFile(path=path)
            live[target] = path
        machine = Machine(
            name=name,
            uuid=f"5f0c1f7e-0000-4000-8000-{index:012d}",
            guest=guest,
            live=live,
            persistent=dict(live),
            macs=(f"52:54:00:00:00:{index:02x}",),
            addresses=(IPv4Interface(f"10.0.0.{index}/24"),),
        )
        self.machines[name] = machine
        return machine

    def machine(self, name: str) -> Machine:
        """Return a VM by its name. Raises GuestNotFoundError."""
        try:
            return self.machines[name]
        except KeyError:
            raise GuestNotFoundError(f"there is no guest {name!r}", remedy="this is a fake") from None

    def sources(self) -> Iterator[Machine]:
        """Yield the VMs that no run made."""
        return (machine for machine in list(self.machines.values()) if machine.run is None)

    def made(self) -> Iterator[Machine]:
        """Yield the clones and environments."""
        return (machine for machine in list(self.machines.values()) if machine.run is not None)

    # Time

    def live_on(self) -> None:
        """Let every running VM write once to each of its disks, and look whether the rules hold."""
        for machine in list(self.machines.values()):
            if machine.state is GuestState.RUNNING:
                self._clock_of_writes += 1
                for target, path in machine.live.items():
                    word = f"{machine.name}/{target}/{self._clock_of_writes}"
                    if self._write(path, word=word, who=machine.name):
                        machine.promised.add(word)
                        machine.note_write(target, block=0)
        self._check_fences()

    def _write(self, path: str, *, word: str, who: str) -> bool:
        file = self.files.get(path)
        if file is None:
            self.violations.append(f"{who} writes to {path}, which is gone")
            return False
        file.writes.add(word)
        return True

    def _check_fences(self) -> None:
        for machine in self.made():
            if machine.fence is None or machine.state is not GuestState.RUNNING:
                continue
            fence = self.network.fences.get(machine.fence)
            if fence is None or not fence.intact:
                self.violations.append(f"{machine.name} runs without its fence: it could reach production")

    # Image files

    def content(self, path: str) -> frozenset[str]:
        """Return all writes that somebody who reads an image sees. An image that is not the host's reads as empty."""
        seen: set[str] = set()
        file = self.files.get(path)
        while file is not None:
            seen |= file.writes
            file = self.files.get(file.backing) if file.backing is not None else None
        return frozenset(seen)

    def check_frozen(self, file: ImageFile, *, what: str) -> None:
        """Record a violation where the base of a clone's overlay changed since the capture.

        A clone that is only waiting to be removed may run on a base that changed; nothing of it may be used any more.
        """
        if file.frozen is not None and file.backing is not None and self.content(file.backing) != file.frozen:
            violation = f"{what} although {file.backing} was written under {file.path}"
            if violation not in self.violations:
                self.violations.append(violation)

    def delete(self, path: str) -> None:
        """Remove an image. Content where it is gone; a violation where a guest of production needs it."""
        for machine in self.sources():
            for used in (*machine.live.values(), *machine.persistent.values()):
                if path in self.chain(used):
                    self.violations.append(f"{path} was removed although {machine.name} is on it: data loss")
        self.files.pop(path, None)

    def chain(self, path: str | None) -> Iterator[str]:
        """Yield an image and all that it is over."""
        while path is not None:
            yield path
            file = self.files.get(path)
            path = None if file is None else file.backing

    # The end of VMs

    def forget(self, machine: Machine, *, in_order: bool) -> None:
        """End a VM at once and forget it, its taps with it."""
        if machine.run is not None:
            self.ended[machine.run] = Ended(guest=machine.guest, in_order=in_order)
        machine.guest.answers = False
        self.unplug(machine)
        self.machines.pop(machine.name, None)

    def plug(self, machine: Machine) -> None:
        """Put a VM's taps into the bridges of its fence."""
        fence = self.network.fences.get(machine.fence) if machine.fence is not None else None
        if machine.fence is not None and fence is None:
            self.violations.append(f"{machine.name} was made before its fence")
        if fence is not None:
            fence.members |= {port.tap for port in fence.plan.ports}

    def unplug(self, machine: Machine) -> None:
        """Take a VM's taps out of the bridges."""
        fence = self.network.fences.get(machine.fence) if machine.fence is not None else None
        if fence is not None:
            fence.members -= {port.tap for port in fence.plan.ports}

    def replug(self, name: str, *, mac: str, wait: Callable[[], None]) -> None:
        """Take a NIC out of a clone and put it back, paused; ``wait`` passes the time a guest that keeps it has."""
        machine = self.machine(name)
        if machine.run is None or mac not in machine.macs:
            raise BugError(f"{name!r} is not vmsnap's, or has no interface {mac}")
        if self.keeps_nics:
            wait()
            raise DeadlineError(f"the guest did not let go of the NIC {mac}", remedy="leave out the rung 'hot-plug'")
        self.unplug(machine)
        self.between("the NIC is out")
        machine.state = GuestState.PAUSED
        self.plug(machine)

    def power_cycle(self, name: str) -> None:
        """Power a guest off and start it again."""
        self.machine(name).notes.clear()

    def kill(self, name: str) -> None:
        """End a clone or an environment as the host's OOM killer does. A defined VM stays defined."""
        machine = self.machine(name)
        if machine.transient:
            self.forget(machine, in_order=False)
        else:
            machine.state = GuestState.SHUT_OFF

    # What tests ask

    def harm(self) -> list[str]:
        """Return everything that is wrong with production now: violations, and guests not as they should be."""
        wrong = list(self.violations)
        for machine in self.sources():
            if machine.state is not GuestState.RUNNING:
                wrong.append(f"{machine.name} is {machine.state}")
            if machine.live != machine.persistent:
                wrong.append(f"{machine.name} would start on other disks than it runs on")
            for target, path in machine.live.items():
                file = self.files.get(path)
                if file is None or file.backing is not None:
                    wrong.append(f"{machine.name} is not on its own disk {target} but on {path}")
                    continue
                lost = {word for word in machine.promised if word.split("/")[1] == target} - file.writes
                if lost:
                    wrong.append(f"{machine.name} lost {len(lost)} writes on {target}")
        return wrong
