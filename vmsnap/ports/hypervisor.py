"""What a backup needs from a hypervisor."""

from __future__ import annotations

from datetime import timedelta
from typing import Protocol

from vmsnap.model.admission import HostMemory
from vmsnap.model.capture import Capture, CapturePlan, CaptureSettings, Clone, DiskImage, ModeChoice
from vmsnap.model.environment import EnvironmentPlan
from vmsnap.model.guest import Finding, Guest, GuestState, Nic
from vmsnap.model.ids import RunId
from vmsnap.model.isolation import FencePlan, FencePort, IsolationProof
from vmsnap.model.journal import Resource
from vmsnap.model.manifest import MachineRecord
from vmsnap.ports.clock import Cancel
from vmsnap.ports.guest import AgentChannel
from vmsnap.ports.owner import Owner


class Hypervisor(Owner, Protocol):
    """One hypervisor. Methods that change something come with a resource, journalled by the caller before the call.

    Errors: GuestNotFoundError, PreconditionError, SafetyError, DeadlineError, DriverError.
    """

    def guests(self) -> tuple[str, ...]:
        """Return the names of all guests, clones and environments of vmsnap not among them."""

    def host_findings(self) -> tuple[Finding, ...]:
        """Look whether the host answers, and whether it can be used. Changes nothing.

        Raises what reaching it raises: PreconditionError, HostUnreachableError, DriverError.
        """

    def inspect(self, guest: str) -> Guest:
        """Describe a guest. Raises GuestNotFoundError."""

    def machine(self, guest: Guest) -> MachineRecord:
        """Return what is needed to make a VM from this guest's disks later. ``nvram`` is a path on the host here."""

    def choose_mode(self, guest: Guest, *, settings: CaptureSettings) -> ModeChoice:
        """Return the mode to capture this guest in: the one of the settings, or for ``auto`` the one that suits it now."""

    def findings(self, guest: Guest, *, settings: CaptureSettings) -> tuple[Finding, ...]:
        """Look whether this guest can be captured now, in the mode of ``choose_mode``. Changes nothing.

        A refusal forbids the capture.
        """

    def settle(self, guest: Guest, *, settings: CaptureSettings) -> CaptureSettings:
        """Return the settings with nothing left to choose: what ``auto`` comes to for this guest on this host now."""

    def clone_memory_bytes(self, guest: Guest, *, settings: CaptureSettings) -> int:
        """Return the most memory that a guest's memory image, if one is made, and clone take of the host together."""

    def host_memory(self) -> HostMemory:
        """Return what memory the host has left, and what each run's image and clone have taken so far."""

    def memory_resource(self, plan: CapturePlan) -> Resource:
        """Name the place of the memory image."""

    def prepare_memory(self, plan: CapturePlan) -> None:
        """Make the place of the memory image. Raises NoSpaceError."""

    def overlays_resource(self, plan: CapturePlan) -> Resource:
        """Name the source's overlays. Releasing it puts the source back on its own disks (commit and pivot).

        It must be released after the clone, which reads the disks that the commit writes; where the clone reads copies
        (``plan.settings.detach``), at any time after the capture.
        """

    def prepare_overlays(self, plan: CapturePlan) -> None:
        """Make the overlays that the source will write to, without using them yet. Raises NoSpaceError."""

    def clone_overlays_resource(self, plan: CapturePlan) -> Resource:
        """Name the overlays that the clone will write to."""

    def prepare_clone_overlays(self, plan: CapturePlan) -> None:
        """Make the overlays that the clone will write to, over the disks as they are at the capture.

        Where ``plan.settings.detach`` is ``reflink`` they are over the copies, which the capture fills.
        """

    def copies_resource(self, plan: CapturePlan) -> Resource:
        """Name the copies of the source's disks that the clone reads where ``plan.settings.detach`` is ``reflink``."""

    def prepare_copies(self, plan: CapturePlan) -> None:
        """Make the copies, empty: the capture fills them.

        Raises NoSpaceError, and PreconditionError where a disk cannot be copied by reflink.
        """

    def capture(self, plan: CapturePlan, *, fence: FencePlan, cancel: Cancel) -> Capture:
        """Take RAM, device state and all disks at one instant. The source runs on when this returns or raises.

        The clone may be made meanwhile, paused, in the fence, which was built before; its resource is journalled before
        this call in every mode. The capture is over, the source free of it but for its overlays, when this returns.

        Raises NotConvergingError (nothing taken), DeadlineError, CancelledError, SafetyError where the source was not
        running afterwards and had to be resumed. After CancelledError everything may have been taken; releasing the
        overlays brings the guest home either way.
        """

    def clone_resource(self, plan: CapturePlan) -> Resource:
        """Name the clone."""

    def restore_clone(self, plan: CapturePlan, *, fence: FencePlan) -> Clone:
        """Make the clone of what was captured, paused, on the fence's bridges and its own overlays. It has executed nothing.

        Raises SafetyError where the restored clone could write a production disk or reach a production port.
        """

    def resume_clone(self, clone: Clone, *, proof: IsolationProof) -> None:
        """Let the clone run. Raises BugError for a proof of another run."""

    def clone_state(self, clone: Clone) -> GuestState:
        """Return the clone's state. Raises GuestNotFoundError where it is gone."""

    def agent(self, domain: str) -> AgentChannel:
        """Return the line to the agent of a guest, a clone or an environment by its name on the hypervisor."""

    def set_link(self, domain: str, *, mac: str, up: bool) -> None:
        """Pull or plug the cable of a clone's NIC. Refuses any domain that is not a clone or environment."""

    def replug_nic(self, clone: Clone, *, port: FencePort, deadline: timedelta) -> None:
        """Take a NIC out of a running clone and put it back: same MAC and slot, on the port's bridge and tap.

        The clone is paused when this returns: ``resume_clone`` wants a new proof of its fence. Raises DeadlineError
        where the guest does not let the NIC go in time (it runs on as before), SafetyError where the NIC could not be
        put back as it was (the clone is then of no use), BugError for a clone that has no such NIC.
        """

    def shut_down_clone(self, clone: Clone, *, agent_answers: bool, deadline: timedelta, cancel: Cancel) -> str:
        """Ask the clone's guest to power off and wait until it did. Returns who did it, for the evidence.

        Raises NotCleanError where the clone ended in any other way, DeadlineError where it is still there,
        CancelledError, NoSpaceError (the guard).
        """

    def clone_images(self, plan: CapturePlan) -> tuple[DiskImage, ...]:
        """Return the images of the clone's disks, in the order of the guest's disks. The clone must be off.

        Raises NotCleanError where it can be seen that one of them is not whole.
        """

    def clone_nvram(self, plan: CapturePlan) -> str | None:
        """Return the path of the clone's firmware variables, or None where the guest has none."""

    def overlay_free_bytes(self, plan: CapturePlan) -> int:
        """Return the room left on the fullest file system that a run's overlays grow on."""

    def source_is_home(self, guest: Guest) -> bool:
        """Tell whether the guest runs on its own disks: live and persistent definition as ``guest`` says."""

    def work_on(self, guest: str) -> tuple[str, ...]:
        """Return what works on a guest now and would be disturbed by the undoing of a run of it, a sentence each.

        Empty for a guest that is off, or not there. A driver whose host may be used from other machines, which cannot be seen
        from here, says so instead. Changes nothing. Raises DriverError.
        """

    def environment_disks_resource(self, plan: EnvironmentPlan) -> Resource:
        """Name the overlays of an environment."""

    def prepare_environment_disks(
        self, plan: EnvironmentPlan, *, images: tuple[DiskImage, ...], nvram: str | None
    ) -> None:
        """Make an overlay over each stored image; nothing is copied, except ``nvram``, a path of a few hundred KiB.

        An image of format ``nbd`` is served at the socket that is its path; nobody need listen there yet.
        """

    def environment_resource(self, plan: EnvironmentPlan) -> Resource:
        """Name the environment."""

    def define_environment(self, plan: EnvironmentPlan, *, machine: MachineRecord, fence: FencePlan | None) -> None:
        """Define the VM, not started: new name, UUID and MACs, on its overlays, on the fence or the plan's network.

        Raises PreconditionError where the name is taken or the network is not there.
        """

    def start_environment(self, plan: EnvironmentPlan, *, proof: IsolationProof | None) -> None:
        """Let the environment boot. ``proof`` is needed where it has a fence; it is paused until then."""

    def attach_environment(self, plan: EnvironmentPlan, *, machine: MachineRecord, fence: FencePlan | None) -> None:
        """Create the environment's process, paused before its first instruction, so that a fence can be proven.

        Raises SafetyError where, fenced, it could write a disk or reach a port that is not its own.
        """

    def image_reader(self) -> tuple[int, int] | None:
        """Return the user and group that read the images of VMs; None: whoever runs vmsnap."""

    def keep_environment_reconnecting(self, name: str) -> None:
        """See to it that a running environment waits for its export when that is away. May be repeated.

        Does nothing for one that is off, or whose images are local. Raises EnvironmentNotFoundError.
        """

    def localise_environment(
        self, name: str, *, run: RunId, images: tuple[DiskImage, ...], deadline: timedelta
    ) -> None:
        """Put an environment on local images that hold just what its export serves, while it runs or is off.

        May be repeated, after whatever came between. When this returns, nothing of it uses the export.
        """

    def environment_written_bytes(self, run: RunId) -> int:
        """Return what an environment wrote so far, as it occupies the host's disks."""

    def environment_state(self, name: str) -> GuestState:
        """Return the state of an environment. Raises EnvironmentNotFoundError."""

    def environment_nics(self, name: str) -> tuple[Nic, ...]:
        """Return the NICs of a running environment, with the addresses it has now as far as they can be told.

        Raises EnvironmentNotFoundError.
        """
