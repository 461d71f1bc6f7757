"""Rung 'link flap': pull the clone's cables, plug them in again, refuse the old address and lease one of ours.

A DHCP client that loses its link asks for its old address anew (INIT-REBOOT). The first flap is short, which is enough
for systemd-networkd and dhcpcd; NetworkManager forgives anything below 6 to 10 seconds, so a long one follows where the
clone stays silent.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

from vmsnap.errors import DriverError
from vmsnap.model.isolation import FencePlan
from vmsnap.network.rungs import Dhcp, Timer, wait_for_answer
from vmsnap.ports.network import AddressRequest, LinkControl


@dataclass(frozen=True, kw_only=True)
class Flap:
    """Seconds: how long the cables stay out, and how long a clone that sends no DHCP message is then waited for."""

    pull: float
    silence: float


FLAPS = (Flap(pull=1.5, silence=6.0), Flap(pull=12.0, silence=12.0))


class LinkFlap:
    """Moves clones whose DHCP client reacts to a lost link. The leases last longer than any run."""

    def __init__(self, *, flaps: tuple[Flap, ...] = FLAPS) -> None:
        self._flaps = flaps

    def climb(self, request: AddressRequest, *, links: LinkControl, timer: Timer, dhcp: Dhcp) -> str:
        """See ``RungDriver``. All NICs are flapped at once; the first that answers at its lease counts."""
        for flap in self._flaps:
            _pull_and_plug(request.fence, links=links, timer=timer, seconds=flap.pull)
            address = wait_for_answer(dhcp, timer=timer, silence=flap.silence)
            if address is not None:
                return address
        raise DriverError(
            "the clone sent no DHCP message after its link came back",
            remedy="its address is static, or its client ignores the link; use rung 'old-address'",
        )


def _pull_and_plug(fence: FencePlan, *, links: LinkControl, timer: Timer, seconds: float) -> None:
    with ExitStack() as plugs:
        for port in fence.ports:
            plugs.callback(links.set_link, mac=port.mac, up=True)
            links.set_link(mac=port.mac, up=False)
        timer.wait(seconds)
