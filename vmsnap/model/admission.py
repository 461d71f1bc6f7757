"""Whether another clone may be made on this host: a pure decision over those that there are.

Memory that a clone has not taken yet is promised to it all the same: two runs that begin together see the same free memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vmsnap.model.ids import RunId

_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Place:
    """A place for one run's clone: ``memory_bytes`` is the most that its memory image and its clone take together."""

    run: RunId
    guest: str
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """What the host has left, and what the runs' images and clones have taken of it so far."""

    available_bytes: int
    taken_bytes: Mapping[RunId, int] = field(default_factory=dict)


def refusal(wanted: Place, *, held: Sequence[Place], memory: HostMemory, most: int) -> str | None:
    """Return why there is no place for another clone beside those that hold one; None where there is. ``most``: of clones."""
    if len(held) >= most:
        guests = ", ".join(sorted(place.guest for place in held))
        return f"{len(held)} of at most {most} clones are there: of {guests}"
    promised = sum(max(0, place.memory_bytes - memory.taken_bytes.get(place.run, 0)) for place in held)
    free = memory.available_bytes - promised
    if free < wanted.memory_bytes:
        return (
            f"the clone of {wanted.guest!r} needs {wanted.memory_bytes // _MIB} MiB of memory; "
            f"{memory.available_bytes // _MIB} MiB are available, of which {promised // _MIB} are promised to others"
        )
    return None
