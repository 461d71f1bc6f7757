"""DHCP on the switches of the simulated host: VMs that serve, and guests that ask."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib import resources

from vmsnap.engines.windows import names_in
from vmsnap.model.command import Command, CommandResult
from vmsnap.testing.hyperv.values import ALIVE, DhcpClient, VirtualMachine, VMNetworkAdapter

SCRIPT = "windows_renew"
SCRIPT_SHA256 = "c26fc0bada98770e0b7bfab16cc0d0bb4820f754f67fb2bc0781a64a64aab459"
"""Of ``windows_renew.ps1``, whose twin is ``answer``: an edited script fails until its twin was looked at."""


def ask(vms: Sequence[VirtualMachine], adapter: VMNetworkAdapter) -> bool:
    """Let an adapter ask on its switch for an address; tell whether somebody there gave it one. Else it keeps what it has."""
    for server in vms:
        on = any(other.switch_id == adapter.switch_id for other in server.network_adapters)
        if adapter.connected and server.truth.serves and server.state in ALIVE and on and server.id != adapter.vm_id:
            adapter.ip_addresses = (f"{server.truth.serves}{int(adapter.mac_address[-2:], 16)}",)
            return True
    return False


def digest_now() -> str:
    """Return the SHA-256 of the script as it is now."""
    return hashlib.sha256(
        (resources.files("vmsnap.engines") / "scripts" / f"{SCRIPT}.ps1").read_text(encoding="utf-8").encode()
    ).hexdigest()


def is_asked(command: Command) -> bool:
    """Tell whether a command runs the script."""
    return command.argv[0] == "powershell.exe" and names_in(command) == (SCRIPT,)


def answer(vms: Sequence[VirtualMachine], vm: VirtualMachine, command: Command) -> CommandResult:
    """Do in a VM's guest what the script would do there. Raises LookupError where it was edited since."""
    if digest_now() != SCRIPT_SHA256:
        raise LookupError(f"the script {SCRIPT!r} was edited since its twin was looked at")
    given = json.loads(command.stdin)
    wanted = [one for one in vm.network_adapters if _mac(one) in given["Macs"]]
    for adapter in wanted if given["Renew"] == 1 else ():
        if adapter.client is not DhcpClient.NONE and not ask(vms, adapter):
            adapter.ip_addresses = ("169.254.7.7",)
    found = [
        {"Mac": _mac(one), "Dhcp": one.client is not DhcpClient.NONE, "Addresses": list(one.ip_addresses)}
        for one in wanted
    ]
    return CommandResult(exit_status=0, stdout=json.dumps(found).encode())


def _mac(adapter: VMNetworkAdapter) -> str:
    digits = adapter.mac_address.lower()
    return ":".join(digits[place : place + 2] for place in range(0, 12, 2))
