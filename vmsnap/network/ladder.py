"""The ladder: the rungs in the policy's order, each with its deadline, until the clone answers."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from ipaddress import IPv4Network
from typing import Self

from vmsnap.dhcp.pool import DEFAULT_POOL
from vmsnap.errors import BugError, CancelledError, DeadlineError, DriverError, SafetyError, VmsnapError
from vmsnap.model.ids import RunId
from vmsnap.model.isolation import DHCP_RUNGS, Addressed, Rung, RungAttempt
from vmsnap.network.agentrung import AgentRung
from vmsnap.network.forcerenew import ForceRenew
from vmsnap.network.hotplug import HotPlug
from vmsnap.network.leasing import FenceDhcp
from vmsnap.network.linkflap import FLAPS, Flap, LinkFlap
from vmsnap.network.oldaddress import OldAddressWorld
from vmsnap.network.rungs import Dhcp, Listener, RungDriver, Timer, wait_for_answer
from vmsnap.ports.clock import Cancel, Clock
from vmsnap.ports.network import AddressRequest, LinkControl

_LOG = logging.getLogger(__name__)
_FIRST_LOOK_SECONDS = 0.3  # a client that renews as soon as the clone runs has spoken by then
_SETTLE_SECONDS = (
    6.0  # from a client's first message to its lease and an answer from there: udhcpc rests 3 s after a NAK
)


class NetworkAddressing:
    """Gives clones an address. Close it, or use it as a context, when no clone needs its address any more.

    Responders of finished runs end by themselves when their fence is released. Safe to share between runs.
    """

    def __init__(
        self,
        *,
        clock: Clock,
        pool: IPv4Network = DEFAULT_POOL,
        avoid: tuple[IPv4Network, ...] = (),
        flaps: tuple[Flap, ...] = FLAPS,
        drivers: Mapping[Rung, RungDriver] | None = None,
        dhcp_for: Callable[[AddressRequest], Dhcp] | None = None,
    ) -> None:
        """``avoid`` are networks never to lease from; the guest's old ones are avoided anyway."""
        self._clock = clock
        self._lock = threading.Lock()
        self._listeners: dict[RunId, tuple[Listener, ...]] = {}
        self._dhcp_for = dhcp_for or (lambda request: FenceDhcp(request, pool=pool, avoid=avoid))
        self._drivers: Mapping[Rung, RungDriver] = drivers or {
            Rung.FORCERENEW: ForceRenew(),
            Rung.LINK_FLAP: LinkFlap(flaps=flaps),
            Rung.AGENT: AgentRung(),
            Rung.HOT_PLUG: HotPlug(),
            Rung.OLD_ADDRESS: OldAddressWorld(keeper=self),
        }

    def require_possible(self, *, to_connect: bool) -> None:
        """Return: a fence on this host always has an inside."""

    def move(self, request: AddressRequest, *, links: LinkControl, cancel: Cancel) -> Addressed:
        """Try the rungs in order; see ``vmsnap.ports.network.Addressing``.

        One responder a NIC listens from before the first rung to the end. Raises DeadlineError with every attempt in
        its details, CancelledError, SafetyError.
        """
        self._forget(request.fence.run)
        started = self._clock.monotonic()
        attempts: list[RungAttempt] = []
        dhcp = self._dhcp_for(request)
        with ExitStack() as undo:
            undo.callback(dhcp.withdraw)
            undo.callback(dhcp.stop)
            for rung in request.ladder:
                cancel.check()
                if rung is Rung.NONE:
                    address: str | None = None
                    attempts.append(RungAttempt(rung=rung, seconds=0.0))
                else:
                    attempt, address = self._try(rung, request=request, links=links, cancel=cancel, dhcp=dhcp)
                    attempts.append(attempt)
                if attempts[-1].failure is None:
                    undo.pop_all()
                    self.keep(request.fence.run, listeners=(dhcp,))
                    return Addressed(
                        rung=attempts[-1].rung,
                        address=address,
                        seconds=self._clock.monotonic() - started,
                        attempts=tuple(attempts),
                    )
        raise DeadlineError(
            "the clone could not be reached at any address",
            details="\n".join(f"{attempt.rung}: {attempt.failure} ({attempt.seconds:.1f} s)" for attempt in attempts),
            remedy="allow more rungs or a longer deadline in the policy, or install the guest agent in the guest",
        )

    def _try(
        self, rung: Rung, *, request: AddressRequest, links: LinkControl, cancel: Cancel, dhcp: Dhcp
    ) -> tuple[RungAttempt, str | None]:
        """Return what became of a rung, and the address where the clone answers."""
        reason = _passed_over(rung, request=request)
        if reason is not None:
            request.note(f"rung {rung} passed over: {reason}")
            return RungAttempt(rung=rung, seconds=0.0, failure=reason), None
        began = self._clock.monotonic()
        end = began + request.deadlines.get(rung, request.rung_deadline).total_seconds()
        timer = Timer(clock=self._clock, cancel=cancel, end=end)
        request.note(f"rung {rung} began")
        worked = rung
        try:
            address = self._moved_by_itself(dhcp, timer=timer) if rung in DHCP_RUNGS else None
            if address is not None:
                worked = Rung.BY_ITSELF
            else:
                address = self._climb(rung, request=request, links=links, timer=timer, dhcp=dhcp)
        except (BugError, CancelledError, SafetyError):
            raise
        except VmsnapError as exc:
            seconds = self._clock.monotonic() - began
            _LOG.info("rung %s did not work after %.1f s: %s", rung, seconds, exc.brief)
            request.note(f"rung {rung} ended after {seconds:.1f} s: {exc.brief}")
            return RungAttempt(rung=rung, seconds=seconds, failure=exc.brief), None
        seconds = self._clock.monotonic() - began
        request.note(f"rung {worked} worked after {seconds:.1f} s: the clone answers at {address}")
        return RungAttempt(rung=worked, seconds=seconds), address

    def _moved_by_itself(self, dhcp: Dhcp, *, timer: Timer) -> str | None:
        """Return the address that the clone took before this rung, where it answers there; start listening if need be."""
        if dhcp.is_running:
            return dhcp.answering()
        dhcp.start()
        timer.wait(_FIRST_LOOK_SECONDS)
        if not dhcp.messages:
            return None
        settled = min(timer.end, self._clock.monotonic() + _SETTLE_SECONDS)
        try:
            return wait_for_answer(dhcp, timer=Timer(clock=timer.clock, cancel=timer.cancel, end=settled))
        except DeadlineError:
            return None

    def _climb(self, rung: Rung, *, request: AddressRequest, links: LinkControl, timer: Timer, dhcp: Dhcp) -> str:
        driver = self._drivers.get(rung)
        if driver is None:
            raise DriverError(f"the rung '{rung}' is not offered here", remedy="leave it out of the policy's ladder")
        return driver.climb(request, links=links, timer=timer, dhcp=dhcp)

    def keep(self, run: RunId, *, listeners: tuple[Listener, ...]) -> None:
        """Keep listeners until their fence is gone, beside those the run has; a rung calls this."""
        with self._lock:
            gone = [key for key, kept in self._listeners.items() if not any(item.is_running for item in kept)]
            ended = [item for key in gone if key != run for item in self._listeners.pop(key)]
            self._listeners[run] = (*self._listeners.get(run, ()), *listeners)
        for listener in ended:
            listener.stop()

    def _forget(self, run: RunId) -> None:
        with self._lock:
            before = self._listeners.pop(run, ())
        for listener in before:
            listener.stop()

    def close(self) -> None:
        """Stop all responders. May be repeated. Clones keep their addresses until the lease (1 h) ends."""
        with self._lock:
            kept, self._listeners = self._listeners, {}
        for listeners in kept.values():
            for listener in listeners:
                listener.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _passed_over(rung: Rung, *, request: AddressRequest) -> str | None:
    """Return why a rung would be of no use, without trying it."""
    if rung not in DHCP_RUNGS:
        return None
    macs = {port.mac.lower() for port in request.fence.ports}
    if not macs:
        return "the guest has no network interface"
    if macs <= {mac.lower() for mac in request.static_macs}:
        return "the guest's addresses are static"
    return None
