"""Clones: exported as they run, imported connected to nothing, started on proof, shut down by their own guest."""

from __future__ import annotations

import logging
from datetime import timedelta
from enum import IntEnum

from vmsnap.errors import (
    BugError,
    DeadlineError,
    DriverError,
    GuestNotFoundError,
    NotCleanError,
    PreconditionError,
    SafetyError,
    UnknownOutcomeError,
)
from vmsnap.hypervisors.hyperv.failures import RemoteError
from vmsnap.hypervisors.hyperv.fence import find_switch
from vmsnap.hypervisors.hyperv.host import Host, Import
from vmsnap.hypervisors.hyperv.inspect import image_format
from vmsnap.hypervisors.hyperv.pauses import PauseWatch
from vmsnap.hypervisors.hyperv.rows import Description, Machine
from vmsnap.hypervisors.hyperv.tags import Part, Tag, TagKind
from vmsnap.model.capture import Capture, CapturePlan, Clone, DiskImage
from vmsnap.model.ids import RunId
from vmsnap.model.isolation import FencePlan, IsolationProof
from vmsnap.ports.clock import Cancel, Clock

_LOG = logging.getLogger(__name__)
_START = timedelta(minutes=5)
_BETWEEN = timedelta(seconds=1)
# A guest may be on its way back when its export has ended.
_SETTLE = timedelta(seconds=30)
_CONFIGURATIONS = frozenset({".vmcx", ".xml"})
_MEMORY_FILES = frozenset({".vmrs", ".bin", ".vsv"})

# Return values of Msvm_ShutdownComponent.InitiateShutdown, as its documentation names them.
_OBEYS = frozenset({0, 4096, 32782})
# Not ready; or, where it has begun to go down meanwhile, in no state to be asked.
_NOT_NOW = frozenset({32780, 32775})
_LOCKED = 32781
_NOBODY = -1

_ON_ITS_WAY = frozenset({"Running", "Stopping", "ForceShutdown"})


class _Answer(IntEnum):
    """What is known of a request to shut down, the more the higher."""

    NOT_YET = 0
    PERHAPS = 1
    OBEYS = 2


def clone_name(run: RunId) -> str:
    """Return the name of a run's clone."""
    return f"vmsnap-clone-{run}"


def clone_tag(run: RunId, *, guest: str = "") -> Tag:
    """Return the tag of a run's clone."""
    return Tag(kind=TagKind.CLONE, run=run, guest=guest)


def export_part(plan: CapturePlan) -> Part:
    """Return the part of the run's folder that the export goes to."""
    return Part.MEMORY if plan.choice.mode.takes_memory else Part.DISKS


class Clones:
    """All clones of one host."""

    def __init__(self, host: Host, *, clock: Clock) -> None:
        self._host = host
        self._clock = clock

    def find(self, run: RunId) -> Machine | None:
        """Return the clone of a run as it is listed now, or None."""
        found = [machine for machine in self._host.machines_of(run) if machine.tag is not None]
        if len(found) > 1:
            raise DriverError(
                f"{len(found)} VMs bear the tag of run {run}",
                details=", ".join(f"{machine.name} {machine.id}" for machine in found),
                remedy="somebody copied a clone with its notes: remove the copy, then 'vmsnap reconcile'",
            )
        return found[0] if found else None

    def get(self, run: RunId) -> Machine:
        """Return the clone of a run as it is listed now. Raises GuestNotFoundError."""
        machine = self.find(run)
        if machine is None:
            raise GuestNotFoundError(f"the clone of run {run} is gone from the Hyper-V host")
        return machine

    # Capturing

    def capture(self, plan: CapturePlan, *, cancel: Cancel) -> Capture:
        """Export the guest as it runs. See ports.hypervisor.

        Raises DeadlineError where the export took longer than the policy allows, CancelledError: it may go on by itself
        then, and is thrown away when it is over.
        """
        host, guest = self._host, plan.guest
        part = export_part(plan)
        host.make_folder(plan.run, part)
        cancel.check()
        with PauseWatch(lambda: host.sample(guest.uuid)) as watch:
            try:
                host.export(
                    guest.uuid,
                    folder=host.folders.of(plan.run, part),
                    with_memory=plan.choice.mode.takes_memory,
                    timeout=plan.settings.timeout,
                    cancel=cancel,
                )
            except UnknownOutcomeError as error:
                # Nothing tells a whole export from one that is still written, so this one is not used.
                raise DriverError(
                    f"whether the export of {guest.name!r} was finished is not known; it is given up",
                    details=error.brief,
                    remedy="run the backup again; the guest goes on, whatever became of the export",
                ) from error
        self._require_running(plan)
        files = host.export_files(host.folders.of(plan.run, part))
        pause = watch.pause
        return Capture(
            mode=plan.choice.mode,
            reason=plan.choice.reason,
            captured=watch.started,
            resumed=watch.ended,
            pause_ms=pause.ms,
            pause_at_most=pause.at_most,
            ram_bytes=sum(size for _, extension, size in files if extension in _MEMORY_FILES),
            seconds=watch.seconds,
            parts=pause.parts,
            on_overlay_seconds=0.0,
        )

    def _require_running(self, plan: CapturePlan) -> None:
        until = self._clock.monotonic() + _SETTLE.total_seconds()
        state, _ = self._host.sample(plan.guest.uuid)
        while state != "Running" and self._clock.monotonic() < until:
            self._clock.sleep(_BETWEEN)
            state, _ = self._host.sample(plan.guest.uuid)
        if state != "Running":
            # It is not for vmsnap to start a VM that somebody may have stopped meanwhile.
            raise SafetyError(
                f"the guest {plan.guest.name!r} is {state} after its export",
                remedy="look at it at once: was it stopped by somebody, or by Hyper-V? Nothing was stored",
            )

    # Making the clone

    def restore(self, plan: CapturePlan, *, fence: FencePlan) -> Clone:
        """Import the clone, connected to nothing, look at it, and put it on the fence's switch. See ports.hypervisor."""
        machine_id = self._import(plan)
        description = self._host.describe(machine_id)
        self._require_private(plan, fence=fence, description=description, switch_id="")
        if fence.ports:
            switch = find_switch(self._host, run=plan.run)
            self._host.connect(
                machine_id,
                tag=clone_tag(plan.run),
                switch=switch,
                switch_tag=Tag(kind=TagKind.FENCE, run=plan.run),
                macs=[adapter.mac for adapter in description.adapters],
            )
            description = self._host.describe(machine_id)
            self._require_private(plan, fence=fence, description=description, switch_id=switch.id)
        return Clone(run=plan.run, guest=plan.guest.name, name=description.machine.name, uuid=machine_id)

    def _import(self, plan: CapturePlan) -> str:
        host, folders = self._host, self._host.folders
        exported = folders.of(plan.run, export_part(plan))
        configurations = [
            path
            for path, extension, _ in host.export_files(exported)
            if extension in _CONFIGURATIONS and "\\Virtual Machines\\" in path
        ]
        if len(configurations) != 1:
            raise DriverError(
                f"the export has {len(configurations)} configurations instead of one",
                details="\n".join(configurations),
                remedy="a guest with checkpoints is exported with them: remove them first",
            )
        wanted = Import(
            configuration=configurations[0],
            folder=folders.of(plan.run, Part.CLONE),
            disks=f"{folders.of(plan.run, Part.CLONE)}\\Virtual Hard Disks",
            name=clone_name(plan.run),
            tag=clone_tag(plan.run, guest=plan.guest.name),
        )
        try:
            made = host.import_clone(wanted, timeout=plan.settings.timeout)
        except UnknownOutcomeError:
            # Hyper-V may still be at it, but what bears the tag is a clone that was taken apart before it was made.
            machine = self._settled(plan.run)
            if machine is None:
                raise
            _LOG.info("the clone of run %s was made although no answer came", plan.run)
            return machine.id
        if made.id is None:
            raise PreconditionError(
                "Hyper-V finds the clone incompatible with its host",
                details="\n".join(made.incompatibilities),
                remedy="'Compare-VM' on the Hyper-V host says more; the guest itself was not touched",
            )
        return made.id

    def _settled(self, run: RunId) -> Machine | None:
        """Return the clone once it neither appears nor changes any more, or None."""
        until = self._clock.monotonic() + _START.total_seconds()
        while self._clock.monotonic() < until:
            # Looked for first: what is planned may become real between the two looks.
            is_planned = any(self._is_planned_by(run, folder) for folder in self._planned_folders())
            machine = self.find(run)
            if machine is not None and machine.state in ("Saved", "Off"):
                return machine
            if machine is None and not is_planned:
                return None
            self._clock.sleep(_BETWEEN)
        return None

    def _planned_folders(self) -> tuple[str, ...]:
        return tuple(planned.folder for planned in self._host.planned())

    def _is_planned_by(self, run: RunId, folder: str) -> bool:
        return self._host.folders.run_of(folder) == run

    def _require_private(
        self, plan: CapturePlan, *, fence: FencePlan, description: Description, switch_id: str
    ) -> None:
        """Raise SafetyError where the clone is the source, could write one of its disks, or is on another switch."""
        machine, guest = description.machine, plan.guest
        wrong = []
        if machine.id.lower() == guest.uuid.lower():
            raise BugError(f"the clone of {guest.name!r} has the id of {guest.name!r} itself")
        if machine.tag is None or machine.tag.run != plan.run:
            wrong.append("its notes do not bear the run's tag")
        if machine.state not in ("Saved", "Off"):
            wrong.append(f"it is {machine.state}, and has not been started")
        outside = [drive.path for drive in description.drives if not self._is_own(plan.run, drive.path)]
        if outside:
            wrong.append(f"it would write {', '.join(outside)}")
        if [drive.target for drive in description.drives] != [disk.target for disk in guest.disks]:
            wrong.append(f"its disks are {[drive.target for drive in description.drives]}")
        if len(description.adapters) != len(fence.ports):
            wrong.append(f"it has {len(description.adapters)} network adapters, the fence {len(fence.ports)} ports")
        wrong += [
            f"its adapter {adapter.mac} is on switch {adapter.switch or 'none'}"
            for adapter in description.adapters
            if (adapter.switch_id.lower() if switch_id else adapter.switch) != switch_id.lower()
        ]
        if wrong:
            raise SafetyError(
                f"the clone of {guest.name!r} is not what it must be: {wrong[0]}",
                details="\n".join(wrong),
                remedy="it was not started and is thrown away; report it with 'vmsnap doctor'",
            )

    def _is_own(self, run: RunId, path: str) -> bool:
        return self._host.folders.holds(path, run=run)

    # The clone's life

    def resume(self, clone: Clone, *, proof: IsolationProof) -> None:
        """Let the clone run. Raises BugError for a proof of another run."""
        if proof.run != clone.run:
            raise BugError(f"the proof is of run {proof.run}, the clone of run {clone.run}")
        machine = self.get(clone.run)
        try:
            self._start(machine, run=clone.run)
        except RemoteError as error:
            fixed = [item.mac for item in self._host.describe(machine.id).adapters if item.switch and not item.dynamic]
            if not fixed:
                raise
            # Hyper-V may not let two VMs with one fixed MAC run, though they are on different switches. The memory in the
            # clone wants the MAC; nobody wants the switch.
            _LOG.warning(
                "the clone of run %s did not start; once more, its adapters unplugged: %s", clone.run, error.details
            )
            self._host.disconnect(machine.id, tag=clone_tag(clone.run), macs=fixed)
            self._start(machine, run=clone.run)

    def _start(self, machine: Machine, *, run: RunId) -> None:
        try:
            self._host.start(machine.id, tag=clone_tag(run), timeout=_START)
        except UnknownOutcomeError:
            self._wait_until_started(run)

    def _wait_until_started(self, run: RunId) -> None:
        until = self._clock.monotonic() + _START.total_seconds()
        while self._clock.monotonic() < until:
            state = self.get(run).state
            if state == "Running":
                return
            if state in ("Saved", "Off"):
                break
            self._clock.sleep(_BETWEEN)
        raise DriverError("the clone was told to start, and did not", remedy="see the Hyper-V host's event log")

    def shut_down(self, clone: Clone, *, deadline: timedelta, cancel: Cancel) -> str:
        """Ask the guest to power off, by the integration service for that, and wait. See ports.hypervisor."""
        machine = self.find(clone.run)
        if machine is None or machine.state not in _ON_ITS_WAY:
            ended = "is gone" if machine is None else f"is {machine.state}"
            raise NotCleanError(
                f"the clone {ended} before it was asked to shut down", remedy="see the Hyper-V host's event log"
            )
        until = self._clock.monotonic() + deadline.total_seconds()
        answer = _Answer.NOT_YET
        found: Machine | None = machine
        while found is not None and found.state in _ON_ITS_WAY:
            cancel.check()
            if answer is not _Answer.OBEYS and found.state == "Running":
                # Asking twice is no harm, where nobody knows whether the first time was heard.
                answer = max(answer, self._ask(machine))
            if self._clock.monotonic() > until:
                raise DeadlineError(
                    f"the clone did not power off within {deadline}",
                    remedy="raise clone.shutdown_deadline; the System event log of a test VM shows what hung",
                )
            self._clock.sleep(_BETWEEN)
            found = self.find(clone.run)
        if found is None or found.state != "Off" or answer is _Answer.NOT_YET:
            ended = "is gone" if found is None else f"is {found.state}"
            raise NotCleanError(
                f"the clone did not shut down: it {ended}", remedy="see the Hyper-V host's event log for the clone"
            )
        return "shutdown integration service"

    def _ask(self, machine: Machine) -> _Answer:
        """Ask once. Raises DriverError where nobody there can be asked."""
        try:
            answer = self._host.request_shutdown(machine.id, tag=clone_tag(self._run_of(machine)))
        except UnknownOutcomeError:
            return _Answer.PERHAPS
        if answer in _OBEYS:
            return _Answer.OBEYS
        if answer in _NOT_NOW:
            return _Answer.NOT_YET
        reasons = {
            _LOCKED: "somebody is logged in at its console, and it is locked",
            _NOBODY: "it has no shutdown integration service",
        }
        raise DriverError(
            f"the clone cannot be asked to shut down: {reasons.get(answer, f'Hyper-V says {answer}')}",
            remedy="is the integration service 'Shutdown' of the guest enabled and running? It is never turned off instead",
        )

    def _run_of(self, machine: Machine) -> RunId:
        run = self._host.run_of(machine)
        if run is None:
            raise BugError(f"{machine.name!r} is not vmsnap's and is left alone")
        return run

    def images(self, plan: CapturePlan) -> tuple[DiskImage, ...]:
        """Return the clone's disks as they are seen here. See ports.hypervisor."""
        machine = self.get(plan.run)
        if machine.state != "Off":
            raise BugError(f"the disks of a clone that is {machine.state} are not to be read")
        drives = {drive.target: drive for drive in self._host.describe(machine.id).drives}
        checked = {disk.path: disk for disk in self._host.check_disks([drive.path for drive in drives.values()])}
        images = []
        for disk in plan.guest.disks:
            drive = drives[disk.target]
            found = checked[drive.path]
            if not found.sound or found.parent or not self._is_own(plan.run, drive.path):
                reason = "damaged, says Test-VHD" if not found.sound else f"on {found.parent or 'a disk of others'}"
                raise NotCleanError(f"disk {disk.target} of the clone is {reason}", remedy="back up again")
            images.append(
                DiskImage(
                    target=disk.target,
                    path=str(self._host.folders.here(drive.path)),
                    image_format=image_format(found.vhd_format),
                    size_bytes=found.size_bytes,
                )
            )
        return tuple(images)
