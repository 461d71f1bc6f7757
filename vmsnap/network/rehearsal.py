"""The rehearsal of a fence: before the clone is made, a stand-in at its tap tries everything and nothing may come of it.

The frames enter where the clone's will, so they meet the very rules that will hold the clone. For each NIC: a marked
broadcast must arrive inside the namespace (so frames do pass), then each probe must be dropped and counted on its way
to the host, nothing may be heard anywhere on the host (``vmsnap.network.ears``), and nobody may answer.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from datetime import timedelta

from vmsnap.errors import DriverError, IsolationError
from vmsnap.model.isolation import FencePlan, FencePort, ProofKind, ProofPoint
from vmsnap.network import links, netns, rules
from vmsnap.network.ears import Ears
from vmsnap.network.frames import ETHERTYPE_EXPERIMENT, Frame, parse_mac
from vmsnap.network.packets import PacketSocket
from vmsnap.network.probes import BROADCAST, Probe, Target, past_the_filter, probes_of, targets_of
from vmsnap.network.standin import StandInTap

_ATTEMPT_SECONDS = 0.1
_ANSWER_SECONDS = 0.01  # the host's own protocols answer within the sending call
_SHORTEST_PAYLOAD_BYTES = 46


def rehearse(plan: FencePlan, *, timeout: timedelta) -> tuple[ProofPoint, ...]:
    """Try a built fence out before its clone is there. Leaves nothing behind but counters. Raises IsolationError."""
    try:
        targets = targets_of(plan)
        macs = {link.name: link.mac for link in links.all_links()}
        with Ears(plan) as ears:
            before = rules.counts(plan, families=(rules.TO_HOST.family,))
            sent = {
                port: _one(
                    plan,
                    port=port,
                    probes=probes_of(plan, port=port, bridge_mac=parse_mac(macs[port.bridge]), targets=targets),
                    targets=targets,
                    timeout=timeout,
                )
                for port in plan.ports
            }
            after = rules.counts(plan, families=(rules.TO_HOST.family,))
            heard = ears.heard()
    except DriverError as exc:
        raise IsolationError(
            f"the fence {plan.namespace} cannot be rehearsed: {exc.brief}",
            details=exc.details,
            remedy="nothing ran; start a new run",
        ) from exc
    if heard:
        link, data = heard[0]
        raise IsolationError(
            f"a frame of a stand-in for the clone came through the fence to the host's link {link}",
            details=f"{data[:64].hex()}",
            remedy="a rule of the fence does not work on this host; check nftables and the kernel",
        )
    points = []
    for port, probes in sent.items():
        label = rules.to_host_label(port.tap)
        dropped = after[label].packets - before[label].packets
        if dropped < len(probes):
            raise IsolationError(
                f"of {len(probes)} frames that a stand-in for the clone sent to the host, {dropped} were dropped",
                details="\n".join(probe.what for probe in probes),
                remedy="another program changes the bridge's rules; find it before the next run",
            )
        points.append(
            ProofPoint(
                kind=ProofKind.PROBES,
                name=f"probes from {port.tap}",
                observed=f"{len(probes)} frames, {dropped} drops counted, 0 answers: "
                + "; ".join(target.what for target in targets),
            )
        )
    return tuple(points)


def _one(
    plan: FencePlan, *, port: FencePort, probes: tuple[Probe, ...], targets: tuple[Target, ...], timeout: timedelta
) -> tuple[Probe, ...]:
    inside: Callable[[], PacketSocket] = lambda: PacketSocket(port.veth_inside)  # noqa: E731 - typed for inside()
    with StandInTap(port.tap) as clone, netns.inside(plan.namespace, action=inside) as listener:
        links.switch_ipv6_off(port.tap)
        links.join_bridge(port.tap, bridge=port.bridge)
        _require_passage(port, clone=clone, listener=listener, timeout=timeout)
        clone.received(timeout_seconds=0)
        for probe in (*probes, *past_the_filter(port, targets=targets)):
            clone.send(probe.frame)
        received = clone.received(timeout_seconds=_ANSWER_SECONDS)
    # To the clone alone: programs such as lldpd speak to everybody on any new link of the host.
    answers = [frame for frame in received if frame[:6] == parse_mac(port.mac)]
    if answers:
        raise IsolationError(
            f"somebody answered a stand-in for the clone on {port.tap}",
            details=answers[0][:64].hex(),
            remedy="a rule of the fence does not work on this host; check nftables and the kernel",
        )
    return probes


def _require_passage(port: FencePort, *, clone: StandInTap, listener: PacketSocket, timeout: timedelta) -> None:
    """Send a marked frame until it arrives inside: without that, drops would prove nothing."""
    frame = Frame(
        destination=BROADCAST,
        source=parse_mac(port.mac),
        ethertype=ETHERTYPE_EXPERIMENT,
        payload=(b"vmsnap" + secrets.token_bytes(16)).ljust(_SHORTEST_PAYLOAD_BYTES, b"\0"),
    ).encode()
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        clone.send(frame)
        end = time.monotonic() + _ATTEMPT_SECONDS
        while (received := listener.receive(timeout_seconds=end - time.monotonic())) is not None:
            if received[0] == frame:
                return
    raise IsolationError(
        f"a frame of a stand-in for the clone on {port.tap} did not arrive inside the fence",
        remedy="the fence is broken; start a new run",
    )
