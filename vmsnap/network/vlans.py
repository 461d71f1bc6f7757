"""A link of ours inside one VLAN of a clone's NIC: a TAP whose frames travel over the NIC's veth with the tag.

It is made in user space: each host that runs VMs has TAPs, and not each has the kernel's 802.1Q. It ends with the
process, and with the namespace.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import select
import struct
import threading
import time

from vmsnap.dhcp.message import SERVER_PORT
from vmsnap.errors import DriverError, PreconditionError
from vmsnap.model.isolation import FencePort
from vmsnap.network import links, netns
from vmsnap.network.frames import ETHERTYPE_IPV4, Frame, MalformedFrameError, Tag, internet_checksum
from vmsnap.network.packets import PacketSocket, vlan_filter

_LOG = logging.getLogger(__name__)
_TUN = "/dev/net/tun"
_TUNSETIFF = 0x400454CA  # linux/if_tun.h, as the next two
_IFF_TAP = 0x0002
_IFF_NO_PI = 0x1000
_REQUEST = struct.Struct("16sH22x")  # struct ifreq of linux/if.h
_LONGEST_FRAME_BYTES = 65536
_VLAN_ID = 0x0FFF
_STOP_SECONDS = 5.0
_GONE_PAUSE_SECONDS = 0.2
_TCP, _UDP = 6, 17
_CHECKSUM_AT = {_TCP: 16, _UDP: 6}
_FRAGMENT = 0x3FFF


def vlan_link_name(port: FencePort) -> str:
    """Return the name of the link inside a VLAN of that NIC: the veth's, with another letter before the index."""
    digits = str(port.index)
    return f"{port.veth_inside[: -len(digits) - 1]}v{digits}"


class VlanLink:
    """One such link. ``open`` and ``close`` belong to one thread; ``close`` may be repeated."""

    def __init__(self, namespace: str, *, port: FencePort, tags: tuple[Tag, ...]) -> None:
        """``tags`` are those of the clone's frames, outermost first; their priorities do not matter."""
        self.name = vlan_link_name(port)
        self._namespace = namespace
        self._interface = port.veth_inside
        self._tags = tuple((kind, control & _VLAN_ID) for kind, control in tags)
        self._thread: threading.Thread | None = None
        self._wake_read, self._wake_write = -1, -1

    def open(self) -> None:
        """Make the link and set it up. Raises DriverError, PreconditionError."""
        tap, packets = netns.inside(self._namespace, action=self._make)
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(
            target=self._run, args=(tap, packets), name=f"vmsnap-vlan-{self.name}", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Remove the link. Raises DriverError where its thread does not end."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        os.write(self._wake_write, b"x")
        thread.join(_STOP_SECONDS)
        if thread.is_alive():  # the pipe stays open: the thread still selects on it
            raise DriverError(f"the link {self.name} does not close", remedy="end vmsnap; the fence is not harmed")
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _make(self) -> tuple[int, PacketSocket]:
        packets = PacketSocket(self._interface, bpf=vlan_filter(self._tags[0][1]))
        try:
            tap = _open_tap(self.name)
        except BaseException:
            packets.close()
            raise
        try:
            links.set_up(self.name)
        except BaseException:
            os.close(tap)
            packets.close()
            raise
        return tap, packets

    def _run(self, tap: int, packets: PacketSocket) -> None:
        try:
            with packets:
                while self._relay_some(tap, packets=packets):
                    pass
        finally:
            os.close(tap)

    def _relay_some(self, tap: int, *, packets: PacketSocket) -> bool:
        """Wait for frames and hand them on; return whether to go on."""
        readable, _, _ = select.select([tap, packets.fileno(), self._wake_read], [], [])
        if self._wake_read in readable:
            return False
        try:
            if packets.fileno() in readable:
                received = packets.receive(timeout_seconds=0)
                frame = None if received is None or received[1] else self._untagged(received[0])
                if frame is not None:
                    os.write(tap, frame)
            if tap in readable:
                packets.send(self._tagged(os.read(tap, _LONGEST_FRAME_BYTES)))
        except BlockingIOError:
            return True
        except OSError as exc:
            if exc.errno not in {errno.ENETDOWN, errno.ENXIO, errno.ENODEV, errno.ENOBUFS, errno.EIO}:
                _LOG.warning("the link %s: %s", self.name, exc)
            time.sleep(_GONE_PAUSE_SECONDS)
            return self._exists(packets)
        return True

    @staticmethod
    def _exists(packets: PacketSocket) -> bool:
        try:
            return bool(packets.mac)
        except OSError:
            return False

    def _untagged(self, data: bytes) -> bytes | None:
        """Return the clone's frame without its tags; None for one of another VLAN and for one that the responder serves."""
        try:
            frame = Frame.decode(data)
        except MalformedFrameError:
            return None
        if tuple((kind, control & _VLAN_ID) for kind, control in frame.tags) != self._tags:
            return None
        payload = frame.payload
        if frame.ethertype == ETHERTYPE_IPV4:
            if _is_for_dhcp_server(payload):
                return None
            payload = with_checksum(payload)
        return Frame(
            destination=frame.destination, source=frame.source, ethertype=frame.ethertype, payload=payload
        ).encode()

    def _tagged(self, data: bytes) -> bytes:
        frame = Frame.decode(data)
        return Frame(
            destination=frame.destination,
            source=frame.source,
            ethertype=frame.ethertype,
            payload=frame.payload,
            tags=self._tags,
        ).encode()


def with_checksum(packet: bytes) -> bytes:
    """Return an IPv4 packet with the checksum of its TCP segment or UDP datagram made anew.

    A guest's virtio card leaves it to the next card, and there is none. Others are returned as they are.
    """
    part = _transport(packet)
    if part is None:
        return packet
    protocol, header, total = part
    place = header + _CHECKSUM_AT[protocol]
    if place + 2 > total:
        return packet
    blank = packet[header:place] + bytes(2) + packet[place + 2 : total]
    pseudo = packet[12:20] + struct.pack("!BBH", 0, protocol, total - header)
    checksum = internet_checksum(pseudo + blank) or 0xFFFF
    return packet[:place] + checksum.to_bytes(2, "big") + packet[place + 2 :]


def _is_for_dhcp_server(packet: bytes) -> bool:
    part = _transport(packet)
    if part is None or part[0] != _UDP:
        return False
    return packet[part[1] + 2 : part[1] + 4] == SERVER_PORT.to_bytes(2, "big")


def _transport(packet: bytes) -> tuple[int, int, int] | None:
    """Return protocol, length of the header and total length of an unfragmented TCP or UDP packet, or None."""
    if len(packet) < 20 or packet[0] >> 4 != 4:
        return None
    header, total = (packet[0] & 0x0F) * 4, int.from_bytes(packet[2:4], "big")
    whole = not int.from_bytes(packet[6:8], "big") & _FRAGMENT
    if packet[9] not in _CHECKSUM_AT or not whole or not 20 <= header <= total <= len(packet):
        return None
    return packet[9], header, total


def _open_tap(name: str) -> int:
    """Make a TAP in the calling thread's namespace; it is there as long as the descriptor is."""
    try:
        tap = os.open(_TUN, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as exc:
        raise PreconditionError(
            f"cannot open {_TUN}: {exc}", remedy="load the kernel module tun; vmsnap has to run as root"
        ) from exc
    try:
        fcntl.ioctl(tap, _TUNSETIFF, _REQUEST.pack(name.encode(), _IFF_TAP | _IFF_NO_PI))
    except OSError as exc:
        os.close(tap)
        raise DriverError(
            f"cannot make the link {name}: {exc}", remedy="run 'vmsnap reconcile', then try again"
        ) from exc
    return tap
