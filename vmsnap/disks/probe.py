"""What lies where on a disk: partition tables by ``sfdisk``, signatures by ``blkid``. No kernel mounts anything."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from vmsnap.disks.tools import Deadline, run_tool
from vmsnap.errors import ToolError

# util-linux's blkid(8): 2 says that nothing was found, 8 that several signatures contradict each other.
_NOTHING_FOUND = 2
_AMBIVALENT = 8
AMBIVALENT = "ambivalent"

# Partition types without a file system: extended partitions of a DOS table, GRUB's BIOS boot partition, PReP boot,
# Microsoft's reserved partition.
_CONTAINERS = frozenset({"5", "f", "85"})
_TRAILING_NUMBER = re.compile(r"\d+\Z")
_BOOT_CODE = frozenset(
    {
        "21686148-6449-6E6F-744E-656564454649",
        "9E1A2D38-C612-4316-AA26-8B49521E5A8B",
        "E3C9E316-0B5C-4DB8-817D-F92DF00215AE",
        "41",
    }
)


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A stretch of a disk that may hold a file system. ``name`` is for people."""

    name: str
    offset: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Signature:
    """What blkid recognised: a file system (``kind``), a partition table (``table``), or nothing."""

    kind: str = ""
    uuid: str = ""
    table: str = ""


def of_whole_disk(found: Signature) -> Signature:
    """Return what a whole disk is: ambivalent where it has a file system and a partition table.

    An isohybrid image is so, or what an earlier use of the disk left: which of them the guest writes to cannot be told. Inside
    a partition a table means nothing: boot code looks like one.
    """
    return Signature(kind=AMBIVALENT) if found.kind and found.table else found


def parse_blkid(text: str) -> Signature:
    """Return the signature from the output of ``blkid -p -o export``."""
    fields = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    return Signature(kind=fields.get("TYPE", ""), uuid=fields.get("UUID", ""), table=fields.get("PTTYPE", ""))


def parse_sfdisk(text: str) -> tuple[Partition, ...]:
    """Return the partitions from the output of ``sfdisk -J`` that may hold a file system.

    Raises ToolError where the output is not what sfdisk(8) describes.
    """
    try:
        table = json.loads(text)["partitiontable"]
        sector_bytes = int(table.get("sectorsize", 512))
        return tuple(
            Partition(
                name=f"partition {_number_of(entry['node'])}",
                offset=int(entry["start"]) * sector_bytes,
                length=int(entry["size"]) * sector_bytes,
            )
            for entry in table.get("partitions", [])
            if entry["type"] not in _CONTAINERS | _BOOT_CODE
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ToolError(
            "sfdisk printed a partition table that makes no sense",
            details=text[:500],
            remedy="run 'sfdisk -J' on the disk by hand",
        ) from error


def _number_of(node: str) -> str:
    # sfdisk names a partition by the disk's path and its number, with a 'p' between where the path ends in a digit.
    found = _TRAILING_NUMBER.search(node)
    if found is None:
        raise ValueError(node)
    return found[0]


def signature(disk: Path, *, offset: int, length: int, deadline: Deadline) -> Signature:
    """Return what blkid finds in a stretch of a disk. Raises ToolError."""
    argv = ["blkid", "-p", "-O", str(offset), "-S", str(length), "-o", "export"]
    argv += ["-s", "TYPE", "-s", "UUID", "-s", "PTTYPE", str(disk)]
    output = run_tool(argv, timeout=deadline.left(), accepted=frozenset({0, _NOTHING_FOUND, _AMBIVALENT}))
    if output.status == _AMBIVALENT:
        return Signature(kind=AMBIVALENT)
    return parse_blkid(output.text) if output.status == 0 else Signature()


def partitions(disk: Path, *, deadline: Deadline) -> tuple[Partition, ...]:
    """Return the partitions of a disk that has a partition table. Raises ToolError."""
    return parse_sfdisk(run_tool(["sfdisk", "-J", str(disk)], timeout=deadline.left()).text)
