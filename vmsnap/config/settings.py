"""``vmsnap.toml``: where things live on this host. What to do with a guest is in its policy."""

from __future__ import annotations

import os
import re
from datetime import timedelta
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    field_validator,
    model_validator,
)

from vmsnap.config.problems import validate
from vmsnap.config.toml import read_toml
from vmsnap.model.durations import PositiveDuration
from vmsnap.model.objects import ARCHIVE_CLASSES, ObjectLock

DEFAULT_FILE = Path("/etc/vmsnap/vmsnap.toml")
ENVIRONMENT_VARIABLE = "VMSNAP_CONFIG"
LONGEST_SERVICE_PREFIX = 30
_MISSING = (
    'write it (two lines are enough: [store] and path = "/FOLDER/ON/XFS/OR/BTRFS"), '
    f"or name another with --config or ${ENVIRONMENT_VARIABLE}"
)


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        msg = "an absolute path is allowed (one that begins with a slash)"
        raise ValueError(msg)
    return path


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]


def _never_is_none(value: object) -> object:
    return None if value == "never" else value


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StoreSettings(_Section):
    """Where snapshots live. ``allow_copies``: accept a file system without reflinks, at the cost of full copies."""

    path: AbsolutePath
    allow_copies: bool = False


class StateSettings(_Section):
    """Where the journal, the locks and the book of environments live. A local file system that outlives a boot."""

    path: AbsolutePath = Path("/var/lib/vmsnap")


class RuntimeSettings(_Section):
    """Where things live that need not outlive a boot: memory images on a private tmpfs."""

    path: AbsolutePath = Path("/run/vmsnap")


class LibvirtSettings(_Section):
    """Which libvirt to talk to."""

    uri: str = Field(default="qemu:///system", min_length=1)


class IsolationSettings(_Section):
    """What fences use of this host. Service addresses are taken in pairs from ``service_network``."""

    service_network: IPv4Network = IPv4Network("198.18.0.0/15")

    @field_validator("service_network")
    @classmethod
    def _has_room(cls, network: IPv4Network) -> IPv4Network:
        if network.prefixlen > LONGEST_SERVICE_PREFIX:
            msg = (
                f"a network with room for pairs of addresses is allowed (a prefix of at most /{LONGEST_SERVICE_PREFIX})"
            )
            raise ValueError(msg)
        return network


class LimitSettings(_Section):
    """How many runs the schedule lets go on at a time: on this host, and on each storage that policies name.

    ``clones_per_host``: how many clones there may be at a time, whoever wants them.
    """

    runs_per_host: int = Field(default=1, ge=1)
    runs_per_storage: int = Field(default=1, ge=1)
    clones_per_host: int = Field(default=4, ge=1)


class DaemonSettings(_Section):
    """How often ``vmsnap daemon`` does what, and how long its runs may take to end when it is stopped."""

    tick: Annotated[PositiveDuration, Field(ge=timedelta(seconds=1), le=timedelta(minutes=10))] = timedelta(seconds=30)
    reconcile_every: PositiveDuration = timedelta(minutes=5)
    prune_every: PositiveDuration = timedelta(hours=1)
    collect_every: PositiveDuration = timedelta(days=1)
    stop_deadline: PositiveDuration = timedelta(minutes=19)


def listen_address(text: str) -> tuple[IPv4Address | IPv6Address, int]:
    """Return the address and the port of a text such as ``127.0.0.1:9642`` or ``[::1]:9642``. Raises ValueError."""
    host, _, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        address = IPv6Address(host[1:-1]) if bracketed else IPv4Address(host)
        number = int(port) if port.isascii() and port.isdecimal() else 0
    except ValueError:
        number = 0
    if not 1 <= number <= 65535:
        msg = 'an IP address and a port such as "127.0.0.1:9642" or "[::1]:9642" are allowed'
        raise ValueError(msg)
    return address, number


def _listen(text: str) -> str:
    listen_address(text)
    return text


class MetricsSettings(_Section):
    """Metrics for Prometheus: ``listen``, where the daemon answers it, and a file for node_exporter. Both off by default."""

    listen: Annotated[str, AfterValidator(_listen)] | None = None
    textfile: AbsolutePath | None = None

    @field_validator("textfile")
    @classmethod
    def _is_read(cls, path: Path | None) -> Path | None:
        if path is not None and path.suffix != ".prom":
            msg = "node_exporter reads files whose names end in .prom"
            raise ValueError(msg)
        return path


class NotificationSettings(_Section):
    """Who is told what is wrong. ``credential`` names a file or a systemd credential with ``urls`` and ``dead_man_url``.

    ``urls`` are apprise's; they are secrets, and so is ``dead_man_url``. ``remind_after`` None: nobody is reminded.
    """

    urls: tuple[SecretStr, ...] = ()
    dead_man_url: SecretStr | None = None
    credential: str | None = Field(default=None, min_length=1, max_length=4096)
    dead_man_method: Literal["GET", "POST"] = "GET"
    remind_after: Annotated[PositiveDuration | None, BeforeValidator(_never_is_none)] = timedelta(days=1)
    at_most_every: Annotated[PositiveDuration, Field(ge=timedelta(minutes=1))] = timedelta(minutes=5)
    timeout: Annotated[PositiveDuration, Field(le=timedelta(minutes=1))] = timedelta(seconds=20)


def _bucket(name: str) -> str:
    if re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", name) is None:
        msg = "the name of a bucket is allowed: 3 to 63 lower-case letters, digits, hyphens and dots"
        raise ValueError(msg)
    return name


def _prefix(prefix: str) -> str:
    if prefix and re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*", prefix) is None:
        msg = 'letters, digits, "-", "_" and "." are allowed, with slashes between and none at the ends: "site-a/db"'
        raise ValueError(msg)
    return prefix


def _endpoint(url: str) -> str:
    if re.fullmatch(r"https?://[A-Za-z0-9.:_\[\]-]+/?", url) is None:
        msg = 'an URL without a path is allowed, such as "https://s3.example.org:9000"'
        raise ValueError(msg)
    return url


def _storage_class(name: str) -> str:
    if not name or name in ARCHIVE_CLASSES:
        msg = 'a class whose objects are read at once is allowed, such as "STANDARD_IA" or "GLACIER_IR"'
        raise ValueError(msg)
    return name


class ReplicaSettings(_Section):
    """Where copies of snapshots go: a bucket of an S3 server, or a folder, such as one of a mounted file server.

    ``endpoint`` None: AWS. ``path_style`` None: only with an endpoint, and so are the new checksums of AWS left out with one
    where ``checksums`` is None. ``credential`` and ``encryption_credential`` name files, or systemd credentials; without the
    former, keys come from where boto3 looks for them, without the latter nothing is encrypted.
    ``bandwidth_mib_s`` bounds sending and receiving, each. ``retry_for``: how long a call that fails is made again.
    """

    kind: Literal["s3", "directory"]
    path: AbsolutePath | None = None
    bucket: Annotated[str, AfterValidator(_bucket)] | None = None
    prefix: Annotated[str, AfterValidator(_prefix)] = ""
    endpoint: Annotated[str, AfterValidator(_endpoint)] | None = None
    region: str | None = Field(default=None, min_length=1)
    ca_file: AbsolutePath | None = None
    path_style: bool | None = None
    checksums: bool | None = None
    storage_class: Annotated[str, AfterValidator(_storage_class)] | None = None
    kms_key: str | None = Field(default=None, min_length=1)
    object_lock: ObjectLock = ObjectLock.OFF
    credential: str | None = Field(default=None, min_length=1, max_length=4096)
    encryption_credential: str | None = Field(default=None, min_length=1, max_length=4096)
    bandwidth_mib_s: int | None = Field(default=None, ge=1)
    connections: int = Field(default=16, ge=1, le=256)
    timeout: Annotated[PositiveDuration, Field(le=timedelta(minutes=10))] = timedelta(minutes=1)
    retry_for: Annotated[PositiveDuration, Field(le=timedelta(days=1))] = timedelta(minutes=5)

    @model_validator(mode="after")
    def _keys_fit_the_kind(self) -> ReplicaSettings:
        needed = "bucket" if self.kind == "s3" else "path"
        if getattr(self, needed) is None:
            msg = f'kind = "{self.kind}" needs the key {needed}'
            raise ValueError(msg)
        only = ("path",) if self.kind == "s3" else _OF_S3
        given = [key for key in only if key in self.model_fields_set]
        if given:
            msg = f'kind = "{self.kind}" has no {", ".join(given)}'
            raise ValueError(msg)
        if self.ca_file is not None and (self.endpoint or "https:").startswith("http:"):
            msg = "ca_file is of no use with an endpoint that begins with http:, which is not encrypted"
            raise ValueError(msg)
        return self


_OF_S3 = (
    "bucket",
    "prefix",
    "endpoint",
    "region",
    "ca_file",
    "path_style",
    "checksums",
    "storage_class",
    "kms_key",
    "object_lock",
    "credential",
    "timeout",
    "retry_for",
)


class HypervSettings(_Section):
    """Which Hyper-V host to talk to, over PowerShell remoting (WinRM).

    ``credential`` names a file, or a systemd credential, with ``user`` and ``password``; ``guest_credential`` one with
    those of accounts in the guests. ``authority``: certificates to trust instead of the system's. ``certificate`` and
    ``key`` log in by themselves. ``configuration`` is a session configuration of the host (JEA). ``export_folder`` is a
    folder of the host, on NTFS or ReFS, and ``export_mounted`` the same one as this host sees it, over SMB.
    ``responder_vm`` is a VM that gives clones addresses on their private switches (docs/hyper-v.md).
    """

    host: str = Field(min_length=1, max_length=253)
    port: int = Field(default=5986, ge=1, le=65535)
    tls: bool = True
    authentication: Literal["negotiate", "kerberos", "ntlm", "certificate", "credssp", "basic"] = "negotiate"
    credential: str | None = Field(default=None, min_length=1, max_length=4096)
    guest_credential: str | None = Field(default=None, min_length=1, max_length=4096)
    authority: AbsolutePath | None = None
    certificate: AbsolutePath | None = None
    key: AbsolutePath | None = None
    configuration: str = Field(default="Microsoft.PowerShell", pattern=r"^[A-Za-z0-9._-]+$")
    connect_timeout: Annotated[PositiveDuration, Field(le=timedelta(minutes=5))] = timedelta(seconds=10)
    operation_timeout: Annotated[PositiveDuration, Field(ge=timedelta(seconds=5), le=timedelta(minutes=10))] = (
        timedelta(seconds=60)
    )
    export_folder: str = Field(pattern=r"^([A-Za-z]:\\|\\\\[^\\]+\\[^\\]+\\)[^/]+$")
    export_mounted: AbsolutePath
    responder_vm: str | None = Field(default=None, min_length=1, max_length=100)

    @model_validator(mode="after")
    def _login_is_possible(self) -> HypervSettings:
        if not self.tls and self.authentication in {"basic", "certificate"}:
            msg = f'authentication = "{self.authentication}" needs tls = true: nothing else keeps the session secret'
            raise ValueError(msg)
        if self.authentication == "certificate" and self.certificate is None:
            msg = 'authentication = "certificate" needs the key certificate'
            raise ValueError(msg)
        if self.authentication in {"basic", "credssp", "ntlm"} and self.credential is None:
            msg = f'authentication = "{self.authentication}" needs the key credential'
            raise ValueError(msg)
        return self


class Settings(_Section):
    """Everything ``vmsnap.toml`` says. ``policies`` is absolute once loaded; in the file it may be relative to it."""

    store: StoreSettings
    state: StateSettings = StateSettings()
    runtime: RuntimeSettings = RuntimeSettings()
    libvirt: LibvirtSettings = LibvirtSettings()
    limits: LimitSettings = LimitSettings()
    isolation: IsolationSettings = IsolationSettings()
    daemon: DaemonSettings = DaemonSettings()
    metrics: MetricsSettings = MetricsSettings()
    notifications: NotificationSettings = NotificationSettings()
    replica: ReplicaSettings | None = None
    hypervisor: Literal["libvirt", "hyperv"] = "libvirt"
    hyperv: HypervSettings | None = None
    policies: Path = Path("policies")

    @model_validator(mode="after")
    def _hypervisor_is_described(self) -> Settings:
        if self.hypervisor == "hyperv" and self.hyperv is None:
            msg = 'hypervisor = "hyperv" needs a section [hyperv] with host, export_folder and export_mounted'
            raise ValueError(msg)
        return self


def settings_path(path: Path | None) -> Path:
    """Return the file to read: the one named, else that of the environment variable, else the default."""
    return path or Path(os.environ.get(ENVIRONMENT_VARIABLE) or DEFAULT_FILE)


def load_settings(path: Path | None = None) -> Settings:
    """Read the settings. Raises ConfigError that names file, line, key, what was given and what is allowed."""
    file = read_toml(settings_path(path), remedy_if_missing=_MISSING)
    settings = validate(Settings, file, data=file.data)
    return settings.model_copy(update={"policies": file.path.absolute().parent / settings.policies})
