"""A stand-in for a clone's end of its tap: a TAP device of the same name, written to as QEMU would.

The rules of a fence go by names, so what they do to the stand-in they will do to the clone. The device is not
persistent: it ends with its descriptor, and so with a process that dies (linux/Documentation/networking/tuntap).
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
from typing import Self

from vmsnap.errors import DriverError, PreconditionError

_DEVICE = "/dev/net/tun"
_TUNSETIFF = 0x400454CA  # linux/if_tun.h, as the next two
_IFF_TAP = 0x0002
_IFF_NO_PI = 0x1000
_LONGEST_FRAME_BYTES = 65536


class StandInTap:
    """The guest's end of a new tap. Raises PreconditionError where the kernel has no TAP devices, DriverError."""

    def __init__(self, name: str) -> None:
        self._name = name
        try:
            self._descriptor = os.open(_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as exc:
            raise PreconditionError(f"cannot open {_DEVICE}: {exc}", remedy="load the kernel module tun") from exc
        try:
            fcntl.ioctl(self._descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI))
        except OSError as exc:
            os.close(self._descriptor)
            raise DriverError(f"cannot make the tap {name}: {exc}", remedy="run 'vmsnap reconcile'") from exc

    def send(self, frame: bytes) -> None:
        """Let one frame arrive on the tap, as sent by the guest. Raises DriverError."""
        try:
            os.write(self._descriptor, frame)
        except OSError as exc:
            raise DriverError(f"cannot send through the tap {self._name}: {exc}", remedy="start a new run") from exc

    def received(self, *, timeout_seconds: float) -> tuple[bytes, ...]:
        """Return the frames that were sent to the guest; wait that long for a first one."""
        frames: list[bytes] = []
        wait = timeout_seconds
        while select.select([self._descriptor], [], [], wait)[0]:
            wait = 0
            try:
                frames.append(os.read(self._descriptor, _LONGEST_FRAME_BYTES))
            except OSError:
                break
        return tuple(frames)

    def close(self) -> None:
        """Take the tap away."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
