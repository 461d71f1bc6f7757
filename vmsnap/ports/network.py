"""The fence, and giving a clone an address inside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol

from vmsnap.errors import IsolationError
from vmsnap.model.guest import OldAddress
from vmsnap.model.isolation import Addressed, Exchange, FencePlan, IsolationProof, ProofPoint, Rung
from vmsnap.model.journal import Resource
from vmsnap.ports.clock import Cancel
from vmsnap.ports.guest import Connector, GuestControl
from vmsnap.ports.owner import Owner


class FenceWatch(Protocol):
    """Ears on production and eyes on a fence, from before its clone runs until ``close``."""

    def observed(self) -> tuple[ProofPoint, ...]:
        """Return what was seen until now: nothing of the clone anywhere else, the fence as built. May be repeated.

        Raises IsolationError with the breach, where there was one.
        """

    def original(self) -> tuple[ProofPoint, ...]:
        """Return how the original is in production: it answers as before, and where it was. May be repeated.

        Empty for a fence without an original. Raises IsolationError.
        """

    def passed_bytes(self) -> int:
        """Return how much the clone has sent to our side of the fence. Raises DriverError."""

    def close(self) -> None:
        """End the watch. May be repeated."""


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

    def watch(self, plan: FencePlan, *, proof: IsolationProof, alarm: Callable[[IsolationError], None]) -> FenceWatch:
        """Watch a proven fence. To be called before the clone runs; close the watch before the fence is released.

        ``alarm`` is called once, from another thread or this one, within a second of: a frame from the clone's side of
        the fence anywhere else on the host; a change of the fence's links or rules; the original's MAC at another port
        of its bridge. Raises IsolationError where something is wrong already, BugError for a proof of another run.
        """

    def cut(self, plan: FencePlan) -> None:
        """Take the clone's ends of the fence down, so that nothing passes any more, whatever became of the rules.

        Needs no hypervisor. May be repeated; content with ends that are gone. Raises DriverError.
        """

    def connector(self, plan: FencePlan) -> Connector:
        """Return a way to open connections from inside the namespace. The host's routing never sees them."""


class LinkControl(Protocol):
    """Pulls and plugs cables, and whole NICs, of one clone."""

    def set_link(self, *, mac: str, up: bool) -> None:
        """Set the link of the NIC with that MAC."""

    def replug(self, *, mac: str, deadline: timedelta) -> None:
        """Remove that NIC and add it again: same MAC, same slot, same bridge and tap of the fence.

        The clone stands still from before the NIC is back until the fence is proven anew. Needs a fence in which no
        address was given out. Raises DeadlineError where the guest does not let the NIC go, SafetyError, DriverError.
        """


def _no_note(_: str) -> None:
    """Stand for a journal that nobody keeps."""


@dataclass(frozen=True, kw_only=True)
class AddressRequest:
    """What the ladder needs to know. ``probe_port`` is a TCP port that answers once the clone is reachable.

    ``rung_deadline`` is each rung's, where ``deadlines`` names none for it. ``exchanges`` are the last ones of the
    guest's NICs in production, where somebody saw them. ``agent`` runs commands in the clone without its network, where
    a rung may use it. ``static_macs`` are NICs known not to use DHCP. ``note`` is told, before and after each rung, what
    begins and how it ended.
    """

    fence: FencePlan
    ladder: tuple[Rung, ...]
    old_addresses: tuple[OldAddress, ...]
    probe_port: int
    rung_deadline: timedelta
    exchanges: tuple[Exchange, ...] = ()
    agent: GuestControl | None = None
    static_macs: frozenset[str] = frozenset()
    deadlines: Mapping[Rung, timedelta] = field(default_factory=dict)
    note: Callable[[str], None] = _no_note


class Addressing(Protocol):
    """Gives a clone an address."""

    def require_possible(self, *, to_connect: bool) -> None:
        """Return where clones can be given addresses at all. Raises PreconditionError, before anything is touched.

        ``to_connect``: the clone has to be reached at its address from here.
        """

    def move(self, request: AddressRequest, *, links: LinkControl, cancel: Cancel) -> Addressed:
        """Try the rungs in order until the clone answers at an address of its own or, last, at its old one.

        A clone that took an address of its own before a rung began has moved by itself (``Rung.BY_ITSELF``). Where all
        NICs are static, rungs that need a DHCP client are passed over, and the attempts say so.

        Whatever a rung sets up inside the fence's namespace stays until the fence is released.
        Raises DeadlineError where no rung worked.
        """
