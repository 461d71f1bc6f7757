"""Taking a NIC out of a running clone and putting it back into the same slot, on the same tap and bridge of its fence.

The clone stands still from before the NIC is back, so that its fence can be proven first. In between there is no NIC and
no tap. The fence's rules match the tap by name, so they hold for the new one from its first frame on.
"""

from __future__ import annotations

import copy
import time
import xml.etree.ElementTree as ET
from datetime import timedelta
from typing import Any

import libvirt

from vmsnap.errors import BugError, DeadlineError, SafetyError, VmsnapError
from vmsnap.hypervisors.libvirt.connection import translated
from vmsnap.hypervisors.libvirt.inspect import nic_mac
from vmsnap.hypervisors.libvirt.xml import devices, drop, parse, unparse
from vmsnap.model.isolation import FencePort

_POLL_SECONDS = 0.1
_LIVE = libvirt.VIR_DOMAIN_AFFECT_LIVE


def replug(domain: Any, *, port: FencePort, deadline: timedelta) -> None:
    """See ports.hypervisor. The caller has made sure that the domain is a clone of the port's run."""
    before = _nic(domain, port=port)
    if before is None:
        raise BugError(f"the clone has no interface {port.mac}")
    _take_out(domain, before, port=port, deadline=deadline)
    try:
        with translated(f"pause the clone and put its NIC {port.mac} back"):
            domain.suspend()
            domain.attachDeviceFlags(unparse(_for_attaching(before)), _LIVE)
        after = _nic(domain, port=port)
    except VmsnapError as error:
        raise SafetyError(
            f"the clone's NIC {port.mac} could not be put back, and its fence cannot be proven: {error.brief}",
            details=error.details,
            remedy="leave the rung 'hot-plug' out of the policy's ladder",
        ) from error
    if after is None or _attachment(after) != (port.bridge, port.tap) or _slot(after) != _slot(before):
        raise SafetyError(
            f"the clone's NIC {port.mac} did not come back where it was",
            details=unparse(after) if after is not None else "it is not there",
            remedy="leave the rung 'hot-plug' out of the policy's ladder",
        )


def _take_out(domain: Any, nic: ET.Element, *, port: FencePort, deadline: timedelta) -> None:
    until = time.monotonic() + deadline.total_seconds()
    with translated(f"take the clone's NIC {port.mac} out"):
        domain.detachDeviceFlags(unparse(nic), _LIVE)
    while _nic(domain, port=port) is not None:
        if time.monotonic() > until:
            raise DeadlineError(
                f"the guest did not let go of the NIC {port.mac}",
                remedy="it has to support PCI hot-plug (a q35 machine needs a free pcie-root-port for the NIC); "
                "leave the rung 'hot-plug' out of the policy's ladder",
            )
        time.sleep(_POLL_SECONDS)


def _nic(domain: Any, *, port: FencePort) -> ET.Element | None:
    with translated("describe the clone"):
        root = parse(domain.XMLDesc(0))
    return next((nic for nic in devices(root).findall("interface") if nic_mac(nic) == port.mac.lower()), None)


def _for_attaching(nic: ET.Element) -> ET.Element:
    """Return the NIC as it was, its cable in, without what libvirt alone gives out."""
    wanted = copy.deepcopy(nic)
    drop(wanted, "alias", "link")
    return wanted


def _attachment(nic: ET.Element) -> tuple[str | None, str | None]:
    source, target = nic.find("source"), nic.find("target")
    return None if source is None else source.get("bridge"), None if target is None else target.get("dev")


def _slot(nic: ET.Element) -> dict[str, str]:
    address = nic.find("address")
    return {} if address is None else dict(address.attrib)
