"""Taking a NIC out and putting it back, over a domain that does as it likes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import libvirt
import pytest

from vmsnap.errors import BugError, DeadlineError, SafetyError
from vmsnap.hypervisors.libvirt.replug import replug
from vmsnap.model.isolation import FencePort

PORT = FencePort(
    index=0, mac="52:54:00:aa:00:01", bridge="vs1b0", tap="vs1t0", veth_host="vs1h0", veth_inside="vs1n0"
)  # fmt: skip
NIC = (
    "<interface type='bridge'><mac address='52:54:00:aa:00:01'/><source bridge='vs1b0'/><target dev='vs1t0'/>"
    "<model type='virtio'/><link state='down'/><alias name='net0'/>"
    "<address type='pci' domain='0x0000' bus='0x01' slot='0x00' function='0x0'/></interface>"
)


class Domain:
    """A running domain with at most one NIC."""

    def __init__(self, *, keeps: bool = False, attach: Callable[[str], str] = str) -> None:
        self.nic = NIC
        self.running = True
        self.attached = ""
        self._keeps = keeps
        self._attach = attach

    def XMLDesc(self, _flags: int) -> str:  # noqa: N802 - libvirt's name
        return f"<domain><devices>{self.nic}</devices></domain>"

    def detachDeviceFlags(self, _xml: str, flags: int) -> None:  # noqa: N802
        assert flags == libvirt.VIR_DOMAIN_AFFECT_LIVE
        assert self.running, "a guest that stands still lets nothing go"
        if not self._keeps:
            self.nic = ""

    def suspend(self) -> None:
        assert self.nic == "", "it stands still from before its NIC is back, and not longer than needed"
        self.running = False

    def attachDeviceFlags(self, xml: str, _flags: int) -> None:  # noqa: N802
        assert not self.running
        self.attached = xml
        self.nic = self._attach(xml)


def test_the_nic_comes_back_into_a_domain_that_stands_still() -> None:
    domain = Domain()
    replug(domain, port=PORT, deadline=timedelta(seconds=1))
    assert not domain.running
    assert "alias" not in domain.attached
    assert "link" not in domain.attached, "its cable is in"
    assert "slot" in domain.attached


def test_a_guest_that_keeps_its_nic_runs_on() -> None:
    domain = Domain(keeps=True)
    with pytest.raises(DeadlineError, match="did not let go"):
        replug(domain, port=PORT, deadline=timedelta(seconds=0.2))
    assert domain.running
    assert domain.attached == ""


def _refuse(_xml: str) -> str:
    raise libvirt.libvirtError("no free slot")


@pytest.mark.parametrize(
    "attach",
    [
        _refuse,
        lambda _: "",
        lambda xml: xml.replace("vs1b0", "prod"),
        lambda xml: xml.replace("vs1t0", "vnet7"),
        lambda xml: xml.replace('bus="0x01"', 'bus="0x02"'),
    ],
    ids=["refused", "vanished", "another bridge", "another tap", "another slot"],
)
def test_a_nic_that_does_not_come_back_as_it_was_is_a_breach(attach: Callable[[str], str]) -> None:
    domain = Domain(attach=attach)
    with pytest.raises(SafetyError) as raised:
        replug(domain, port=PORT, deadline=timedelta(seconds=1))
    assert raised.value.remedy
    assert not domain.running, "it executes nothing any more"


def test_a_nic_that_was_never_there_is_a_bug() -> None:
    with pytest.raises(BugError):
        replug(Domain(), port=replace(PORT, mac="52:54:00:aa:00:02"), deadline=timedelta(seconds=1))
