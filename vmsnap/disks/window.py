"""A stretch of a disk as a file of its own, for tools that cannot be told where to begin."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from vmsnap.disks.daemon import ServedImage, StorageDaemon, protocol_node, sweep
from vmsnap.disks.tools import Deadline
from vmsnap.ports.disks import DiskView

_CLEANUP = timedelta(seconds=10)


@contextmanager
def window(view: DiskView, *, offset: int, length: int, deadline: Deadline) -> Iterator[Path]:
    """Yield a read-only file with the bytes of a stretch of the disk; the view's own file where that is all of it.

    It is made beside the view's file, so that releasing the export removes what a dead process left.
    Raises ToolError, DeadlineError.
    """
    if offset == 0 and length == view.size_bytes:
        yield view.path
        return
    folder = view.path.with_name(f"{view.path.name}.at-{offset}")
    folder.mkdir(mode=0o700)
    image = ServedImage(
        node={"driver": "raw", "offset": offset, "size": length, "file": protocol_node(str(view.path))},
        path=folder / "stretch.raw",
    )
    try:
        daemon = StorageDaemon.start(folder, images=[image], timeout=deadline.left())
        try:
            yield image.path
        finally:
            daemon.stop()
    finally:
        sweep(folder, deadline=_CLEANUP)
        shutil.rmtree(folder)
