"""Finding where an environment answers: on a network of the hypervisor, or in its fence."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import IPv4Address, IPv4Interface

from vmsnap.dhcp.pool import choose_networks
from vmsnap.errors import CancelledError, GuestUnreachableError, PreconditionError
from vmsnap.model.environment import Environment
from vmsnap.model.guest import GuestState, OldAddress
from vmsnap.model.isolation import FencePlan, Rung
from vmsnap.model.policy import Policy
from vmsnap.ports.clock import Cancel
from vmsnap.ports.guest import Connector
from vmsnap.ports.progress import Progress
from vmsnap.ports.service import Opener, Place, Residence
from vmsnap.workflow.location import usable
from vmsnap.workflow.run import closing
from vmsnap.workflow.world import World

_LOG = logging.getLogger(__name__)
_ANSWER_DEADLINE = timedelta(minutes=1)
_CLOSED_DEADLINE = timedelta(seconds=5)
_CONNECT_TIMEOUT = timedelta(seconds=10)
_PROBE_TIMEOUT = timedelta(seconds=2)
_BETWEEN_PROBES = timedelta(milliseconds=300)
_CABLE_PAUSE = timedelta(seconds=1)
# A DHCP client that found no server asks more and more rarely; a cable that is plugged in makes most of them ask at once.
_FIRST_PULL_SECONDS = 4.0
_BETWEEN_PULLS_SECONDS = 15.0
_ASSUMED_PREFIX = 24


@dataclass(frozen=True, kw_only=True)
class Reached:
    """Where an environment answers, and how to connect to it."""

    address: str
    connector: Connector

    def opener(self, port: int) -> Opener:
        """Return what opens connections to a port."""
        return lambda: self.connector(self.address, port, _CONNECT_TIMEOUT)


def require_running(world: World, *, environment: Environment) -> None:
    """Raise PreconditionError for an environment that does not run, EnvironmentNotFoundError for one whose VM is gone."""
    state = world.hypervisor.environment_state(environment.name)
    if state is not GuestState.RUNNING:
        raise PreconditionError(
            f"environment {environment.name!r} does not run: it is {state}",
            remedy=_how_to_go_on(environment, state=state),
        )


def _how_to_go_on(environment: Environment, *, state: GuestState) -> str:
    name = environment.name
    if state is GuestState.PAUSED:
        return f"find out why it was paused, and let it go on with the hypervisor's tools ('virsh resume {name}')"
    if environment.network is not None:
        return f"start it with the hypervisor's tools ('virsh start {name}'), or 'vmsnap env destroy {name}'"
    # After a boot of the host its fence is gone. Where it is still there, nothing would prove it anew before the VM runs.
    return (
        f"do not start it: nothing would prove its fence. 'vmsnap env destroy {name}', then 'vmsnap provision "
        f"{environment.snapshot} --name {name}' make it anew, without what it wrote; copy that first where it is needed"
    )


class Finder:
    """Finds where one environment answers."""

    def __init__(
        self, world: World, *, environment: Environment, policy: Policy | None, wait: timedelta | None
    ) -> None:
        self._world = world
        self._environment = environment
        self._policy = policy
        self._answer_deadline = wait or _ANSWER_DEADLINE
        self._closed_deadline = wait or _CLOSED_DEADLINE

    @contextmanager
    def reached(self, *, port: int, closed_is_fine: bool, waiting: tuple[Progress, Cancel]) -> Iterator[Reached]:
        """Wait until the environment answers on a port, and keep it reachable meanwhile.

        ``closed_is_fine``: a port that refuses is an answer as well.
        """
        world, name = self._world, self._environment.name
        require_running(world, environment=self._environment)
        progress, cancel = waiting
        progress.step("reach")
        progress.waiting(f"port {port} of {name}", deadline_seconds=self._answer_deadline.total_seconds())
        site: _FencedSite | _OpenSite
        if self._environment.network is None:
            site = _FencedSite(world, environment=self._environment, policy=self._policy)
        else:
            site = _OpenSite(world, environment=self._environment)
        with closing(site):
            yield self._wait(site, port=port, closed_is_fine=closed_is_fine, cancel=cancel)

    def _wait(self, site: _FencedSite | _OpenSite, *, port: int, closed_is_fine: bool, cancel: Cancel) -> Reached:
        clock = self._world.clock
        began = clock.monotonic()
        refused_since: float | None = None
        while True:
            if cancel.is_set():
                raise CancelledError("stopped before the environment answered", remedy="run the command again")
            candidates = site.look()
            failure: GuestUnreachableError | None = None
            refused = ""
            for address in candidates:
                try:
                    site.connector(address, port, _PROBE_TIMEOUT).close()
                except GuestUnreachableError as error:
                    failure = error
                    if isinstance(error.__cause__, ConnectionRefusedError):
                        refused = address
                        if not closed_is_fine:
                            continue
                    else:
                        continue
                return Reached(address=address, connector=site.connector)
            now = clock.monotonic()
            refused_since = (refused_since if refused_since is not None else now) if refused else None
            if refused_since is not None and now - refused_since >= self._closed_deadline.total_seconds():
                raise self._closed(port, address=refused) from failure
            if now - began >= self._answer_deadline.total_seconds():
                raise self._silent(port, candidates=candidates) from failure
            clock.sleep(_BETWEEN_PROBES)

    def _closed(self, port: int, *, address: str) -> PreconditionError:
        return PreconditionError(
            f"nothing listens on port {port} of environment {self._environment.name!r} (at {address})",
            remedy="is the service started there, and does it listen on all addresses and not only on localhost? "
            "--wait waits longer for it",
        )

    def _silent(self, port: int, *, candidates: tuple[str, ...]) -> GuestUnreachableError:
        tried = ", ".join(candidates) or "no address is known"
        return GuestUnreachableError(
            f"environment {self._environment.name!r} does not answer on port {port}",
            details=f"tried for {self._answer_deadline.total_seconds():.0f} s: {tried}",
            remedy="is it up, and does its firewall let the port in? A guest agent tells its address; without one, set "
            "isolation.old_address in the guest's policy. --wait waits longer",
        )


class _OpenSite:
    """An environment on a network of the hypervisor, reached as the host's routing says."""

    def __init__(self, world: World, *, environment: Environment) -> None:
        self._world = world
        self._name = environment.name
        self.connector: Connector = world.direct

    def look(self) -> tuple[str, ...]:
        """Return the addresses it has now."""
        nics = self._world.hypervisor.environment_nics(self._name)
        return tuple(str(interface.ip) for nic in nics for interface in usable(nic))

    def close(self) -> None:
        """Nothing was set up."""


class _FencedSite:
    """An environment in a fence: its NICs are put in places, by what is known of its addresses."""

    def __init__(self, world: World, *, environment: Environment, policy: Policy | None) -> None:
        self._world = world
        self._environment = environment
        nics = world.hypervisor.environment_nics(environment.name)
        macs = tuple(nic.mac for nic in nics)
        self._plan = FencePlan.for_macs(environment.run, guest=environment.guest, macs=macs)
        self._old = _old_addresses(world, environment=environment, policy=policy)
        self._places: tuple[Place, ...] = ()
        self._residence: Residence | None = None
        self._next_pull = world.clock.monotonic() + _FIRST_PULL_SECONDS
        self.connector: Connector = world.fence.connector(self._plan)

    def look(self) -> tuple[str, ...]:
        """Return the addresses it has now or, where nobody can tell, those it was given."""
        nics = self._world.hypervisor.environment_nics(self._environment.name)
        known = {nic.mac: usable(nic)[0] for nic in nics if usable(nic)}
        places, leased = self._plan_places(known)
        if places != self._places:
            self.close()
            self._residence = self._world.residences.open(self._plan, places=places)
            self._places = places
            self._next_pull = self._world.clock.monotonic() + _FIRST_PULL_SECONDS
        elif leased and self._world.clock.monotonic() >= self._next_pull:
            self._pull(leased)
        own = [str(place.old.interface.ip) for place in places if place.mac in known]
        return tuple(own or [str(place.old.interface.ip) for place in places])

    def close(self) -> None:
        """Stop answering DHCP."""
        residence, self._residence = self._residence, None
        if residence is not None:
            residence.close()

    def _plan_places(self, known: dict[str, IPv4Interface]) -> tuple[tuple[Place, ...], tuple[str, ...]]:
        """Return a place for every NIC, and the NICs that have no address as far as anybody can tell."""
        free = [old for old in self._old if old.interface.ip not in {interface.ip for interface in known.values()}]
        found = {} if known else {mac: old for old in free if (mac := self._world.residences.find(self._plan, old=old))}
        free = [old for old in free if old not in found.values()]
        lent = choose_networks(
            self._environment.run,
            count=len(self._plan.ports),
            avoid=[item.network for item in (*known.values(), *(old.interface for old in self._old))],
        )
        places, leased = [], []
        for port, network in zip(self._plan.ports, lent, strict=True):
            if port.mac in known:
                old = self._as_known(known[port.mac])
            elif port.mac in found:
                old = found[port.mac]
            else:
                old = free.pop(0) if free else _lease(network[10], prefix=network.prefixlen, gateway=network[1])
                leased.append(port.mac)
            places.append(Place(mac=port.mac, old=old))
        return tuple(places), tuple(leased)

    def _as_known(self, interface: IPv4Interface) -> OldAddress:
        """Return the place of an address: with its gateway, where it is one that we know."""
        before = next((place.old for place in self._places if place.old.interface.ip == interface.ip), None)
        old = next((old for old in self._old if old.interface.ip == interface.ip), None)
        return before or old or OldAddress(interface=interface)

    def _pull(self, macs: tuple[str, ...]) -> None:
        hypervisor, name = self._world.hypervisor, self._environment.name
        for up in (False, True):
            for mac in macs:
                hypervisor.set_link(name, mac=mac, up=up)
            self._world.clock.sleep(_CABLE_PAUSE)
        self._next_pull = self._world.clock.monotonic() + _BETWEEN_PULLS_SECONDS
        _LOG.info("pulled the cables of %s: no address is known there yet", ", ".join(macs))


def _lease(address: IPv4Address, *, prefix: int, gateway: IPv4Address) -> OldAddress:
    return OldAddress(interface=IPv4Interface(f"{address}/{prefix}"), gateway=gateway)


def _old_addresses(world: World, *, environment: Environment, policy: Policy | None) -> tuple[OldAddress, ...]:
    """Return where the guest lived: by its policy, else where its clone was reached at the old address."""
    if policy is not None and policy.isolation.old_address is not None:
        return (OldAddress(interface=policy.isolation.old_address, gateway=policy.isolation.old_gateway),)
    isolation = world.store.find(environment.snapshot).manifest.isolation
    if isolation.rung is Rung.OLD_ADDRESS and isolation.address is not None:
        return (OldAddress(interface=IPv4Interface(f"{isolation.address}/{_ASSUMED_PREFIX}")),)
    return ()
