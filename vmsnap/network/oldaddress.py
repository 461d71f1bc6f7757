"""Rung 'old address': the namespace becomes the clone's old gateway and reaches it where it always was.

It works for static addresses and for DHCP clients that cannot be moved, and for any number of clones of one guest at
once, because each has a namespace of its own. Our ARP question, asked as the gateway, also tells the clone the
gateway's new MAC (RFC 826). A responder goes on renewing the old lease, so that the clone keeps its address.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from datetime import timedelta
from ipaddress import IPv4Address

from vmsnap.dhcp.arp import ArpOperation, ArpPacket, ArpPolicy
from vmsnap.dhcp.responder import Responder, ResponderConfig
from vmsnap.errors import DriverError
from vmsnap.model.guest import OldAddress
from vmsnap.model.isolation import FencePort
from vmsnap.network import links, netns, sockets
from vmsnap.network.frames import ETHERTYPE_ARP, Frame
from vmsnap.network.packets import PacketSocket
from vmsnap.network.responder import FenceResponder
from vmsnap.network.rungs import Keeper, Timer
from vmsnap.ports.network import AddressRequest, LinkControl

_BROADCAST = b"\xff" * 6
_ARP_SECONDS = 0.3
_PROBE_TIMEOUT = timedelta(seconds=1)
_HOST_PREFIX = 32


class OldAddressWorld:
    """Reaches clones at the addresses of their originals."""

    def __init__(self, *, keeper: Keeper) -> None:
        self._keeper = keeper

    def climb(self, request: AddressRequest, *, links: LinkControl, timer: Timer) -> str:  # noqa: ARG002 - no cable
        """See ``RungDriver``. Every old address is asked for on every NIC; the first that answers counts."""
        if not request.old_addresses or not request.fence.ports:
            raise DriverError(
                "no old address of the guest is known", remedy="name it in the policy, or give the guest an agent"
            )
        while True:
            for old in request.old_addresses:
                for port in request.fence.ports:
                    if lives_on(port, namespace=request.fence.namespace, old=old):
                        return self._move_in(request, port=port, old=old, timer=timer)
            asked = ", ".join(str(old.interface.ip) for old in request.old_addresses)
            timer.tick(missing=f"nothing in the fence answers for {asked}")

    def _move_in(self, request: AddressRequest, *, port: FencePort, old: OldAddress, timer: Timer) -> str:
        namespace, address, gateway = request.fence.namespace, str(old.interface.ip), gateway_of(old)
        with ExitStack() as undo:
            undo.callback(_leave, namespace, port=port, old=old)
            netns.inside(namespace, action=lambda: _become_gateway(port, old=old))
            responder = FenceResponder(
                namespace, interface=port.veth_inside, responder=Responder(_as_before(old)), arp=_arp_policy(old)
            )
            undo.callback(responder.stop)
            responder.start()
            while not sockets.answers(namespace, host=address, port=request.probe_port, timeout=_PROBE_TIMEOUT):
                lives_on(port, namespace=namespace, old=old)  # tell the clone again who its gateway is
                timer.tick(missing=f"the clone answers ARP for {address} and no TCP from its gateway {gateway}")
            undo.pop_all()
        self._keeper.keep(request.fence.run, responders=(responder,))
        return address


def gateway_of(old: OldAddress) -> IPv4Address:
    """Return the address to speak as: the guest's gateway or, where unknown, a neighbour in its network."""
    if old.gateway is not None:
        return old.gateway
    network, own = old.interface.network, old.interface.ip
    if network.prefixlen < 31:
        first = network.network_address + 1
        return first if first != own else first + 1
    return IPv4Address(int(own) ^ 1)


def _as_before(old: OldAddress) -> ResponderConfig:
    """Return the configuration of a server that leases exactly the old address, with everything as it was."""
    return ResponderConfig(
        server=gateway_of(old), network=old.interface.network, pool=(old.interface.ip,), router=old.gateway
    )


def _arp_policy(old: OldAddress) -> ArpPolicy:
    """The kernel answers for the gateway itself. Where the gateway is unknown, be whatever the clone asks for."""
    own = frozenset({old.interface.ip})
    return ArpPolicy(everything_but=own | {gateway_of(old)} if old.gateway is None else None)


def _become_gateway(port: FencePort, *, old: OldAddress) -> None:
    gateway = str(gateway_of(old))
    links.add_address(port.veth_inside, address=gateway, prefix=_HOST_PREFIX)
    links.add_host_route(str(old.interface.ip), interface=port.veth_inside, source=gateway)


def _leave(namespace: str, *, port: FencePort, old: OldAddress) -> None:
    def leave() -> None:
        links.remove_host_route(str(old.interface.ip), interface=port.veth_inside)
        links.remove_address(port.veth_inside, address=str(gateway_of(old)), prefix=_HOST_PREFIX)

    netns.inside(namespace, action=leave)


def lives_on(port: FencePort, *, namespace: str, old: OldAddress) -> bool:
    """Ask by ARP, as the gateway, for the old address on one NIC; return whether the clone answered."""
    return netns.inside(namespace, action=lambda: _ask(port, old=old))


def _ask(port: FencePort, *, old: OldAddress) -> bool:
    with PacketSocket(port.veth_inside) as packets:
        question = ArpPacket(
            operation=ArpOperation.REQUEST,
            sender_mac=packets.mac,
            sender=gateway_of(old),
            target=old.interface.ip,
        )
        frame = Frame(destination=_BROADCAST, source=packets.mac, ethertype=ETHERTYPE_ARP, payload=question.encode())
        try:
            packets.send(frame.encode())
            return _reply_comes(packets, address=old.interface.ip)
        except OSError as exc:
            raise DriverError(f"cannot ask for {old.interface.ip} on {port.veth_inside}: {exc}") from exc


def _reply_comes(packets: PacketSocket, *, address: IPv4Address) -> bool:
    end = time.monotonic() + _ARP_SECONDS
    while (left := end - time.monotonic()) > 0:
        received = packets.receive(timeout_seconds=left)
        if received is not None and not received[1] and _is_reply(received[0], address=address):
            return True
    return False


def _is_reply(data: bytes, *, address: IPv4Address) -> bool:
    try:
        frame = Frame.decode(data)
        if frame.ethertype != ETHERTYPE_ARP or frame.tags:
            return False
        packet = ArpPacket.decode(frame.payload)
    except DriverError:
        return False
    return packet.operation is ArpOperation.REPLY and packet.sender == address
