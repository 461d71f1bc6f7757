"""The Hyper-V driver and its fence do what every driver and fence must do, over the simulated host."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.hyperv_hosts import DISK_BYTES, EXPORTS, add_guest, make_host
from vmsnap.errors import GuestUnreachableError
from vmsnap.hypervisors.hyperv.commands import Commands
from vmsnap.hypervisors.hyperv.connection import HostConnection, Login
from vmsnap.hypervisors.hyperv.driver import HyperVHypervisor
from vmsnap.hypervisors.hyperv.fence import HyperVFence
from vmsnap.hypervisors.hyperv.host import Host
from vmsnap.hypervisors.hyperv.running import ScriptRunner
from vmsnap.hypervisors.hyperv.tags import RunFolders
from vmsnap.hypervisors.hyperv.transport import Transport
from vmsnap.model.capture import CaptureChoice, CaptureSettings, DiskImage
from vmsnap.model.guest import GuestState
from vmsnap.model.isolation import FencePlan, ProofKind
from vmsnap.model.journal import ResourceKind
from vmsnap.ports.hypervisor import Hypervisor
from vmsnap.ports.network import Fence
from vmsnap.testing.fence_contract import FenceContract, FenceHarness
from vmsnap.testing.hyperv.endpoint import PASSWORD, USER, Endpoint
from vmsnap.testing.hyperv.machine import HyperVHost
from vmsnap.testing.hyperv.running import TwinDispatcher, TwinRunner
from vmsnap.testing.hyperv.values import SwitchType, VMNetworkAdapter, VMState
from vmsnap.testing.hypervisor_contract import BootingContract, HypervisorContract, HypervisorHarness, Manner
from vmsnap.testing.world import FakeClock


def connect(machine: HyperVHost, runner: ScriptRunner | None = None) -> Host:
    """Return the host as a driver reaches it, its folder of exports being mounted where it is."""
    folders = RunFolders(root=EXPORTS, mounted=str(machine.files.local(EXPORTS)))
    return Host(runner or TwinRunner(machine), folders=folders)


class NoLogins:
    def login(self, guest: str) -> None:
        return None


class HyperVHarness:
    """A simulated host with one guest of two disks."""

    guest = "db"
    manner = Manner(
        prepared=frozenset({ResourceKind.CLONE_OVERLAYS, ResourceKind.MEMORY}),
        leaves_home=False,
        replugs=False,
        waits=GuestState.SHUT_OFF,
        sees_all=False,
    )

    def __init__(self, folder: Path, *, settings: CaptureSettings | None = None, generation: int = 2) -> None:
        self.settings = settings or CaptureSettings()
        self.machine = make_host(folder / "host", disks=2)
        if generation == 1:
            self.guest = "old"
            add_guest(self.machine, "old", disks=2, generation=1)
        self._scratch = folder
        self.hypervisor: Hypervisor = self.another_process()
        self.fence: Fence = HyperVFence(connect(self.machine, self.runner()))

    def runner(self) -> ScriptRunner:
        """Return the line of another process to the host."""
        return TwinRunner(self.machine)

    def another_process(self) -> Hypervisor:
        return HyperVHypervisor(connect(self.machine, self.runner()), clock=FakeClock(), logins=NoLogins())

    def require_answer(self, domain: str) -> None:
        (vm,) = self.machine.get_vm(name=domain)
        if vm.heartbeat != "OkApplicationsUnknown":
            raise GuestUnreachableError(f"{domain} does not answer")

    def stored_images(self) -> tuple[DiskImage, ...]:
        images = []
        for disk in self.hypervisor.inspect(self.guest).disks:
            path = self._scratch / f"{disk.target}.raw"
            with path.open("wb") as file:
                file.truncate(DISK_BYTES)
            image = DiskImage(target=disk.target, path=str(path), image_format="raw", size_bytes=DISK_BYTES)
            images.append(image)
        return tuple(images)

    def close(self) -> None:
        assert self.machine.harm() == []
        assert self.machine.leftovers() == []


class TestHyperVHypervisor(HypervisorContract):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> Iterator[HypervisorHarness]:
        harness = HyperVHarness(tmp_path)
        yield harness
        harness.close()


class TestHyperVHypervisorOfTheFirstGeneration(HypervisorContract):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> Iterator[HypervisorHarness]:
        harness = HyperVHarness(tmp_path, generation=1)
        yield harness
        harness.close()


class TestHyperVHypervisorThatTakesDisksAlone(BootingContract):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> Iterator[HypervisorHarness]:
        harness = HyperVHarness(tmp_path, settings=CaptureSettings(mode=CaptureChoice.BOOT))
        yield harness
        harness.close()


class WireHarness(HyperVHarness):
    """The same host behind WinRM on the loopback interface: every script crosses the wire, and its answer comes back."""

    def __init__(self, folder: Path) -> None:
        self._endpoint: Endpoint | None = None
        self._lines: list[Commands] = []
        super().__init__(folder)

    def runner(self) -> ScriptRunner:
        if self._endpoint is None:
            self._endpoint = Endpoint(TwinDispatcher(self.machine))
        connection = HostConnection(
            host="127.0.0.1",
            port=self._endpoint.port,
            tls=False,
            login=Login(user=USER, password=PASSWORD),
        )
        line = Commands(Transport(connection))
        self._lines.append(line)
        return line

    def close(self) -> None:
        for line in self._lines:
            line.close()
        if self._endpoint is not None:
            self._endpoint.close()
        super().close()


class TestHyperVHypervisorOverTheWire(HypervisorContract):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> Iterator[HypervisorHarness]:
        harness = WireHarness(tmp_path)
        yield harness
        harness.close()


class SwitchHarness:
    """A simulated host on which VMs appear as an import would leave them."""

    shows = frozenset({ProofKind.TOPOLOGY})

    def __init__(self, folder: Path) -> None:
        self.machine = make_host(folder)
        # The original that the suite's plans name.
        original = add_guest(self.machine, "shop db/1")
        original.network_adapters.clear()
        for index in range(3):
            adapter = VMNetworkAdapter(mac_address=f"5254000000{index:02X}", switch_name="production")
            original.network_adapters.append(adapter)
        self.machine.bind(adapter_of=original)
        self.fence: Fence = HyperVFence(connect(self.machine))

    def end_of(self, plan: FencePlan) -> str:
        return plan.ports[0].mac

    def middle_of(self, plan: FencePlan) -> str:
        return plan.namespace

    def attach_clone(self, plan: FencePlan) -> None:
        machine = self.machine
        vm = machine.new_vm(name=f"vmsnap-clone-{plan.run}", path=f"{EXPORTS}\\vmsnap-{plan.run}", no_vhd=True)
        machine.set_vm(vm=vm, notes=f"vmsnap clone {plan.run} \n", automatic_start_action="Nothing")
        vm.network_adapters.clear()
        (switch,) = machine.get_vm_switch(name=f"vmsnap-{plan.run}")
        for port in plan.ports:
            machine.add_vm_network_adapter(vm=vm, static_mac_address=port.mac.replace(":", ""))
            machine.connect_vm_network_adapter(vm_network_adapter=vm.network_adapters[-1], vm_switch=switch)

    def detach_clone(self, plan: FencePlan) -> None:
        for vm in tuple(self.machine.vms):
            if vm.name in (f"vmsnap-clone-{plan.run}", "intruder"):
                vm.state = VMState.OFF
                self.machine.remove_vm(vm=vm, force=True)

    def add_foreign_member(self, plan: FencePlan) -> None:
        vm = self.machine.new_vm(name="intruder", no_vhd=True)
        (switch,) = self.machine.get_vm_switch(name=f"vmsnap-{plan.run}")
        self.machine.connect_vm_network_adapter(vm_network_adapter=vm.network_adapters[0], vm_switch=switch)

    def lose_rule(self, plan: FencePlan) -> None:
        (switch,) = self.machine.get_vm_switch(name=f"vmsnap-{plan.run}")
        switch.switch_type, switch.allow_management_os = SwitchType.INTERNAL, True


class TestHyperVFence(FenceContract):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> FenceHarness:
        return SwitchHarness(tmp_path)
