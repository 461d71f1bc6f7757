"""Environments: VMs on differencing disks over stored images, which are put where Hyper-V reads them as VHDX."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path, PureWindowsPath

from vmsnap.errors import (
    BugError,
    DriverError,
    EnvironmentNotFoundError,
    PreconditionError,
    SafetyError,
    UnknownOutcomeError,
)
from vmsnap.hypervisors.hyperv.bases import Bases
from vmsnap.hypervisors.hyperv.failures import RemoteError
from vmsnap.hypervisors.hyperv.fence import fence_tag, find_switch
from vmsnap.hypervisors.hyperv.host import Host, NewDisk, NewMachine
from vmsnap.hypervisors.hyperv.inspect import MachineDefinition, definition_of
from vmsnap.hypervisors.hyperv.rows import Description, Machine, Switch
from vmsnap.hypervisors.hyperv.tags import Part, Tag, TagKind
from vmsnap.model.capture import DiskImage
from vmsnap.model.environment import EnvironmentPlan
from vmsnap.model.ids import RunId
from vmsnap.model.isolation import FencePlan, IsolationProof
from vmsnap.model.manifest import MachineRecord
from vmsnap.ports.clock import Clock

_START = timedelta(minutes=5)
_MIB = 1 << 20


def environment_tag(run: RunId, *, guest: str = "") -> Tag:
    """Return the tag of a run's environment."""
    return Tag(kind=TagKind.ENVIRONMENT, run=run, guest=guest)


class Environments:
    """All environments of one host."""

    def __init__(self, host: Host, *, clock: Clock) -> None:
        self._host = host
        self._bases = Bases(host.folders, clock=clock)

    # Disks

    def prepare_disks(self, plan: EnvironmentPlan, *, images: tuple[DiskImage, ...]) -> None:
        """Put each stored image where Hyper-V can read it, as VHDX, and make a differencing disk over it.

        The first test VM of a snapshot waits for the copy: Hyper-V reads no image of a file system that is not its own.
        """
        host = self._host
        host.make_folder(plan.run, Part.ENVIRONMENT)
        folder = PureWindowsPath(host.folders.of(plan.run, Part.ENVIRONMENT))
        _require_seen(host, folder)
        self._bases.collect()
        for image in images:
            base = self._bases.use(image, run=plan.run)
            try:
                host.make_child_disk(str(folder / f"{image.target}.vhdx"), parent=base)
            except UnknownOutcomeError as error:
                raise DriverError(
                    f"whether disk {image.target} of the environment was made is not known",
                    details=error.brief,
                    remedy="what there is of it is removed; try again",
                ) from error

    def written_bytes(self, run: RunId) -> int:
        """Return what an environment's disks occupy beside what they stand on."""
        folder = Path(self._host.folders.here(self._host.folders.of(run, Part.ENVIRONMENT)))
        if not folder.is_dir():
            return 0
        return sum(path.stat().st_blocks * 512 for path in folder.glob("*.vhdx"))

    def collect_bases(self) -> None:
        """Remove copies of stored images that no test VM stands on any more."""
        self._bases.collect()

    # The VM

    def define(self, plan: EnvironmentPlan, *, machine: MachineRecord, fence: FencePlan | None) -> None:
        """Make the VM, off, on its disks and on the fence's switch, or on the named one. See ports.hypervisor."""
        definition = definition_of(machine)
        host = self._host
        if any(found.name == plan.name for found in host.machines()):
            raise _taken(plan.name)
        switch = self._switch(plan)
        wanted = NewMachine(
            name=plan.name,
            tag=environment_tag(plan.run, guest=plan.guest),
            folder=host.folders.of(plan.run, Part.ENVIRONMENT),
            generation=definition.generation,
            # Hyper-V takes memory in steps of 2 MiB.
            memory_bytes=(plan.memory_bytes or machine.memory_bytes) // (2 * _MIB) * (2 * _MIB),
            processors=plan.vcpus or machine.vcpus,
            secure_boot=definition.secure_boot,
            secure_boot_template=definition.secure_boot_template,
        )
        machine_id = self._make(wanted, run=plan.run)
        self._furnish(machine_id, plan=plan, definition=definition)
        switch_tag = None if fence is None else fence_tag(plan.run)
        if switch is not None and plan.macs:
            host.connect(
                machine_id, tag=environment_tag(plan.run), switch=switch, switch_tag=switch_tag, macs=plan.macs
            )

    def _switch(self, plan: EnvironmentPlan) -> Switch | None:
        if plan.network is None:
            return find_switch(self._host, run=plan.run)
        named = [switch for switch in self._host.switches() if switch.name == plan.network]
        if len(named) != 1:
            raise PreconditionError(
                f"the Hyper-V host has {len(named)} switches named {plan.network!r}",
                remedy="see Get-VMSwitch there, or leave --network out to get a switch of its own",
            )
        return named[0]

    def _make(self, wanted: NewMachine, *, run: RunId) -> str:
        try:
            return self._host.make_machine(wanted)
        except UnknownOutcomeError as error:
            raise DriverError(
                f"whether the VM {wanted.name!r} was made as it should be is not known",
                details=error.brief,
                remedy=f"what there is of run {run} is removed; try again",
            ) from error
        except RemoteError as error:
            if error.record.error_id == "VmsnapMachineExists":
                raise _taken(wanted.name) from error
            raise

    def _furnish(self, machine_id: str, *, plan: EnvironmentPlan, definition: MachineDefinition) -> None:
        host, tag = self._host, environment_tag(plan.run)
        folder = PureWindowsPath(host.folders.of(plan.run, Part.ENVIRONMENT))
        for index, place in enumerate(definition.disks):
            disk = NewDisk(
                controller=place.controller,
                number=place.number,
                location=place.location,
                path=str(folder / f"{place.target}.vhdx"),
                boots=index == 0,
            )
            host.add_disk(machine_id, tag=tag, disk=disk)
        for index, mac in enumerate(plan.macs):
            host.add_adapter(machine_id, tag=tag, name=f"vmsnap {index}", mac=mac)

    def attach(self, plan: EnvironmentPlan, *, fence: FencePlan | None) -> None:
        """Look what the VM could touch. It is off, and stays so: Hyper-V proves a fence without a process."""
        machine = self.find(plan.name)
        description = self._host.describe(machine.id)
        switch_id = None if fence is None else find_switch(self._host, run=plan.run).id
        wrong = list(self._wrong(plan, description=description, switch_id=switch_id))
        if wrong:
            raise SafetyError(
                f"the environment {plan.name!r} is not what it must be: {wrong[0]}",
                details="\n".join(wrong),
                remedy="it was not started and is removed",
            )

    def _wrong(self, plan: EnvironmentPlan, *, description: Description, switch_id: str | None) -> list[str]:
        wrong = []
        if description.machine.state != "Off":
            wrong.append(f"it is {description.machine.state}")
        wrong += [
            f"it would write {drive.path}"
            for drive in description.drives
            if not self._host.folders.holds(drive.path, run=plan.run)
        ]
        if [adapter.mac for adapter in description.adapters] != [mac.lower() for mac in plan.macs]:
            wrong.append(f"its adapters are {[adapter.mac for adapter in description.adapters]}")
        if switch_id is not None:
            wrong += [
                f"its adapter {adapter.mac} is on switch {adapter.switch or 'none'}"
                for adapter in description.adapters
                if adapter.switch_id.lower() != switch_id.lower()
            ]
        return wrong

    def start(self, plan: EnvironmentPlan, *, proof: IsolationProof | None) -> None:
        """Let it boot. Raises BugError where it has a fence and no proof of it."""
        if plan.network is None and (proof is None or proof.run != plan.run):
            raise BugError(f"the environment {plan.name!r} has a fence that was not proven")
        machine = self.find(plan.name)
        try:
            self._host.start(machine.id, tag=environment_tag(plan.run), timeout=_START)
        except UnknownOutcomeError:
            if self.find(plan.name).state not in ("Running", "Starting"):
                raise

    def find(self, name: str) -> Machine:
        """Return the environment of that name. Raises EnvironmentNotFoundError."""
        for machine in self._host.machines():
            if machine.name == name and machine.tag is not None and machine.tag.kind is TagKind.ENVIRONMENT:
                return machine
        raise EnvironmentNotFoundError(f"the VM of environment {name!r} is gone", remedy=f"vmsnap env destroy {name}")


def _taken(name: str) -> PreconditionError:
    return PreconditionError(
        f"there is already a VM named {name!r} on the Hyper-V host", remedy="choose another with --name"
    )


def _require_seen(host: Host, folder: PureWindowsPath) -> None:
    """Raise PreconditionError where a folder of the host is not found here."""
    here = host.folders.here(str(folder))
    if not Path(here).is_dir():
        raise PreconditionError(
            f"{folder} of the Hyper-V host is not found at {here}",
            remedy="mount the share of hyperv.export_folder at hyperv.export_mounted, writable for test VMs",
        )
