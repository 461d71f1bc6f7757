"""What a pause was spent on, told from the moments that were seen of it.

QEMU 7.2 sends these events in a capture, stamped by itself (qapi/run-state.json, qapi/migration.json): STOP, MIGRATION_PASS
when it has looked for the last time which memory was written, MIGRATION ``completed``, RESUME. Of what libvirt does between
the last two, QEMU sends no events: there the memory image and the disks are watched (``filewatch``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from vmsnap.model.capture import MEMORY_PART, PausePart

STOPPING = "stop"
IMAGE = "memory image"
DISKS = "disk transaction"
RESUMING = "resume"
ORDER = (STOPPING, MEMORY_PART, IMAGE, DISKS)


@dataclass(frozen=True, kw_only=True)
class Mark:
    """The moment at which a part of a pause was last seen to go on."""

    part: str
    at: datetime


def parts_of(*, stopped: datetime, resumed: datetime, marks: Iterable[Mark]) -> tuple[PausePart, ...]:
    """Return the parts of a pause, in order; they add up to it.

    Of several marks of a part inside the pause the last counts. A part without one is in the part after it.
    """
    ends: dict[str, datetime] = {}
    for mark in marks:
        if stopped <= mark.at <= resumed:
            ends[mark.part] = max(mark.at, ends.get(mark.part, mark.at))
    found = []
    began = stopped
    for name in ORDER:
        end = ends.get(name)
        if end is not None and end >= began:
            found.append(PausePart(name=name, ms=_ms(end - began)))
            began = end
    return (*found, PausePart(name=RESUMING, ms=_ms(resumed - began)))


def _ms(length: timedelta) -> float:
    return length / timedelta(milliseconds=1)
