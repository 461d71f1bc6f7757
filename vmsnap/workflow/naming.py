"""Registering environments in the DNS, where their policy says so. It never fails anything else."""

from __future__ import annotations

import logging
from ipaddress import IPv4Address

from vmsnap.errors import ConfigError, PreconditionError, VmsnapError
from vmsnap.model.environment import Environment
from vmsnap.model.journal import ResourceKind
from vmsnap.model.policy import DnsPolicy, EnvironmentPolicy, dns_name
from vmsnap.model.report import RegisterReport
from vmsnap.ports.names import DnsZone
from vmsnap.workflow.location import known_address, resources_of
from vmsnap.workflow.run import as_vmsnap_error, closing
from vmsnap.workflow.world import World

_LOG = logging.getLogger(__name__)


def register(
    world: World, environment: Environment, *, policy: EnvironmentPolicy, address: IPv4Address | None = None
) -> RegisterReport:
    """Register an environment's name with the address given, or the one that is known. May be repeated.

    Raises PreconditionError where the policy names no zone, where no address is known, where the server refuses, and
    where somebody else has the name; ConfigError for a bad key file; DriverError where nobody can tell what became of it.
    """
    dns = policy.dns
    if dns is None:
        raise PreconditionError(
            f"the policy of {environment.guest!r} names no DNS zone", remedy="add [environment.dns] to it"
        )
    address = address or known_address(world, environment)
    if address is None:
        raise _no_address(environment)
    try:
        name = dns_name(dns, environment=environment.name, guest=environment.guest, run=environment.run)
    except ValueError as error:
        raise ConfigError(
            f"the policy of {environment.guest!r} makes no name for environment {environment.name!r}",
            details=str(error),
            remedy="change 'name' in its [environment.dns]",
        ) from error
    resource = world.names.resource(environment.run, guest=environment.guest, full_name=name, zone=_zone(dns))
    is_new = resource not in resources_of(world, environment, kind=ResourceKind.DNS_RECORD)
    if is_new:
        journal = world.journals.reopen(environment.run)
        with closing(journal):
            journal.intend(resource)
    try:
        world.names.register(resource, address=address, ttl=dns.ttl)
    except (PreconditionError, ConfigError):
        # Nothing was registered, for certain: nobody has to be asked to remove it.
        if is_new:
            journal = world.journals.reopen(environment.run)
            with closing(journal):
                journal.released(resource)
        raise
    return RegisterReport(environment=environment.name, dns_name=name, address=str(address))


def register_quietly(
    world: World, environment: Environment, *, policy: EnvironmentPolicy | None, address: IPv4Address | None
) -> tuple[str | None, tuple[str, ...]]:
    """Register where the policy says so; return the name, or None, and warnings. Raises nothing."""
    if policy is None or policy.dns is None:
        return None, ()
    try:
        return register(world, environment, policy=policy, address=address).dns_name, ()
    except Exception as error:  # noqa: BLE001 - an environment without a name is better than none
        told = as_vmsnap_error(error, doing="registering the name")
        _LOG.info("environment %r has no name in the DNS: %s", environment.name, told.brief)
        return None, (_warning(told),)


def _warning(error: VmsnapError) -> str:
    remedy = f" ({error.remedy})" if error.remedy else ""
    return f"not registered in the DNS: {error.brief}{remedy}"


def _no_address(environment: Environment) -> PreconditionError:
    if environment.network is None:
        return PreconditionError(
            f"environment {environment.name!r} is fenced and has no service address",
            remedy="'vmsnap env serve' gives it one and registers it",
        )
    return PreconditionError(
        f"the address of environment {environment.name!r} is not known yet",
        remedy="run 'vmsnap env register' when it is up",
    )


def _zone(dns: DnsPolicy) -> DnsZone:
    return DnsZone(
        zone=dns.zone.rstrip(".").lower(),
        server=dns.server,
        port=dns.port,
        key_name=dns.key_name,
        key_file=dns.key_file,
        algorithm=dns.algorithm,
    )
