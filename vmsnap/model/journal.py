"""What a run makes outside itself, and what the journal says of a run."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from vmsnap.model.ids import RunId


class ResourceKind(StrEnum):
    """Kinds of outside things. Each kind belongs to one owner, which knows how to remove it."""

    MEMORY = "memory"
    SOURCE_OVERLAYS = "source-overlays"
    CLONE_OVERLAYS = "clone-overlays"
    DISK_COPIES = "disk-copies"
    HINTS = "hints"
    FENCE = "fence"
    CLONE = "clone"
    EXPORT = "export"
    STAGING = "staging"
    ENVIRONMENT_DISKS = "environment-disks"
    ENVIRONMENT = "environment"
    HOLD = "hold"
    SERVICE = "service"
    DNS_RECORD = "dns-record"
    REPLICA_EXPORT = "replica-export"
    EXPORTED_FILES = "exported-files"


@dataclass(frozen=True, kw_only=True)
class Resource:
    """One outside thing of a run. ``detail`` is text that its owner wrote and alone understands; it holds no secret.

    The name is the same for the same run and kind, so that what a dead process made can be found again.
    """

    kind: ResourceKind
    run: RunId
    guest: str
    name: str
    detail: str = ""


class RunKind(StrEnum):
    """What a run was started for."""

    BACKUP = "backup"
    PROVISION = "provision"
    REPLICATE = "replicate"
    RESTORE = "restore"
    EXPORT = "export"


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What the journal knows of one run.

    ``alive``: a process works on it now. ``kept_for``: the environment that keeps the run's resources on purpose.
    ``unreleased``: resources with a recorded intent and no recorded release, oldest first.
    """

    run: RunId
    kind: RunKind
    guest: str
    started: datetime
    alive: bool
    kept_for: str | None
    closed: bool
    unreleased: tuple[Resource, ...]
    state: str
