"""Rung 'old address': the namespace becomes the clone's old gateway and reaches it where it always was.

It works for static addresses and for DHCP clients that cannot be moved, and for any number of clones of one guest at
once, because each has a namespace of its own. Our ARP question, asked as the gateway, also tells the clone the
gateway's new MAC (RFC 826). A responder goes on renewing the old lease, so that the clone keeps its address.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from ipaddress import IPv4Address

from vmsnap.dhcp.arp import ArpOperation, ArpPacket, ArpPolicy
from vmsnap.dhcp.responder import Responder, ResponderConfig
from vmsnap.errors import DriverError
from vmsnap.model.guest import OldAddress
from vmsnap.model.isolation import FencePort
from vmsnap.network import links, netns, sockets
from vmsnap.network.frames import ETHERTYPE_ARP, Frame, vlan_tag
from vmsnap.network.leasing import exchange_of
from vmsnap.network.packets import PacketSocket
from vmsnap.network.responder import FenceResponder
from vmsnap.network.rungs import Dhcp, Keeper, Listener, Timer
from vmsnap.network.vlans import VlanLink
from vmsnap.ports.network import AddressRequest, LinkControl

_BROADCAST = b"\xff" * 6
_ARP_SECONDS = 0.3
_PROBE_TIMEOUT = timedelta(seconds=1)
_HOST_PREFIX = 32


@dataclass(frozen=True, kw_only=True)
class _Home:
    """A NIC of the clone and the old address that lives there, with our side as its gateway.

    ``near`` is the port as seen from our side: ``veth_inside`` is the link to speak by, in a VLAN that of the VLAN.
    """

    near: FencePort
    old: OldAddress
    responder: FenceResponder

    @property
    def address(self) -> str:
        return str(self.old.interface.ip)


@dataclass(frozen=True)
class _KeptLink:
    """A link inside a VLAN, kept as long as its clone is reached by it."""

    link: VlanLink

    @property
    def is_running(self) -> bool:
        return False  # it is no reason to keep anything else

    def stop(self) -> None:
        self.link.close()


class OldAddressWorld:
    """Reaches clones at the addresses of their originals."""

    def __init__(self, *, keeper: Keeper) -> None:
        self._keeper = keeper

    def climb(
        self,
        request: AddressRequest,
        *,
        links: LinkControl,  # noqa: ARG002 - no cable is touched
        timer: Timer,
        dhcp: Dhcp,
    ) -> str:
        """See ``RungDriver``. Every NIC is asked for the old addresses that may be its own; the first to answer counts.

        NICs on which no old address lives go on being leased addresses of ours.
        """
        if not request.old_addresses or not request.fence.ports:
            raise DriverError(
                "no old address of the guest is known", remedy="name it in the policy, or give the guest an agent"
            )
        dhcp.stop()  # it would refuse the old address; from here on every renewal is granted as before
        dhcp.withdraw()
        with ExitStack() as undo:
            kept: list[Listener] = []
            nears = {port: _near(request, port=port, undo=undo, kept=kept) for port in request.fence.ports}
            homes: dict[FencePort, _Home] = {}
            while (home := _answering(request, homes=homes.values())) is None:
                for port in request.fence.ports:
                    if port in homes:  # tell the clone again who its gateway is
                        lives_on(nears[port], namespace=request.fence.namespace, old=homes[port].old)
                    else:
                        homes.update(_move_in(request, port=port, near=nears[port], homes=homes, undo=undo))
                timer.tick(missing=_what_is_missing(request, homes=homes.values()))
            undo.callback(dhcp.stop)
            dhcp.start([port for port in request.fence.ports if port not in homes])
            undo.pop_all()
        self._keeper.keep(request.fence.run, listeners=(*(item.responder for item in homes.values()), *kept))
        return home.address


def _near(request: AddressRequest, *, port: FencePort, undo: ExitStack, kept: list[Listener]) -> FencePort:
    """Return the port with the link to speak by: one inside the VLAN that the guest is known to use on this NIC."""
    exchange = exchange_of(request, mac=port.mac)
    known = [old.vlan for old in request.old_addresses if old.mac in {None, port.mac}]
    vlan = next((vlan for vlan in (*known, None if exchange is None else exchange.vlan) if vlan is not None), None)
    if vlan is None:
        return port
    link = VlanLink(request.fence.namespace, port=port, tags=(vlan_tag(vlan),))
    undo.callback(link.close)
    link.open()
    kept.append(_KeptLink(link))
    return replace(port, veth_inside=link.name)


def _move_in(
    request: AddressRequest,
    *,
    port: FencePort,
    near: FencePort,
    homes: Mapping[FencePort, _Home],
    undo: ExitStack,
) -> dict[FencePort, _Home]:
    """Ask a NIC for the old addresses that may be its own, and become the gateway of the first that answers."""
    namespace = request.fence.namespace
    taken = [home.old for home in homes.values()]
    for old in request.old_addresses:
        if old in taken or old.mac not in {None, port.mac} or not lives_on(near, namespace=namespace, old=old):
            continue
        undo.callback(_leave, namespace, port=near, old=old)
        netns.inside(namespace, action=lambda: _become_gateway(near, old=old))  # noqa: B023 - runs at once
        # The responder answers in the VLAN that it is asked in.
        responder = FenceResponder(
            namespace, interface=port.veth_inside, responder=Responder(_as_before(old)), arp=_arp_policy(old)
        )
        undo.callback(responder.stop)
        responder.start()
        return {port: _Home(near=near, old=old, responder=responder)}
    return {}


def _answering(request: AddressRequest, *, homes: Iterable[_Home]) -> _Home | None:
    for home in homes:
        namespace, port = request.fence.namespace, request.probe_port
        if sockets.answers(namespace, host=home.address, port=port, timeout=_PROBE_TIMEOUT):
            return home
    return None


def _what_is_missing(request: AddressRequest, *, homes: Iterable[_Home]) -> str:
    told = [f"{home.address} and no TCP from its gateway {gateway_of(home.old)}" for home in homes]
    if told:
        return f"the clone answers ARP for {'; '.join(told)}"
    return f"nothing in the fence answers for {', '.join(str(old.interface.ip) for old in request.old_addresses)}"


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
        if frame.ethertype != ETHERTYPE_ARP:
            return False
        packet = ArpPacket.decode(frame.payload)
    except DriverError:
        return False
    return packet.operation is ArpOperation.REPLY and packet.sender == address
