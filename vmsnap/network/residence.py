"""The old-address world around a fenced VM, as a service: the inside of the fence is the network that it knew.

An environment boots from a disk on which the guest's addresses are configured: a fixed address is simply there; a DHCP
client asks, and is given the address of its place. On our side we are its gateway, as on rung 'old address' of the
ladder. Everything may be done twice, and by several processes at once: each says the same.
"""

from __future__ import annotations

from contextlib import ExitStack
from datetime import timedelta

from vmsnap.dhcp.arp import ArpPolicy
from vmsnap.dhcp.responder import Responder, ResponderConfig
from vmsnap.errors import PreconditionError
from vmsnap.model.guest import OldAddress
from vmsnap.model.isolation import FencePlan, FencePort
from vmsnap.network import links, netns
from vmsnap.network.oldaddress import gateway_of, lives_on
from vmsnap.network.responder import FenceResponder
from vmsnap.ports.service import Place

_HOST_PREFIX = 32
# An environment keeps its address when nobody relays to it for a while.
_LEASE = timedelta(days=7)


class FenceResidence:
    """The responders of one VM's places."""

    def __init__(self, responders: ExitStack) -> None:
        self._responders = responders

    def close(self) -> None:
        """Stop answering DHCP. May be repeated."""
        self._responders.close()


class FenceResidences:
    """Makes residences with netlink and packet sockets inside a fence's namespace. Needs root. Keeps no state."""

    def open(self, plan: FencePlan, *, places: tuple[Place, ...]) -> FenceResidence:
        """Set up every place; see ``vmsnap.ports.service.Residences``."""
        with ExitStack() as stack:
            for place in places:
                port = _port(plan, mac=place.mac)
                _become_gateway(plan, port=port, old=place.old)
                responder = _responder(plan, port=port, old=place.old)
                stack.callback(responder.stop)
                responder.start()
            return FenceResidence(stack.pop_all())

    def find(self, plan: FencePlan, *, old: OldAddress) -> str | None:
        """Ask on every NIC, as the gateway, by ARP (RFC 826)."""
        return next((port.mac for port in plan.ports if lives_on(port, namespace=plan.namespace, old=old)), None)


def _port(plan: FencePlan, *, mac: str) -> FencePort:
    for port in plan.ports:
        if port.mac.lower() == mac.lower():
            return port
    raise PreconditionError(f"no NIC with the MAC {mac} is in the fence {plan.namespace}", remedy="provision it anew")


def _become_gateway(plan: FencePlan, *, port: FencePort, old: OldAddress) -> None:
    gateway = str(gateway_of(old))

    def become() -> None:
        links.add_address(port.veth_inside, address=gateway, prefix=_HOST_PREFIX)
        links.add_host_route(str(old.interface.ip), interface=port.veth_inside, source=gateway)

    netns.inside(plan.namespace, action=become)


def _responder(plan: FencePlan, *, port: FencePort, old: OldAddress) -> FenceResponder:
    config = ResponderConfig(
        server=gateway_of(old),
        network=old.interface.network,
        pool=(old.interface.ip,),
        router=old.gateway,
        lease=_LEASE,
    )
    # Where the gateway is not known, be whatever the VM asks for.
    stays_silent_for = frozenset({old.interface.ip, gateway_of(old)})
    arp = ArpPolicy(everything_but=stays_silent_for if old.gateway is None else None)
    return FenceResponder(plan.namespace, interface=port.veth_inside, responder=Responder(config), arp=arp)
