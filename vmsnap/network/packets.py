"""Packet sockets (packet(7)) on one link of the calling thread's namespace."""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from vmsnap.errors import DriverError, PreconditionError

ETH_P_ALL = 0x0003
_SO_ATTACH_FILTER = 26  # asm-generic/socket.h
_LONGEST_FRAME_BYTES = 65536
_SOL_PACKET = 263  # linux/socket.h
_ADD_MEMBERSHIP = 1  # linux/if_packet.h, as the next ones
_PROMISCUOUS = 1
_MEMBERSHIP = struct.Struct("iHH8s")
_PACKET_AUXDATA = 8
_AUXDATA = struct.Struct("IIIHHHH")
_VLAN_VALID = 1 << 4
_MAC_BYTES = 12


@dataclass(frozen=True)
class BpfStep:
    """One instruction of a classic packet filter (linux/filter.h)."""

    code: int
    jump_true: int
    jump_false: int
    operand: int


def dhcp_and_arp_filter() -> tuple[BpfStep, ...]:
    """Return a filter that lets only ARP and unfragmented UDP to port 67 through.

    Without it every packet of a backup's SSH session would wake the responder.
    """
    load_half, load_byte, load_header, load_half_at = 0x28, 0x30, 0xB1, 0x48
    equal, any_bit, give_back = 0x15, 0x45, 0x06
    return (
        BpfStep(load_half, 0, 0, 12),  # ethertype
        BpfStep(equal, 8, 0, 0x0806),  # ARP
        BpfStep(equal, 0, 8, 0x0800),  # IPv4
        BpfStep(load_byte, 0, 0, 23),  # protocol
        BpfStep(equal, 0, 6, 17),  # UDP
        BpfStep(load_half, 0, 0, 20),  # fragment offset
        BpfStep(any_bit, 4, 0, 0x1FFF),
        BpfStep(load_header, 0, 0, 14),  # length of the IP header
        BpfStep(load_half_at, 0, 0, 16),  # destination port
        BpfStep(equal, 0, 1, 67),
        BpfStep(give_back, 0, 0, 0x40000),
        BpfStep(give_back, 0, 0, 0),
    )


def marked_filter(mark: int, *, except_links: Sequence[int] = ()) -> tuple[BpfStep, ...]:
    """Return a filter that lets only packets through that bear a mark, on any link but those with these indexes."""
    load_word, equal, give_back = 0x20, 0x15, 0x06
    ancillary, its_mark, its_link = 0xFFFFF000, 20, 8  # SKF_AD_OFF, SKF_AD_MARK, SKF_AD_IFINDEX of linux/filter.h
    count = len(except_links)
    return (
        BpfStep(load_word, 0, 0, ancillary + its_mark),
        BpfStep(equal, 0, count + 2, mark),
        BpfStep(load_word, 0, 0, ancillary + its_link),
        *(BpfStep(equal, count - number, 0, index) for number, index in enumerate(except_links)),
        BpfStep(give_back, 0, 0, 0x40000),
        BpfStep(give_back, 0, 0, 0),
    )


def dhcp_filter() -> tuple[BpfStep, ...]:
    """Return a filter that lets only unfragmented UDP to port 67 or 68 through, also where a VLAN tag is in the frame.

    Most tags are not: the kernel takes a frame's outer tag out before it is filtered, and hands it over beside it.
    """
    load_half, equal, give_back = 0x28, 0x15, 0x06
    tagged, plain = 4, 14  # where the checks of either kind begin
    accept, drop = 22, 23

    def at(step: int, *, code: int, operand: int, to: tuple[int, int]) -> BpfStep:
        return BpfStep(code, to[0] - step - 1, to[1] - step - 1, operand)

    return (
        BpfStep(load_half, 0, 0, 12),  # ethertype
        at(1, code=equal, operand=0x0800, to=(plain, 2)),
        at(2, code=equal, operand=0x8100, to=(tagged, 3)),
        at(3, code=equal, operand=0x88A8, to=(tagged, drop)),
        BpfStep(load_half, 0, 0, 16),
        at(5, code=equal, operand=0x0800, to=(6, drop)),
        *_dhcp_steps(6, header=18, accept=accept, drop=drop),
        *_dhcp_steps(plain, header=14, accept=accept, drop=drop),
        BpfStep(give_back, 0, 0, 0x40000),
        BpfStep(give_back, 0, 0, 0),
    )


def _dhcp_steps(first: int, *, header: int, accept: int, drop: int) -> tuple[BpfStep, ...]:
    """Return the eight steps that look into an IPv4 header at this offset; ``first`` is the number of the first."""
    load_half, load_byte, load_header, load_half_at = 0x28, 0x30, 0xB1, 0x48
    equal, any_bit = 0x15, 0x45

    def drop_from(step: int) -> int:
        return drop - (first + step) - 1

    return (
        BpfStep(load_byte, 0, 0, header + 9),  # protocol
        BpfStep(equal, 0, drop_from(1), 17),  # UDP
        BpfStep(load_half, 0, 0, header + 6),  # fragment offset
        BpfStep(any_bit, drop_from(3), 0, 0x1FFF),
        BpfStep(load_header, 0, 0, header),  # length of the IP header
        BpfStep(load_half_at, 0, 0, header + 2),  # destination port
        BpfStep(equal, accept - (first + 6) - 1, 0, 67),
        BpfStep(equal, accept - (first + 7) - 1, drop_from(7), 68),
    )


def arp_filter() -> tuple[BpfStep, ...]:
    """Return a filter that lets only untagged ARP through."""
    load_half, equal, give_back = 0x28, 0x15, 0x06
    return (
        BpfStep(load_half, 0, 0, 12),
        BpfStep(equal, 0, 1, 0x0806),
        BpfStep(give_back, 0, 0, 0x40000),
        BpfStep(give_back, 0, 0, 0),
    )


def vlan_filter(vlan: int) -> tuple[BpfStep, ...]:
    """Return a filter that lets only frames of one VLAN through, by their outer tag."""
    load_word, and_with, equal, give_back = 0x20, 0x54, 0x15, 0x06
    ancillary, tag, is_tagged = 0xFFFFF000, 44, 48  # SKF_AD_OFF, SKF_AD_VLAN_TAG, SKF_AD_VLAN_TAG_PRESENT
    return (
        BpfStep(load_word, 0, 0, ancillary + is_tagged),
        BpfStep(equal, 4, 0, 0),
        BpfStep(load_word, 0, 0, ancillary + tag),
        BpfStep(and_with, 0, 0, 0x0FFF),
        BpfStep(equal, 0, 1, vlan),
        BpfStep(give_back, 0, 0, 0x40000),
        BpfStep(give_back, 0, 0, 0),
    )


def attach_filter(target: socket.socket, *, steps: Sequence[BpfStep]) -> None:
    """Make a packet socket's filter this one. Raises OSError."""
    _attach(target, steps=steps)


class PacketSocket:
    """Sends and receives whole frames on one link. Made by a thread of the link's namespace, used by any."""

    def __init__(self, interface: str, *, bpf: Sequence[BpfStep] = ()) -> None:
        """Open the socket. Raises PreconditionError without the right, DriverError where the link is missing."""
        self._interface = interface
        try:
            # Protocol 0 until the filter is in place: nothing slips in before it.
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        except PermissionError as exc:
            raise PreconditionError(
                f"cannot open a packet socket on {interface}: {exc}", remedy="vmsnap has to run as root"
            ) from exc
        try:
            if bpf:
                _attach(self._socket, steps=bpf)
            self._socket.setsockopt(_SOL_PACKET, _PACKET_AUXDATA, 1)
            self._socket.bind((interface, ETH_P_ALL))
        except OSError as exc:
            self._socket.close()
            raise DriverError(
                f"cannot listen on the link {interface}: {exc}", remedy="the clone's fence is gone; start a new run"
            ) from exc

    def fileno(self) -> int:
        """Return the descriptor, for select."""
        return self._socket.fileno()

    def hear_everything(self) -> None:
        """Hear frames to other MACs too (packet(7), PACKET_MR_PROMISC), until closed. Raises OSError."""
        index = socket.if_nametoindex(self._interface)
        self._socket.setsockopt(_SOL_PACKET, _ADD_MEMBERSHIP, _MEMBERSHIP.pack(index, _PROMISCUOUS, 0, b""))

    @property
    def mac(self) -> bytes:
        """Return the link's own MAC address."""
        return bytes(self._socket.getsockname()[4])

    def send(self, frame: bytes) -> None:
        """Send one frame. Raises OSError."""
        self._socket.send(frame)

    def receive(self, *, timeout_seconds: float) -> tuple[bytes, bool] | None:
        """Return one frame and whether it was leaving by the link rather than arriving; None when the time is over.

        Raises OSError (ENETDOWN when the link went down).
        """
        self._socket.settimeout(max(timeout_seconds, 0.001))
        try:
            data, ancillary, _, origin = self._socket.recvmsg(_LONGEST_FRAME_BYTES, socket.CMSG_SPACE(_AUXDATA.size))
        except TimeoutError:
            return None
        return _with_tag(data, ancillary=ancillary), origin[2] == socket.PACKET_OUTGOING

    def close(self) -> None:
        """Close the socket. May be repeated."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _with_tag(data: bytes, *, ancillary: Sequence[tuple[int, int, bytes]]) -> bytes:
    """Put the VLAN tag, which the kernel takes out of the frame and hands over beside it, back into its place."""
    for level, kind, value in ancillary:
        if (level, kind, len(value)) == (_SOL_PACKET, _PACKET_AUXDATA, _AUXDATA.size):
            status, *_, control, protocol = _AUXDATA.unpack(value)
            if status & _VLAN_VALID:
                return data[:_MAC_BYTES] + struct.pack("!HH", protocol, control) + data[_MAC_BYTES:]
    return data


def _attach(target: socket.socket, *, steps: Sequence[BpfStep]) -> None:
    program = b"".join(struct.pack("HBBI", step.code, step.jump_true, step.jump_false, step.operand) for step in steps)
    buffer = ctypes.create_string_buffer(program, len(program))
    target.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HL", len(steps), ctypes.addressof(buffer)))
