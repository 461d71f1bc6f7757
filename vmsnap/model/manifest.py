"""The manifest of a snapshot: written last, never changed. ``docs/formats.md`` describes the JSON.

Pins and verification results change; they live beside it as ``Marks``.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from vmsnap.model.capture import CaptureMode
from vmsnap.model.ids import RunId, SnapshotId
from vmsnap.model.isolation import ProofKind, Rung

_NEXT = timedelta(microseconds=1)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PausePartRecord(_Record):
    """What one stretch of the pause was spent on."""

    name: str
    ms: float


class CaptureRecord(_Record):
    """How the guest was captured. ``captured`` is the instant the disks are of.

    ``reason`` says why it was this mode. The oldest manifests have neither ``reason`` nor ``parts``.
    ``memory_captured`` false: disks only, and the clone booted.
    ``on_overlay_seconds``: how long production was on its overlays, where it was home before the snapshot was stored.
    ``pause_at_most``: how long the guest stood still is not known, but that it was not longer than ``pause_ms``.
    """

    mode: CaptureMode
    captured: AwareDatetime
    pause_ms: float
    ram_bytes: int
    parts: tuple[PausePartRecord, ...] = ()
    reason: str = ""
    on_overlay_seconds: float | None = None
    memory_captured: bool = True
    pause_at_most: bool = False


class ProofRecord(_Record):
    """One observation of the isolation proof. The oldest manifests do not say of what ``kind`` it is."""

    name: str
    observed: str
    kind: ProofKind | None = None


class AttemptRecord(_Record):
    """One rung of the address ladder that was tried."""

    rung: Rung
    seconds: float
    failure: str | None = None


class IsolationRecord(_Record):
    """How the clone was kept apart, and how it was reached."""

    rung: Rung
    address: str | None
    seconds: float
    proof: tuple[ProofRecord, ...]
    attempts: tuple[AttemptRecord, ...] = ()


class DrainRecord(_Record):
    """Work in flight in one database instance when its lame duck began, and what became of it."""

    engine: str
    instance: str
    in_flight_at_start: int
    finished: int
    rolled_back: int
    seconds: float


class InstanceRecord(_Record):
    """What was read from one instance's files after the clone was off (``disk``) or before (``in-guest``)."""

    engine: str
    instance: str
    data_directory: str
    method: str
    observed: dict[str, str]


class FileSystemRecord(_Record):
    """The state of one file system, read from the disk after the clone was off."""

    disk: str
    kind: str
    uuid: str
    observed: str


class CleanRecord(_Record):
    """The evidence that everything in this snapshot ended in order."""

    made: AwareDatetime
    guest_shut_down_by: str
    instances: tuple[InstanceRecord, ...] = Field(min_length=1)
    file_systems: tuple[FileSystemRecord, ...] = Field(min_length=1)


class ReadRecord(_Record):
    """How much of a clone's disk was read to store it.

    ``since``: the snapshot since which a hint told what can have changed, and only that was read; None: all was read, for
    the reason ``full_because``. ``sampled_blocks`` were read although the hint called them unchanged; ``mismatch`` says where
    one had changed nevertheless. ``hinted_in_a_row``: how many snapshots in a row, this one included, were stored by hints.
    """

    read_bytes: int = Field(ge=0)
    since: SnapshotId | None = None
    full_because: str | None = None
    sampled_blocks: int = Field(default=0, ge=0)
    mismatch: str | None = None
    hinted_in_a_row: int = Field(default=0, ge=0)


class DiskRecord(_Record):
    """One stored disk. ``image`` and ``digests`` are file names in the snapshot's folder.

    ``digests_sha256`` is the SHA-256 of the digests file, so that the manifest vouches for every block.
    ``new_bytes`` were written for this snapshot; the rest is shared with the previous one.
    ``written`` is the file that lists where the clone wrote: the next snapshot needs it to be stored by hints. Older snapshots
    and such as came from elsewhere have none, nor ``read``.
    """

    target: str
    image: str
    digests: str
    digests_sha256: str
    size_bytes: int = Field(gt=0)
    data_bytes: int = Field(ge=0)
    new_bytes: int = Field(ge=0)
    block_bytes: Literal[65536] = 65536
    written: str | None = None
    written_sha256: str | None = None
    read: ReadRecord | None = None


class MachineRecord(_Record):
    """What a hypervisor needs to make a VM from the disks again. ``definition`` is its own text (libvirt: domain XML).

    ``nvram`` is the file name of the firmware's variable store, where the guest has one. ``macs`` are its NICs, in order.
    """

    hypervisor: str
    definition: str
    uuid: str
    memory_bytes: int
    vcpus: int
    nvram: str | None = None
    macs: tuple[str, ...] = ()


class StoreRecord(_Record):
    """What storing cost. ``logical_bytes`` is the size of all disks, ``new_bytes`` what was written.

    ``read_bytes`` is what was read of the clone's disks; older manifests do not say.
    """

    logical_bytes: int
    new_bytes: int
    seconds: float
    read_bytes: int | None = None


class StepRecord(_Record):
    """How long one step of the run took."""

    name: str
    seconds: float


class Manifest(_Record):
    """Everything known about one snapshot.

    ``clock_doubt_seconds``: how much of the time before it is in doubt, by the clock of its host (``model.doubt``).
    ``made_after``: when its parent was captured, where the clock had gone back since and said less.
    ``hints_distrusted``: why hints of what changed are not believed any more for this guest; None while they are.
    """

    format_version: Literal[1] = 1
    id: SnapshotId
    run: RunId
    guest: str
    created: AwareDatetime
    parent: SnapshotId | None
    machine: MachineRecord
    capture: CaptureRecord
    isolation: IsolationRecord
    drain: tuple[DrainRecord, ...]
    clean: CleanRecord
    disks: tuple[DiskRecord, ...] = Field(min_length=1)
    store: StoreRecord
    steps: tuple[StepRecord, ...]
    vmsnap_version: str
    clock_doubt_seconds: float = Field(default=0.0, ge=0.0)
    made_after: AwareDatetime | None = None
    hints_distrusted: str | None = None

    @property
    def captured(self) -> datetime:
        """Return the instant the snapshot is of: the moment the guest stood still."""
        return self.capture.captured

    @property
    def ranked(self) -> datetime:
        """Return the time by which it is older or younger than others: a clock that went back makes nothing old."""
        return self.captured if self.made_after is None else max(self.captured, self.made_after + _NEXT)


class Pin(_Record):
    """A hold against retention. ``until`` None: until it is taken off."""

    owner: str
    reason: str
    since: AwareDatetime
    until: AwareDatetime | None = None

    def holds(self, now: datetime) -> bool:
        """Tell whether it holds its snapshot at a moment, by the clock alone. Retention also doubts the clock."""
        return self.until is None or now < self.until


class Verification(_Record):
    """The last time a snapshot's blocks were read and compared with their digests."""

    at: AwareDatetime
    blocks: int
    bad_blocks: int


class Marks(_Record):
    """What may change about a snapshot after it was published.

    ``hints_distrusted``: what a newer snapshot's manifest said of hints, which was removed by hand.
    """

    pin: Pin | None = None
    verification: Verification | None = None
    hints_distrusted: str | None = None


class Snapshot(_Record):
    """A published snapshot: its manifest, and its marks."""

    manifest: Manifest
    marks: Marks = Marks()

    @property
    def id(self) -> SnapshotId:
        """Return the snapshot's id."""
        return self.manifest.id

    @property
    def hints_distrusted(self) -> str | None:
        """Return why hints of what changed are not believed any more for its guest, by this snapshot; None while they are."""
        return self.manifest.hints_distrusted or self.marks.hints_distrusted
