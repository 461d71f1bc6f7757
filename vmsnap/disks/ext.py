"""ext2, ext3 and ext4, by ``dumpe2fs`` and ``debugfs`` of e2fsprogs.

Both take a stretch of a file as ``PATH?offset=BYTES`` (ext2fs_open2(3): I/O options). ``debugfs`` is only ever given
inode numbers, never names, so that nothing in a guest can end up as a part of a command.
"""

from __future__ import annotations

import re
from pathlib import Path

from vmsnap.disks.tools import Deadline, run_tool
from vmsnap.disks.verdict import LARGEST_FILE_BYTES, Entry, Verdict, find_inode, too_large
from vmsnap.errors import ToolError

KINDS = frozenset({"ext2", "ext3", "ext4", "ext4dev"})

_ROOT_INODE = 2
_SIZE = re.compile(r"\bSize: (\d+)")
_FOLDER_MODE = 0o04
_FILE_MODE = 0o10
_LISTING_FIELDS = 8


def parse_header(text: str) -> Verdict:
    """Judge the output of ``dumpe2fs -h``: clean is the state ``clean`` exactly, no replay due, no errors counted."""
    fields = {
        name.strip(): value.strip() for name, _, value in (line.partition(":") for line in text.splitlines()) if value
    }
    state = fields.get("Filesystem state", "not given")
    features = fields.get("Filesystem features", "").split()
    errors = fields.get("FS Error count", "0")
    # orphan_present: inodes wait for removal; set while mounted, as needs_recovery is.
    flags = [flag for flag in ("needs_recovery", "orphan_present") if flag in features]
    observed = ", ".join([f"state {state}", *flags, f"{errors} errors"])
    return Verdict(clean=state == "clean" and bool(features) and not flags and errors == "0", observed=observed)


def parse_listing(data: bytes) -> tuple[Entry, ...]:
    """Return the names in the output of ``debugfs``'s ``ls -p``: ``/INODE/MODE/UID/GID/NAME/SIZE/`` a line.

    Raises ToolError where a line is different.
    """
    entries = []
    for line in data.splitlines():
        if not line.strip():
            continue
        fields = line.split(b"/")
        try:
            inode, mode = int(fields[1]), int(fields[2], 8) >> 12
        except (IndexError, ValueError) as error:
            raise ToolError(
                "debugfs printed a folder that makes no sense",
                details=repr(line),
                remedy="check the file system in the guest",
            ) from error
        if len(fields) == _LISTING_FIELDS and inode != 0:
            kind = {_FOLDER_MODE: "folder", _FILE_MODE: "file"}.get(mode, "other")
            entries.append(Entry(name=fields[5], inode=inode, kind=kind))
    return tuple(entries)


def state(disk: Path, *, offset: int, deadline: Deadline) -> Verdict:
    """Return the state of the file system that begins at ``offset``. Raises ToolError."""
    return parse_header(run_tool(["dumpe2fs", "-h", _at(disk, offset)], timeout=deadline.left()).text)


def read_file(disk: Path, *, offset: int, path: str, deadline: Deadline) -> bytes | None:
    """Return a file's bytes, or None where there is no such file.

    Raises PreconditionError for paths that cannot be read, links and large files; ToolError.
    """
    inode = find_inode(
        path,
        root=_ROOT_INODE,
        folder=lambda number: parse_listing(_debugfs(disk, f"ls -p <{number}>", offset=offset, deadline=deadline)),
    )
    if inode is None:
        return None
    described = _debugfs(disk, f"stat <{inode}>", offset=offset, deadline=deadline).decode("utf-8", "replace")
    found = _SIZE.search(described)
    if found is None:
        raise ToolError(
            f"debugfs does not tell the size of {path}",
            details=described[:500],
            remedy="check the file system in the guest",
        )
    size_bytes = int(found[1])
    if size_bytes > LARGEST_FILE_BYTES:
        raise too_large(path, size_bytes=size_bytes)
    content = _debugfs(disk, f"cat <{inode}>", offset=offset, deadline=deadline)
    if len(content) != size_bytes:
        raise ToolError(
            f"debugfs read {len(content)} of the {size_bytes} bytes of {path}",
            remedy="check the file system in the guest",
        )
    return content


def _debugfs(disk: Path, request: str, *, offset: int, deadline: Deadline) -> bytes:
    # Its exit status is 0 even where it could not open the file system; the complaint is on stderr, after its version.
    output = run_tool(["debugfs", "-R", request, _at(disk, offset)], timeout=deadline.left())
    complaint = "\n".join(output.stderr.splitlines()[1:]).strip()
    if complaint:
        raise ToolError(
            f"debugfs could not do {request!r}: {complaint[:500]}", remedy="check the file system in the guest"
        )
    return output.stdout


def _at(disk: Path, offset: int) -> str:
    return f"{disk}?offset={offset}"
