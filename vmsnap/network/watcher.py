"""The passive watcher: keeps the last DHCP exchange of each protected NIC, read from production's bridges.

It never sends anything. What it keeps lets the rung 'forcerenew' speak as the guest's DHCP server: the server's id, the
transaction id of the exchange and, where the server gave one, the nonce of RFC 6704. Whoever shares the bridge with a
guest can make it believe in an exchange that never was; that costs one rung its success and nothing else.
"""

from __future__ import annotations

import logging
import select
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from vmsnap.dhcp.authentication import nonce_of
from vmsnap.dhcp.message import (
    CLIENT_PORT,
    SERVER_PORT,
    UNSPECIFIED,
    DhcpMessage,
    MalformedMessageError,
    MessageType,
    Op,
    OptionCode,
    decode,
)
from vmsnap.errors import DriverError, VmsnapError
from vmsnap.model.isolation import Exchange
from vmsnap.network import links
from vmsnap.network.frames import ETHERTYPE_IPV4, Datagram, Frame, MalformedFrameError, parse_mac
from vmsnap.network.packets import PacketSocket, dhcp_filter
from vmsnap.ports.clock import Cancel
from vmsnap.ports.state import Exchanges

_LOG = logging.getLogger(__name__)
_POLL_SECONDS = 0.5
_IMPATIENT_SECONDS = 10.0  # the hypervisor or the guests may still be starting
REFRESH = timedelta(minutes=5)
_VLAN_ID = 0x0FFF
_ENDED_BY_CLIENT = frozenset({MessageType.RELEASE, MessageType.DECLINE})


@dataclass(frozen=True, kw_only=True)
class Watched:
    """Whose exchanges to keep, and the links to listen on."""

    macs: frozenset[str]
    interfaces: frozenset[str]


class ExchangeFollower:
    """What follows from one message after the other, for the NICs given. Sans-IO but for the book of exchanges."""

    def __init__(self, exchanges: Exchanges) -> None:
        self._exchanges = exchanges
        self._macs: frozenset[bytes] = frozenset()
        self._clients: dict[bytes, str] = {}

    def follow(self, macs: frozenset[str]) -> None:
        """Keep exchanges of these NICs from now on, and of no others."""
        self._macs = frozenset(parse_mac(mac) for mac in macs)

    def see(self, message: DhcpMessage, *, vlan: int | None, at: datetime) -> Exchange | None:
        """Take a message; return the exchange that it completed and that is now in the book.

        Raises what the book raises, and MalformedMessageError.
        """
        mac = message.chaddr
        if mac not in self._macs:
            return None
        text = mac.hex(":")
        kind = message.message_type
        if message.op is Op.REQUEST:
            client = message.option(OptionCode.VENDOR_CLASS)
            if client is not None:
                self._clients[mac] = client.decode("ascii", "replace")
            if kind in _ENDED_BY_CLIENT:
                self._exchanges.forget(text)
            return None
        if kind is MessageType.NAK:
            self._exchanges.forget(text)
        server = message.address(OptionCode.SERVER_ID)
        # An ACK without an address answers an INFORM: nothing was leased.
        if kind is not MessageType.ACK or server is None or message.yiaddr == UNSPECIFIED:
            return None
        before = self._before(text, message=message)
        nonce = nonce_of(message)
        exchange = Exchange(
            mac=text,
            address=message.yiaddr,
            server=server,
            xid=message.xid,
            seen=at,
            # A renewal need not repeat the nonce (RFC 6704 section 3.1).
            nonce=before.nonce if nonce is None and before is not None else nonce,
            client=self._clients.get(mac, "" if before is None else before.client),
            vlan=vlan,
        )
        self._exchanges.put(exchange)
        return exchange

    def _before(self, mac: str, *, message: DhcpMessage) -> Exchange | None:
        """Return the exchange that this one goes on: of the same lease, by the same server."""
        try:
            known = self._exchanges.get(mac)
        except DriverError as error:
            _LOG.warning("what was known of %s is passed over: %s", mac, error.brief)
            return None
        if known is None or (known.address, known.server) != (message.yiaddr, message.address(OptionCode.SERVER_ID)):
            return None
        return known


class DhcpWatcher:
    """Listens until it is cancelled. Links may come and go meanwhile. Used by one thread."""

    def __init__(
        self,
        exchanges: Exchanges,
        *,
        look: Callable[[], Watched],
        tell: Callable[[Exchange], None],
        refresh: timedelta = REFRESH,
    ) -> None:
        """``look`` says whom to watch and where, asked at the start and then every ``refresh``.

        ``tell`` is called with each exchange that was recorded.
        """
        self._follower = ExchangeFollower(exchanges)
        self._look = look
        self._tell = tell
        self._refresh_seconds = refresh.total_seconds()
        self._sockets: dict[str, PacketSocket] = {}
        self._silent: set[str] = set()
        self._complaints: set[str] = set()

    def run(self, *, cancel: Cancel) -> None:
        """Watch until cancelled, which is no error. Raises PreconditionError without the right to listen."""
        try:
            next_look = 0.0
            wanted: frozenset[str] = frozenset()
            while not cancel.is_set():
                if time.monotonic() >= next_look:
                    watched = self._look()
                    self._follower.follow(watched.macs)
                    wanted = watched.interfaces
                    complete = watched.macs and watched.interfaces
                    next_look = time.monotonic() + (self._refresh_seconds if complete else _IMPATIENT_SECONDS)
                self._open(wanted)
                self._wait()
        finally:
            for packets in self._sockets.values():
                packets.close()
            self._sockets.clear()

    def _open(self, wanted: frozenset[str]) -> None:
        for name in self._sockets.keys() - wanted:
            self._sockets.pop(name).close()
        for name in sorted(wanted - self._sockets.keys()):
            try:
                packets = PacketSocket(name, bpf=dhcp_filter())
                try:
                    packets.hear_everything()
                except OSError:
                    packets.close()
                    raise
            except (DriverError, OSError) as error:
                if name not in self._silent:
                    _LOG.warning("cannot listen on %s, and try again until it is there: %s", name, error)
                    self._silent.add(name)
                continue
            self._silent.discard(name)
            self._sockets[name] = packets
            _LOG.info("listening on %s", name)

    def _wait(self) -> None:
        """Take what comes within half a second."""
        if not self._sockets:
            time.sleep(_POLL_SECONDS)
            return
        names = {packets.fileno(): name for name, packets in self._sockets.items()}
        readable, _, _ = select.select(list(names), [], [], _POLL_SECONDS)
        for descriptor in readable:
            name = names[descriptor]
            try:
                received = self._sockets[name].receive(timeout_seconds=0)
            except OSError as error:
                _LOG.info("%s went away: %s", name, error)
                self._sockets.pop(name).close()
                time.sleep(_POLL_SECONDS)  # a link that is there and down would be opened and lost without end
                continue
            if received is not None:
                self._take(received[0])

    def _take(self, data: bytes) -> None:
        try:
            frame = Frame.decode(data)
            if frame.ethertype != ETHERTYPE_IPV4:
                return
            datagram = Datagram.decode(frame.payload)
            if {datagram.source_port, datagram.destination_port} - {CLIENT_PORT, SERVER_PORT}:
                return
            vlan = frame.tags[0][1] & _VLAN_ID if frame.tags else 0
            # VLAN 0 is no VLAN but a priority (IEEE 802.1Q).
            exchange = self._follower.see(decode(datagram.data), vlan=vlan or None, at=datetime.now(UTC))
        except (MalformedFrameError, MalformedMessageError) as error:
            _LOG.debug("passed over a frame: %s", error.brief)
            return
        except VmsnapError as error:
            if error.brief not in self._complaints:  # a full disk would complain of every exchange
                self._complaints.add(error.brief)
                _LOG.warning("an exchange could not be kept: %s", error.brief)
            return
        if exchange is not None:
            self._tell(exchange)


def bridges_of(taps: frozenset[str]) -> Iterator[str]:
    """Yield the bridge of each tap, or the tap itself where it is in none; links that are not there are passed over.

    Raises DriverError.
    """
    found = links.all_links()
    by_index = {link.index: link for link in found}
    for link in found:
        if link.name in taps:
            master = by_index.get(link.master) if link.master is not None else None
            yield master.name if master is not None and master.kind == "bridge" else link.name
