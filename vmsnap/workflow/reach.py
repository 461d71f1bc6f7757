"""Getting hold of a clone: by its guest agent where one answers, else by SSH inside the fence."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta

from vmsnap.errors import ConfigError, GuestCommandError, GuestUnreachableError, PreconditionError, VmsnapError
from vmsnap.model.capture import Clone
from vmsnap.model.command import Command
from vmsnap.model.guest import Guest, OldAddress, SshLogin
from vmsnap.model.isolation import Addressed, Exchange, FencePlan, Rung
from vmsnap.model.policy import Policy
from vmsnap.ports.clock import Cancel
from vmsnap.ports.guest import GuestControl
from vmsnap.ports.network import AddressRequest
from vmsnap.ports.progress import Progress
from vmsnap.workflow.fencing import prove_fence
from vmsnap.workflow.run import closing
from vmsnap.workflow.talk import wait_until_answers
from vmsnap.workflow.whereabouts import exchanges_of, old_addresses, static_macs
from vmsnap.workflow.world import World

_LOG = logging.getLogger(__name__)
_AGENT_PROBE = timedelta(seconds=5)


@dataclass(frozen=True, kw_only=True)
class Login:
    """How the clone will be reached, decided on the running guest: the agent, or SSH with a pinned host key.

    The rest is for the ladder; see ``AddressRequest``. ``agent_channel``: the guest has a line for an agent.
    """

    agent: bool
    ssh: SshLogin | None
    addresses: tuple[OldAddress, ...]
    agent_channel: bool = False
    exchanges: tuple[Exchange, ...] = ()
    static_macs: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class _CloneLinks:
    """ports.network.LinkControl for one clone."""

    world: World
    clone: Clone
    fence: FencePlan

    def set_link(self, *, mac: str, up: bool) -> None:
        """Pull or plug the cable of one of the clone's NICs."""
        self.world.hypervisor.set_link(self.clone.name, mac=mac, up=up)

    def replug(self, *, mac: str, deadline: timedelta) -> None:
        """Remove one of the clone's NICs, add it again, and prove the fence before the clone runs on."""
        (port,) = (port for port in self.fence.ports if port.mac == mac)
        self.world.hypervisor.replug_nic(self.clone, port=port, deadline=deadline)
        proof = prove_fence(self.world, clone=self.clone, fence=self.fence)
        self.world.hypervisor.resume_clone(self.clone, proof=proof)


def choose(world: World, *, policy: Policy, guest: Guest) -> Login:
    """Decide, before anything is touched, how the clone will be reached.

    Raises PreconditionError where neither the agent answers nor SSH is set up, or the clone needs an address and can have
    none, ConfigError for a bad SSH key. The agent is whatever line the hypervisor itself has into its guests.
    """
    control = policy.control
    agent = control.via != "ssh" and guest.has_agent_channel and _agent_answers(world, guest)
    addresses = old_addresses(policy, guest=guest)
    if not agent or policy.isolation.address == "always":
        world.addressing.require_possible(to_connect=not agent)
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
    exchanges: tuple[Exchange, ...] = ()
    static: frozenset[str] = frozenset()
    if not agent or policy.isolation.address == "always":
        exchanges = exchanges_of(world, policy=policy, guest=guest)
        static = static_macs(world, policy=policy, guest=guest, exchanges=exchanges)
    return Login(
        agent=agent,
        ssh=ssh,
        addresses=addresses,
        agent_channel=guest.has_agent_channel,
        exchanges=exchanges,
        static_macs=static,
    )


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
        addressed = _climb(
            world, policy=policy, clone=clone, login=login, fence=fence, cancel=cancel, progress=progress
        )
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


def _climb(
    world: World,
    *,
    policy: Policy,
    clone: Clone,
    login: Login,
    fence: FencePlan,
    cancel: Cancel,
    progress: Progress,
) -> Addressed:
    """Give the clone an address, the rung that worked last time first."""
    isolation = policy.isolation
    with ExitStack() as undo:
        agent = None
        if Rung.AGENT in isolation.ladder and login.agent_channel:
            agent = world.access.agent(world.hypervisor.agent(clone.name))
            undo.enter_context(closing(agent))
        remembered = _recall(world, guest=policy.guest)
        request = AddressRequest(
            fence=fence,
            ladder=tuple(sorted(isolation.ladder, key=lambda rung: rung is not remembered)),
            old_addresses=login.addresses,
            probe_port=22 if login.ssh is None else login.ssh.port,
            rung_deadline=isolation.rung_deadline,
            deadlines=isolation.deadlines,
            exchanges=login.exchanges,
            agent=agent,
            static_macs=login.static_macs,
            note=progress.note,
        )
        links = _CloneLinks(world=world, clone=clone, fence=fence)
        addressed = world.addressing.move(request, links=links, cancel=cancel)
    if addressed.rung in isolation.ladder and addressed.rung is not remembered:
        _remember(world, guest=policy.guest, rung=addressed.rung)
    return addressed


def _recall(world: World, *, guest: str) -> Rung | None:
    try:
        return world.rungs.recall(guest)
    except VmsnapError as error:
        _LOG.warning("which rung worked last for %r is not known: %s", guest, error.brief)
        return None


def _remember(world: World, *, guest: str, rung: Rung) -> None:
    try:
        world.rungs.remember(guest, rung=rung)
    except VmsnapError as error:
        _LOG.warning("the rung that worked for %r is not remembered: %s", guest, error.brief)


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
