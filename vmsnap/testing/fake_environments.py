"""The part of the fake hypervisor that makes environments."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from vmsnap.errors import BugError, EnvironmentNotFoundError, PreconditionError
from vmsnap.model.capture import DiskImage
from vmsnap.model.environment import EnvironmentPlan
from vmsnap.model.guest import GuestState, Nic
from vmsnap.model.ids import RunId
from vmsnap.model.isolation import FencePlan, IsolationProof
from vmsnap.model.journal import Resource, ResourceKind
from vmsnap.model.manifest import MachineRecord
from vmsnap.testing.fake_guest import FakeGuest
from vmsnap.testing.fake_host import FakeHost, ImageFile, Machine


class FakeEnvironments:
    """What ``ports.hypervisor.Hypervisor`` says of environments, over a ``FakeHost``."""

    def __init__(self, host: FakeHost) -> None:
        self._host = host

    def environment_disks_resource(self, plan: EnvironmentPlan) -> Resource:
        """Name an environment's overlays."""
        return environment_disks(plan.run, guest=plan.guest)

    def prepare_environment_disks(
        self, plan: EnvironmentPlan, *, images: tuple[DiskImage, ...], nvram: str | None
    ) -> None:
        """Make an environment's overlays."""
        del nvram
        for image in images:
            path = f"/environments/{plan.run}/{image.target}.qcow2"
            self._host.files[path] = ImageFile(path=path, backing=image.path)
            self._host.between(f"environment overlay of {image.target} made")

    def environment_resource(self, plan: EnvironmentPlan) -> Resource:
        """Name an environment."""
        return Resource(kind=ResourceKind.ENVIRONMENT, run=plan.run, guest=plan.guest, name=plan.name)

    def define_environment(self, plan: EnvironmentPlan, *, machine: MachineRecord, fence: FencePlan | None) -> None:
        """Define an environment."""
        if plan.name in self._host.machines:
            raise PreconditionError(f"there is already a VM named {plan.name!r}", remedy="choose another name")
        if plan.network is not None and plan.network not in self._host.networks:
            raise PreconditionError(f"there is no network {plan.network!r}")
        if machine.hypervisor != "fake":
            raise PreconditionError(f"the snapshot is of {machine.hypervisor}")
        prefix = f"/environments/{plan.run}/"
        live = {path.removeprefix(prefix)[:3]: path for path in self._host.files if path.startswith(prefix)}
        guest = FakeGuest()
        guest.answers = self._host.environments_answer
        self._host.machines[plan.name] = Machine(
            name=plan.name,
            uuid=plan.uuid,
            guest=guest,
            live=live,
            persistent=dict(live),
            macs=plan.macs,
            addresses=self._host.environment_addresses,
            state=GuestState.SHUT_OFF,
            run=plan.run,
            of_guest=plan.guest,
            fence=None if fence is None else fence.run,
        )

    def attach_environment(self, plan: EnvironmentPlan, *, machine: MachineRecord, fence: FencePlan | None) -> None:
        """Create an environment's process, paused."""
        del machine
        environment = self._host.machine(plan.name)
        environment.state = GuestState.PAUSED
        self._host.between("the environment's process is there")
        if fence is not None:
            self._host.plug(environment)

    def start_environment(self, plan: EnvironmentPlan, *, proof: IsolationProof | None) -> None:
        """Let an environment boot."""
        if plan.network is None and (proof is None or proof.run != plan.run):
            raise BugError(f"the environment {plan.name!r} has a fence that was not proven")
        environment = self._host.machine(plan.name)
        if environment.state is not GuestState.PAUSED:
            raise BugError(f"the environment {plan.name!r} was not attached")
        environment.state = GuestState.RUNNING
        self._host.live_on()

    def environment_state(self, name: str) -> GuestState:
        """Return an environment's state."""
        machine = self._host.machines.get(name)
        if machine is None:
            raise EnvironmentNotFoundError(f"the VM of environment {name!r} is gone")
        return machine.state

    def environment_nics(self, name: str) -> tuple[Nic, ...]:
        """Return an environment's NICs; all of its addresses are on the first."""
        self.environment_state(name)
        machine = self._host.machine(name)
        return tuple(
            Nic(
                index=index,
                mac=mac,
                attached_to="fence" if machine.fence else "network",
                addresses=machine.addresses if index == 0 else (),
            )
            for index, mac in enumerate(machine.macs)
        )

    def image_reader(self) -> tuple[int, int] | None:
        """Return nobody: whoever runs the tests reads the images."""
        return None

    def keep_environment_reconnecting(self, name: str) -> None:
        """Look whether it is there: a fake guest waits for its export as long as it takes."""
        self.environment_state(name)

    def localise_environment(
        self, name: str, *, run: RunId, images: tuple[DiskImage, ...], deadline: timedelta
    ) -> None:
        """Put an environment's overlays over the local images."""
        del deadline
        self.environment_state(name)
        for image in images:
            path = f"/environments/{run}/{image.target}.qcow2"
            self._host.files[path] = replace(self._host.files[path], backing=image.path)
            self._host.between(f"disk {image.target} is local")

    def environment_written_bytes(self, run: RunId) -> int:
        """Return what an environment wrote: 64 KiB a write."""
        prefix = f"/environments/{run}/"
        return sum(65536 * len(file.writes) for path, file in self._host.files.items() if path.startswith(prefix))


def environment_disks(run: RunId, *, guest: str) -> Resource:
    """Return the resource of an environment's overlays."""
    return Resource(kind=ResourceKind.ENVIRONMENT_DISKS, run=run, guest=guest, name=f"/environments/{run}")
