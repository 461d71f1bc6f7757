"""XFS, by ``xfs_logprint`` and ``xfs_db`` of xfsprogs, read-only.

``xfs_db`` is only ever given inode numbers, never names. It tells where a file's blocks lie; the blocks are read from the
disk directly. Layout: XFS Algorithms and Data Structures (kernel.org), chapters on allocation groups and on-disk inodes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from vmsnap.disks.tools import Deadline, run_tool
from vmsnap.disks.verdict import LARGEST_FILE_BYTES, Entry, Verdict, find_inode, not_a_file, too_large
from vmsnap.errors import ToolError

KIND = "xfs"

_STATE = re.compile(r"state: <(\w+)>")
_FIELD = re.compile(r"^([\w.]+) = (\S+)", re.MULTILINE)
# ls of xfs_db(8): cookie, inode, type, hash, length of the name, name, (good) or (corrupt).
_ENTRY = re.compile(rb"^\d+\s+(\d+)\s+(\w+)\s+0x[0-9a-f]+\s+(\d+) (.*) \(\w+\)$")
_EXTENT = re.compile(r"^data offset (\d+) startblock \d+ \((\d+)/(\d+)\) count (\d+) flag (\d)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class FileExtent:
    """A stretch of a file in blocks: where in the file, in which allocation group, whether ever written."""

    offset: int
    group: int
    block: int
    count: int
    written: bool


def parse_logprint(text: str) -> Verdict:
    """Judge the output of ``xfs_logprint -t``: ``state: <CLEAN>`` says that no replay is due."""
    found = _STATE.search(text)
    if found is None:
        return Verdict(clean=False, observed="log state not found")
    return Verdict(clean=found[1] == "CLEAN", observed=f"log {found[1]}")


def parse_fields(text: str) -> dict[str, str]:
    """Return the fields that ``print`` of xfs_db shows."""
    return dict(_FIELD.findall(text))


def parse_listing(data: bytes) -> tuple[Entry, ...]:
    """Return the names in the output of ``ls`` of xfs_db. Raises ToolError where a line is different."""
    entries = []
    for line in data.splitlines():
        if not line.strip():
            continue
        found = _ENTRY.match(line)
        if found is None or len(found[4]) != int(found[3]):
            raise ToolError(
                "xfs_db printed a folder that makes no sense",
                details=repr(line),
                remedy="check the file system in the guest",
            )
        kind = {b"directory": "folder", b"regular": "file"}.get(found[2], "other")
        entries.append(Entry(name=found[4], inode=int(found[1]), kind=kind))
    return tuple(entries)


def parse_extents(text: str) -> tuple[FileExtent, ...]:
    """Return a file's extents from the output of ``bmap`` of xfs_db."""
    return tuple(
        FileExtent(offset=int(offset), group=int(group), block=int(block), count=int(count), written=flag == "0")
        for offset, group, block, count, flag in _EXTENT.findall(text)
    )


def state(image: Path, *, deadline: Deadline) -> Verdict:
    """Return the state of the file system that fills ``image``. Raises ToolError.

    A log on another device, and one that xfs_logprint cannot make sense of, count as not clean.
    """
    geometry = _fields(image, "sb 0", fields=("logstart",), deadline=deadline)
    if geometry.get("logstart") == "0":
        return Verdict(clean=False, observed="log on another device: cannot be read from the host")
    output = run_tool(["xfs_logprint", "-t", str(image)], timeout=deadline.left(), accepted=frozenset({0, 1}))
    if output.status != 0:
        return Verdict(clean=False, observed=f"log cannot be read: {output.stderr[:200]}")
    return parse_logprint(output.text)


def read_file(image: Path, *, path: str, deadline: Deadline) -> bytes | None:
    """Return a file's bytes, or None where there is no such file.

    Raises PreconditionError for paths that cannot be read, links and large files; ToolError.
    """
    geometry = _fields(image, "sb 0", fields=("rootino", "blocksize", "agblocks"), deadline=deadline)
    inode = find_inode(
        path,
        root=_number(geometry, "rootino"),
        folder=lambda number: parse_listing(_xfs_db(image, f"inode {number}", "ls", deadline=deadline)),
    )
    if inode is None:
        return None
    described = _fields(image, f"inode {inode}", fields=("core.size", "core.realtime"), deadline=deadline)
    size_bytes = _number(described, "core.size")
    if size_bytes > LARGEST_FILE_BYTES:
        raise too_large(path, size_bytes=size_bytes)
    if described.get("core.realtime") != "0":
        raise not_a_file(path)
    block_bytes, group_blocks = _number(geometry, "blocksize"), _number(geometry, "agblocks")
    content = bytearray(size_bytes)
    mapping = _xfs_db(image, f"inode {inode}", "bmap", deadline=deadline).decode("ascii", "replace")
    with image.open("rb") as disk:
        for extent in parse_extents(mapping):
            start = extent.offset * block_bytes
            length = min(extent.count * block_bytes, size_bytes - start)
            if extent.written and length > 0:
                disk.seek((extent.group * group_blocks + extent.block) * block_bytes)
                content[start : start + length] = disk.read(length)
    return bytes(content)


def _fields(image: Path, where: str, *, fields: tuple[str, ...], deadline: Deadline) -> dict[str, str]:
    data = _xfs_db(image, where, f"print {' '.join(fields)}", deadline=deadline)
    return parse_fields(data.decode("ascii", "replace"))


def _number(fields: dict[str, str], name: str) -> int:
    try:
        return int(fields[name])
    except (KeyError, ValueError) as error:
        raise ToolError(
            f"xfs_db does not tell {name}", details=repr(fields), remedy="check the file system in the guest"
        ) from error


def _xfs_db(image: Path, *commands: str, deadline: Deadline) -> bytes:
    argv = ["xfs_db", "-r", "-f"]
    for command in commands:
        argv += ["-c", command]
    output = run_tool([*argv, str(image)], timeout=deadline.left())
    # xfs_db ends with 0 after most failures; what it could not read it says on stderr.
    if not output.stdout.strip() and output.stderr:
        raise ToolError(
            f"xfs_db could not do {commands[-1]!r}: {output.stderr[:500]}", remedy="check the file system in the guest"
        )
    return output.stdout
