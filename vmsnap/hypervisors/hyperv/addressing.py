"""Addresses for clones on Hyper-V: by an operator's responder on the private switch, and two rungs to make clones ask it.

Nobody of ours is on the switch, so no address is tried out: what counts is what the guest, or its integration services, say.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from datetime import timedelta
from ipaddress import IPv4Address
from typing import NoReturn

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from vmsnap.engines.windows import powershell
from vmsnap.errors import (
    BugError,
    CancelledError,
    DeadlineError,
    DriverError,
    GuestCommandError,
    PreconditionError,
    SafetyError,
    VmsnapError,
)
from vmsnap.hypervisors.hyperv.fence import HyperVFence, find_switch
from vmsnap.hypervisors.hyperv.host import Host
from vmsnap.hypervisors.hyperv.responder import Responder
from vmsnap.model.isolation import Addressed, FencePlan, Rung, RungAttempt
from vmsnap.ports.clock import Cancel, Clock
from vmsnap.ports.guest import GuestControl
from vmsnap.ports.network import AddressRequest, LinkControl

_LOG = logging.getLogger(__name__)
_PULLED = timedelta(seconds=5)
_BETWEEN = timedelta(seconds=1)
_NOT_HERE = {
    Rung.FORCERENEW: "nothing of vmsnap's is on a private switch that could send FORCERENEW",
    Rung.HOT_PLUG: "adapters stay plugged in on Hyper-V",
    Rung.OLD_ADDRESS: "nothing of vmsnap's is on a private switch that could talk to the old address",
}


class _Lease(BaseModel):
    """What ``windows_renew.ps1`` tells of an adapter."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    Mac: str
    Dhcp: bool
    Addresses: list[str]


_LEASES = TypeAdapter(list[_Lease])


class HyperVAddressing:
    """Gives clones an address where there is a responder, and refuses where there is none. See ports.network."""

    def __init__(self, host: Host, *, fence: HyperVFence, responder: Responder | None, clock: Clock) -> None:
        self._host = host
        self._fence = fence
        self._responder = responder
        self._clock = clock

    def require_possible(self, *, to_connect: bool) -> None:
        """Return where a responder is ready and nobody wants to connect. Raises PreconditionError."""
        if self._responder is None or to_connect:
            _refuse()
        self._responder.require_ready()

    def move(self, request: AddressRequest, *, links: LinkControl, cancel: Cancel) -> Addressed:
        """Try the rungs in order, the responder on the clone's own switch meanwhile. See ``ports.network.Addressing``.

        Raises DeadlineError with every attempt in its details, IsolationError where the fence is not whole afterwards.
        """
        if self._responder is None:
            _refuse()
        began = self._clock.monotonic()
        known = {old.interface.ip for old in request.old_addresses}
        known |= self._told(request.fence)
        attempts: list[RungAttempt] = []
        found: IPv4Address | None = None
        plan = request.fence
        reasons = {rung: _passed_over(rung, request=request, known=known) for rung in request.ladder}
        if all(reasons.values()):
            attempts = [RungAttempt(rung=rung, seconds=0.0, failure=reason) for rung, reason in reasons.items()]
            _fail(attempts)
        switch = find_switch(self._host, run=plan.run)
        with self._responder.on(switch, run=plan.run, patience=request.rung_deadline, cancel=cancel):
            for rung, reason in reasons.items():
                cancel.check()
                attempt, found = self._try(rung, reason, request=request, links=links, cancel=cancel, known=known)
                attempts.append(attempt)
                if found is not None:
                    break
        self._fence.read_back(plan)
        if found is None:
            _fail(attempts)
        seconds = self._clock.monotonic() - began
        return Addressed(rung=attempts[-1].rung, address=str(found), seconds=seconds, attempts=tuple(attempts))

    def _told(self, plan: FencePlan) -> frozenset[IPv4Address]:
        """Return the addresses of the clone's adapters, as its integration services tell them."""
        macs = {port.mac.lower() for port in plan.ports}
        return frozenset(
            address
            for machine in self._host.machines_of(plan.run)
            for adapter in self._host.describe(machine.id).adapters
            if adapter.mac in macs
            for address in adapter.addresses
        )

    def _try(
        self,
        rung: Rung,
        reason: str | None,
        *,
        request: AddressRequest,
        links: LinkControl,
        cancel: Cancel,
        known: set[IPv4Address],
    ) -> tuple[RungAttempt, IPv4Address | None]:
        if reason is not None:
            request.note(f"rung {rung} passed over: {reason}")
            return RungAttempt(rung=rung, seconds=0.0, failure=reason), None
        began = self._clock.monotonic()
        until = began + request.deadlines.get(rung, request.rung_deadline).total_seconds()
        request.note(f"rung {rung} began")
        try:
            if rung is Rung.AGENT:
                address = self._renew(request, known=known, until=until, cancel=cancel)
            else:
                address = self._flap(request, links=links, known=known, until=until, cancel=cancel)
        except (BugError, CancelledError, SafetyError):
            raise
        except VmsnapError as error:
            seconds = self._clock.monotonic() - began
            _LOG.info("rung %s did not work after %.1f s: %s", rung, seconds, error.brief)
            request.note(f"rung {rung} ended after {seconds:.1f} s: {error.brief}")
            return RungAttempt(rung=rung, seconds=seconds, failure=error.brief), None
        seconds = self._clock.monotonic() - began
        request.note(f"rung {rung} worked after {seconds:.1f} s: the clone has {address}")
        return RungAttempt(rung=rung, seconds=seconds), address

    def _renew(self, request: AddressRequest, *, known: set[IPv4Address], until: float, cancel: Cancel) -> IPv4Address:
        """Tell the guest's own DHCP client, by PowerShell Direct, to begin anew."""
        if request.agent is None:
            raise DriverError("the guest is not reached by PowerShell Direct", remedy="name hyperv.guest_credential")
        renew = True
        while True:
            told = self._leases(request, control=request.agent, renew=renew, until=until)
            renew = False
            if (address := _new_one(told, known=known)) is not None:
                return address
            self._wait(until, cancel=cancel, missing="the clone got no address of the responder when it asked anew")

    def _leases(
        self, request: AddressRequest, *, control: GuestControl, renew: bool, until: float
    ) -> frozenset[IPv4Address]:
        static = {mac.lower() for mac in request.static_macs}
        macs = [port.mac.lower() for port in request.fence.ports if port.mac.lower() not in static]
        left = timedelta(seconds=max(until - self._clock.monotonic(), 1.0))
        command = powershell("windows_renew", parameters={"Macs": macs, "Renew": int(renew)})
        done = control.run(command, timeout=left)
        if done.exit_status != 0:
            raise GuestCommandError(
                "the clone could not be told to renew its addresses", details=done.error_text.strip()[:500]
            )
        return leased(done.text, macs=macs)

    def _flap(
        self, request: AddressRequest, *, links: LinkControl, known: set[IPv4Address], until: float, cancel: Cancel
    ) -> IPv4Address:
        """Pull the clone's cables and plug them into its own switch again; then the fence is proven anew.

        Where anything fails on the way, cables stay out.
        """
        plan = request.fence
        for port in plan.ports:
            links.set_link(mac=port.mac, up=False)
        pulled = min(self._clock.monotonic() + _PULLED.total_seconds(), until)
        while self._clock.monotonic() < pulled:
            cancel.check()
            self._clock.sleep(_BETWEEN)
        for port in plan.ports:
            links.set_link(mac=port.mac, up=True)
        self._fence.prove(plan)
        while True:
            if (address := _new_one(self._told(plan), known=known)) is not None:
                return address
            self._wait(until, cancel=cancel, missing="the clone asked for no address after its link came back")

    def _wait(self, until: float, *, cancel: Cancel, missing: str) -> None:
        cancel.check()
        if self._clock.monotonic() > until:
            raise DeadlineError(missing, remedy="allow the rung more time, or another rung")
        self._clock.sleep(_BETWEEN)


def leased(text: str, *, macs: Iterable[str]) -> frozenset[IPv4Address]:
    """Return the addresses that DHCP gave these adapters, of what the guest's script printed. Raises GuestCommandError."""
    try:
        leases = _LEASES.validate_python(json.loads(text))
        return frozenset(
            IPv4Address(word) for lease in leases if lease.Dhcp and lease.Mac in macs for word in lease.Addresses
        )
    except (ValueError, ValidationError) as error:
        raise GuestCommandError(
            "what the clone says of its addresses makes no sense", details=f"{error}\n{text[:300]}"
        ) from error


def _new_one(addresses: frozenset[IPv4Address], *, known: set[IPv4Address]) -> IPv4Address | None:
    """Return an address that the clone did not bring along. One that Windows makes up for itself (169.254) is none."""
    good = {item for item in addresses - known if not item.is_link_local and not item.is_unspecified}
    return min(good, default=None)


def _passed_over(rung: Rung, *, request: AddressRequest, known: set[IPv4Address]) -> str | None:
    """Return why a rung would be of no use, without trying it."""
    if rung in _NOT_HERE:
        return _NOT_HERE[rung]
    macs = {port.mac.lower() for port in request.fence.ports}
    if not macs:
        return "the guest has no network adapter"
    if macs <= {mac.lower() for mac in request.static_macs}:
        return "the guest's addresses are static"
    if not known:
        return "the guest's old address is not known, and a new one could not be told from it"
    return None


def _fail(attempts: list[RungAttempt]) -> NoReturn:
    raise DeadlineError(
        "the clone took no address of its own",
        details="\n".join(f"{item.rung}: {item.failure} ({item.seconds:.1f} s)" for item in attempts),
        remedy="name 'agent' and 'link-flap' in isolation.ladder, allow them more time, set isolation.old_address where it "
        "is not known; does the responder of hyperv.responder_vm refuse addresses that it did not give (docs/hyper-v.md)?",
    )


def _refuse() -> NoReturn:
    raise PreconditionError(
        "a clone on Hyper-V has no address: it is reached by PowerShell Direct, or not at all",
        remedy='leave control.via and isolation.address at "auto", and name an administrator of the guest in '
        "hyperv.guest_credential; does PowerShell Direct reach the guest (Windows 10, Server 2016 or later)? "
        "For an address without connections to it: hyperv.responder_vm (docs/hyper-v.md)",
    )
