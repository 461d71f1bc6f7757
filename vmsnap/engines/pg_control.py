"""PostgreSQL's control file, ``global/pg_control``, read without PostgreSQL.

The layout is that of ``src/include/catalog/pg_control.h`` (struct ``ControlFileData``), the same in its first fields
from PostgreSQL 10 to 18: system identifier (u64 at 0), control file version (u32 at 8), catalog version (u32 at 12),
state (u32 at 16), time (i64 at 24), checkpoint position (u64 at 32). The last field is a CRC-32C over all before it;
its place differs between versions, so it is found by what it is: the aligned place where the sum is right.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

_FIRST_FIELDS = {"little": struct.Struct("<QIIIxxxxqQ"), "big": struct.Struct(">QIIIxxxxqQ")}
_LONGEST = 512
_ALIGNMENT = 4
_CASTAGNOLI = 0x82F63B78


class ClusterState(IntEnum):
    """State of a cluster by its control file (enum ``DBState``). Only ``SHUT_DOWN`` starts without recovery."""

    STARTING_UP = 0
    SHUT_DOWN = 1
    SHUT_DOWN_IN_RECOVERY = 2
    SHUTTING_DOWN = 3
    IN_CRASH_RECOVERY = 4
    IN_ARCHIVE_RECOVERY = 5
    IN_PRODUCTION = 6

    @property
    def text(self) -> str:
        """Return the words that ``pg_controldata`` prints for this state."""
        return self.name.lower().replace("_", " ")


class ControlFileError(ValueError):
    """These bytes are no intact control file."""


@dataclass(frozen=True, kw_only=True)
class ControlFile:
    """What a control file says. ``checkpoint`` is the position of the last checkpoint, as PostgreSQL prints it."""

    system_identifier: int
    control_version: int
    catalog_version: int
    state: ClusterState
    checkpoint: str


def crc32c(data: bytes, *, start: int = 0) -> int:
    """Return the CRC-32C (RFC 3720, appendix B.4) of ``data``; ``start`` is the sum of what came before it."""
    value = start ^ 0xFFFFFFFF
    for byte in data:
        value = _TABLE[(value ^ byte) & 0xFF] ^ (value >> 8)
    return value ^ 0xFFFFFFFF


def parse_control_file(content: bytes) -> ControlFile:
    """Return what the control file says.

    Raises ControlFileError where no CRC fits (torn, damaged, another format) or the state is unknown.
    """
    order = _byte_order(content)
    fields = _FIRST_FIELDS[order].unpack_from(content)
    system_identifier, control_version, catalog_version, state, _time, checkpoint = fields
    try:
        known = ClusterState(state)
    except ValueError:
        raise ControlFileError(f"the control file has an unknown state, {state}") from None
    return ControlFile(
        system_identifier=system_identifier,
        control_version=control_version,
        catalog_version=catalog_version,
        state=known,
        checkpoint=f"{checkpoint >> 32:X}/{checkpoint & 0xFFFFFFFF:X}",
    )


def _byte_order(content: bytes) -> str:
    shortest = _FIRST_FIELDS["little"].size
    if len(content) < shortest + _ALIGNMENT:
        raise ControlFileError(f"the control file has {len(content)} bytes only")
    crc = crc32c(content[:shortest])
    for place in range(shortest, min(len(content), _LONGEST) - _ALIGNMENT + 1, _ALIGNMENT):
        stored = content[place : place + _ALIGNMENT]
        if crc == int.from_bytes(stored, "little"):
            return "little"
        if crc == int.from_bytes(stored, "big"):
            return "big"
        crc = crc32c(stored, start=crc)
    raise ControlFileError("no checksum in the control file fits: it is damaged, or of an unknown format")


def _make_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = (value >> 1) ^ _CASTAGNOLI if value & 1 else value >> 1
        table.append(value)
    return tuple(table)


_TABLE = _make_table()
