"""The state of a Hyper-V host, what goes on in it by itself, and the rule that no copy of a guest can reach production."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Concatenate, NoReturn, ParamSpec, TypeVar

from vmsnap.testing.hyperv import failures
from vmsnap.testing.hyperv.failures import CmdletError, Code, Reason, Speech, Text
from vmsnap.testing.hyperv.files import BadPathError, HostFiles, NoRoomError, copy_sparse
from vmsnap.testing.hyperv.inventory import Inventory
from vmsnap.testing.hyperv.values import (
    ALIVE,
    SavedState,
    VirtualMachine,
    VMState,
)

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S", bound="HostState")
COMPUTER = "HV-HOST"
_LOOKS = ("Get-", "Test-")


@dataclass(kw_only=True)
class Job:
    """Something that goes on in the host whoever began it: its client may die, and it ends all the same.

    ``left`` are its further steps: made one after another where a client waits (``watched``), else one at each call to the
    host. ``holds`` are folders whose files it has open.
    """

    name: str
    vm: VirtualMachine
    left: list[tuple[str, Callable[[], None]]]
    holds: tuple[str, ...]
    undo: Callable[[], None]
    watched: bool = False


@dataclass(kw_only=True)
class Exported:
    """What a ``.vmcx`` file of an export says."""

    vm: VirtualMachine
    vhds: tuple[str, ...]
    saved: SavedState | None


def cmdlet(name: str) -> Callable[[Callable[Concatenate[S, P], T]], Callable[Concatenate[S, P], T]]:
    """Make a method a cmdlet: the host's life goes on by a step before it, and the rules are looked at around it."""

    def decorate(function: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
        @functools.wraps(function)
        def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
            with self.turn:
                self.begin(name)
                try:
                    return function(self, *args, **kwargs)
                finally:
                    self.look()

        return call

    return decorate


class HostState(Inventory):
    """What is on a host and goes on in it.

    ``between`` is called with the name of a place inside an operation that takes long: the client may die there, by an
    exception, and the operation goes on in the host. ``entering`` is called with the name of each cmdlet that changes something,
    before it does. ``rights`` False: the account may not use Hyper-V.
    ``on_end`` is called with a VM whose worker ends, and whether that was a shutdown of its guest's own.
    ``step_seconds``: how long each step of such an operation takes, during which others may call.
    """

    def __init__(
        self,
        root: Path,
        *,
        speech: Speech | None = None,
        volumes: dict[str, int] | None = None,
        memory_bytes: int = 64 << 30,
    ) -> None:
        super().__init__(HostFiles(root, volumes=volumes or {"C": 100 << 30, "D": 100 << 30}))
        self.files.in_use = self.is_open
        self.speech = speech or Speech()
        self.memory_bytes = memory_bytes
        self.exports: dict[str, Exported] = {}
        self.calls: list[str] = []
        self.jobs: list[Job] = []
        self.turn = threading.Condition(threading.RLock())
        self.step_seconds = 0.0
        self.between: Callable[[str], None] = _nothing
        self.entering: Callable[[str], None] = _nothing
        self.on_end: Callable[[VirtualMachine, bool], None] = _no_matter
        self.rights = True
        self.is_clustered_host = False

    def leftovers(self) -> list[str]:
        """Return everything on the host that was not there when the test began."""
        return super().leftovers() + [f"job {job.name}" for job in self.jobs]

    # Living on

    def begin(self, name: str) -> None:
        """Begin a cmdlet: what goes on in the host comes a step further."""
        self.calls.append(name)
        if not name.startswith(_LOOKS):
            self.entering(name)
        for job in tuple(self.jobs):
            if not job.watched:
                self._step(job)
        for vm in tuple(self.vms):
            self._come_down(vm)
        self.look()

    def _come_down(self, vm: VirtualMachine) -> None:
        left = vm.truth.shutdown_left
        if left is None or vm.state not in ALIVE:
            vm.truth.shutdown_left = None
        elif left > 0:
            vm.truth.shutdown_left = left - 1
        else:
            self.end(vm, in_order=vm.truth.inside.ends_in_order)

    def end(self, vm: VirtualMachine, *, in_order: bool) -> None:
        """End a VM's worker: its disks hold then what its guest left."""
        if vm.state in ALIVE:
            self.on_end(vm, in_order)
        vm.state, vm.truth.shutdown_left, vm.truth.saved = VMState.OFF, None, None
        for drive, content in zip(vm.hard_drives, vm.truth.inside.ended(in_order=in_order), strict=False):
            if content is not None and drive.path:
                copy_sparse(content, target=self.files.local(drive.path))

    def run_job(self, job: Job) -> None:
        """Do a job to its end, its client watching; where the client dies meanwhile, the host does the rest by itself."""
        self.jobs.append(job)
        job.watched = True
        try:
            while job in self.jobs:
                self.turn.wait(self.step_seconds)
                self.between(job.left[0][0])
                self._step(job, raising=True)
        finally:
            job.watched = False

    def _step(self, job: Job, *, raising: bool = False) -> None:
        _, work = job.left.pop(0)
        try:
            work()
        except CmdletError:
            self.jobs.remove(job)
            job.undo()
            if raising:
                raise
        if not job.left and job in self.jobs:
            self.jobs.remove(job)
            job.undo()
        self.look()

    def is_busy(self, vm: VirtualMachine) -> bool:
        """Tell whether an operation on the VM goes on, so that most others are refused."""
        return any(job.vm is vm for job in self.jobs)

    def is_open(self, path: str) -> bool:
        """Tell whether a file of the host is open: a VM's disk, its configuration, or what a job writes."""
        folded = path.casefold()
        held = {name.casefold() for vm in self.vms for name in vm.truth.files}
        held |= {name.casefold() for vm in self.vms if vm.state in ALIVE for name in self.opened_by(vm)}
        jobs = tuple(folder.casefold() for job in self.jobs for folder in job.holds)
        return folded in held or folded.startswith(jobs)

    # Refusing

    def refuse(
        self, cmdlet: str, *, text: Text, about: tuple[object, ...] = (), reason: Reason, code: Code | None = None
    ) -> NoReturn:
        """Raise the error of a cmdlet of the Hyper-V module."""
        raise self.speech.hyper_v(cmdlet, text=text, about=about, reason=reason, code=code)

    def need_rights(self, cmdlet: str) -> None:
        """Raise what an account without the right gets."""
        if not self.rights:
            self.refuse(cmdlet, text=failures.NO_RIGHT, about=(COMPUTER,), reason=Reason.ACCESS_DENIED)

    def write(self, cmdlet: str, *, path: str, size_bytes: int) -> None:
        """Write a file of Hyper-V's own, as zeroes."""
        self.put(cmdlet, path=path, make=lambda: self.files.write(path, content=bytes(size_bytes)))

    def put(self, cmdlet: str, *, path: str, make: Callable[[], None]) -> None:
        """Write a file, or fail as Hyper-V does."""
        try:
            make()
        except NoRoomError:
            self.refuse(cmdlet, text=failures.FULL, about=(path,), reason=Reason.OPERATION_FAILED, code=Code.DISK_FULL)
        except FileExistsError:
            self.refuse(
                cmdlet, text=failures.EXISTS, about=(path,), reason=Reason.OPERATION_FAILED, code=Code.FILE_EXISTS
            )
        except FileNotFoundError:
            self.refuse(
                cmdlet, text=failures.NO_FILE, about=(path,), reason=Reason.OPERATION_FAILED, code=Code.FILE_NOT_FOUND
            )
        except BadPathError:
            self.refuse(
                cmdlet, text=failures.BAD_NAME, about=(path,), reason=Reason.OPERATION_FAILED, code=Code.INVALID_NAME
            )


def _nothing(_: str) -> None:
    """Stand for a hook nobody set."""


def _no_matter(_vm: VirtualMachine, _in_order: bool) -> None:  # noqa: FBT001 - as the hook has it
    """Stand for a hook nobody set."""
