"""The fence, and giving a clone an address inside it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from vmsnap.model.guest import OldAddress
from vmsnap.model.isolation import Addressed, Exchange, FencePlan, IsolationProof, Rung
from vmsnap.model.journal import Resource
from vmsnap.ports.clock import Cancel
from vmsnap.ports.guest import Connector, GuestControl
from vmsnap.ports.owner import Owner


class Fence(Owner, Protocol):
    """Builds and proves isolated networks."""

    def resource(self, plan: FencePlan) -> Resource:
        """Name the fence."""

    def build(self, plan: FencePlan) -> None:
        """Make bridges, namespace, veth pairs and rules. Raises PreconditionError for a missing tool or right."""

    def prove(self, plan: FencePlan) -> IsolationProof:
        """Read the fence back with the clone's taps in it, the clone still paused, and vouch for it.

        Raises IsolationError where anything is not as built: another member, an address, a missing rule.
        """

    def connector(self, plan: FencePlan) -> Connector:
        """Return a way to open connections from inside the namespace. The host's routing never sees them."""


class LinkControl(Protocol):
    """Pulls and plugs cables of one clone."""

    def set_link(self, *, mac: str, up: bool) -> None:
        """Set the link of the NIC with that MAC."""


@dataclass(frozen=True, kw_only=True)
class AddressRequest:
    """What the ladder needs to know. ``probe_port`` is a TCP port that answers once the clone is reachable.

    ``exchanges`` are the last ones of the guest's NICs in production, where somebody saw them. ``agent`` runs commands
    in the clone without its network, where a rung may use it. ``static_macs`` are NICs known not to use DHCP.
    """

    fence: FencePlan
    ladder: tuple[Rung, ...]
    old_addresses: tuple[OldAddress, ...]
    probe_port: int
    rung_deadline: timedelta
    exchanges: tuple[Exchange, ...] = ()
    agent: GuestControl | None = None
    static_macs: frozenset[str] = frozenset()


class Addressing(Protocol):
    """Gives a clone an address."""

    def move(self, request: AddressRequest, *, links: LinkControl, cancel: Cancel) -> Addressed:
        """Try the rungs in order until the clone answers at an address of its own or, last, at its old one.

        Whatever a rung sets up inside the fence's namespace stays until the fence is released.
        Raises DeadlineError where no rung worked.
        """
