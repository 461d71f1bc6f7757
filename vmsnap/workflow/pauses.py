"""What is told of a pause, and what earlier ones tell of the next."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from statistics import median

from vmsnap.model.capture import MEMORY_PART, Capture
from vmsnap.model.manifest import Snapshot
from vmsnap.ports.progress import Progress

_RECENT = 3


def usual_rest_ms(snapshots: Iterable[Snapshot]) -> float | None:
    """Return what a guest's latest pauses usually took beside the copying of memory; None where none tells.

    It is the median of three, so that one slow pause on a busy host does not count.
    """
    captures = [snapshot.manifest.capture for snapshot in snapshots]
    told = [capture for capture in captures if any(part.name == MEMORY_PART for part in capture.parts)]
    latest = sorted(told, key=lambda capture: capture.captured)[-_RECENT:]
    rests = [sum(part.ms for part in capture.parts if part.name != MEMORY_PART) for capture in latest]
    return median(rests) if rests else None


def tell_pause(capture: Capture, *, promised: timedelta, progress: Progress) -> tuple[str, ...]:
    """Tell the operator how long the guest stood still, and what for; return a warning where it was longer than promised."""
    parts = ", ".join(f"{part.name} {part.ms:.1f}" for part in capture.parts)
    what = "the guest stood still for" if capture.mode.takes_memory else "the guest's disks were frozen within"
    if capture.pause_at_most:
        what += " at most"
    progress.note(f"{what} {capture.pause_ms:.0f} ms{parts and f' ({parts})'}")
    promised_ms = promised / timedelta(milliseconds=1)
    if capture.pause_ms <= promised_ms:
        return ()
    if capture.pause_at_most:
        told = f"how long the guest stood still is not known: at most {capture.pause_ms:.0f} ms"
        return (f"{told}; capture.max_pause ({promised_ms:.0f} ms) cannot be promised on this hypervisor",)
    return (f"the guest stood still for {capture.pause_ms:.0f} ms; capture.max_pause is {promised_ms:.0f} ms",)
