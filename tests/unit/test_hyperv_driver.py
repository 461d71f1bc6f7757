"""The Hyper-V driver over the simulated host: refusals, lost replies, leftovers, hostile names."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.unit.hyperv_hosts import DISK_BYTES, EXPORTS, add_guest, make_host
from vmsnap.errors import (
    BugError,
    CancelledError,
    DriverError,
    GuestNotFoundError,
    HostUnreachableError,
    IsolationError,
    NotCleanError,
    PreconditionError,
    SafetyError,
    UnknownOutcomeError,
    VmsnapError,
)
from vmsnap.hypervisors.hyperv.connection import Login, Row
from vmsnap.hypervisors.hyperv.driver import HyperVHypervisor
from vmsnap.hypervisors.hyperv.fence import HyperVFence
from vmsnap.hypervisors.hyperv.host import Host
from vmsnap.hypervisors.hyperv.tags import RunFolders, Tag, TagKind, read_tag
from vmsnap.model.capture import CaptureChoice, CapturePlan, CaptureSettings, Clone, Detach, DiskImage, DiskSnapshot
from vmsnap.model.environment import EnvironmentPlan
from vmsnap.model.guest import GuestState, Severity
from vmsnap.model.ids import RunId, new_run_id
from vmsnap.model.isolation import FencePlan
from vmsnap.model.journal import Resource, ResourceKind
from vmsnap.ports.guest import HostLine
from vmsnap.testing.cancels import NeverCancelled
from vmsnap.testing.hyperv.failures import Language, ModuleGeneration, Speech
from vmsnap.testing.hyperv.machine import HyperVHost
from vmsnap.testing.hyperv.running import TwinRunner
from vmsnap.testing.hyperv.values import (
    HardDiskDrive,
    Silent,
    SwitchType,
    VirtualMachine,
    VMSnapshot,
    VMState,
)
from vmsnap.testing.world import FakeClock

DEADLINE = timedelta(minutes=2)


class NoLogins:
    def login(self, guest: str) -> None:
        return None


@dataclass
class Rig:
    """One process over a simulated host, and the one run it does."""

    machine: HyperVHost
    guest_name: str = "db"
    run: RunId = field(default_factory=new_run_id)

    def __post_init__(self) -> None:
        self.runner = TwinRunner(self.machine)
        mounted = self.machine.files.local(EXPORTS)
        self.host = Host(self.runner, folders=RunFolders(root=EXPORTS, mounted=str(mounted)))
        self.driver = HyperVHypervisor(self.host, clock=FakeClock(), logins=NoLogins())
        self.fence = HyperVFence(self.host)
        self.resources: list[Resource] = []

    def plan(self, settings: CaptureSettings | None = None) -> CapturePlan:
        guest = self.driver.inspect(self.guest_name)
        return CapturePlan(run=self.run, guest=guest, settings=settings or CaptureSettings())

    def backup(self) -> Clone:
        """Do everything that a backup does to the host, up to its clone being off."""
        driver, plan = self.driver, self.plan()
        fence = FencePlan.for_guest(self.run, guest=plan.guest)
        steps: tuple[tuple[Resource, Callable[[], object]], ...] = (
            (driver.overlays_resource(plan), lambda: driver.prepare_overlays(plan)),
            (driver.clone_overlays_resource(plan), lambda: driver.prepare_clone_overlays(plan)),
            (driver.memory_resource(plan), lambda: driver.prepare_memory(plan)),
            (self.fence.resource(fence), lambda: self.fence.build(fence)),
            (driver.clone_resource(plan), lambda: driver.capture(plan, fence=fence, cancel=NeverCancelled())),
        )
        for resource, make in steps:
            self.resources.append(resource)
            make()
        clone = driver.restore_clone(plan, fence=fence)
        driver.resume_clone(clone, proof=self.fence.prove(fence))
        driver.shut_down_clone(clone, agent_answers=True, deadline=DEADLINE, cancel=NeverCancelled())
        assert driver.clone_images(plan)
        return clone

    def release_all(self) -> None:
        for resource in reversed(self.resources):
            owner = self.fence if resource.kind is ResourceKind.FENCE else self.driver
            owner.release(resource, deadline=DEADLINE)

    def refusals(self) -> list[str]:
        guest = self.driver.inspect(self.guest_name)
        found = self.driver.findings(guest, settings=CaptureSettings())
        assert all(finding.remedy for finding in found if finding.severity is not Severity.OK)
        return [finding.check for finding in found if finding.severity is Severity.REFUSAL]


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(make_host(tmp_path))


CHANGING = (
    "make_folder",
    "make_switch",
    "export_machine",
    "import_clone",
    "connect_adapters",
    "start_machine",
    "request_shutdown",
    "remove_machine",
    "remove_switch",
    "remove_folder",
)


@pytest.mark.parametrize("script", CHANGING)
@pytest.mark.parametrize("done", [True, False], ids=["although it was done", "before it was done"])
def test_a_lost_reply_leaves_nothing_and_harms_nobody(rig: Rig, script: str, *, done: bool) -> None:
    left = [1]

    def lose(name: str) -> None:
        if name == script and left[0]:
            left[0] -= 1
            raise UnknownOutcomeError("the line broke")

    if done:
        rig.runner.after = lose
    else:
        rig.runner.before = lose
    with suppress(DriverError, SafetyError):
        rig.backup()
    with suppress(DriverError):
        rig.release_all()
    # As reconcile does, and where nothing is left it changes nothing.
    rig.release_all()
    assert not left[0]
    assert rig.machine.harm() == []
    assert rig.machine.leftovers() == []


@pytest.mark.parametrize("script", ["import_clone", "start_machine", "request_shutdown", "make_switch"])
def test_what_was_done_although_no_reply_came_is_found_by_the_run_and_used(rig: Rig, script: str) -> None:
    def lose(name: str) -> None:
        if name == script:
            raise UnknownOutcomeError("the line broke")

    rig.runner.after = lose
    assert rig.backup().name == f"vmsnap-clone-{rig.run}"
    rig.runner.after = lambda _: None
    rig.release_all()
    assert rig.machine.leftovers() == []


def test_a_host_that_answers_again_is_cleaned_up(rig: Rig) -> None:
    rig.backup()
    failures = iter([True, True, False])

    def fail(name: str) -> None:
        if name == "remove_machine" and next(failures, False):
            raise HostUnreachableError("no answer")

    rig.runner.before = fail
    rig.release_all()
    assert rig.machine.leftovers() == []


@pytest.mark.parametrize("place", ["Export-VM: disk 0", "Export-VM: memory", "Import-VM: disk 0", "Import-VM: realise"])
def test_what_hyper_v_goes_on_with_by_itself_is_found_and_removed(rig: Rig, place: str) -> None:
    """The process dies in the middle; the host ends what it had begun; the next process sees it by tags alone."""

    def die(where: str) -> None:
        if where == place:
            raise KeyboardInterrupt

    rig.machine.between = die
    with pytest.raises(KeyboardInterrupt):
        rig.backup()
    rig.machine.between = lambda _: None
    another = Rig(rig.machine, run=rig.run)
    for _ in range(3):
        for resource in (*another.driver.owned(), *another.fence.owned()):
            assert resource.run == rig.run
            owner = another.fence if resource.kind is ResourceKind.FENCE else another.driver
            owner.release(resource, deadline=DEADLINE)
    assert rig.machine.harm() == []
    assert rig.machine.leftovers() == []


def _checkpoint(host: HyperVHost, vm: VirtualMachine) -> None:
    vm.snapshots.append(VMSnapshot(name="before", vm_name=vm.name, vm_id=vm.id))


def _saved(host: HyperVHost, vm: VirtualMachine) -> None:
    host.stop_vm(vm=vm, save=True)


def _clustered(host: HyperVHost, vm: VirtualMachine) -> None:
    vm.is_clustered = True


def _shared(host: HyperVHost, vm: VirtualMachine) -> None:
    vm.hard_drives[0].support_persistent_reservations = True


def _passed_through(host: HyperVHost, vm: VirtualMachine) -> None:
    vm.hard_drives.append(HardDiskDrive(disk_number=2, controller_location=5))


def _without_shutdown(host: HyperVHost, vm: VirtualMachine) -> None:
    vm.disabled_services.add("9F8233AC-BE49-4C79-8EE3-E7E1985B2077")


def _sriov(host: HyperVHost, vm: VirtualMachine) -> None:
    vm.network_adapters[0].iov_weight = 50


def _devices(host: HyperVHost, vm: VirtualMachine) -> None:
    vm.assigned_devices = 1


def _shielded(host: HyperVHost, vm: VirtualMachine) -> None:
    vm.shielded = True


def _fabric(host: HyperVHost, vm: VirtualMachine) -> None:
    vm.fibre_channel = 1


def _full(host: HyperVHost, vm: VirtualMachine) -> None:
    host.files.volumes["D"].free_bytes = 1 << 30


def _no_memory(host: HyperVHost, vm: VirtualMachine) -> None:
    host.memory_bytes = vm.memory_startup


def _differencing(host: HyperVHost, vm: VirtualMachine) -> None:
    host.new_vhd(path="C:\\VMs\\0\\child.vhdx", parent_path=vm.hard_drives[0].path, differencing=True)
    vm.hard_drives[0].path = "C:\\VMs\\0\\child.vhdx"


def _twice_one_name(host: HyperVHost, vm: VirtualMachine) -> None:
    host.files.make_folder("C:\\VMs\\other")
    host.files.copy(vm.hard_drives[0].path, target="C:\\VMs\\other\\disk0.vhdx")
    vm.hard_drives.append(HardDiskDrive(path="C:\\VMs\\other\\disk0.vhdx", controller_location=1))


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (_checkpoint, "checkpoints"),
        (_saved, "state"),
        (_clustered, "cluster"),
        (_shared, "disk scsi-0-0"),
        (_passed_through, "disk scsi-0-5"),
        (_without_shutdown, "integration services"),
        (_sriov, "adapter 00:15:5d:00:00:01"),
        (_devices, "devices"),
        (_fabric, "fibre channel"),
        (_shielded, "shielded"),
        (_full, "export folder"),
        (_no_memory, "memory"),
        (_differencing, "disk scsi-0-0"),
        (_twice_one_name, "disks"),
    ],
)
def test_what_cannot_be_captured_is_refused_beforehand(
    rig: Rig, change: Callable[[HyperVHost, VirtualMachine], None], check: str
) -> None:
    assert rig.refusals() == []
    change(rig.machine, rig.machine.vm("db"))
    assert rig.refusals() == [check]
    assert rig.machine.leftovers() == [] or change in (_differencing, _twice_one_name)


def test_what_an_operator_should_know_is_a_warning(rig: Rig) -> None:
    vm = rig.machine.vm("db")
    vm.network_adapters[0].dynamic_mac_address_enabled = False
    vm.replication_state = "Replicating"
    vm.tpm_enabled = True
    found = rig.driver.findings(rig.driver.inspect("db"), settings=CaptureSettings())
    warnings = {finding.check for finding in found if finding.severity is Severity.WARNING}
    assert warnings == {"adapter 00:15:5d:00:00:01", "replication", "tpm"}
    assert rig.refusals() == []


@pytest.mark.parametrize("name", ["it's $(Stop-VM db) `n", "[d]b", "-Force", "Ümläut 数据库", "a; Remove-VM db"])
def test_a_name_of_any_text_is_the_name_of_a_guest_and_nothing_else(tmp_path: Path, name: str) -> None:
    machine = make_host(tmp_path)
    add_guest(machine, name)
    rig = Rig(machine, guest_name=name)
    assert rig.driver.guests() == tuple(sorted(["db", name]))
    rig.backup()
    assert {resource.guest for resource in rig.driver.owned()} <= {"", name}
    rig.release_all()
    assert machine.harm() == []
    assert machine.leftovers() == []


def test_disks_come_in_the_order_of_their_slots(rig: Rig) -> None:
    vm = rig.machine.get_vm(name="db")[0]
    slots = [10, 2]
    for slot in slots:
        path = f"C:\\VMs\\0\\more{slot}.vhdx"
        rig.machine.files.copy(vm.hard_drives[0].path, target=path)
        vm.hard_drives.append(HardDiskDrive(path=path, controller_location=slot))
    found = [disk.target.rpartition("-")[2] for disk in rig.driver.inspect("db").disks]
    assert found == [str(slot) for slot in sorted({*slots, *map(int, found)})]
    assert len(found) > 2


@pytest.mark.parametrize("name", ["*", "d?", "DB", "", "db\n"])
def test_a_name_is_no_pattern(rig: Rig, name: str) -> None:
    with pytest.raises(GuestNotFoundError):
        rig.driver.inspect(name)


@pytest.mark.parametrize("name", ["a/b", 'the "old" one', "C:\\x", "what?", "trailing "])
def test_a_name_that_no_folder_can_have_is_refused(tmp_path: Path, name: str) -> None:
    machine = make_host(tmp_path)
    add_guest(machine, name, folder="C:\\VMs\\odd")
    assert Rig(machine, guest_name=name).refusals() == ["name"]


def test_two_guests_of_one_name_cannot_be_told_apart(rig: Rig) -> None:
    add_guest(rig.machine, "db", folder="C:\\VMs\\second")
    assert rig.driver.guests() == ("db",)
    with pytest.raises(PreconditionError, match="2 VMs of the name 'db'"):
        rig.driver.inspect("db")


@pytest.mark.parametrize("generation", list(ModuleGeneration))
def test_hosts_of_any_language_and_module_are_understood(tmp_path: Path, generation: ModuleGeneration) -> None:
    rig = Rig(make_host(tmp_path, speech=Speech(language=Language.GERMAN, generation=generation)))
    rig.backup()
    with pytest.raises(GuestNotFoundError):
        rig.host.describe("00000000-0000-4000-8000-000000000000")
    rig.release_all()
    assert rig.machine.leftovers() == []


def test_an_account_without_rights_is_told_so(rig: Rig) -> None:
    rig.machine.rights = False
    with pytest.raises(PreconditionError, match="may not"):
        rig.driver.inspect("db")


class _Deaf(Silent):
    obeys = False


class _Crashing(Silent):
    ends_in_order = False

    def captured(self) -> _Crashing:
        return _Crashing()


def test_a_clone_that_does_not_obey_is_late_and_never_turned_off_by_the_shutdown(tmp_path: Path) -> None:
    class Deaf(_Deaf):
        def captured(self) -> Deaf:
            return Deaf()

    rig = Rig(make_host(tmp_path, inside=Deaf()))
    with pytest.raises(VmsnapError, match="did not power off"):
        rig.backup()
    assert "Stop-VM" not in rig.machine.calls
    rig.release_all()
    assert rig.machine.leftovers() == []


def test_a_clone_that_somebody_turned_off_is_not_clean(rig: Rig) -> None:
    plan = rig.plan()
    clone = rig.backup()
    with pytest.raises(NotCleanError, match="is Off before it was asked"):
        rig.driver.shut_down_clone(clone, agent_answers=True, deadline=DEADLINE, cancel=NeverCancelled())
    rig.release_all()
    with pytest.raises(NotCleanError, match="is gone"):
        rig.driver.shut_down_clone(clone, agent_answers=True, deadline=DEADLINE, cancel=NeverCancelled())
    assert rig.driver.source_is_home(plan.guest)


def test_a_clone_that_came_back_on_the_switch_of_production_is_not_started(rig: Rig) -> None:
    """As a script would leave it that lacks the step which takes it off."""
    after = rig.runner.after

    def plug(name: str) -> None:
        after(name)
        if name == "import_clone":
            vm = rig.machine.vm(f"vmsnap-clone-{rig.run}")
            vm.network_adapters[0].switch_name = "LAN"

    rig.runner.after = plug
    with pytest.raises(SafetyError, match="on switch LAN"):
        rig.backup()
    assert "Start-VM" not in rig.machine.calls
    rig.release_all()
    assert rig.machine.leftovers() == []


def test_a_switch_that_somebody_gave_an_uplink_is_left_alone(rig: Rig) -> None:
    plan = FencePlan.for_macs(rig.run, guest="db", macs=())
    rig.fence.build(plan)
    (switch,) = rig.machine.get_vm_switch(name=plan.namespace)
    switch.switch_type, switch.net_adapter_interface_descriptions = SwitchType.EXTERNAL, ("Intel",)
    with pytest.raises(IsolationError):
        rig.fence.prove(plan)
    with pytest.raises(DriverError):
        rig.fence.release(rig.fence.resource(plan), deadline=DEADLINE)
    assert switch in rig.machine.switches


def test_nobody_elses_vm_is_touched_whatever_it_is_called(rig: Rig) -> None:
    """Only notes and folders count; a name is no tag."""
    vm = add_guest(rig.machine, f"vmsnap-clone-{rig.run}")
    resource = Resource(kind=ResourceKind.CLONE, run=rig.run, guest="db", name=vm.name)
    rig.driver.release(resource, deadline=DEADLINE)
    assert vm.state is VMState.RUNNING
    assert rig.driver.owned() == ()
    with pytest.raises(GuestNotFoundError):
        rig.driver.agent(vm.name)
    with pytest.raises(BugError):
        rig.driver.set_link(vm.name, mac="00:15:5d:00:00:02", up=False)


def test_a_run_that_is_no_run_names_no_folder(rig: Rig) -> None:
    for run in ("..", "", "x" * 10, "0123456789/.."):
        with pytest.raises(BugError):
            rig.host.folders.of(RunId(run))
    for path in ("C:\\Windows", "D:\\vmsnap\\..\\Windows", "D:\\vmsnapper\\x", "x"):
        with pytest.raises(BugError):
            rig.host.folders.here(path)
    assert not rig.host.folders.holds(f"{rig.host.folders.of(rig.run)}\\..\\other.vhdx", run=rig.run)


def test_a_guest_that_somebody_stopped_during_its_export_is_told_and_left_as_it_is(rig: Rig) -> None:
    def stop(name: str) -> None:
        if name == "export_machine":
            rig.machine.end(rig.machine.vm("db"), in_order=True)

    rig.runner.after = stop
    with pytest.raises(SafetyError, match="is Off after its export"):
        rig.backup()
    rig.release_all()
    assert "Start-VM" not in rig.machine.calls
    assert rig.machine.leftovers() == []


def test_settings_that_hyper_v_has_no_use_for_are_settled(rig: Rig) -> None:
    guest = rig.driver.inspect("db")
    wanted = CaptureSettings(detach=Detach.REFLINK, disk_snapshot=DiskSnapshot.STORAGE)
    settled = rig.driver.settle(guest, settings=wanted)
    assert not settled.on_copies
    with pytest.raises(PreconditionError, match="instant"):
        rig.driver.choose_mode(guest, settings=CaptureSettings(mode=CaptureChoice.INSTANT))


def test_a_folder_that_is_not_mounted_here_is_noticed_before_the_guest_is_exported(tmp_path: Path) -> None:
    rig = Rig(make_host(tmp_path / "host"))
    elsewhere = Host(rig.runner, folders=RunFolders(root=EXPORTS, mounted=str(tmp_path / "elsewhere")))
    driver = HyperVHypervisor(elsewhere, clock=FakeClock(), logins=NoLogins())
    plan = rig.plan()
    with pytest.raises(PreconditionError, match="is not found at"):
        driver.prepare_clone_overlays(plan)
    driver.release(driver.clone_overlays_resource(plan), deadline=DEADLINE)
    assert rig.machine.leftovers() == []


def test_memory_that_clones_have_taken_is_told(rig: Rig) -> None:
    before = rig.driver.host_memory()
    assert before.taken_bytes == {}
    plan = rig.plan()
    fence = FencePlan.for_guest(rig.run, guest=plan.guest)
    rig.fence.build(fence)
    rig.driver.prepare_clone_overlays(plan)
    rig.driver.prepare_memory(plan)
    rig.driver.capture(plan, fence=fence, cancel=NeverCancelled())
    clone = rig.driver.restore_clone(plan, fence=fence)
    assert rig.driver.host_memory().taken_bytes == {}
    rig.driver.resume_clone(clone, proof=rig.fence.prove(fence))
    assert rig.driver.host_memory().taken_bytes == {rig.run: plan.guest.memory_bytes}
    assert rig.driver.clone_state(clone) is GuestState.RUNNING


@pytest.mark.parametrize("guest", ["db", "", "a. Removed by 'vmsnap reconcile' b", "x\ny", "vmsnap clone 0123456789 "])
def test_tags_are_read_back(guest: str) -> None:
    tag = Tag(kind=TagKind.CLONE, run=new_run_id(), guest=guest)
    assert read_tag(tag.notes) == tag
    assert tag.notes.startswith(tag.beginning)
    assert read_tag(f"an operator wrote {tag.notes}") is None


def test_an_export_that_somebody_cancels_is_given_up(rig: Rig) -> None:
    """The transport stops the script; the host may have done all of it."""
    waited_for: list[object] = []
    run = rig.runner.run

    def cancelled(name: str, **given: Any) -> tuple[Row, ...]:
        rows = run(name, **given)
        if name == "export_machine":
            waited_for.append(given["cancel"])
            raise CancelledError("a signal")
        return rows

    rig.runner.run = cancelled  # type: ignore[method-assign]
    with pytest.raises(CancelledError):
        rig.backup()
    assert isinstance(waited_for[0], NeverCancelled)
    rig.release_all()
    assert rig.machine.harm() == []
    assert rig.machine.leftovers() == []


def test_a_line_leads_into_the_clone_and_not_into_a_vm_that_is_called_like_it(rig: Rig) -> None:
    namesake = add_guest(rig.machine, f"vmsnap-clone-{rig.run}")
    rig.machine.vms.reverse()
    clone = rig.backup()
    asked: list[object] = []

    def run(name: str, *, parameters: dict[str, object], **_: object) -> tuple[Row, ...]:
        asked.append(parameters["Id"])
        raise HostUnreachableError("no answer")

    class Logins:
        def login(self, guest: str) -> Login:
            return Login(user=guest, password="secret")

    driver = HyperVHypervisor(rig.host, clock=FakeClock(), logins=Logins())
    for domain in (clone.name, "db"):
        line = driver.agent(domain)
        assert isinstance(line, HostLine)
        listing, rig.runner.run = rig.runner.run, run  # type: ignore[method-assign, assignment]
        with pytest.raises(HostUnreachableError):
            line.run_program("hostname", arguments="", stdin=b"", timeout=DEADLINE, cancel=None)
        rig.runner.run = listing  # type: ignore[method-assign]
    assert asked == [clone.uuid, rig.plan().guest.uuid]
    assert namesake.id not in asked
    rig.release_all()


def test_a_test_vm_on_a_named_switch_needs_no_fence_and_has_what_was_ordered(rig: Rig, tmp_path: Path) -> None:
    guest = rig.driver.inspect("db")
    stored = tmp_path / "stored.raw"
    with stored.open("wb") as file:
        file.truncate(DISK_BYTES)
    image = DiskImage(target="scsi-0-0", path=str(stored), image_format="raw", size_bytes=DISK_BYTES)
    plan = EnvironmentPlan(
        run=rig.run,
        guest="db",
        name="db-test",
        uuid="",
        macs=("52:54:00:aa:bb:cc",),
        network="LAN",
        memory_bytes=(3 << 30) + 12345,
        vcpus=3,
    )
    machine = rig.driver.machine(guest)
    rig.driver.prepare_environment_disks(plan, images=(image,), nvram=None)
    rig.driver.define_environment(plan, machine=machine, fence=None)
    rig.driver.attach_environment(plan, machine=machine, fence=None)
    rig.driver.start_environment(plan, proof=None)
    vm = rig.machine.vm("db-test")
    assert (vm.state, vm.memory_startup, vm.processor_count) == (VMState.RUNNING, 3 << 30, 3)
    assert [(adapter.mac_address, adapter.switch_name) for adapter in vm.network_adapters] == [("525400AABBCC", "LAN")]
    assert [nic.mac for nic in rig.driver.environment_nics("db-test")] == ["52:54:00:aa:bb:cc"]
    assert vm.automatic_start_action == "Nothing"
    with pytest.raises(PreconditionError, match="already a VM"):
        rig.driver.define_environment(plan, machine=machine, fence=None)
    rig.driver.release(rig.driver.environment_resource(plan), deadline=DEADLINE)
    rig.driver.release(rig.driver.environment_disks_resource(plan), deadline=DEADLINE)
    assert rig.machine.harm() == []
    assert rig.machine.leftovers() == []


def test_a_snapshot_of_another_hypervisor_makes_no_vm(rig: Rig) -> None:
    plan = EnvironmentPlan(run=rig.run, guest="db", name="x", uuid="", macs=(), network="LAN")
    machine = rig.driver.machine(rig.driver.inspect("db"))
    for changed, words in (({"hypervisor": "libvirt"}, "libvirt"), ({"definition": "<domain/>"}, "makes no sense")):
        with pytest.raises(PreconditionError, match=words):
            rig.driver.define_environment(plan, machine=machine.model_copy(update=changed), fence=None)
    assert rig.machine.leftovers() == []
