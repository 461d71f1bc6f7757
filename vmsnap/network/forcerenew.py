"""Rung 'forcerenew': ask the clone's DHCP client, as its production server, to renew; refuse, and lease one of ours.

No cable is touched. Where the guest's last exchange in production was seen with its nonce, the message is signed and
repeated at growing distances; else one unsigned message is sent, which few clients obey.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass

from vmsnap.dhcp.authentication import ReplayCounter
from vmsnap.dhcp.forcerenew import Bound, forcerenew
from vmsnap.dhcp.responder import Reply
from vmsnap.errors import DriverError
from vmsnap.model.isolation import FencePort
from vmsnap.network import netns
from vmsnap.network.frames import Tag, parse_mac, vlan_tag
from vmsnap.network.oldaddress import gateway_of
from vmsnap.network.packets import PacketSocket
from vmsnap.network.responder import reply_frame
from vmsnap.network.rungs import Dhcp, Timer, wait_for_answer
from vmsnap.ports.network import AddressRequest, LinkControl

SPACING_SECONDS = (2.0, 4.0, 8.0)
_XID_BITS = 32


@dataclass(frozen=True, kw_only=True)
class _Target:
    port: FencePort
    client: Bound
    tags: tuple[Tag, ...]


class ForceRenew:
    """Moves clones whose DHCP client obeys FORCERENEW.

    ``spacing_seconds`` is how long a clone that sends no DHCP message is waited for after each message.
    """

    def __init__(
        self, *, spacing_seconds: tuple[float, ...] = SPACING_SECONDS, replay: ReplayCounter | None = None
    ) -> None:
        self._spacing_seconds = spacing_seconds
        self._replay = replay or ReplayCounter()

    def climb(
        self,
        request: AddressRequest,
        *,
        links: LinkControl,  # noqa: ARG002 - no cable is touched
        timer: Timer,
        dhcp: Dhcp,
    ) -> str:
        """See ``RungDriver``. All NICs are asked at once; the first that answers at its lease counts."""
        targets = tuple(_targets(request))
        if not targets:
            raise DriverError(
                "no address that the guest may have by DHCP is known",
                remedy="watch the guest's DHCP exchanges ('vmsnap dhcp watch'), or leave out the rung 'forcerenew'",
            )
        for seconds in self._spacing_seconds:
            for target in targets:
                self._send(request.fence.namespace, target=target)
            address = wait_for_answer(dhcp, timer=timer, silence=seconds)
            if address is not None:
                return address
            targets = tuple(target for target in targets if target.client.nonce is not None)
            if not targets:
                break
        raise DriverError(
            "the clone's DHCP client did not obey FORCERENEW",
            remedy="most clients know it not at all, and dhcpcd only with the nonce of its last exchange; "
            "use the rung 'link-flap'",
        )

    def _send(self, namespace: str, *, target: _Target) -> None:
        client = target.client
        reply = Reply(
            message=forcerenew(client, replay=self._replay.next()),
            source=client.server,
            destination=client.address,
            link_destination=client.mac,
        )
        netns.inside(namespace, action=lambda: _send_frame(reply, target=target))


def _targets(request: AddressRequest) -> Iterator[_Target]:
    """Yield whom to ask on which NIC: whoever was seen there or, where nobody was, each old address of the guest."""
    static = {parse_mac(mac) for mac in request.static_macs}
    for port in request.fence.ports:
        mac = parse_mac(port.mac)
        if mac in static:
            continue
        seen = [exchange for exchange in request.exchanges if parse_mac(exchange.mac) == mac]
        for exchange in seen:
            client = Bound(
                mac=mac,
                address=exchange.address,
                server=exchange.server,
                xid=exchange.xid,
                nonce=exchange.nonce,
            )
            tags = () if exchange.vlan is None else (vlan_tag(exchange.vlan),)
            yield _Target(port=port, client=client, tags=tags)
        for old in () if seen else request.old_addresses:
            client = Bound(
                mac=mac,
                address=old.interface.ip,
                server=gateway_of(old),
                xid=secrets.randbits(_XID_BITS),
            )
            yield _Target(port=port, client=client, tags=())


def _send_frame(reply: Reply, *, target: _Target) -> None:
    interface = target.port.veth_inside
    with PacketSocket(interface) as packets:
        try:
            packets.send(reply_frame(reply, mac=packets.mac, tags=target.tags))
        except OSError as exc:
            raise DriverError(f"cannot send FORCERENEW on {interface}: {exc}", remedy="start a new run") from exc
