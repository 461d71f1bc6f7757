"""The ladder: the rungs in the policy's order, each with its deadline, until the clone answers."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from ipaddress import IPv4Network
from typing import Self

from vmsnap.dhcp.pool import DEFAULT_POOL
from vmsnap.errors import BugError, CancelledError, DeadlineError, SafetyError, VmsnapError
from vmsnap.model.ids import RunId
from vmsnap.model.isolation import Addressed, Rung, RungAttempt
from vmsnap.network.linkflap import FLAPS, Flap, LinkFlap
from vmsnap.network.oldaddress import OldAddressWorld
from vmsnap.network.responder import FenceResponder
from vmsnap.network.rungs import RungDriver, Timer
from vmsnap.ports.clock import Cancel, Clock
from vmsnap.ports.network import AddressRequest, LinkControl

_LOG = logging.getLogger(__name__)


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
    ) -> None:
        """``avoid`` are networks never to lease from; the guest's old ones are avoided anyway."""
        self._clock = clock
        self._lock = threading.Lock()
        self._responders: dict[RunId, tuple[FenceResponder, ...]] = {}
        self._drivers: Mapping[Rung, RungDriver] = drivers or {
            Rung.LINK_FLAP: LinkFlap(keeper=self, pool=pool, avoid=avoid, flaps=flaps),
            Rung.OLD_ADDRESS: OldAddressWorld(keeper=self),
        }

    def move(self, request: AddressRequest, *, links: LinkControl, cancel: Cancel) -> Addressed:
        """Try the rungs in order; see ``vmsnap.ports.network.Addressing``.

        A rung that is not offered here counts as a failed attempt. Raises DeadlineError with every attempt in its
        details, CancelledError, SafetyError.
        """
        started = self._clock.monotonic()
        attempts: list[RungAttempt] = []
        for rung in request.ladder:
            cancel.check()
            began = self._clock.monotonic()
            try:
                address = self._climb(rung, request=request, links=links, cancel=cancel)
            except (BugError, CancelledError, SafetyError):
                raise
            except VmsnapError as exc:
                seconds = self._clock.monotonic() - began
                attempts.append(RungAttempt(rung=rung, seconds=seconds, failure=exc.brief))
                _LOG.info("rung %s did not work after %.1f s: %s", rung, seconds, exc.brief)
                continue
            now = self._clock.monotonic()
            attempts.append(RungAttempt(rung=rung, seconds=now - began))
            return Addressed(rung=rung, address=address, seconds=now - started, attempts=tuple(attempts))
        raise DeadlineError(
            "the clone could not be reached at any address",
            details="\n".join(f"{attempt.rung}: {attempt.failure} ({attempt.seconds:.1f} s)" for attempt in attempts),
            remedy="allow more rungs or a longer deadline in the policy, or install the guest agent in the guest",
        )

    def _climb(self, rung: Rung, *, request: AddressRequest, links: LinkControl, cancel: Cancel) -> str | None:
        if rung is Rung.NONE:
            return None
        driver = self._drivers.get(rung)
        if driver is None:
            raise DeadlineError(f"the rung '{rung}' is not offered yet", remedy="leave it out of the policy's ladder")
        end = self._clock.monotonic() + request.rung_deadline.total_seconds()
        return driver.climb(request, links=links, timer=Timer(clock=self._clock, cancel=cancel, end=end))

    def keep(self, run: RunId, *, responders: tuple[FenceResponder, ...]) -> None:
        """Keep responders until their fence is gone; a rung calls this. Stops those the run had before."""
        with self._lock:
            before = self._responders.pop(run, ())
            gone = [key for key, kept in self._responders.items() if not any(item.is_running for item in kept)]
            ended = [item for key in gone for item in self._responders.pop(key)]
            self._responders[run] = responders
        for responder in (*before, *ended):
            responder.stop()

    def close(self) -> None:
        """Stop all responders. May be repeated. Clones keep their addresses until the lease (1 h) ends."""
        with self._lock:
            kept, self._responders = self._responders, {}
        for responders in kept.values():
            for responder in responders:
                responder.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
