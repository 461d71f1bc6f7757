"""What a capture needs and what it measured."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from vmsnap.model.guest import Guest
from vmsnap.model.ids import RunId


class CaptureMode(StrEnum):
    """How RAM, devices and disks were taken. See the operator's guide for which guest needs which.

    ``live``: RAM is copied while the guest runs, what changed meanwhile while it stands still. ``instant``: the guest stands
    still once, and its RAM is copied afterwards, each page before it changes. ``boot``: disks only.
    """

    LIVE = "live"
    INSTANT = "instant"
    BOOT = "boot"

    @property
    def takes_memory(self) -> bool:
        """Tell whether RAM and device state are captured; else the clone boots from its disks."""
        return self is not CaptureMode.BOOT


class CaptureChoice(StrEnum):
    """A policy's word on the mode: one of them, or ``auto`` for what suits guest and host at the time."""

    LIVE = "live"
    INSTANT = "instant"
    BOOT = "boot"
    AUTO = "auto"


class OnNoConvergence(StrEnum):
    """What to do with a guest that writes memory faster than it can be copied.

    Give up; stop it for the rest; take it in mode ``instant`` instead; or slow down its vCPUs for a while.
    """

    ABORT = "abort"
    SUSPEND = "suspend"
    INSTANT = "instant"
    THROTTLE = "throttle"


class Detach(StrEnum):
    """When production leaves its overlays: once the clone's disks are stored, or at once, the clone being on copies.

    ``AUTO``: at once where every disk can be copied by reflink.
    """

    LATE = "late"
    REFLINK = "reflink"
    AUTO = "auto"


class SwapRule(StrEnum):
    """What to do where the kernel may write a memory image to swap on a disk."""

    REFUSE = "refuse"
    WARN = "warn"


@dataclass(frozen=True, kw_only=True)
class CloneLimits:
    """What a clone may use of the host beside CPU weight; None: as much as its guest. Rates are of each disk, or NIC."""

    cpu_percent: int | None = None
    disk_bytes_per_second: int | None = None
    disk_operations_per_second: int | None = None
    network_bytes_per_second: int | None = None


class DiskSnapshot(StrEnum):
    """Who freezes the disks: QEMU, by overlays, or their storage, while the guest stands still."""

    OVERLAY = "overlay"
    STORAGE = "storage"


@dataclass(frozen=True, kw_only=True)
class StorageCommands:
    """How a storage takes and removes a snapshot of one disk.

    Argument lists, in which ``{source}`` stands for the disk and ``{snapshot}`` for the snapshot. ``path`` is where a
    snapshot is found, with ``{folder}`` for the disk's folder, ``{disk}`` for its file name and ``{name}``, which has to be
    in it, for a name that says whose it is. There is something at that path exactly as long as the snapshot exists.
    """

    snapshot: tuple[str, ...]
    remove: tuple[str, ...]
    path: str = "{folder}/{name}"


@dataclass(frozen=True, kw_only=True)
class CaptureSettings:
    """A policy's wishes for the capture.

    ``timeout`` is kept, or the capture is undone. ``max_pause`` is a promise: a guest that stands still for that long without
    its memory being taken goes on, and the capture is given up. What comes after (disks, resume) cannot be given up; it is
    measured, room is left for it, and a pause that was longer nevertheless is reported.
    ``throttle_limit`` is how long the guest's vCPUs may be slowed down for a capture (``OnNoConvergence.THROTTLE``).
    ``swap``: what to do where memory images could reach a disk. ``cpu_shares`` and ``limits`` are the clone's.
    ``boot_memory_bytes`` is the most memory that a clone gets which boots; None: as much as its guest.
    ``storage`` None: reflinks; all its snapshots together may take ``storage_timeout``, while the guest stands still.
    ``allow_emulation``: take guests without hardware virtualisation even where the copy of their memory may be wrong.
    """

    mode: CaptureChoice = CaptureChoice.LIVE
    max_pause: timedelta = timedelta(milliseconds=500)
    on_no_convergence: OnNoConvergence = OnNoConvergence.ABORT
    throttle_limit: timedelta = timedelta(seconds=30)
    timeout: timedelta = timedelta(minutes=10)
    detach: Detach = Detach.LATE
    disk_snapshot: DiskSnapshot = DiskSnapshot.OVERLAY
    storage: StorageCommands | None = None
    storage_timeout: timedelta = timedelta(seconds=10)
    overlay_dir: str | None = None
    min_overlay_free_bytes: int = 1 << 30
    allow_emulation: bool = False
    swap: SwapRule = SwapRule.REFUSE
    cpu_shares: int = 64
    limits: CloneLimits = CloneLimits()
    boot_memory_bytes: int | None = None

    @property
    def on_copies(self) -> bool:
        """Tell whether the clone reads copies of the disks: reflinks, or snapshots of their storage."""
        return self.detach is Detach.REFLINK or self.disk_snapshot is DiskSnapshot.STORAGE


@dataclass(frozen=True, kw_only=True)
class ModeChoice:
    """The mode to capture a guest in, and why this one, as an operator reads it."""

    mode: CaptureMode
    reason: str


POLICY_SAYS_LIVE = ModeChoice(mode=CaptureMode.LIVE, reason="the policy says so")


@dataclass(frozen=True, kw_only=True)
class CapturePlan:
    """One capture to do: whose, for which run, and how. ``choice`` is what became of ``settings.mode``.

    ``usual_rest_ms`` is what the guest's pauses took lately beside the copying of memory; None where it was not measured.
    """

    run: RunId
    guest: Guest
    settings: CaptureSettings
    choice: ModeChoice = POLICY_SAYS_LIVE
    usual_rest_ms: float | None = None


MEMORY_PART = "last pass and devices"
"""The part of a pause in which memory is copied: the only one that grows with what the guest writes."""


@dataclass(frozen=True, kw_only=True)
class PausePart:
    """What one stretch of a pause was spent on. ``name`` is shown to people; ``ms`` is how long it took."""

    name: str
    ms: float


@dataclass(frozen=True, kw_only=True)
class Capture:
    """RAM, device state and disk state of a guest at one instant, as measured.

    ``pause_ms`` is the time between QEMU's STOP and RESUME events. ``captured`` is the wall clock of the STOP. In mode
    ``boot``, in which vCPUs do not stop, they say when the disks were frozen, and how long that took at most.
    ``reason`` says why it was this mode. ``ram_bytes`` is what was copied of RAM and device state.
    ``parts`` follow one another and add up to the pause, as far as they could be told apart; empty where they could not.
    ``on_overlay_seconds``: how long production was on its overlays, where it is home already.
    ``pause_at_most``: the hypervisor does not say how long the guest stood still; it was not longer than ``pause_ms``.
    """

    mode: CaptureMode
    reason: str
    captured: datetime
    resumed: datetime
    pause_ms: float
    ram_bytes: int
    seconds: float
    parts: tuple[PausePart, ...] = ()
    on_overlay_seconds: float | None = None
    pause_at_most: bool = False


@dataclass(frozen=True, kw_only=True)
class Clone:
    """A copy of a guest, known to the hypervisor under its own name and UUID."""

    run: RunId
    guest: str
    name: str
    uuid: str


@dataclass(frozen=True, kw_only=True)
class DiskImage:
    """A disk image on the host: what a clone wrote, over what the guest had at the capture."""

    target: str
    path: str
    image_format: str
    size_bytes: int
