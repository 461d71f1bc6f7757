"""What a clone may use of its host: set on it while it is paused."""

from __future__ import annotations

import logging
from typing import Any

import libvirt

from vmsnap.hypervisors.libvirt.connection import translated
from vmsnap.hypervisors.libvirt.inspect import disk_target, nic_mac, writable_disks
from vmsnap.hypervisors.libvirt.xml import devices, parse
from vmsnap.model.capture import CloneLimits

_LOG = logging.getLogger(__name__)
_LIVE = libvirt.VIR_DOMAIN_AFFECT_LIVE
NORMAL_SHARES = 1024
"""The CPU weight of a VM of which nothing is said, as policies count it."""
_WEIGHT_V2 = 100
_PERIOD_US = 100_000
_KIB = 1024
_QEMU_BYTES = 1 << 30


def cpu_weight(cpu_shares: int, *, normal: int) -> int:
    """Return a policy's CPU weight, in which 1024 is that of other VMs, in the host's measure.

    ``normal`` is what libvirt gives a VM without a word: 1024 in cgroups version 1 (2 to 262144), 100 in version 2 (1 to
    10000: Linux, Documentation/admin-guide/cgroup-v2.rst, cpu.weight).
    """
    largest = 262144 if normal > _WEIGHT_V2 else 10000
    return min(max(2, cpu_shares * normal // NORMAL_SHARES), largest)


def limit_memory(domain: Any, *, ram_bytes: int) -> None:
    """Let a clone's control group hold its RAM and what QEMU needs beside it, and no more.

    A QEMU that takes more is ended in its group, before anybody else is short of memory. A host whose libvirt does not use
    the memory controller has ``oom_score_adj`` alone.
    """
    most = ram_bytes + ram_bytes // 4 + _QEMU_BYTES
    try:
        domain.setMemoryParameters({"hard_limit": most // _KIB}, _LIVE)
    except libvirt.libvirtError as error:
        _LOG.info("the clone's memory has no limit: %s", error)


def set_limits(domain: Any, *, cpu_shares: int, limits: CloneLimits) -> None:
    """Set a clone's CPU weight, and the limits that there are. Raises DriverError where the host has no way to keep one."""
    with translated("set the clone's CPU weight"):
        normal = int(domain.schedulerParametersFlags(_LIVE)["cpu_shares"])
        parameters = {"cpu_shares": cpu_weight(cpu_shares, normal=normal)}
        if limits.cpu_percent is not None:
            parameters |= {"vcpu_period": _PERIOD_US, "vcpu_quota": _PERIOD_US * limits.cpu_percent // 100}
        domain.setSchedulerParametersFlags(parameters, _LIVE)
    with translated("set the limits of the clone's disks", remedy="take disk_mib_s and disk_iops out of [clone]"):
        root = parse(domain.XMLDesc(0))
        rates = {"total_bytes_sec": limits.disk_bytes_per_second, "total_iops_sec": limits.disk_operations_per_second}
        tune = {name: rate for name, rate in rates.items() if rate is not None}
        for disk in writable_disks(root) if tune else ():
            domain.setBlockIoTune(disk_target(disk), tune, _LIVE)
    if limits.network_bytes_per_second is not None:
        with translated("set the limits of the clone's network cards", remedy="take network_mib_s out of [clone]"):
            average = max(1, limits.network_bytes_per_second // _KIB)
            for interface in devices(root).findall("interface"):
                rates_of_nic = {"inbound.average": average, "outbound.average": average}
                domain.setInterfaceParameters(nic_mac(interface), rates_of_nic, _LIVE)
