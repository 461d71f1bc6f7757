"""A test VM provisioned from a snapshot."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from vmsnap.errors import VmsnapError
from vmsnap.model.ids import RunId, SnapshotId


@dataclass(frozen=True, kw_only=True)
class Environment:
    """One environment as the book of environments records it. ``expires`` None: it stays until destroyed.

    ``network`` None: in a fence of its own; otherwise the hypervisor's network it was put on.
    """

    name: str
    run: RunId
    guest: str
    snapshot: SnapshotId
    created: datetime
    expires: datetime | None
    network: str | None


@dataclass(frozen=True, kw_only=True)
class Expiry:
    """What became of an environment whose time has come. ``error``: why it could not be removed; None in a dry run too."""

    environment: Environment
    removed: bool
    error: VmsnapError | None = None


@dataclass(frozen=True, kw_only=True)
class EnvironmentPlan:
    """An environment to make. ``macs`` are new, one for each NIC of the guest, in its order.

    ``export_socket``: where its disks are served while their data lies in the replica; None: they are local.
    """

    run: RunId
    guest: str
    name: str
    uuid: str
    macs: tuple[str, ...]
    network: str | None
    memory_bytes: int | None = None
    vcpus: int | None = None
    export_socket: str | None = None
