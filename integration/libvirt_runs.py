"""One run of the libvirt driver on a lab guest, step by step, for tests: what a backup does, without the database."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import libvirt
import pytest

from integration.lab.guest import LabGuest
from integration.lab.lab import Lab
from integration.lab.services import start_libvirt, stop_libvirtd
from vmsnap.errors import CancelledError, GuestUnreachableError
from vmsnap.guests.agent import AgentControl
from vmsnap.hypervisors.libvirt import overlays, yielding
from vmsnap.hypervisors.libvirt.clones import Clones, clone_of
from vmsnap.hypervisors.libvirt.driver import LibvirtFolders, LibvirtHypervisor
from vmsnap.model.capture import Capture, CaptureMode, CapturePlan, CaptureSettings, Clone, ModeChoice
from vmsnap.model.command import Command
from vmsnap.model.ids import RunId, new_run_id
from vmsnap.model.isolation import FencePlan
from vmsnap.model.journal import Resource
from vmsnap.network.fence import NetworkFence
from vmsnap.ports.hypervisor import Hypervisor
from vmsnap.state.clock import SystemClock

URI = "qemu:///system"
RUNTIME = Path("/run/vmsnap")
DEADLINE = timedelta(seconds=60)
# Wide, because the hosts of the tests are slow and busy; the benchmark is where the pause is judged.
PATIENT = CaptureSettings(max_pause=timedelta(seconds=5), min_overlay_free_bytes=1 << 20, allow_emulation=True)
INSTANT = ModeChoice(mode=CaptureMode.INSTANT, reason="the test says so")
HASTY = CaptureSettings(max_pause=timedelta(milliseconds=2), min_overlay_free_bytes=1 << 20)


@dataclass
class Cancel:
    """Implements ports.clock.Cancel: set when ``when`` says so."""

    when: Callable[[], bool] = lambda: False

    def is_set(self) -> bool:
        return self.when()

    def check(self) -> None:
        if self.is_set():
            raise CancelledError("cancelled by the test")


def new_driver(lab: Lab) -> LibvirtHypervisor:
    """A driver with a connection of its own, as a fresh process would have."""
    folders = LibvirtFolders(runtime=RUNTIME, environments=lab.scratch / "environments")
    return LibvirtHypervisor(URI, folders=folders, clock=SystemClock())


@dataclass
class DriverRun:
    """One run: its plan, and its steps in their order."""

    driver: LibvirtHypervisor
    plan: CapturePlan
    fence: FencePlan
    clone: Clone | None = None
    network: NetworkFence = field(default_factory=NetworkFence)  # who proves a fence must have built it
    resources: list[Resource] = field(default_factory=list)

    def prepare(self) -> None:
        for resource, make in (
            (self.driver.overlays_resource(self.plan), self.driver.prepare_overlays),
            (self.driver.clone_overlays_resource(self.plan), self.driver.prepare_clone_overlays),
            (self.driver.memory_resource(self.plan), self.driver.prepare_memory),
        ):
            self.resources.append(resource)
            make(self.plan)

    def note(self) -> None:
        """Take for made what another process may make of this run, so that all of it is released."""
        self.resources += [
            self.driver.overlays_resource(self.plan),
            self.driver.clone_overlays_resource(self.plan),
            self.driver.memory_resource(self.plan),
            self.network.resource(self.fence),
            self.driver.clone_resource(self.plan),
        ]

    def capture(self, cancel: Cancel | None = None) -> Capture:
        """Build the fence, where it is not there, and capture."""
        clone = self.driver.clone_resource(self.plan)
        if clone not in self.resources:
            self.build_fence()
            self.resources.append(clone)
        return self.driver.capture(self.plan, fence=self.fence, cancel=cancel or Cancel())

    def restore(self) -> Clone:
        """Make the clone, paused."""
        self.clone = self.driver.restore_clone(self.plan, fence=self.fence)
        return self.clone

    def build_fence(self) -> None:
        self.resources.append(self.network.resource(self.fence))
        self.network.build(self.fence)

    def resume(self) -> Clone:
        """Prove the fence, let the clone run, and wait until its agent has opened its end of the new channel."""
        assert self.clone is not None
        self.driver.resume_clone(self.clone, proof=self.network.prove(self.fence))
        wait_for_answer(self.driver, domain=self.clone.name)
        return self.clone

    def release(self, *, driver: LibvirtHypervisor | None = None) -> None:
        """Undo everything, the last thing first, as a run's clean-up or reconcile does."""
        owners = (driver or self.driver, self.network)
        for resource in reversed(self.resources):
            (owner,) = (owner for owner in owners if resource.kind in owner.kinds)
            owner.release(resource, deadline=DEADLINE)
        self.resources.clear()

    def overlay_files(self) -> list[Path]:
        return sorted(path for path in map(Path, self.overlay_paths()) if path.exists())

    def overlay_paths(self) -> list[str]:
        return [disk.overlay for disk in overlays.describe(self.plan, role="source").disks]


@contextmanager
def run_of(lab: Lab, guest: LabGuest, settings: CaptureSettings = PATIENT) -> Iterator[DriverRun]:
    """A run over a guest; whatever the test leaves of it is released, and the guest must be home then."""
    driver = new_driver(lab)
    source = driver.inspect(guest.name)
    run = new_run_id()
    plan = CapturePlan(run=run, guest=source, settings=settings)
    made = DriverRun(driver=driver, plan=plan, fence=FencePlan.for_guest(run, guest=source))
    try:
        yield made
    finally:
        try:
            made.release()
            assert driver.source_is_home(source)
            assert driver.owned() == ()
        finally:
            driver.close()
            if RUNTIME.exists():
                RUNTIME.rmdir()


def run_in_clone(run: DriverRun, argv: tuple[str, ...]) -> str:
    """Run a command in the running clone as root; returns its stdout."""
    assert run.clone is not None
    control = AgentControl(run.driver.agent(run.clone.name), clock=SystemClock())
    result = control.run(Command(argv=argv), timeout=DEADLINE)
    assert result.exit_status == 0, result.error_text
    return result.text


def definitions(guest: LabGuest) -> tuple[str, str]:
    """The live and the persistent definition, with secrets."""
    secure = libvirt.VIR_DOMAIN_XML_SECURE
    return guest.domain.XMLDesc(secure), guest.domain.XMLDesc(secure | libvirt.VIR_DOMAIN_XML_INACTIVE)


def is_running(guest: LabGuest) -> bool:
    return bool(guest.domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING)


def capture_job_runs(guest: LabGuest) -> bool:
    """Whether libvirt is reading the guest's memory for a snapshot now."""
    try:
        stats = guest.domain.jobStats()
    except libvirt.libvirtError:
        return False
    return bool(
        stats.get("operation") == libvirt.VIR_DOMAIN_JOB_OPERATION_SNAPSHOT and stats.get("memory_iteration", 0) >= 1
    )


def idle_when_accepted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets, for each clone that is complete, whether its control group was idle until then."""
    seen: list[str] = []
    accept = Clones.accept

    def noted(self: Clones, plan: CapturePlan, **arguments: Any) -> Clone:
        group = yielding.group_of(clone_of(plan.run, guest=plan.guest.name).name, run=plan.run)
        assert group is not None, "this kernel has no idle groups"
        seen.append((group / "cpu.idle").read_text().strip())
        return accept(self, plan, **arguments)

    monkeypatch.setattr(Clones, "accept", noted)
    return seen


def wait_until(condition: Callable[[], bool], what: str, *, limit_s: float = 180) -> None:
    """Wait until something is so. The limit is for an emulated guest on a host whose disks others write to as well."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {limit_s} s"
        time.sleep(0.02)


def wait_for_answer(driver: Hypervisor, *, domain: str, limit_s: float = 180) -> None:
    """Wait for a guest's agent: a clone's opens its end of the new channel a moment after the clone was resumed."""

    def answers() -> bool:
        try:
            driver.agent(domain).send('{"execute":"guest-ping"}', timeout=timedelta(seconds=5))
        except GuestUnreachableError:
            return False
        return True

    wait_until(answers, f"an answer of the agent of {domain!r}", limit_s=limit_s)


def restart_libvirtd(guest: LabGuest) -> None:
    """Kill the lab's libvirtd, as a crash would, and start another; guests run on."""
    stop_libvirtd(kill=True)
    start_libvirt()
    wait_until(lambda: _answers(guest), "an answer about the guest")


def _answers(guest: LabGuest) -> bool:
    try:
        guest.domain.state()
    except libvirt.libvirtError:
        return False
    return True


# Memory writer: copies a file on a tmpfs over and over, which rewrites pages that are neither empty nor alike.
WRITER = "lab-memory-writer"
_WRITER_SCRIPT = "head -c 150000000 /dev/vda >/dev/shm/a; while :; do cp /dev/shm/a /dev/shm/b; done"
_WHAT_HOLDS_IT_UP = (
    "ls -l /dev/shm; head -n 5 /proc/meminfo; ps -eo stat,wchan:24,time,args | grep -v ' \\['; dmesg | tail -n 20"
)


@contextmanager
def memory_writer(guest: LabGuest) -> Iterator[None]:
    """Let the guest rewrite its memory faster than it can be copied within a few milliseconds."""
    guest.run(["systemd-run", f"--unit={WRITER}", "--collect", "sh", "-c", _WRITER_SCRIPT])
    try:
        try:
            wait_until(lambda: guest.exec(["test", "-s", "/dev/shm/b"]).exit_status == 0, "the writer's first round")
        except AssertionError as error:
            raise AssertionError(f"{error}:\n{guest.exec(['sh', '-c', _WHAT_HOLDS_IT_UP]).stdout}") from None
        yield
    finally:
        guest.exec(["systemctl", "stop", f"{WRITER}.service"])
        guest.exec(["rm", "-f", "/dev/shm/a", "/dev/shm/b"])


def write_file(guest: LabGuest, path: str, text: str) -> None:
    """Write a file in the guest, on its disk when this returns."""
    guest.run(["sh", "-c", 'cat >"$0" && sync', path], text=text)


def drop_caches(guest: LabGuest) -> None:
    """Make the guest read from its disks again, not from its page cache."""
    guest.run(["sh", "-c", "sync; echo 3 >/proc/sys/vm/drop_caches"])


def read_file_from_disk(guest: LabGuest, path: str) -> str:
    """Read a file in the guest from its disk."""
    drop_caches(guest)
    return guest.run(["cat", path])


def child_of_run(run: RunId, guest: str, *, stage: str) -> subprocess.Popen[str]:
    """A process of its own that does the run up to ``stage`` ('captured', 'restoring' or 'restored') and then only waits."""
    argv = [sys.executable, "-m", "integration.libvirt_runs", run, guest, stage]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)


def _main(run: str, name: str, stage: str) -> None:
    driver = new_driver(Lab.current())
    source = driver.inspect(name)
    settings = HASTY if stage == "capturing" else PATIENT
    plan = CapturePlan(run=RunId(run), guest=source, settings=settings)
    if stage == "instantly":
        plan = replace(plan, choice=INSTANT)
    mine = DriverRun(driver=driver, plan=plan, fence=FencePlan.for_guest(RunId(run), guest=source))
    mine.prepare()
    print("capturing", flush=True)
    mine.capture()
    print("captured", flush=True)
    if stage in ("restoring", "restored"):
        print("restoring", flush=True)
        mine.restore()
        print("restored", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    _main(*sys.argv[1:])
