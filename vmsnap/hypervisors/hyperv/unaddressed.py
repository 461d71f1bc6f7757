"""What there is of addresses on Hyper-V: nothing. Nobody but the clone is on its private switch, so nobody can give it one.

Ports of network (``vmsnap.ports.network.Addressing``, ``vmsnap.ports.service.Residences``) that say so before anything is
touched. A DHCP server on the switch would be another VM there, and a fence with a stranger in it is not proven.
"""

from __future__ import annotations

from typing import NoReturn

from vmsnap.errors import PreconditionError
from vmsnap.model.guest import OldAddress
from vmsnap.model.isolation import Addressed, FencePlan
from vmsnap.ports.clock import Cancel
from vmsnap.ports.network import AddressRequest, LinkControl
from vmsnap.ports.service import Place, Residence


class NoAddresses:
    """Refuses to give clones addresses."""

    def require_possible(self) -> None:
        """Raise PreconditionError."""
        _refuse()

    def move(self, request: AddressRequest, *, links: LinkControl, cancel: Cancel) -> Addressed:
        """Raise PreconditionError."""
        del request, links, cancel
        _refuse()


def _refuse() -> NoReturn:
    raise PreconditionError(
        "a clone on Hyper-V has no address: it is reached by PowerShell Direct, or not at all",
        remedy='leave control.via and isolation.address at "auto", and name an administrator of the guest in '
        "hyperv.guest_credential; does PowerShell Direct reach the guest (Windows 10, Server 2016 or later)?",
    )


class NoResidences:
    """Refuses to make the inside of a fence the network that a VM knew."""

    def open(self, plan: FencePlan, *, places: tuple[Place, ...]) -> Residence:
        """Raise PreconditionError."""
        del places
        raise PreconditionError(
            f"a test VM on the private switch {plan.namespace} cannot be reached from here",
            remedy="provision it with --network and a switch of the Hyper-V host, or use its console there",
        )

    def find(self, plan: FencePlan, *, old: OldAddress) -> str | None:
        """Return None: nobody can ask on the switch."""
        del plan, old
        return None
