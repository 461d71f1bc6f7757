"""The DHCP and ARP responder of one fence, on the inner end of its veth pair: a thread with a packet socket.

The decisions are made in ``vmsnap.dhcp``; here are frames, time and the thread.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import threading
import time
from dataclasses import dataclass

from vmsnap.dhcp.arp import ArpPacket, ArpPolicy
from vmsnap.dhcp.message import CLIENT_PORT, SERVER_PORT, DhcpMessage, MessageType, decode, encode
from vmsnap.dhcp.responder import Lease, Reply, Responder
from vmsnap.errors import DriverError, VmsnapError
from vmsnap.network import netns
from vmsnap.network.frames import ETHERTYPE_ARP, ETHERTYPE_IPV4, Datagram, Frame, Tag
from vmsnap.network.packets import PacketSocket, dhcp_and_arp_filter

_LOG = logging.getLogger(__name__)
_STOP_SECONDS = 5.0
_GONE_PAUSE_SECONDS = 0.2
_MOST_CLIENTS = 1024  # a clone that makes up MAC addresses shall not fill the host's memory


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What the responder has seen of one MAC: how many messages that ask for an address, and the lease that it took.

    ``tags`` are the VLAN tags that the last of these messages came with.
    INFORM does not count: a machine with a static address sends it too (RFC 2131 section 3.4).
    """

    messages: int
    lease: Lease | None
    tags: tuple[Tag, ...] = ()


class FenceResponder:
    """Runs a responder on one link of a namespace until it is stopped or the link is gone.

    ``start`` and ``stop`` belong to one thread; ``heard`` may be asked by any.
    """

    def __init__(self, namespace: str, *, interface: str, responder: Responder, arp: ArpPolicy | None = None) -> None:
        self._namespace = namespace
        self._interface = interface
        self._responder = responder
        self._arp = arp or ArpPolicy()
        self._lock = threading.Lock()
        self._messages: dict[bytes, int] = {}
        self._tags: dict[bytes, tuple[Tag, ...]] = {}
        self._started = threading.Event()
        self._failure: VmsnapError | None = None
        self._wake_read, self._wake_write = -1, -1
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Listen. Returns when frames are received. Raises DriverError, PreconditionError."""
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name=f"vmsnap-dhcp-{self._interface}", daemon=True)
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            failure = self._failure
            self.stop()
            raise failure

    def stop(self) -> None:
        """End the thread and close its sockets. May be repeated, and called where it was never started."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        os.write(self._wake_write, b"x")
        thread.join(_STOP_SECONDS)
        if thread.is_alive():  # the pipe stays open: the thread still selects on it
            raise DriverError(
                f"the responder on {self._interface} does not stop", remedy="end vmsnap; the fence is not harmed"
            )
        os.close(self._wake_read)
        os.close(self._wake_write)

    @property
    def is_running(self) -> bool:
        """Tell whether the thread still listens; it ends by itself when its link is gone."""
        return self._thread is not None and self._thread.is_alive()

    def heard(self, mac: bytes) -> Heard:
        """Return what was seen of a client so far."""
        with self._lock:
            return Heard(
                messages=self._messages.get(mac, 0),
                lease=self._responder.bound(mac, now=time.monotonic()),
                tags=self._tags.get(mac, ()),
            )

    def _run(self) -> None:
        try:
            netns.enter(self._namespace)
            packets = PacketSocket(self._interface, bpf=dhcp_and_arp_filter())
        except VmsnapError as exc:
            self._failure = exc
            self._started.set()
            return
        # A UDP socket nobody reads: without one the kernel answers unicast renewals with 'port unreachable'.
        with packets, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silencer:
            self._silence(silencer)
            self._started.set()
            while self._serve_one(packets):
                pass

    def _silence(self, silencer: socket.socket) -> None:
        try:
            silencer.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            silencer.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, self._interface.encode())
            silencer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            silencer.bind(("0.0.0.0", SERVER_PORT))  # noqa: S104 - inside the fence, on one link
        except OSError as exc:
            _LOG.warning("the kernel will refuse unicast renewals on %s: %s", self._interface, exc)

    def _serve_one(self, packets: PacketSocket) -> bool:
        """Wait for one frame and answer it; return whether to go on."""
        readable, _, _ = select.select([packets.fileno(), self._wake_read], [], [])
        if self._wake_read in readable:
            return False
        try:
            received = packets.receive(timeout_seconds=0)
            if received is not None and not received[1]:
                for frame in self.answers(received[0], mac=packets.mac):
                    packets.send(frame)
        except OSError as exc:
            if exc.errno not in {errno.ENETDOWN, errno.ENXIO, errno.ENODEV, errno.ENOBUFS}:
                _LOG.warning("the responder on %s: %s", self._interface, exc)
            time.sleep(_GONE_PAUSE_SECONDS)
            return self._link_exists()
        return True

    def _link_exists(self) -> bool:
        try:
            socket.if_nametoindex(self._interface)
        except OSError:
            return False
        return True

    def answers(self, data: bytes, *, mac: bytes) -> tuple[bytes, ...]:
        """Return the frames to send, from ``mac``, where this one arrived. Never raises, whatever it holds."""
        try:
            frame = Frame.decode(data)
            if frame.ethertype == ETHERTYPE_ARP:
                return self._answer_arp(frame, mac=mac)
            if frame.ethertype == ETHERTYPE_IPV4:
                return self._answer_dhcp(Datagram.decode(frame.payload), mac=mac, tags=frame.tags)
        except DriverError as exc:
            _LOG.debug("ignored a frame on %s: %s", self._interface, exc.brief)
        return ()

    def _answer_arp(self, frame: Frame, *, mac: bytes) -> tuple[bytes, ...]:
        answer = self._arp.answer(ArpPacket.decode(frame.payload), mac=mac)
        if answer is None:
            return ()
        reply = Frame(
            destination=frame.source, source=mac, ethertype=ETHERTYPE_ARP, payload=answer.encode(), tags=frame.tags
        )
        return (reply.encode(),)

    def _answer_dhcp(self, datagram: Datagram, *, mac: bytes, tags: tuple[Tag, ...]) -> tuple[bytes, ...]:
        if datagram.destination_port != SERVER_PORT:
            return ()
        message = decode(datagram.data)
        with self._lock:
            self._count(message, tags=tags)
            replies = self._responder.receive(message, destination=datagram.destination, now=time.monotonic())
        kind = message.message_type
        _LOG.debug("%s: %s answered with %d messages", self._interface, kind.name if kind else "?", len(replies))
        return tuple(reply_frame(reply, mac=mac, tags=tags) for reply in replies)

    def _count(self, message: DhcpMessage, *, tags: tuple[Tag, ...]) -> None:
        asks = message.message_type in {MessageType.DISCOVER, MessageType.REQUEST}
        if asks and (message.chaddr in self._messages or len(self._messages) < _MOST_CLIENTS):
            self._messages[message.chaddr] = self._messages.get(message.chaddr, 0) + 1
            self._tags[message.chaddr] = tags


def reply_frame(reply: Reply, *, mac: bytes, tags: tuple[Tag, ...] = ()) -> bytes:
    """Return the frame that carries a server's message, from ``mac`` and inside the VLANs of ``tags``."""
    datagram = Datagram(
        source=reply.source,
        source_port=SERVER_PORT,
        destination=reply.destination,
        destination_port=CLIENT_PORT,
        data=encode(reply.message),
    )
    return Frame(
        destination=reply.link_destination,
        source=mac,
        ethertype=ETHERTYPE_IPV4,
        payload=datagram.encode(),
        tags=tags,
    ).encode()
