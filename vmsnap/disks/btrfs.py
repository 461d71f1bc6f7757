"""btrfs, by ``btrfs inspect-internal dump-super`` of btrfs-progs. Its state can be told, its files are not read."""

from __future__ import annotations

import re
from pathlib import Path

from vmsnap.disks.tools import Deadline, run_tool
from vmsnap.disks.verdict import Verdict

KIND = "btrfs"

_LOG_ROOT = re.compile(r"^log_root\s+(\d+)$", re.MULTILINE)


def parse_super(text: str) -> Verdict:
    """Judge a superblock: without a log tree there is nothing to replay. btrfs is consistent at every commit."""
    found = _LOG_ROOT.search(text)
    if found is None:
        return Verdict(clean=False, observed="log_root not found")
    return Verdict(clean=found[1] == "0", observed=f"log_root {found[1]}")


def state(image: Path, *, deadline: Deadline) -> Verdict:
    """Return the state of the file system that fills ``image``. Raises ToolError."""
    argv = ["btrfs", "inspect-internal", "dump-super", str(image)]
    return parse_super(run_tool(argv, timeout=deadline.left()).text)
