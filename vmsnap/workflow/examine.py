"""Looking whether this host, and a guest on it, can be backed up, for ``vmsnap doctor``. Changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vmsnap.errors import VmsnapError
from vmsnap.model.guest import Finding, Guest, GuestState, Severity
from vmsnap.model.policy import Policy
from vmsnap.workflow.hinting import hint_findings
from vmsnap.workflow.load import load_findings
from vmsnap.workflow.reach import choose
from vmsnap.workflow.wishes import settings_of
from vmsnap.workflow.world import World


def examine_host(world: World, *, policies: Sequence[Policy], per_host: int) -> tuple[Finding, ...]:
    """Look at this host: hypervisor, store, replica, and whether ``per_host`` runs at a time suffice for the policies."""
    found = [*_attempt("hypervisor", world.hypervisor.host_findings)]
    found.extend(_attempt("store", lambda: world.store.findings(needed_bytes=0)))
    if world.replica is not None:
        found.extend(_attempt("replica", world.replica.findings))
    found.extend(load_findings(world, policies=policies, per_host=per_host))
    return tuple(found)


def examine_guest(world: World, *, policy: Policy) -> tuple[Finding, ...]:
    """Look at the hypervisor and at one guest."""
    return (
        *_attempt("hypervisor", world.hypervisor.host_findings),
        *_attempt("guest", lambda: _guest_findings(world, policy=policy)),
    )


def _guest_findings(world: World, *, policy: Policy) -> tuple[Finding, ...]:
    guest = world.hypervisor.inspect(policy.guest)
    first = not world.store.snapshots(guest.name)
    needed = sum(disk.size_bytes for disk in guest.disks) if first else 0
    running = guest.state is GuestState.RUNNING
    return (
        *world.hypervisor.findings(guest, settings=settings_of(policy)),
        *world.store.findings(needed_bytes=needed),
        *hint_findings(world, policy=policy, guest=guest),
        *(_attempt("control", lambda: _control(world, policy=policy, guest=guest)) if running else ()),
    )


def _control(world: World, *, policy: Policy, guest: Guest) -> tuple[Finding, ...]:
    login = choose(world, policy=policy, guest=guest)
    way = "its guest agent" if login.agent else "SSH inside the fence"
    return (Finding(check="control", severity=Severity.OK, message=f"the clone will be controlled by {way}"),)


def _attempt(check: str, look: Callable[[], tuple[Finding, ...]]) -> tuple[Finding, ...]:
    """Return the findings, or the error as a finding: doctor reports, it does not fail."""
    try:
        return look()
    except VmsnapError as error:
        return (Finding(check=check, severity=Severity.REFUSAL, message=error.brief, remedy=error.remedy),)
