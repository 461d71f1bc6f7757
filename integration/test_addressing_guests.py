"""The ladder against real guests: their kernels, virtio cards that leave checksums unfinished, libvirt's cables."""

from __future__ import annotations

from datetime import timedelta
from ipaddress import IPv4Address, IPv4Interface

import pytest

from integration.conftest import MakeGuest
from integration.lab.domain import GuestSpec
from integration.lab.guest import LabGuest
from integration.lab.lab import Lab
from integration.networld import SwitchCancel, plan_for, sh
from vmsnap.guests.agent import AgentControl
from vmsnap.hypervisors.libvirt.agent import LibvirtAgentChannel
from vmsnap.hypervisors.libvirt.connection import Connection
from vmsnap.model.guest import OldAddress
from vmsnap.model.isolation import Rung
from vmsnap.network.fence import NetworkFence
from vmsnap.network.ladder import NetworkAddressing
from vmsnap.ports.network import AddressRequest
from vmsnap.state.clock import SystemClock


class VirshCables:
    def __init__(self, domain: str) -> None:
        self._domain = domain

    def set_link(self, *, mac: str, up: bool) -> None:
        sh("virsh", "domif-setlink", self._domain, mac, "up" if up else "down")

    def replug(self, *, mac: str, deadline: timedelta) -> None:
        raise AssertionError


@pytest.mark.parametrize("static", [None, "10.77.0.55/24"], ids=["networkd", "static"])
def test_real_guests_are_reached(static: str | None, make_guest: MakeGuest, lab: Lab) -> None:
    guest = make_guest(GuestSpec(static_address=static))
    old = OldAddress(interface=IPv4Interface(f"{guest.address()}/24"), gateway=IPv4Address("10.77.0.1"))
    tap = sh("virsh", "domiflist", guest.name).split()[-5]
    connection = Connection("qemu:///system")
    try:
        # From one fence to the next: for a DHCP client each is a network on which its lease is not valid.
        for rung in (Rung.AGENT, Rung.LINK_FLAP) if static is None else (Rung.OLD_ADDRESS,):
            tap = reach_real_guest(guest, rung, tap=tap, old=old, connection=connection, factor=lab.time_factor)
    finally:
        connection.close()


def reach_real_guest(
    guest: LabGuest, rung: Rung, *, tap: str, old: OldAddress, connection: Connection, factor: float
) -> str:
    """Turn a running guest's tap into a fence's, as if libvirt had restored a clone there, and reach it by one rung.

    Returns the tap's new name; the fence is gone by then.
    """
    plan = plan_for(macs=guest.spec.macs)
    (port,) = plan.ports
    fence = NetworkFence()
    fence.build(plan)
    try:
        sh("ip", "link", "set", tap, "name", port.tap)
        sh("ip", "link", "set", port.tap, "master", port.bridge)
        fence.prove(plan)
        request = AddressRequest(
            fence=plan, ladder=(rung,), old_addresses=(old,), probe_port=22, rung_deadline=timedelta(seconds=20 * factor),
            agent=AgentControl(LibvirtAgentChannel(connection, domain=guest.name), clock=SystemClock()),
        )  # fmt: skip
        with NetworkAddressing(clock=SystemClock()) as addressing:
            moved = addressing.move(request, links=VirshCables(guest.name), cancel=SwitchCancel())
            print(f"real guest, {rung}: {moved.seconds:.2f} s, {moved.address}")
            assert moved.rung is rung
            assert moved.seconds < (2 if rung is Rung.OLD_ADDRESS else 15) * factor
            assert moved.address is not None
            assert (moved.address == str(old.interface.ip)) is (rung is Rung.OLD_ADDRESS)
            with fence.connector(plan)(moved.address, 22, timedelta(seconds=5 * factor)) as ssh:
                ssh.settimeout(5 * factor)
                assert ssh.recv(64).startswith(b"SSH-2.0")
            counts = fence.counts(plan)
            assert all(counts[f"elsewhere to {link}"].packets == 0 for link in (port.tap, port.veth_host))
    finally:
        # Removing a fence removes its taps: this one is the guest's, and not the fence's to remove.
        sh("ip", "link", "set", port.tap, "nomaster", check=False)
        sh("ip", "link", "set", port.tap, "name", f"{port.tap[:-2]}x0", check=False)
        fence.release(fence.resource(plan), deadline=timedelta(seconds=10))
    return f"{port.tap[:-2]}x0"
