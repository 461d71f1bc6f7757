"""What a hypervisor tells about a guest: its disks, links and state."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Interface


class GuestState(StrEnum):
    """State of a guest, as far as vmsnap cares."""

    RUNNING = "running"
    PAUSED = "paused"
    SHUT_OFF = "shut off"
    OTHER = "other"


class DiskKind(StrEnum):
    """What backs a disk on the host."""

    FILE = "file"
    BLOCK = "block"


@dataclass(frozen=True, kw_only=True)
class Disk:
    """One writable disk of a guest. ``target`` is the name the hypervisor gives it (``vda``)."""

    target: str
    kind: DiskKind
    source: str
    image_format: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Nic:
    """One network interface of a guest, in the order of its definition.

    ``attached_to`` is the production bridge or network it is on. ``tap`` is the host's link, where known.
    ``addresses`` are those the guest uses now, as far as anybody could tell without asking the guest itself.
    """

    index: int
    mac: str
    attached_to: str
    tap: str | None = None
    mtu: int | None = None
    addresses: tuple[IPv4Interface, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Guest:
    """A VM that a policy protects, as the hypervisor describes it at one moment."""

    name: str
    uuid: str
    state: GuestState
    memory_bytes: int
    vcpus: int
    disks: tuple[Disk, ...]
    nics: tuple[Nic, ...]
    has_agent_channel: bool
    nvram: str | None = None


class Severity(StrEnum):
    """How bad a finding is: ``OK`` is a check that passed, a ``WARNING`` is printed, a ``REFUSAL`` stops the run."""

    OK = "ok"
    WARNING = "warning"
    REFUSAL = "refusal"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One result of the preflight, printed by ``vmsnap doctor`` and used by ``vmsnap backup``."""

    check: str
    severity: Severity
    message: str
    remedy: str | None = None


@dataclass(frozen=True, kw_only=True)
class OldAddress:
    """Where the guest lives in production: its address with prefix and, where known, more.

    ``gateway``; ``mac`` of the NIC that has it; ``vlan``, the tag that the guest itself puts on its frames there.
    """

    interface: IPv4Interface
    gateway: IPv4Address | None = None
    mac: str | None = None
    vlan: int | None = None


@dataclass(frozen=True, kw_only=True)
class SshLogin:
    """How to reach a guest by SSH. ``host_key`` is a line of known_hosts without the name: ``ssh-ed25519 AAAA...``."""

    user: str
    key_file: str
    host_key: str | None = None
    port: int = 22
    connect_timeout: timedelta = timedelta(seconds=10)
