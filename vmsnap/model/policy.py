"""One guest's policy: when, how and how long. Every key has a default but the guest.

Durations are texts such as ``"90s"``, ``"10m"``, ``"2h"``, ``"14d"`` or ``"1h 30m"``; see ``vmsnap.model.durations``.
"""

from __future__ import annotations

import re
from datetime import timedelta
from ipaddress import IPv4Address, IPv4Interface, IPv6Address
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from vmsnap.model.capture import CaptureChoice, Detach, DiskSnapshot, OnNoConvergence, SwapRule
from vmsnap.model.durations import Duration, PositiveDuration, TimeZoneName
from vmsnap.model.ids import RunId
from vmsnap.model.isolation import DEFAULT_LADDER, Rung
from vmsnap.model.retention_policy import RetentionPolicy
from vmsnap.model.schedule_policy import SchedulePolicy


def _never_is_none(value: object) -> object:
    return None if value == "never" else value


TimeToLive = Annotated[PositiveDuration | None, BeforeValidator(_never_is_none)]


GuestPath = Annotated[str, Field(pattern=r"^/")]
"""An absolute path in a guest."""


Port = Annotated[int, Field(ge=1, le=65535)]
"""A TCP or UDP port."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StoragePolicy(_Section):
    """The commands of a storage that takes snapshots itself, for ``disk_snapshot = "storage"``. See ``StorageCommands``."""

    snapshot: tuple[str, ...] = Field(min_length=1)
    remove: tuple[str, ...] = Field(min_length=1)
    path: str = Field(default="{folder}/{name}", pattern=r"^(/|\{folder\}/)")

    @model_validator(mode="after")
    def _placeholders_are_there(self) -> StoragePolicy:
        for key, words, needed in (
            ("snapshot", " ".join(self.snapshot), ("{source}", "{snapshot}")),
            ("remove", " ".join(self.remove), ("{snapshot}",)),
            ("path", self.path, ("{name}",)),
        ):
            missing = [word for word in needed if word not in words]
            if missing:
                msg = f"{key}: {', '.join(missing)} has to be in it"
                raise ValueError(msg)
        return self


class CapturePolicy(_Section):
    """How to take the guest. ``max_pause`` bounds how long it may stand still.

    ``throttle_limit`` bounds how long its vCPUs may be slowed down, with ``on_no_convergence = "throttle"``.
    ``hints``: whether only what changed since the last snapshot is read, where the hypervisor knows it.
    """

    mode: CaptureChoice = CaptureChoice.LIVE
    max_pause: PositiveDuration = timedelta(milliseconds=500)
    on_no_convergence: OnNoConvergence = OnNoConvergence.ABORT
    throttle_limit: PositiveDuration = timedelta(seconds=30)
    timeout: PositiveDuration = timedelta(minutes=10)
    detach: Detach = Detach.LATE
    disk_snapshot: DiskSnapshot = DiskSnapshot.OVERLAY
    storage_timeout: PositiveDuration = timedelta(seconds=10)
    overlay_dir: str | None = None
    min_overlay_free_mib: int = Field(default=1024, ge=1)
    allow_emulation: bool = False
    swap: SwapRule = SwapRule.REFUSE
    storage: StoragePolicy | None = None
    hints: Literal["auto", "off"] = "auto"


class ClonePolicy(_Section):
    """How the clone runs.

    ``cpu_shares`` is its weight against other VMs, which have 1024 each by default; with less than that it takes only what
    nobody else wants for its first half minute.
    ``cpu_percent`` is the most of one CPU that each of its vCPUs gets; the rates are of each disk, and of each network card.
    In mode ``boot`` it has at most ``boot_memory_mib``, and its databases have ``recovery_deadline`` to come up.
    """

    cpu_shares: int = Field(default=64, ge=2, le=262144)
    cpu_percent: int | None = Field(default=None, ge=1, le=100)
    disk_mib_s: int | None = Field(default=None, ge=1)
    disk_iops: int | None = Field(default=None, ge=1)
    network_mib_s: int | None = Field(default=None, ge=1)
    boot_deadline: PositiveDuration = timedelta(minutes=3)
    recovery_deadline: PositiveDuration = timedelta(minutes=15)
    boot_memory_mib: int | None = Field(default=None, ge=64)
    shutdown_deadline: PositiveDuration = timedelta(minutes=5)


class IsolationPolicy(_Section):
    """How the clone gets an address. ``address = "auto"`` asks for one only where the guest's agent cannot be used.

    ``deadlines`` are those of single rungs, the others have ``rung_deadline``. ``exchanges`` names who knows the guest's
    last DHCP exchange. ``static``: whether the guest's addresses are set by hand; ``"auto"``: ask the guest's agent.
    ``clone_ports`` of the clone are at an address of the host's while its database drains.
    """

    address: Literal["auto", "always"] = "auto"
    ladder: tuple[Rung, ...] = DEFAULT_LADDER
    rung_deadline: PositiveDuration = timedelta(seconds=60)
    deadlines: dict[Rung, PositiveDuration] = Field(default_factory=dict)
    exchanges: Literal["watch", "none"] = "watch"
    static: Literal["auto"] | bool = "auto"
    old_address: IPv4Interface | None = None
    old_gateway: IPv4Address | None = None
    old_vlan: int | None = Field(default=None, ge=1, le=4094)
    clone_ports: tuple[Port, ...] = ()

    @model_validator(mode="after")
    def _ladder_is_possible(self) -> IsolationPolicy:
        outcomes = {Rung.NONE, Rung.BY_ITSELF}
        for key, rungs in (("ladder", self.ladder), ("deadlines", tuple(self.deadlines))):
            wrong = [rung.value for rung in rungs if rung in outcomes]
            if wrong:
                known = ", ".join(rung.value for rung in Rung if rung not in outcomes)
                msg = f"{key}: {', '.join(wrong)} is no rung; the rungs are {known}"
                raise ValueError(msg)
        if len(set(self.ladder)) != len(self.ladder):
            msg = "ladder: a rung is named twice"
            raise ValueError(msg)
        return self


class SshPolicy(_Section):
    """SSH into the clone. ``key_file`` is a private key readable by its owner only (mode 0600).

    ``host_key`` pins the guest's host key, as in known_hosts without the name: ``"ssh-ed25519 AAAA..."``.
    Without it the key is taken from the running guest itself before the capture.
    """

    user: str = "root"
    key_file: str
    port: int = Field(default=22, ge=1, le=65535)
    host_key: str | None = None


class ControlPolicy(_Section):
    """How to run commands in the clone. ``auto``: the guest agent, else SSH where ``[control.ssh]`` is given."""

    via: Literal["auto", "agent", "ssh"] = "auto"
    command_timeout: PositiveDuration = timedelta(seconds=60)
    ssh: SshPolicy | None = None

    @model_validator(mode="after")
    def _ssh_needs_a_section(self) -> ControlPolicy:
        if self.via == "ssh" and self.ssh is None:
            msg = 'via = "ssh" needs a section [control.ssh] with key_file'
            raise ValueError(msg)
        return self


class ClusterPolicy(_Section):
    """One PostgreSQL cluster, for guests where it cannot be found from its running process."""

    data_directory: GuestPath
    programs: GuestPath
    user: str = "postgres"
    port: int = Field(default=5432, ge=1, le=65535)
    socket_directory: str | None = None


class DatabasePolicy(_Section):
    """Which database, and how long its work in flight may take to finish in the clone."""

    engine: Literal["postgresql", "postgresql-windows", "sqlserver"] = "postgresql"
    drain_deadline: Duration = timedelta(seconds=60)
    stop_deadline: PositiveDuration = timedelta(minutes=5)
    clusters: tuple[ClusterPolicy, ...] = ()
    before_drain: tuple[tuple[str, ...], ...] = ()

    @model_validator(mode="after")
    def _clusters_are_of_linux(self) -> DatabasePolicy:
        if self.clusters and self.engine != "postgresql":
            msg = f'engine = "{self.engine}" finds its servers itself and has no [[database.clusters]]'
            raise ValueError(msg)
        return self


class DnsPolicy(_Section):
    """Where environments are registered by dynamic update (RFC 2136), signed with a key (TSIG, RFC 8945).

    ``key_file`` holds the key's secret in base64, and is readable by its owner only (mode 0600). ``name`` is made of
    ``{environment}``, ``{guest}``, ``{run}`` and letters, digits, hyphens and dots; the zone is added to it.
    """

    zone: str = Field(
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_-]{0,62}(\.[A-Za-z0-9_][A-Za-z0-9_-]{0,62})*\.?$", max_length=180
    )
    server: IPv4Address | IPv6Address
    port: Port = 53
    name: str = "{environment}"
    ttl: Annotated[PositiveDuration, Field(ge=timedelta(seconds=1), le=timedelta(seconds=60))] = timedelta(seconds=60)
    key_name: str = Field(pattern=r"^[A-Za-z0-9._-]+$", max_length=253)
    key_file: str
    algorithm: Literal["hmac-sha256", "hmac-sha384", "hmac-sha512", "hmac-sha224", "hmac-sha1"] = "hmac-sha256"

    @model_validator(mode="after")
    def _name_can_be_made(self) -> DnsPolicy:
        dns_name(self, environment="environment", guest="guest", run=RunId("0" * 10))
        return self


_NOT_IN_LABELS = re.compile(r"[^a-z0-9-]+")
_NAME = re.compile(r"[A-Za-z0-9.{}-]+\Z")
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")


def dns_name(policy: DnsPolicy, *, environment: str, guest: str, run: RunId) -> str:
    """Return the host name (RFC 1123, section 2.1) of an environment, with its zone and without a dot at the end.

    What cannot be in a host name becomes a hyphen, and labels are cut at 63 characters. Raises ValueError where the
    policy's ``name`` makes no name, or one of more than 253 characters.
    """
    words = {"{environment}": environment, "{guest}": guest, "{run}": run}
    relative = policy.name
    for place, word in words.items():
        relative = relative.replace(place, _NOT_IN_LABELS.sub("-", word.lower()).strip("-")[:63].strip("-") or run)
    labels = [label if len(label) <= 63 else label[:63].rstrip("-") for label in relative.lower().split(".")]
    if not _NAME.match(policy.name) or not all(_LABEL.match(label) for label in labels):
        msg = (
            f"name: {policy.name!r} makes {relative!r}: labels of letters, digits and hyphens, from {', '.join(words)}"
        )
        raise ValueError(msg)
    full = f"{'.'.join(labels)}.{policy.zone.rstrip('.').lower()}"
    if len(full) > 253:
        msg = f"name: {full!r} is longer than 253 characters"
        raise ValueError(msg)
    return full


class EnvironmentPolicy(_Section):
    """Test VMs from this guest's snapshots. ``network`` None: each in a fence of its own. ``ttl``: may be ``"never"``.

    ``service_ports`` are those that ``vmsnap env serve`` makes reachable. One straight from the replica fetches everything in
    the end and is then local (``hydrate``); without that it keeps at most ``cache_mib`` of each disk here.
    """

    network: str | None = None
    ttl: TimeToLive = timedelta(days=1)
    memory_mib: int | None = Field(default=None, ge=64)
    vcpus: int | None = Field(default=None, ge=1)
    service_ports: tuple[Port, ...] = (22, 5432)
    dns: DnsPolicy | None = None
    hydrate: bool = True
    cache_mib: int | None = Field(default=None, ge=64)


class VerifyPolicy(_Section):
    """When stored snapshots are read again and compared with their digests.

    ``every``: each that is still there so long after the last time, and the newest where none of those made within that was
    found whole (see ``model.verification``). ``"never"``: None.

    ``share_per_day``: in addition, such a part of each snapshot is read every day, here and at the replica, another one each
    day, so that all is read in ``1 / share_per_day`` days. 0: none.
    """

    every: TimeToLive = timedelta(days=7)
    share_per_day: float = Field(default=0.0, ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _ends_some_day(self) -> VerifyPolicy:
        if 0.0 < self.share_per_day < 0.001:
            msg = "share_per_day: must be 0 or at least 0.001, which takes 1000 days"
            raise ValueError(msg)
        return self


class ReplicaPolicy(_Section):
    """Copies of this guest's snapshots at the replica of ``vmsnap.toml``. ``retention`` None: the rules of ``[retention]``.

    ``enabled``: it has some, and they are kept in order there; ``after_backup``: each snapshot is copied as soon as it is
    made, otherwise only by command.
    """

    enabled: bool = False
    after_backup: bool = True
    retention: RetentionPolicy | None = None


class Policy(_Section):
    """Everything one policy file says. ``time_zone`` says what its days, months and times of day are."""

    guest: str = Field(min_length=1, max_length=255)
    enabled: bool = True
    time_zone: TimeZoneName = "UTC"
    capture: CapturePolicy = CapturePolicy()
    clone: ClonePolicy = ClonePolicy()
    isolation: IsolationPolicy = IsolationPolicy()
    control: ControlPolicy = ControlPolicy()
    database: DatabasePolicy = DatabasePolicy()
    schedule: SchedulePolicy = SchedulePolicy()
    retention: RetentionPolicy = RetentionPolicy()
    replica: ReplicaPolicy = ReplicaPolicy()
    verify: VerifyPolicy = VerifyPolicy()
    environment: EnvironmentPolicy = EnvironmentPolicy()
