"""Guests and hosts of Hyper-V that cannot be backed up, or have awkward names: told, and nothing touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.workflow.invocations import backup, order, provision, reconciling, simply, succeed
from vmsnap.errors import (
    DeadlineError,
    ExitCode,
    GuestNotFoundError,
    NoSpaceError,
    NotCleanError,
    PreconditionError,
    SafetyError,
    VmsnapError,
)
from vmsnap.model.policy import Policy
from vmsnap.testing.hyperv.failures import Language, ModuleGeneration, Speech
from vmsnap.testing.hyperv.host import HostState
from vmsnap.testing.hyperv.values import SwitchType, VirtualMachine, VMSnapshot, VMState
from vmsnap.testing.hyperv.vhd import write_headers
from vmsnap.testing.hyperv.world import EXPORTS, DatabaseGuest, HyperVWorld

Change = Callable[[HyperVWorld, VirtualMachine], None]
GIB = 1 << 30


def _set(**properties: object) -> Change:
    def change(_lab: HyperVWorld, vm: VirtualMachine) -> None:
        for name, value in properties.items():
            setattr(vm, name, value)

    return change


def _set_disk(**properties: object) -> Change:
    def change(_lab: HyperVWorld, vm: VirtualMachine) -> None:
        for name, value in properties.items():
            setattr(vm.hard_drives[0], name, value)

    return change


def _checkpoint(_lab: HyperVWorld, vm: VirtualMachine) -> None:
    vm.snapshots.append(VMSnapshot(name="before the update", vm_name=vm.name, vm_id=vm.id))


def _differencing(lab: HyperVWorld, vm: VirtualMachine) -> None:
    child = "C:\\VMs\\0\\child.avhdx"
    lab.machine.new_vhd(path=child, parent_path=vm.hard_drives[0].path, differencing=True)
    vm.hard_drives[0].path = child


def _full(lab: HyperVWorld, _vm: VirtualMachine) -> None:
    lab.machine.files.volumes["D"].free_bytes = GIB


def _little_memory(lab: HyperVWorld, vm: VirtualMachine) -> None:
    lab.machine.memory_bytes = vm.memory_startup + GIB // 2


def _no_shutdown_service(_lab: HyperVWorld, vm: VirtualMachine) -> None:
    vm.disabled_services.add("9F8233AC-BE49-4C79-8EE3-E7E1985B2077")


def _passes_by_the_switch(_lab: HyperVWorld, vm: VirtualMachine) -> None:
    vm.network_adapters[0].iov_weight = 100


UNFIT: dict[str, tuple[Change, str]] = {
    "cluster": (_set(is_clustered=True), "cluster"),
    "checkpoints": (_checkpoint, "checkpoint"),
    "shared VHDX": (_set_disk(support_persistent_reservations=True), "shared"),
    "pass-through disk": (_set_disk(disk_number=3, path=""), "passed through"),
    "differencing disk": (_differencing, "stands on another disk"),
    "saved": (_set(state=VMState.SAVED), "Saved"),
    "paused": (_set(state=VMState.PAUSED), "Paused"),
    "critical": (_set(state=VMState.RUNNING_CRITICAL), "RunningCritical"),
    "on its way": (_set(state=VMState.SAVING), "Saving"),
    "domain controller": (_set(product_type=2), "domain controller"),
    "assigned devices": (_set(assigned_devices=1), "devices of the host"),
    "Fibre Channel": (_set(fibre_channel=1), "Fibre Channel"),
    "no shutdown service": (_no_shutdown_service, "shuts a guest down"),
    "SR-IOV": (_passes_by_the_switch, "SR-IOV"),
    "full volume": (_full, "folder of exports"),
    "little memory": (_little_memory, "memory"),
    "quotation marks": (_set(name='the "shop"'), "cannot be one"),
    "slash": (_set(name="shop/db"), "cannot be one"),
}


@pytest.mark.parametrize("why", list(UNFIT))
def test_an_unfit_guest_is_refused_before_anything_is_made(tmp_path: Path, why: str) -> None:
    change, word = UNFIT[why]
    lab = HyperVWorld(tmp_path)
    vm = lab.machine.vm("db")
    change(lab, vm)
    lab.machine.remember()
    before = len(lab.machine.calls)
    outcome = simply(lab, backup(Policy(guest=vm.name)))
    assert isinstance(outcome.error, PreconditionError), outcome.error
    assert outcome.error.exit_code is ExitCode.PRECONDITION
    assert word in f"{outcome.error}{outcome.error.details}"
    assert outcome.error.remedy
    assert not {"New-VMSwitch", "New-Item", "Export-VM"} & set(lab.machine.calls[before:])
    assert lab.machine.harm() == []
    assert lab.machine.leftovers() == []


def _simply_backed_up(lab: HyperVWorld, name: str) -> None:
    succeed(lab, backup(Policy(guest=name)))
    assert [snapshot.manifest.guest for snapshot in lab.store.snapshots(name)] == [name]
    assert lab.machine.leftovers() == []


@pytest.mark.parametrize(
    "name", ["it's", "$(Get-VM)", "`whoami`", "$env", "a; b & c", "two  words", "größer 東京", "[x]", "-Force"]
)
def test_a_guest_of_an_awkward_name_is_like_any_other(tmp_path: Path, name: str) -> None:
    lab = HyperVWorld(tmp_path)
    lab.add_vm(name)
    _simply_backed_up(lab, name)


def test_two_guests_of_one_name_cannot_be_told_apart(tmp_path: Path) -> None:
    lab = HyperVWorld(tmp_path)
    lab.add_vm("db")
    outcome = simply(lab, backup())
    assert isinstance(outcome.error, PreconditionError)
    assert "2 VMs of the name 'db'" in str(outcome.error)
    assert lab.machine.harm() == []
    assert lab.machine.leftovers() == []


def test_names_are_taken_at_their_word(tmp_path: Path) -> None:
    """Hyper-V's own look-up would take these for the running guest."""
    lab = HyperVWorld(tmp_path)
    for name in ("d*", "DB", "d[ab]", ""):
        outcome = simply(lab, backup(Policy.model_construct(**{**dict(Policy(guest="db")), "guest": name})))
        assert isinstance(outcome.error, GuestNotFoundError), name


@pytest.mark.parametrize("generation", list(ModuleGeneration))
def test_an_account_without_rights_is_told_so(tmp_path: Path, generation: ModuleGeneration) -> None:
    """The first generation of the module lists nothing then, without a word."""
    lab = HyperVWorld(tmp_path, speech=Speech(generation=generation, language=Language.GERMAN))
    lab.machine.rights = False
    outcome = simply(lab, backup())
    assert isinstance(outcome.error, PreconditionError)
    assert outcome.error.remedy
    assert lab.machine.leftovers() == []


@pytest.mark.parametrize("generation", list(ModuleGeneration))
def test_a_host_of_another_language_is_like_any_other(tmp_path: Path, generation: ModuleGeneration) -> None:
    lab = HyperVWorld(tmp_path, speech=Speech(generation=generation, language=Language.GERMAN))
    succeed(lab, backup())
    succeed(lab, provision())
    assert order(lab) == []


class _Filling:
    """Fills the volume of exports at a place within the host."""

    def __init__(self, machine: HostState, *, at: str) -> None:
        self.machine = machine
        self.at = at

    def __call__(self, place: str) -> None:
        if place == self.at:
            self.machine.files.volumes["D"].free_bytes = 1000


@pytest.mark.parametrize(
    "place", ["Export-VM: disk 0", "Export-VM: memory", "Import-VM: disk 0", "Import-VM: configuration"]
)
@pytest.mark.parametrize("language", list(Language))
def test_a_volume_that_fills_up_meanwhile_ends_the_run_and_is_emptied(
    tmp_path: Path, place: str, language: Language
) -> None:
    lab = HyperVWorld(tmp_path, speech=Speech(language=language))
    lab.machine.between = _Filling(lab.machine, at=place)
    outcome = simply(lab, backup())
    assert isinstance(outcome.error, NoSpaceError), outcome.error
    assert outcome.error.also == []
    assert lab.store.snapshots() == ()
    assert order(lab) == []
    assert lab.machine.leftovers() == []


def _ending(*, obeys: bool = True, ends_in_order: bool = True, heartbeat: bool = True) -> Change:
    def change(_lab: HyperVWorld, vm: VirtualMachine) -> None:
        inside = vm.truth.inside
        assert isinstance(inside, DatabaseGuest)
        inside.obeys, inside.ends_in_order, inside.heartbeat = obeys, ends_in_order, heartbeat

    return change


ENDINGS: dict[str, tuple[Change, type[VmsnapError]]] = {
    "crashes while it shuts down": (_ending(ends_in_order=False), NotCleanError),
    "does not shut down": (_ending(obeys=False), DeadlineError),
    "cannot be asked": (_ending(heartbeat=False), (DeadlineError)),
}


@pytest.mark.parametrize("how", list(ENDINGS))
def test_a_clone_that_does_not_shut_down_in_order_is_stored_nowhere(tmp_path: Path, how: str) -> None:
    change, kind = ENDINGS[how]
    lab = HyperVWorld(tmp_path)
    change(lab, lab.machine.vm("db"))
    outcome = simply(lab, backup())
    assert isinstance(outcome.error, kind), outcome.error
    assert lab.store.snapshots() == ()
    assert "Stop-VM" not in lab.machine.calls or kind is not NotCleanError
    assert order(lab) == []
    assert lab.machine.leftovers() == []


def test_a_clone_with_a_static_mac_that_the_host_refuses_twice_runs_unplugged(tmp_path: Path) -> None:
    lab = HyperVWorld(tmp_path)
    lab.machine.vm("db").network_adapters[0].dynamic_mac_address_enabled = False
    outcome = simply(lab, backup())
    assert outcome.error is None
    assert lab.machine.calls.count("Start-VM") == 2
    assert len(lab.store.snapshots()) == 1
    assert order(lab) == []
    assert lab.machine.leftovers() == []


def test_a_stranger_on_the_clones_switch_keeps_it_from_running(tmp_path: Path) -> None:
    """Somebody puts another VM on the private switch as soon as it is there."""
    lab = HyperVWorld(tmp_path)
    other = lab.add_vm("web")
    lab.machine.remember()

    def intrude(place: str) -> None:
        private = [switch for switch in lab.machine.switches if switch.switch_type is SwitchType.PRIVATE]
        if place == "Import-VM: realise" and private:
            other.network_adapters[0].switch_name, other.network_adapters[0].switch_id = private[0].name, private[0].id

    lab.machine.between = intrude
    outcome = simply(lab, backup())
    assert isinstance(outcome.error, SafetyError)
    assert "Start-VM" not in lab.machine.calls
    assert [vm.name for vm in lab.machine.vms] == ["db", "web"]
    assert lab.machine.leftovers() == ["switch vmsnap-0000000001"], (
        "a switch that somebody's VM runs on cannot be removed"
    )
    lab.machine.between = lambda _place: None
    (adapter,) = other.network_adapters
    lab.machine.connect_vm_network_adapter(vm_network_adapter=adapter, switch_name="LAN")
    assert simply(lab, reconciling).error is None
    assert lab.machine.leftovers() == []


def test_a_disk_that_somebody_else_has_in_the_folder_of_exports_is_left_alone(tmp_path: Path) -> None:
    lab = HyperVWorld(tmp_path)
    write_headers(lab.machine.files.local(f"{EXPORTS}\\vmsnap-0000000001.vhdx"), size_bytes=GIB)
    lab.machine.files.make_folder(f"{EXPORTS}\\vmsnap-notours")
    lab.machine.remember()
    succeed(lab, backup())
    assert lab.machine.harm() == []
    assert lab.machine.leftovers() == []
    assert lab.machine.files.exists(f"{EXPORTS}\\vmsnap-0000000001.vhdx")
    assert lab.machine.files.exists(f"{EXPORTS}\\vmsnap-notours")
