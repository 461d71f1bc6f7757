"""The libvirt driver over a real guest does what every hypervisor's driver must do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from integration.lab.guest import LabGuest
from integration.lab.lab import Lab
from integration.libvirt_runs import PATIENT, RUNTIME, new_driver, wait_for_answer
from vmsnap.hypervisors.libvirt.driver import LibvirtHypervisor
from vmsnap.model.capture import CaptureSettings, DiskImage
from vmsnap.network.fence import NetworkFence
from vmsnap.ports.hypervisor import Hypervisor
from vmsnap.ports.network import Fence
from vmsnap.testing.hypervisor_contract import ANSWER, HypervisorContract, HypervisorHarness, Manner

IMAGE_BYTES = 1 << 30


class LibvirtHarness:
    """The lab's libvirtd and its shared guest. Each 'process' has a connection of its own."""

    def __init__(self, lab: Lab, guest: LabGuest) -> None:
        self._lab = lab
        self._drivers: list[LibvirtHypervisor] = []
        self.hypervisor: Hypervisor = self.another_process()
        self.fence: Fence = NetworkFence()
        self.guest = guest.name
        self.settings: CaptureSettings = PATIENT

    @property
    def manner(self) -> Manner:
        return Manner()

    def require_answer(self, domain: str) -> None:
        limit_s = ANSWER.total_seconds() * self._lab.time_factor
        wait_for_answer(self.hypervisor, domain=domain, limit_s=limit_s)

    def another_process(self) -> Hypervisor:
        driver = new_driver(self._lab)
        self._drivers.append(driver)
        return driver

    def stored_images(self) -> tuple[DiskImage, ...]:
        path = self._lab.scratch / "stored.raw"
        with path.open("wb") as file:
            file.truncate(IMAGE_BYTES)
        return (DiskImage(target="vda", path=str(path), image_format="raw", size_bytes=IMAGE_BYTES),)

    def close(self) -> None:
        for driver in self._drivers:
            driver.close()
        (self._lab.scratch / "stored.raw").unlink(missing_ok=True)
        if RUNTIME.exists():
            RUNTIME.rmdir()


class TestLibvirtHypervisor(HypervisorContract):
    @pytest.fixture
    def harness(self, lab: Lab, guest: LabGuest) -> Iterator[HypervisorHarness]:
        harness = LibvirtHarness(lab, guest)
        yield harness
        harness.close()
