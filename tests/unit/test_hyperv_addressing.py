"""What a clone on Hyper-V says of its addresses, and who may be beside it on its switch."""

from __future__ import annotations

from ipaddress import IPv4Address
from pathlib import Path

import pytest

from tests.unit.hyperv_hosts import clone, fence_switch, make_host
from vmsnap.errors import GuestCommandError
from vmsnap.hypervisors.hyperv.addressing import leased
from vmsnap.testing.hyperv.machine import HyperVHost
from vmsnap.testing.hyperv.values import VirtualMachine, VMNetworkAdapter, VMState

MAC = "00:15:5d:00:00:01"


def test_only_what_dhcp_gave_the_adapters_that_were_asked_for_counts() -> None:
    text = (
        f'[{{"Mac":"{MAC}","Dhcp":true,"Addresses":["198.18.7.1","169.254.1.2"]}},'
        f'{{"Mac":"{MAC}","Dhcp":false,"Addresses":["198.18.7.2"]}},'
        '{"Mac":"00:15:5d:00:00:99","Dhcp":true,"Addresses":["198.18.7.3"]}]'
    )
    assert leased(text, macs=[MAC]) == {IPv4Address("198.18.7.1"), IPv4Address("169.254.1.2")}
    assert leased("[]", macs=[MAC]) == frozenset()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "null",
        f'[{{"Mac":"{MAC}","Dhcp":1,"Addresses":[]}}]',
        f'[{{"Mac":"{MAC}","Dhcp":true,"Addresses":["fe80::1"]}}]',
        f'[{{"Mac":"{MAC}","Dhcp":true,"Addresses":null}}]',
    ],
)
def test_what_makes_no_sense_is_not_believed(text: str) -> None:
    with pytest.raises(GuestCommandError):
        leased(text, macs=[MAC])


def _with_responder(host: HyperVHost, *, adapters: int) -> VirtualMachine:
    plugs = [VMNetworkAdapter(mac_address=f"00155D00FF{index:02X}") for index in range(adapters)]
    vm = VirtualMachine(name="dhcp", state=VMState.RUNNING, network_adapters=plugs)
    vm.truth.serves = "198.18.7."
    return host.add_vm(vm)


@pytest.mark.parametrize(("adapters", "harmless"), [(1, True), (2, False)])
def test_a_responder_is_beside_a_clone_with_one_adapter_only(tmp_path: Path, adapters: int, *, harmless: bool) -> None:
    host = make_host(tmp_path)
    responder = _with_responder(host, adapters=adapters)
    copy, switch = clone(host), fence_switch(host)
    for vm in (copy, responder):
        host.connect_vm_network_adapter(vm_network_adapter=vm.network_adapters[0], vm_switch=switch)
    assert (host.violations == []) == harmless
    assert "responder dhcp on a switch" in host.leftovers()


def test_a_responder_on_the_switch_of_production_is_harm(tmp_path: Path) -> None:
    host = make_host(tmp_path)
    responder = _with_responder(host, adapters=1)
    host.connect_vm_network_adapter(vm_network_adapter=responder.network_adapters[0], switch_name="LAN")
    assert host.violations == ["the responder dhcp is on the switch 'LAN'"]
