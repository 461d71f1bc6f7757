"""Rung 'hot-plug': take the clone's NICs out and put them back, so that its network is set up anew.

For guests that configure a NIC when it appears and never look again (ifupdown with dhclient). The guest's software sees
a new card: what was bound to the old one, such as a bond or a bridge, is not repaired.
"""

from __future__ import annotations

from datetime import timedelta

from vmsnap.errors import DriverError
from vmsnap.network.rungs import Dhcp, Timer, wait_for_answer
from vmsnap.ports.network import AddressRequest, LinkControl

SILENCE_SECONDS = 30.0


class HotPlug:
    """Moves clones that ask for an address when a NIC appears."""

    def __init__(self, *, silence_seconds: float = SILENCE_SECONDS) -> None:
        self._silence_seconds = silence_seconds

    def climb(self, request: AddressRequest, *, links: LinkControl, timer: Timer, dhcp: Dhcp) -> str:
        """See ``RungDriver``. One NIC after the other; the fence is proven anew before the clone has it back."""
        dhcp.withdraw()
        for port in request.fence.ports:
            timer.cancel.check()
            links.replug(mac=port.mac, deadline=timedelta(seconds=timer.left()))
        address = wait_for_answer(dhcp, timer=timer, silence=self._silence_seconds)
        if address is None:
            raise DriverError(
                "the clone sent no DHCP message after its NICs came back",
                remedy="nothing in the guest sets up a NIC that appears; use the rung 'old-address'",
            )
        return address
