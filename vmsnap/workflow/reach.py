"""Getting hold of a clone: by its guest agent where one answers, else by SSH inside the fence."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from datetime import timedelta
from ipaddress import IPv4Interface

from vmsnap.errors import ConfigError, GuestCommandError, GuestUnreachableError, PreconditionError
from vmsnap.model.capture import Clone
from vmsnap.model.command import Command
from vmsnap.model.guest import Guest, OldAddress, SshLogin
from vmsnap.model.isolation import Addressed, FencePlan, Rung
from vmsnap.model.policy import Policy
from vmsnap.ports.clock import Cancel
from vmsnap.ports.guest import GuestControl
from vmsnap.ports.hypervisor import Hypervisor
from vmsnap.ports.network import AddressRequest
from vmsnap.ports.progress import Progress
from vmsnap.workflow.run import closing
from vmsnap.workflow.talk import wait_until_answers
from vmsnap.workflow.world import World

_LOG = logging.getLogger(__name__)
_AGENT_PROBE = timedelta(seconds=5)
_ASSUMED_PREFIX = 24


@dataclass(frozen=True, kw_only=True)
class Login:
    """How the clone will be reached, decided on the running guest: the agent, or SSH with a pinned host key."""

    agent: bool
    ssh: SshLogin | None
    addresses: tuple[OldAddress, ...]


@dataclass(frozen=True, kw_only=True)
class _CloneLinks:
    """ports.network.LinkControl for one clone."""

    hypervisor: Hypervisor
    clone: Clone

    def set_link(self, *, mac: str, up: bool) -> None:
        """Pull or plug the cable of one of the clone's NICs."""
        self.hypervisor.set_link(self.clone.name, mac=mac, up=up)


def choose(world: World, *, policy: Policy, guest: Guest) -> Login:
    """Decide, before anything is touched, how the clone will be reached.

    Raises PreconditionError where neither the agent answers nor SSH is set up, ConfigError for a bad SSH key.
    """
    control = policy.control
    agent = control.via != "ssh" and guest.has_agent_channel and _agent_answers(world, guest)
    addresses = old_addresses(policy, guest=guest)
    if control.via == "agent" and not agent:
        raise PreconditionError(
            f"the guest agent of {guest.name!r} does not answer, and the policy allows nothing else",
            remedy='start qemu-guest-agent in the guest, or set control.via = "auto" and [control.ssh]',
        )
    ssh = None
    if control.ssh is not None and not agent:
        if not addresses:
            raise PreconditionError(
                f"the address of {guest.name!r} is not known, so the clone cannot be reached by SSH",
                remedy="set isolation.old_address in the policy, or start qemu-guest-agent in the guest",
            )
        ssh = _pinned(world, policy=policy, address=str(addresses[0].interface.ip))
    if not agent and ssh is None:
        raise PreconditionError(
            f"there is no way to run commands in {guest.name!r}: no guest agent answers and the policy has no [control.ssh]",
            remedy="install and start qemu-guest-agent in the guest, or add [control.ssh] with user and key_file",
        )
    return Login(agent=agent, ssh=ssh, addresses=addresses)


def _agent_answers(world: World, guest: Guest) -> bool:
    control = world.access.agent(world.hypervisor.agent(guest.name))
    with closing(control):
        try:
            control.ping(timeout=_AGENT_PROBE)
        except GuestUnreachableError as error:
            _LOG.info("the agent of %r does not answer: %s", guest.name, error.brief)
            return False
    return True


def _pinned(world: World, *, policy: Policy, address: str) -> SshLogin:
    """Return the SSH login with the guest's host key: the policy's, or the one the running guest shows now."""
    settings = policy.control.ssh
    if settings is None:
        raise ConfigError("control.via is ssh, but there is no [control.ssh]")
    login = SshLogin(user=settings.user, key_file=settings.key_file, host_key=settings.host_key, port=settings.port)
    # Makes the control once without connecting, so that a bad key file is found before the guest is touched.
    world.access.ssh(replace(login, host_key=login.host_key or "-"), address=address, connector=world.direct).close()
    if login.host_key is not None:
        return login
    try:
        host_key = world.access.host_key(login, address=address, connector=world.direct)
    except GuestUnreachableError as error:
        # Nothing was touched yet, and the remedy is the operator's: no failure of a driver.
        raise PreconditionError(error.brief, details=error.details, remedy=error.remedy) from error
    return replace(login, host_key=host_key)


def old_addresses(policy: Policy, *, guest: Guest) -> tuple[OldAddress, ...]:
    """Return where the guest lives in production: by the policy, else as the hypervisor saw it.

    An address whose prefix nobody knows is taken for a /24; the prefix only decides who counts as a neighbour.
    """
    if policy.isolation.old_address is not None:
        return (OldAddress(interface=policy.isolation.old_address, gateway=policy.isolation.old_gateway),)
    found = []
    for nic in guest.nics:
        for interface in nic.addresses:
            known = interface
            if interface.network.prefixlen == interface.max_prefixlen:
                known = IPv4Interface(f"{interface.ip}/{_ASSUMED_PREFIX}")
            found.append(OldAddress(interface=known, gateway=policy.isolation.old_gateway))
    return tuple(found)


def reach_clone(
    world: World,
    *,
    policy: Policy,
    clone: Clone,
    login: Login,
    fence: FencePlan,
    cancel: Cancel,
    progress: Progress,
) -> tuple[GuestControl, Addressed]:
    """Return a control of the running clone, and where it was reached.

    By the agent no address is needed, unless the policy wants one always. Raises GuestUnreachableError, DeadlineError.
    """
    deadline = policy.clone.boot_deadline
    progress.waiting("the clone to answer", deadline_seconds=deadline.total_seconds())
    began = world.clock.monotonic()
    addressed = Addressed(rung=Rung.NONE, address=None, seconds=0.0)
    if not login.agent or policy.isolation.address == "always":
        request = AddressRequest(
            fence=fence,
            ladder=policy.isolation.ladder,
            old_addresses=login.addresses,
            probe_port=22 if login.ssh is None else login.ssh.port,
            rung_deadline=policy.isolation.rung_deadline,
        )
        links = _CloneLinks(hypervisor=world.hypervisor, clone=clone)
        addressed = world.addressing.move(request, links=links, cancel=cancel)
        for attempt in addressed.attempts:
            if attempt.failure is not None:
                progress.note(f"rung {attempt.rung}: {attempt.failure}")
    if login.agent:
        # Its own clients may go on in the clone, and their work would hold up the drain that ends it.
        control = world.access.agent(world.hypervisor.agent(clone.name), urgent=True)
    else:
        if login.ssh is None or addressed.address is None:
            raise GuestUnreachableError("the clone has no address for SSH")
        control = world.access.ssh(login.ssh, address=addressed.address, connector=world.fence.connector(fence))
    try:
        wait_until_answers(control, deadline=deadline, clock=world.clock, cancel=cancel)
    except BaseException:
        with closing(control):
            raise
    if addressed.rung is Rung.NONE:
        addressed = replace(addressed, seconds=world.clock.monotonic() - began)
    return control, addressed


def run_hooks(hooks: tuple[tuple[str, ...], ...], *, control: GuestControl, timeout: timedelta) -> None:
    """Run the policy's commands in the clone. Raises GuestCommandError for one that fails."""
    for argv in hooks:
        result = control.run(Command(argv=argv), timeout=timeout)
        if result.exit_status != 0:
            raise GuestCommandError(
                f"database.before_drain: {argv[0]} ended with status {result.exit_status} in the clone",
                details=result.error_text.strip() or result.text.strip(),
                remedy="try the command in the guest",
            )
