"""What workflows tell their callers. The CLI's ``--json`` prints these; ``interface`` names are stable."""

from __future__ import annotations

from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from vmsnap.model.environment import Environment
from vmsnap.model.export import ExportStatus
from vmsnap.model.guest import GuestState
from vmsnap.model.ids import RunId, SnapshotId
from vmsnap.model.journal import ResourceKind
from vmsnap.model.manifest import (
    CaptureRecord,
    CleanRecord,
    DrainRecord,
    IsolationRecord,
    Pin,
    ReadRecord,
    Snapshot,
    StepRecord,
    StoreRecord,
)


class _Report(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ReplicateReport(_Report):
    """A snapshot that is at the replica. ``there``: it was before. ``sent_bytes`` were written for it."""

    snapshot: SnapshotId
    guest: str
    there: bool
    logical_bytes: int
    sent_bytes: int
    seconds: float


class BackupReport(_Report):
    """One finished backup. The printed JSON adds up ``drain`` over instances; see ``vmsnap.cli.output``.

    ``replica`` None: the snapshot was not sent there, by the policy or because of what a warning tells.
    ``reads``: how much of each disk was read, by its target, and why.
    """

    snapshot: SnapshotId
    guest: str
    started: datetime
    finished: datetime
    capture: CaptureRecord
    isolation: IsolationRecord
    drain: tuple[DrainRecord, ...]
    clean: CleanRecord
    store: StoreRecord
    reads: dict[str, ReadRecord] = Field(default_factory=dict)
    steps: tuple[StepRecord, ...]
    pruned: tuple[SnapshotId, ...] = ()
    replica: ReplicateReport | None = None
    warnings: tuple[str, ...] = ()


class Origin(StrEnum):
    """Where an environment's data comes from: an image of this host's store, or the replica as it is read."""

    STORE = "store"
    REPLICA = "replica"


class ProvisionOptions(_Report):
    """An operator's wishes for an environment. None takes the policy's or a made-up value.

    ``origin`` None: from here, or straight from the replica where the snapshot is only there.
    """

    name: str | None = None
    ttl: timedelta | None = None
    network: str | None = None
    wait: bool = False
    origin: Origin | None = None


class ProvisionReport(_Report):
    """One provisioned environment. Times count from the beginning of the command. ``origin``: where its data comes from.

    ``address`` is known of one on a network that was waited for. ``reach`` is the command that reaches any.
    """

    environment: str
    snapshot: SnapshotId
    guest: str
    state: GuestState
    defined_ms: float
    running_ms: float
    overlay_bytes: int
    address: str | None
    expires: datetime | None
    answered_ms: float | None = None
    reach: str = ""
    dns_name: str | None = None
    origin: Origin = Origin.STORE
    warnings: tuple[str, ...] = ()


class EnvironmentStatus(_Report):
    """One environment and how it is now. ``overlay_bytes`` is what it wrote.

    ``service_address``: the host's address where ``vmsnap env serve`` serves it. ``dns_name``: as it is registered.
    ``export``: of one straight from the replica, how much of it has come.
    """

    environment: Environment
    state: GuestState | None
    overlay_bytes: int
    service_address: str | None = None
    dns_name: str | None = None
    export: ExportStatus | None = None


class ForwardOptions(_Report):
    """What ``vmsnap env forward`` is to listen at. ``listen_port`` 0: any free one. ``wait`` None: a minute or less."""

    port: int
    listen_address: str = "127.0.0.1"
    listen_port: int = 0
    wait: timedelta | None = None


class ForwardReport(_Report):
    """A port of an environment, and where it is reached as long as the command runs."""

    environment: str
    port: int
    listen_address: str
    listen_port: int
    address: str


class ServeOptions(_Report):
    """Which ports ``vmsnap env serve`` serves; none: those of the policy."""

    ports: tuple[int, ...] = ()
    wait: timedelta | None = None


class ServeReport(_Report):
    """An environment at its service address, as long as the command runs. ``address`` is its own, in its fence."""

    environment: str
    service_address: str
    ports: tuple[int, ...]
    address: str
    dns_name: str | None
    warnings: tuple[str, ...] = ()


class RegisterReport(_Report):
    """What ``vmsnap env register`` registered."""

    environment: str
    dns_name: str
    address: str


class RestoreOptions(_Report):
    """How long a restored snapshot is to be held against retention, and for whom. ``keep`` None: not at all."""

    keep: timedelta | None = Field(gt=timedelta(0))
    owner: str


class RestoreReport(_Report):
    """A snapshot that is in the local store again. ``there``: it was before. ``pin`` holds it; None: nothing does."""

    snapshot: SnapshotId
    guest: str
    there: bool
    logical_bytes: int
    seconds: float
    pin: Pin | None = None


class ExportOptions(_Report):
    """What ``vmsnap export`` is to write, and where. ``replica_only``: even what the local store has comes from the replica."""

    folder: Path
    image_format: Literal["raw", "qcow2"] = "raw"
    replica_only: bool = False


class ExportReport(_Report):
    """Disks of a snapshot as files. ``source``: ``local`` or ``replica``."""

    snapshot: SnapshotId
    guest: str
    source: str
    image_format: str
    files: tuple[str, ...]
    seconds: float


class Place(StrEnum):
    """Where a copy of a snapshot is."""

    LOCAL = "local"
    REPLICA = "replica"


class PruneDecision(_Report):
    """What retention says of one copy of a snapshot, and why. ``removed_bytes`` None: it was not removed.

    At the replica nothing is freed at once: what only that copy needed is garbage, to be collected.

    ``rules`` names what decided, in the order of ``reasons``: a key of the policy, or a ``retention.Keeper``.
    """

    snapshot: Snapshot
    keep: bool
    reasons: tuple[str, ...]
    rules: tuple[str, ...] = ()
    removed_bytes: int | None = None
    place: Place = Place.LOCAL


class Undone(_Report):
    """One thing that reconcile removed, or could not remove."""

    run: RunId
    kind: ResourceKind
    name: str
    guest: str
    failure: str | None = None


class TaggedThing(_Report):
    """One thing that bears the id of a run. ``guest`` is empty where its tag does not say."""

    kind: ResourceKind
    name: str
    guest: str


class UnknownRun(_Report):
    """Things of a run that no journal here knows, in the order in which they would be removed.

    They may belong to another vmsnap. ``test_vm``: they are a test VM's, or what is left of one.
    """

    run: RunId
    guest: str
    test_vm: bool
    things: tuple[TaggedThing, ...]


class Adoption(_Report):
    """Which runs that no journal knows shall be undone as if they were dead runs of this vmsnap.

    ``destroy_test_vms``: test VMs among them are meant too. ``dry_run``: look whether it could be done, and do nothing.
    """

    runs: tuple[RunId, ...]
    destroy_test_vms: bool = False
    dry_run: bool = False


class ReconcileReport(_Report):
    """What reconcile did. ``runs`` were dead; ``undone`` lists their things in the order they were removed.

    ``unknown``: what bears the ids of runs that no journal here knows, and was left alone. ``adopted``: such runs as they were
    before they were taken over (or would be: ``dry_run``).
    """

    runs: tuple[RunId, ...]
    undone: tuple[Undone, ...]
    unknown: tuple[UnknownRun, ...] = ()
    adopted: tuple[UnknownRun, ...] = ()
    dry_run: bool = False

    @property
    def complete(self) -> bool:
        """Tell whether nothing is left."""
        return all(item.failure is None for item in self.undone)


class VerifyReport(_Report):
    """What re-reading a snapshot found, here or (``replica``) there. ``sample``: only such a share of it, as ``"3 of 20"``.

    ``repaired``: the defects that were there before a repair; ``defects`` are those that are left.
    """

    snapshot: SnapshotId
    guest: str = ""
    replica: bool = False
    sample: str | None = None
    blocks: int
    defects: tuple[str, ...]
    repaired: tuple[str, ...] = ()
    seconds: float


class DaemonReport(_Report):
    """What one daemon did in its life. ``backups`` were stored; ``failures`` are those of backups."""

    started: datetime
    finished: datetime
    backups: int
    failures: int
