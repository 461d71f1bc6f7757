"""Reaching an environment from the host, wherever it is, for as long as somebody wants it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta

from vmsnap.errors import PreconditionError
from vmsnap.model.environment import Environment
from vmsnap.model.journal import Resource, ResourceKind
from vmsnap.model.policy import Policy
from vmsnap.model.report import ForwardOptions, ForwardReport, ServeOptions, ServeReport
from vmsnap.ports.clock import Cancel
from vmsnap.ports.progress import Progress
from vmsnap.workflow.location import resources_of
from vmsnap.workflow.naming import register_quietly
from vmsnap.workflow.run import closing
from vmsnap.workflow.sites import Finder, require_running
from vmsnap.workflow.world import World

_BETWEEN_LOOKS_SECONDS = 2.0
_POLL = timedelta(milliseconds=200)


def forward(
    world: World,
    *,
    name: str,
    options: ForwardOptions,
    policy: Policy | None,
    ready: Callable[[ForwardReport], None],
    waiting: tuple[Progress, Cancel],
) -> None:
    """Relay a port of the host to one of an environment until cancelled; ``ready`` is told once, when it listens.

    Raises EnvironmentNotFoundError, PreconditionError where it does not run (any more) or nothing listens on its port,
    GuestUnreachableError, CancelledError where it was cancelled before it was ready.
    """
    _, cancel = waiting
    environment = world.book.get(name)
    finder = Finder(world, environment=environment, policy=policy, wait=options.wait)
    with finder.reached(port=options.port, closed_is_fine=False, waiting=waiting) as reached:
        relay = world.services.forward(
            address=options.listen_address, port=options.listen_port, opener=reached.opener(options.port)
        )
        with closing(relay):
            address, port = relay.address
            ready(
                ForwardReport(
                    environment=name,
                    port=options.port,
                    listen_address=address,
                    listen_port=port,
                    address=reached.address,
                )
            )
            _stay(world, environment=environment, cancel=cancel)


def serve(
    world: World,
    *,
    name: str,
    options: ServeOptions,
    policy: Policy | None,
    ready: Callable[[ServeReport], None],
    waiting: tuple[Progress, Cancel],
) -> None:
    """Give a fenced environment a service address and relay its ports until cancelled.

    The address, and the name in the DNS where the policy wants one, stay until the environment is destroyed. Raises as
    ``forward``, and PreconditionError for an environment that is on a network.
    """
    progress, cancel = waiting
    environment = world.book.get(name)
    if environment.network is not None:
        raise PreconditionError(
            f"environment {name!r} is on the network {environment.network!r} and has an address there",
            remedy=f"vmsnap env forward {name!r} PORT gives it a port of this host; vmsnap env register its name",
        )
    ports = options.ports or (policy.environment.service_ports if policy is not None else ())
    if not ports:
        raise PreconditionError(
            f"no ports of {name!r} are to be served", remedy="--port, or service_ports in the policy's [environment]"
        )
    finder = Finder(world, environment=environment, policy=policy, wait=options.wait)
    with finder.reached(port=ports[0], closed_is_fine=True, waiting=waiting) as reached:
        service = _service_of(world, environment=environment)
        world.services.make(service)
        address = world.services.address(service)
        with ExitStack() as relays:
            for port in ports:
                relay = world.services.listen(service, port=port, opener=reached.opener(port))
                relays.enter_context(closing(relay))
            dns_name, warnings = register_quietly(
                world, environment, policy=None if policy is None else policy.environment, address=address
            )
            for warning in warnings:
                progress.note(warning)
            ready(
                ServeReport(
                    environment=name,
                    service_address=str(address),
                    ports=ports,
                    address=reached.address,
                    dns_name=dns_name,
                    warnings=warnings,
                )
            )
            _stay(world, environment=environment, cancel=cancel)


def _service_of(world: World, *, environment: Environment) -> Resource:
    """Return the environment's service address, entered in its journal: the one it has, or a new one."""
    found = resources_of(world, environment, kind=ResourceKind.SERVICE)
    if found:
        return found[0]
    journal = world.journals.reopen(environment.run)
    with closing(journal):
        service = world.services.resource(environment.run, guest=environment.guest)
        journal.intend(service)
    return service


def _stay(world: World, *, environment: Environment, cancel: Cancel) -> None:
    """Return when cancelled. Raises PreconditionError when the environment is gone or not running any more."""
    looked = world.clock.monotonic()
    while not cancel.is_set():
        world.clock.sleep(_POLL)
        if world.clock.monotonic() - looked >= _BETWEEN_LOOKS_SECONDS:
            require_running(world, environment=environment)
            looked = world.clock.monotonic()
