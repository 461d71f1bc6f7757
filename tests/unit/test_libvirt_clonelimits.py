"""What is set on a clone before it runs, as libvirt is told it."""

from __future__ import annotations

import libvirt
import pytest

from tests.unit.libvirt_domains import domain_xml
from vmsnap.errors import DriverError
from vmsnap.hypervisors.libvirt.clonelimits import limit_memory, set_limits
from vmsnap.model.capture import CloneLimits

LIVE = libvirt.VIR_DOMAIN_AFFECT_LIVE


class Domain:
    """A clone on a host with control groups of version 2. ``refuses``: what the host has no way to do."""

    def __init__(self, *, refuses: str = "") -> None:
        self.refuses = refuses
        self.told: list[tuple[object, ...]] = []

    def _tell(self, what: str, *said: object) -> None:
        if what == self.refuses:
            raise libvirt.libvirtError("no such controller")
        self.told.append((what, *said))

    def XMLDesc(self, flags: int) -> str:  # noqa: N802 - libvirt's names
        assert flags == 0
        return domain_xml("disk raw")

    def schedulerParametersFlags(self, flags: int) -> dict[str, int]:  # noqa: N802
        assert flags == LIVE
        return {"cpu_shares": 100}

    def setSchedulerParametersFlags(self, parameters: dict[str, int], flags: int) -> None:  # noqa: N802
        assert flags == LIVE
        self._tell("cpu", parameters)

    def setBlockIoTune(self, disk: str, tune: dict[str, int], flags: int) -> None:  # noqa: N802
        assert flags == LIVE
        self._tell("disk", disk, tune)

    def setInterfaceParameters(self, mac: str, rates: dict[str, int], flags: int) -> None:  # noqa: N802
        assert flags == LIVE
        self._tell("nic", mac, rates)

    def setMemoryParameters(self, parameters: dict[str, int], flags: int) -> None:  # noqa: N802
        assert flags == LIVE
        self._tell("memory", parameters)


def test_without_limits_only_the_weight_is_set() -> None:
    domain = Domain()
    set_limits(domain, cpu_shares=64, limits=CloneLimits())
    assert domain.told == [("cpu", {"cpu_shares": 6})]


def test_every_limit_is_set_on_every_disk_and_card() -> None:
    domain = Domain()
    limits = CloneLimits(
        cpu_percent=50,
        disk_bytes_per_second=1 << 20,
        disk_operations_per_second=99,
        network_bytes_per_second=2 << 20,
    )
    set_limits(domain, cpu_shares=1024, limits=limits)
    kinds = [what for what, *_ in domain.told]
    assert kinds[0] == "cpu"
    assert domain.told[0][1] == {"cpu_shares": 100, "vcpu_period": 100_000, "vcpu_quota": 50_000}
    disks = [said for what, *said in domain.told if what == "disk"]
    assert [disk for disk, _ in disks] == ["vda", "vdb"]
    assert all(tune == {"total_bytes_sec": 1 << 20, "total_iops_sec": 99} for _, tune in disks)
    nics = [rates for what, _, rates in (told for told in domain.told if told[0] == "nic")]
    assert nics
    assert all(rates == {"inbound.average": 2048, "outbound.average": 2048} for rates in nics)


@pytest.mark.parametrize(("part", "key"), [("disk", "disk_iops"), ("nic", "network_mib_s")])
def test_a_limit_that_the_host_cannot_keep_is_an_error_with_a_remedy(part: str, key: str) -> None:
    limits = CloneLimits(disk_operations_per_second=9, network_bytes_per_second=1 << 20)
    with pytest.raises(DriverError) as caught:
        set_limits(Domain(refuses=part), cpu_shares=64, limits=limits)
    assert caught.value.remedy is not None
    assert key in caught.value.remedy


def test_a_host_without_the_memory_controller_does_without() -> None:
    domain = Domain()
    limit_memory(domain, ram_bytes=4 << 30)
    assert domain.told == [("memory", {"hard_limit": 6 << 20})]
    limit_memory(Domain(refuses="memory"), ram_bytes=4 << 30)
