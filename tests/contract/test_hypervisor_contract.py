from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from vmsnap.model.capture import CaptureChoice, CaptureSettings, Detach, DiskImage, DiskSnapshot
from vmsnap.ports.hypervisor import Hypervisor
from vmsnap.testing.fake_host import DISK_BYTES
from vmsnap.testing.fake_hypervisor import FakeHypervisor
from vmsnap.testing.fake_network import FakeFence
from vmsnap.testing.hypervisor_contract import (
    ANSWER,
    BootingContract,
    CopyingContract,
    HypervisorContract,
    HypervisorHarness,
    Manner,
)
from vmsnap.testing.world import FakeWorld


class FakeHarness:
    """A fake host with one guest of two disks."""

    guest = "db"

    def __init__(self, folder: Path, *, settings: CaptureSettings | None = None) -> None:
        self.settings = settings or CaptureSettings()
        self.lab = FakeWorld(folder, disks=2)
        self.lab.network.needs_watch = False
        self.hypervisor: Hypervisor = self.another_process()
        self.fence = FakeFence(self.lab.network)

    @property
    def manner(self) -> Manner:
        return Manner()

    def require_answer(self, domain: str) -> None:
        self.hypervisor.agent(domain).send('{"execute":"guest-ping"}', timeout=ANSWER)

    def another_process(self) -> Hypervisor:
        return FakeHypervisor(self.lab.host, clock=self.lab.clock)

    def stored_images(self) -> tuple[DiskImage, ...]:
        return tuple(
            DiskImage(target=target, path=f"/store/{target}.raw", image_format="raw", size_bytes=DISK_BYTES)
            for target in ("vda", "vdb")
        )


class TestFakeHypervisor(HypervisorContract):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> Iterator[HypervisorHarness]:
        harness = FakeHarness(tmp_path)
        yield harness
        assert harness.lab.host.harm() == []
        assert harness.lab.leftovers() == ()


class TestFakeHypervisorWithReflinks(CopyingContract):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> Iterator[HypervisorHarness]:
        harness = FakeHarness(tmp_path, settings=CaptureSettings(detach=Detach.AUTO))
        yield harness
        assert harness.lab.host.harm() == []
        assert harness.lab.leftovers() == ()


class TestFakeHypervisorThatTakesDisksAlone(BootingContract):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> Iterator[HypervisorHarness]:
        harness = FakeHarness(tmp_path, settings=CaptureSettings(mode=CaptureChoice.BOOT))
        yield harness
        assert harness.lab.host.harm() == []
        assert harness.lab.leftovers() == ()


class TestFakeHypervisorThatTakesGuestsInstantly(HypervisorContract):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> Iterator[HypervisorHarness]:
        harness = FakeHarness(tmp_path, settings=CaptureSettings(mode=CaptureChoice.INSTANT))
        yield harness
        assert harness.lab.host.harm() == []
        assert harness.lab.leftovers() == ()


class TestFakeHypervisorWithStorageSnapshots(CopyingContract):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> Iterator[HypervisorHarness]:
        harness = FakeHarness(tmp_path, settings=CaptureSettings(disk_snapshot=DiskSnapshot.STORAGE))
        yield harness
        assert harness.lab.host.harm() == []
        assert harness.lab.leftovers() == ()
