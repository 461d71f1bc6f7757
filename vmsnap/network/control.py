"""The positive control of a fence: a marked frame, seen where it shall arrive and counted where it shall die.

Ears that hear nothing prove nothing. One broadcast frame from inside the namespace must leave by the tap, where it is
listened for by its mark as the ears do everywhere else, and must be dropped, and counted, on its way to the host.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from datetime import timedelta

from vmsnap.errors import DriverError, IsolationError
from vmsnap.model.isolation import FencePlan, FencePort, ProofKind, ProofPoint
from vmsnap.network import netns, rules
from vmsnap.network.ears import Ears
from vmsnap.network.frames import ETHERTYPE_EXPERIMENT, Frame
from vmsnap.network.packets import PacketSocket, marked_filter

_BROADCAST = b"\xff" * 6
_ATTEMPT_SECONDS = 0.1
_TOKEN_BYTES = 16
_SHORTEST_PAYLOAD_BYTES = 46


def send_marked_frames(plan: FencePlan, *, timeout: timedelta) -> tuple[ProofPoint, ...]:
    """Send a marked frame into every port and return what was seen. Raises IsolationError."""
    try:
        before = rules.counts(plan, families=(rules.TO_HOST.family,))
        with Ears(plan) as ears:
            points = [_control(plan, port=port, timeout=timeout) for port in plan.ports]
            heard = ears.heard()
        after = rules.counts(plan, families=(rules.TO_HOST.family,))
    except DriverError as exc:
        raise IsolationError(
            f"the fence {plan.namespace} cannot be tried out: {exc.brief}",
            details=exc.details,
            remedy="nothing ran; start a new run",
        ) from exc
    if heard:
        raise IsolationError(
            f"a marked frame sent inside the fence reached the host's link {heard[0][0]}",
            details=heard[0][1][:64].hex(),
            remedy="a rule of the fence does not work on this host; check nftables and the kernel",
        )
    ends = ", ".join(port.tap for port in plan.ports) or "no link"
    points.append(
        ProofPoint(
            kind=ProofKind.EARS,
            name=f"ears for the mark {plan.mark:#010x}",
            observed=f"hear the marked frame at {ends}, and nothing on any other link of the host",
        )
    )
    for port in plan.ports:
        label = rules.to_host_label(port.veth_host)
        dropped = after[label].packets - before[label].packets
        if dropped < 1:
            raise IsolationError(
                f"a marked frame from {port.veth_inside} was not dropped on its way to the host",
                details=f"the counter of the rule '{label}' stood still",
                remedy="another program changes the bridge's rules; find it before the next run",
            )
        points.append(ProofPoint(kind=ProofKind.CONTROL, name=f"drop counter '{label}'", observed=f"rose by {dropped}"))
    return tuple(points)


def _control(plan: FencePlan, *, port: FencePort, timeout: timedelta) -> ProofPoint:
    token = secrets.token_bytes(_TOKEN_BYTES)
    deadline = time.monotonic() + timeout.total_seconds()
    inside: Callable[[], PacketSocket] = lambda: PacketSocket(port.veth_inside)  # noqa: E731 - typed for inside()
    with (
        PacketSocket(port.tap, bpf=marked_filter(plan.mark)) as at_tap,
        netns.inside(plan.namespace, action=inside) as sender,
    ):
        frame = Frame(
            destination=_BROADCAST,
            source=sender.mac,
            ethertype=ETHERTYPE_EXPERIMENT,
            payload=(b"vmsnap" + token).ljust(_SHORTEST_PAYLOAD_BYTES, b"\0"),
        ).encode()
        while time.monotonic() < deadline:
            try:
                sender.send(frame)
                if _arrived(at_tap, frame=frame, seconds=_ATTEMPT_SECONDS):
                    break
            except OSError as exc:
                raise DriverError(f"the marked frame for {port.tap} cannot be sent or heard: {exc}") from exc
        else:
            raise IsolationError(
                f"a marked frame sent inside the fence did not arrive at {port.tap}",
                remedy="the clone's link may be down, or the fence is broken; start a new run",
            )
    return ProofPoint(
        kind=ProofKind.CONTROL, name=f"marked frame to {port.tap}", observed="arrived; not heard on any other link"
    )


def _arrived(at: PacketSocket, *, frame: bytes, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while (received := at.receive(timeout_seconds=end - time.monotonic())) is not None:
        if received[0] == frame:
            return True
    return False
