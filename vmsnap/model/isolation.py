"""The fence of one clone, and the proof that it holds.

Invariant: a clone executes no instruction before its fence is proven. ``IsolationProof`` is the only key that resumes a
clone, and only the fence makes one (a test holds the places that may construct it).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from ipaddress import IPv4Address

from vmsnap.model.guest import Guest, Nic, OldAddress
from vmsnap.model.ids import RunId


class Rung(StrEnum):
    """Ways to give a clone an address, in the order they are tried.

    ``NONE`` (the guest agent needs no address) and ``BY_ITSELF`` (the clone asked for an address before any rung)
    are outcomes and stand in no policy.
    """

    NONE = "none"
    BY_ITSELF = "by-itself"
    FORCERENEW = "forcerenew"
    LINK_FLAP = "link-flap"
    AGENT = "agent"
    HOT_PLUG = "hot-plug"
    OLD_ADDRESS = "old-address"


DHCP_RUNGS = frozenset({Rung.FORCERENEW, Rung.LINK_FLAP, Rung.AGENT, Rung.HOT_PLUG})
"""Rungs that make a DHCP client ask anew. They can do nothing for a static address."""
DEFAULT_LADDER = (Rung.FORCERENEW, Rung.LINK_FLAP, Rung.OLD_ADDRESS)


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """The last DHCP exchange of a guest's NIC in production, as somebody saw it.

    ``server`` is option 54 of the ACK, ``xid`` the transaction id of the exchange, ``nonce`` the 16 bytes of RFC 6704
    where the server gave one, ``client`` what the client calls itself (option 60) or an empty text, ``vlan`` the tag.
    """

    mac: str
    address: IPv4Address
    server: IPv4Address
    xid: int
    seen: datetime
    nonce: bytes | None = field(default=None, repr=False)
    client: str = ""
    vlan: int | None = None


@dataclass(frozen=True, kw_only=True)
class FencePort:
    """The links of one NIC of a clone. Linux allows 15 bytes a link name: ``vs`` + ten digits + letter + index."""

    index: int
    mac: str
    bridge: str
    tap: str
    veth_host: str
    veth_inside: str
    mtu: int | None = None


@dataclass(frozen=True, kw_only=True)
class Original:
    """The guest in production that a clone must never meet: its NICs there, and the addresses it answers at."""

    nics: tuple[Nic, ...]
    addresses: tuple[OldAddress, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FencePlan:
    """Everything a fence is made of, named from the run's id so that a dead run's fence can be found and removed.

    ``original`` is None for an environment, whose MACs are its own.
    """

    run: RunId
    guest: str
    namespace: str
    table: str
    ports: tuple[FencePort, ...]
    original: Original | None = None

    @property
    def mark(self) -> int:
        """Return the 32-bit mark of every packet from the clone's side of the fence, never zero."""
        return int(self.run[-8:], 16) or 1

    @staticmethod
    def for_guest(run: RunId, *, guest: Guest, addresses: tuple[OldAddress, ...] = ()) -> FencePlan:
        """Return the plan of the fence for a clone of ``guest``: one bridge and one veth pair a NIC, one namespace.

        ``addresses`` are those the guest answers at in production.
        """
        nics = tuple((nic.mac, nic.mtu) for nic in guest.nics)
        original = Original(nics=guest.nics, addresses=addresses)
        return FencePlan._of(run, guest=guest.name, nics=nics, original=original)

    @staticmethod
    def for_macs(run: RunId, *, guest: str, macs: tuple[str, ...]) -> FencePlan:
        """Return the plan of the fence for an environment whose NICs have these MACs."""
        return FencePlan._of(run, guest=guest, nics=tuple((mac, None) for mac in macs), original=None)

    @staticmethod
    def _of(
        run: RunId, *, guest: str, nics: tuple[tuple[str, int | None], ...], original: Original | None
    ) -> FencePlan:
        ports = tuple(
            FencePort(
                index=index,
                mac=mac,
                bridge=f"vs{run}b{index}",
                tap=f"vs{run}t{index}",
                veth_host=f"vs{run}h{index}",
                veth_inside=f"vs{run}n{index}",
                mtu=mtu,
            )
            for index, (mac, mtu) in enumerate(nics)
        )
        return FencePlan(
            run=run, guest=guest, namespace=f"vmsnap-{run}", table=f"vmsnap_{run}", ports=ports, original=original
        )


class ProofKind(StrEnum):
    """What a point proves. The first four are made before the clone runs, the others while it does."""

    TOPOLOGY = "topology"
    CONTROL = "control"
    PROBES = "probes"
    EARS = "ears"
    PRODUCTION = "production"
    ORIGINAL = "original"
    IDENTITY = "identity"


BEFORE_IT_RUNS = frozenset({ProofKind.TOPOLOGY, ProofKind.CONTROL, ProofKind.PROBES, ProofKind.EARS})
WHILE_IT_RUNS = frozenset({ProofKind.PRODUCTION, ProofKind.ORIGINAL, ProofKind.IDENTITY})


@dataclass(frozen=True, kw_only=True)
class ProofPoint:
    """One thing that was looked at, and what was seen."""

    name: str
    observed: str
    kind: ProofKind


@dataclass(frozen=True, kw_only=True)
class IsolationProof:
    """Evidence that the fence of ``run`` holds, made by the fence alone. Needed to resume a clone."""

    run: RunId
    made: datetime
    points: tuple[ProofPoint, ...]


@dataclass(frozen=True, kw_only=True)
class IsolationEvidence:
    """What only a running clone can show: nothing of it is in production, the original is well, and the clone answers.

    Made by ``vmsnap.workflow.identity`` alone; no work is drained without it.
    """

    run: RunId
    made: datetime
    points: tuple[ProofPoint, ...]


@dataclass(frozen=True, kw_only=True)
class RungAttempt:
    """One rung that was tried: how long, and why it did not work, where it did not."""

    rung: Rung
    seconds: float
    failure: str | None = None


@dataclass(frozen=True, kw_only=True)
class Addressed:
    """Where a clone can be reached inside its fence. ``address`` is None on rung ``none``."""

    rung: Rung
    address: str | None
    seconds: float
    attempts: tuple[RungAttempt, ...] = ()
