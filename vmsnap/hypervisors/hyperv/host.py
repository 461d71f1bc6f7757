"""One Hyper-V host: a method for each script, with what it takes and what it answers.

Nothing is decided here. Scripts that change something look for the run's tag on the host themselves before they do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from vmsnap.hypervisors.hyperv import rows
from vmsnap.hypervisors.hyperv.connection import Login, Parameter, Row
from vmsnap.hypervisors.hyperv.examination import NEEDED, Examination, examination_of
from vmsnap.hypervisors.hyperv.guestline import DirectLine
from vmsnap.hypervisors.hyperv.rows import (
    CheckedDisk,
    Description,
    Machine,
    Plug,
    Room,
    Switch,
    checked_of,
    description_of,
    machine_of,
    plug_of,
    room_of,
    switch_of,
)
from vmsnap.hypervisors.hyperv.running import CHANGE, ScriptRunner
from vmsnap.hypervisors.hyperv.tags import Mark, Part, RunFolders, Tag, run_of_folder
from vmsnap.model.ids import RunId
from vmsnap.ports.clock import Cancel

LOOK = timedelta(seconds=60)
_REASON = "vmsnap: the database of this clone has stopped, and its disks are kept"


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A VM that an import planned and never made."""

    id: str
    name: str
    folder: str


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """The folder of a run, and the parts that are in it."""

    run: RunId
    parts: tuple[Part, ...]


@dataclass(frozen=True, kw_only=True)
class Import:
    """What to make a clone of. ``folder`` and ``disks`` are where to; ``tag`` goes into its notes."""

    configuration: str
    folder: str
    disks: str
    name: str
    tag: Tag


@dataclass(frozen=True, kw_only=True)
class Imported:
    """The outcome: the id of the clone, or why there is none."""

    id: str | None
    incompatibilities: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class NewMachine:
    """An environment to make."""

    name: str
    tag: Tag
    folder: str
    generation: int
    memory_bytes: int
    processors: int
    secure_boot: bool
    secure_boot_template: str


@dataclass(frozen=True, kw_only=True)
class NewDisk:
    """A disk to give to an environment, and where to plug it in. ``boots``: its firmware begins there."""

    controller: str
    number: int
    location: int
    path: str
    boots: bool


class Host:
    """One Hyper-V host by its scripts. Thread-safe as far as the runner is."""

    def __init__(self, runner: ScriptRunner, *, folders: RunFolders) -> None:
        self._runner = runner
        self.folders = folders

    def close(self) -> None:
        """Let go of the host."""
        self._runner.close()

    def _look(self, script: str, *, doing: str, parameters: Mapping[str, Parameter] | None = None) -> tuple[Row, ...]:
        return self._runner.run(script, doing=doing, parameters=parameters, timeout=LOOK)

    def _change(
        self, script: str, *, doing: str, parameters: Mapping[str, Parameter], timeout: timedelta = CHANGE
    ) -> tuple[Row, ...]:
        return self._runner.run(script, doing=doing, parameters=parameters, timeout=timeout)

    def line(self, machine_id: str, *, guest: str, login: Login | None) -> DirectLine:
        """Return a line into a VM by PowerShell Direct. Nothing is asked yet."""
        return DirectLine(self._runner, machine_id=machine_id, guest=guest, login=login)

    # Looking

    def machines(self) -> tuple[Machine, ...]:
        """Return all VMs."""
        return tuple(map(machine_of, self._look("list_machines", doing="list its VMs")))

    def run_of(self, machine: Machine) -> RunId | None:
        """Return the run that made a VM: by its notes or, where it died before writing them, by its folder."""
        return machine.tag.run if machine.tag is not None else self.folders.run_of(machine.folder)

    def machines_of(self, run: RunId) -> tuple[Machine, ...]:
        """Return the VMs that a run made."""
        return tuple(machine for machine in self.machines() if self.run_of(machine) == run)

    def describe(self, machine_id: str) -> Description:
        """Describe a VM. Raises GuestNotFoundError where it is gone."""
        return description_of(self._look("describe_machine", doing="describe a VM", parameters={"Id": machine_id}))

    def sample(self, machine_id: str) -> tuple[str, float]:
        """Return a VM's state, in Hyper-V's word, and its uptime in ms."""
        (row,) = self._look("sample_machine", doing="look at a VM", parameters={"Id": machine_id})
        return rows.text(row, "State"), rows.measure(row, "UptimeMs")

    def room(self) -> Room:
        """Return what the host has left, of memory and in the folder of exports."""
        (row,) = self._look("describe_host", doing="tell what it has left", parameters={"Folder": self.folders.root})
        return room_of(row)

    def examine(self) -> Examination:
        """Return what the host says of itself, for ``vmsnap doctor``."""
        parameters: dict[str, Parameter] = {"Folder": self.folders.root, "Needed": list(NEEDED)}
        (row,) = self._look("examine_host", doing="be looked at", parameters=parameters)
        return examination_of(row)

    def run_folders(self) -> tuple[RunFolder, ...]:
        """Return the folders of runs."""
        found = []
        for row in self._look("list_folders", doing="list the folders of runs", parameters={"Root": self.folders.root}):
            run = run_of_folder(rows.text(row, "Name"))
            if run is not None:
                parts = tuple(Part(word) for word in rows.text(row, "Parts").split() if word in set(Part))
                found.append(RunFolder(run=run, parts=parts))
        return tuple(found)

    def export_files(self, folder: str) -> tuple[tuple[str, str, int], ...]:
        """Return path, extension and size in bytes of each file of an export."""
        return tuple(
            (rows.text(row, "Path"), rows.text(row, "Extension"), rows.number(row, "SizeBytes"))
            for row in self._look("describe_export", doing="look at an export", parameters={"Folder": folder})
        )

    def planned(self) -> tuple[Planned, ...]:
        """Return what imports planned and never made."""
        return tuple(
            Planned(id=rows.text(row, "Id"), name=rows.text(row, "Name"), folder=rows.text(row, "Folder"))
            for row in self._look("list_planned", doing="list planned VMs")
        )

    def switches(self) -> tuple[Switch, ...]:
        """Return all switches."""
        return tuple(map(switch_of, self._look("list_switches", doing="list its switches")))

    def plugs(self) -> tuple[Plug, ...]:
        """Return all adapters of all VMs, and of the host."""
        return tuple(map(plug_of, self._look("list_adapters", doing="list network adapters")))

    def check_disks(self, paths: Sequence[str]) -> tuple[CheckedDisk, ...]:
        """Look whether virtual disks are sound."""
        return tuple(
            map(checked_of, self._change("check_disks", doing="check disks", parameters={"Paths": list(paths)}))
        )

    # Changing files

    def make_folder(self, run: RunId, part: Part) -> None:
        """Make a part of a run's folder. May be repeated."""
        self._change("make_folder", doing="make a folder", parameters=self._place(run, part))

    def remove_folder(self, run: RunId, part: Part | None, *, timeout: timedelta) -> None:
        """Remove a part of a run's folder, or all of it. May be repeated."""
        self._change("remove_folder", doing="remove a folder", parameters=self._place(run, part), timeout=timeout)

    def _place(self, run: RunId, part: Part | None) -> dict[str, Parameter]:
        return {"Root": self.folders.root, "Name": self.folders.name(run), "Part": "" if part is None else part.value}

    def export(
        self, machine_id: str, *, folder: str, with_memory: bool, timeout: timedelta, cancel: Cancel | None = None
    ) -> None:
        """Export a VM as it runs. Where ``cancel`` or ``timeout`` ends the wait, Hyper-V may go on with it for a while."""
        live_state = "CaptureSavedState" if with_memory else "CaptureCrashConsistentState"
        parameters = {"Id": machine_id, "Folder": folder, "LiveState": live_state}
        self._runner.run("export_machine", doing="export a VM", parameters=parameters, timeout=timeout, cancel=cancel)

    # Changing VMs: each script refuses what does not bear the tag

    def import_clone(self, wanted: Import, *, timeout: timedelta) -> Imported:
        """Make a clone, connected to nothing."""
        answer = self._change(
            "import_clone",
            doing="make a clone",
            parameters={
                "Configuration": wanted.configuration,
                "Folder": wanted.folder,
                "Disks": wanted.disks,
                "Name": wanted.name,
                "Notes": wanted.tag.notes,
            },
            timeout=timeout,
        )
        against = tuple(
            f"{rows.number(row, 'Number')}: {rows.text(row, 'Message')}"
            for row in answer
            if rows.text(row, "Kind") == "incompatibility"
        )
        made = [rows.text(row, "Id") for row in answer if rows.text(row, "Kind") == "machine"]
        return Imported(id=made[0] if made else None, incompatibilities=against)

    def remove_planned(self, planned: Planned) -> None:
        """Forget what an import planned. May be repeated."""
        self._change("remove_planned", doing="forget a planned VM", parameters={"Id": planned.id})

    def start(self, machine_id: str, *, tag: Tag, timeout: timedelta) -> None:
        """Let a VM of ours run."""
        parameters = {"Id": machine_id, "Tag": tag.beginning}
        self._change("start_machine", doing="start a VM", parameters=parameters, timeout=timeout)

    def request_shutdown(self, machine_id: str, *, tag: Tag) -> int:
        """Ask the guest of a VM of ours to shut down; return what Hyper-V says, -1 where nobody in it can be asked."""
        parameters = {"Id": machine_id, "Tag": tag.beginning, "Reason": _REASON}
        (row,) = self._change("request_shutdown", doing="ask a guest to shut down", parameters=parameters)
        return rows.number(row, "ReturnValue")

    def turn_off(self, machine: Machine, *, tag: Tag) -> None:
        """End a VM of ours."""
        self._change("turn_off_machine", doing="turn a VM off", parameters=self._ours(machine, tag))

    def remove(self, machine: Machine, *, tag: Tag) -> None:
        """Forget a VM of ours; its disks stay."""
        self._change("remove_machine", doing="remove a VM", parameters=self._ours(machine, tag))

    def _ours(self, machine: Machine, tag: Tag) -> dict[str, Parameter]:
        return {"Id": machine.id, "Tag": tag.beginning, "Folder": self.folders.of(tag.run)}

    def connect(
        self, machine_id: str, *, tag: Tag | Mark, switch: Switch, switch_tag: Tag | None, macs: Sequence[str]
    ) -> None:
        """Put adapters of a VM of ours, or a marked one, on a switch: of ours too, where its tag is given."""
        self._change(
            "connect_adapters",
            doing="put a VM on a switch",
            parameters={
                "Id": machine_id,
                "Tag": tag.beginning,
                "SwitchId": switch.id,
                "SwitchTag": "" if switch_tag is None else switch_tag.beginning,
                "Macs": [_digits(mac) for mac in macs],
            },
        )

    def disconnect(self, machine_id: str, *, tag: Tag | Mark, macs: Sequence[str] = ()) -> None:
        """Pull cables of a VM of ours, or a marked one: those of these MACs, or all."""
        parameters = {"Id": machine_id, "Tag": tag.beginning, "Macs": [_digits(mac) for mac in macs]}
        self._change("disconnect_adapters", doing="take a VM off its switches", parameters=parameters)

    def make_machine(self, wanted: NewMachine) -> str:
        """Make a VM, off, and return its id."""
        (row,) = self._change(
            "make_environment",
            doing="make a VM",
            parameters={
                "Name": wanted.name,
                "Notes": wanted.tag.notes,
                "Folder": wanted.folder,
                "Generation": wanted.generation,
                "MemoryBytes": wanted.memory_bytes,
                "Processors": wanted.processors,
                "SecureBoot": wanted.secure_boot,
                "SecureBootTemplate": wanted.secure_boot_template,
            },
        )
        return rows.text(row, "Id")

    def make_child_disk(self, path: str, *, parent: str) -> None:
        """Make a differencing disk."""
        parameters = {"Path": path, "Parent": parent}
        self._change("make_environment_disk", doing="make a differencing disk", parameters=parameters)

    def add_disk(self, machine_id: str, *, tag: Tag, disk: NewDisk) -> None:
        """Give a VM of ours a disk."""
        self._change(
            "add_environment_disk",
            doing="give a VM a disk",
            parameters={
                "Id": machine_id,
                "Tag": tag.beginning,
                "Controller": disk.controller,
                "Number": disk.number,
                "Location": disk.location,
                "Path": disk.path,
                "Boots": disk.boots,
            },
        )

    def add_adapter(self, machine_id: str, *, tag: Tag, name: str, mac: str) -> None:
        """Give a VM of ours an adapter, on no switch."""
        parameters = {"Id": machine_id, "Tag": tag.beginning, "Name": name, "Mac": _digits(mac)}
        self._change("add_environment_adapter", doing="give a VM an adapter", parameters=parameters)

    # Changing switches

    def make_switch(self, name: str, *, tag: Tag) -> None:
        """Make a private switch."""
        self._change("make_switch", doing="make a switch", parameters={"Name": name, "Notes": tag.notes})

    def remove_switch(self, switch: Switch, *, tag: Tag) -> None:
        """Remove a switch of ours."""
        self._change("remove_switch", doing="remove a switch", parameters={"Id": switch.id, "Tag": tag.beginning})


def _digits(mac: str) -> str:
    return mac.replace(":", "").replace("-", "").upper()
