"""``vmsnap.toml``: where things live on this host. What to do with a guest is in its policy."""

from __future__ import annotations

import os
from datetime import timedelta
from ipaddress import IPv4Network
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from vmsnap.config.problems import validate
from vmsnap.config.toml import read_toml
from vmsnap.model.durations import PositiveDuration

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
    """How many runs the schedule lets go on at a time: on this host, and on each storage that policies name."""

    runs_per_host: int = Field(default=1, ge=1)
    runs_per_storage: int = Field(default=1, ge=1)


class DaemonSettings(_Section):
    """How often ``vmsnap daemon`` does what, and how long its runs may take to end when it is stopped."""

    tick: Annotated[PositiveDuration, Field(ge=timedelta(seconds=1), le=timedelta(minutes=10))] = timedelta(seconds=30)
    reconcile_every: PositiveDuration = timedelta(minutes=5)
    prune_every: PositiveDuration = timedelta(hours=1)
    stop_deadline: PositiveDuration = timedelta(minutes=9)


class Settings(_Section):
    """Everything ``vmsnap.toml`` says. ``policies`` is absolute once loaded; in the file it may be relative to it."""

    store: StoreSettings
    state: StateSettings = StateSettings()
    runtime: RuntimeSettings = RuntimeSettings()
    libvirt: LibvirtSettings = LibvirtSettings()
    limits: LimitSettings = LimitSettings()
    isolation: IsolationSettings = IsolationSettings()
    daemon: DaemonSettings = DaemonSettings()
    policies: Path = Path("policies")


def settings_path(path: Path | None) -> Path:
    """Return the file to read: the one named, else that of the environment variable, else the default."""
    return path or Path(os.environ.get(ENVIRONMENT_VARIABLE) or DEFAULT_FILE)


def load_settings(path: Path | None = None) -> Settings:
    """Read the settings. Raises ConfigError that names file, line, key, what was given and what is allowed."""
    file = read_toml(settings_path(path), remedy_if_missing=_MISSING)
    settings = validate(Settings, file, data=file.data)
    return settings.model_copy(update={"policies": file.path.absolute().parent / settings.policies})
