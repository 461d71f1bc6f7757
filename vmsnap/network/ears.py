"""Ears on every link of the host: whether anything from a clone's side of its fence is anywhere it must not be.

Why silence here proves something. The original uses the clone's MAC and addresses, so no address tells whose frame it
is. What tells is where a frame came in: the fence's rules mark every packet that arrives on the clone's tap or on our
veth (``vmsnap.network.rules``), before anything else is decided, with a number of this run. The kernel keeps the mark
on the packet while it bridges, floods, routes or delivers it, and clears it only where the packet leaves the host's
network namespace. A packet socket without a link, whose filter knows the mark, thus hears every such packet at every
link of the host, arriving or leaving, except at the fence's own two ends; the original's frames do not bear the mark.
The fence's bridge counts as foreign: what is heard there has reached the host's own protocols.

That the ears are not deaf is shown each time by the positive control: a frame sent into the fence must be heard, with
its mark and through the same filter, at the clone's tap (``vmsnap.network.control``). Where the marking itself is
taken away, by a flush of the rules, the watch notices that, not the ears.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Self

from vmsnap.errors import DriverError, PreconditionError
from vmsnap.model.isolation import FencePlan
from vmsnap.network.packets import ETH_P_ALL, attach_filter, marked_filter

_KEPT_BYTES = 256
_AT_MOST = 100  # frames at once: one is enough to sound the alarm


class Ears:
    """Hears what bears a plan's mark on any link of the calling thread's namespace but the fence's two ends."""

    def __init__(self, plan: FencePlan) -> None:
        """Begin to listen. Raises PreconditionError without the right, DriverError."""
        self._mark = plan.mark
        self._ends = frozenset(name for port in plan.ports for name in (port.tap, port.veth_host))
        try:
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        except PermissionError as exc:
            raise PreconditionError(
                f"cannot listen on the host's links: {exc}", remedy="vmsnap has to run as root"
            ) from exc
        except OSError as exc:
            raise DriverError(f"cannot listen on the host's links: {exc}", remedy="start a new run") from exc
        try:
            self._socket.setblocking(False)
            self.know_ends()
            self._forget_what_came_unfiltered()
        except BaseException:
            self._socket.close()
            raise

    def know_ends(self) -> None:
        """Look again which links are the fence's ends; a tap may have been unplugged and plugged. Raises DriverError."""
        known = [index for index, name in socket.if_nameindex() if name in self._ends]
        try:
            attach_filter(self._socket, steps=marked_filter(self._mark, except_links=known))
        except OSError as exc:
            raise DriverError(f"cannot filter what the host's links carry: {exc}", remedy="start a new run") from exc

    def _forget_what_came_unfiltered(self) -> None:
        """Drop what arrived between the socket's making and its filter's; the clone stands still then."""
        while True:
            try:
                self._socket.recv(1)
            except BlockingIOError:
                return

    def fileno(self) -> int:
        """Return the descriptor, for poll."""
        return self._socket.fileno()

    def heard(self) -> tuple[tuple[str, bytes], ...]:
        """Return the link and the first bytes of what was heard since the last look; waits for nothing."""
        return tuple(self._heard())

    def _heard(self) -> Iterator[tuple[str, bytes]]:
        for _ in range(_AT_MOST):
            try:
                data, origin = self._socket.recvfrom(_KEPT_BYTES)
            except BlockingIOError:
                return
            except OSError:  # a link that listens goes down: the socket goes on with the others
                continue
            if origin[0] not in self._ends:
                yield origin[0], data

    def close(self) -> None:
        """Stop listening. May be repeated."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
