"""Writing a snapshot's disks into a folder that an operator names."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from vmsnap.model.ids import RunId
from vmsnap.model.journal import Resource
from vmsnap.ports.clock import Cancel
from vmsnap.ports.owner import Owner


class ExportFolders(Owner, Protocol):
    """Makes files that have their names only once they are whole. Owns EXPORTED_FILES: those that are not."""

    def resource(self, run: RunId, *, guest: str, folder: Path) -> Resource:
        """Name what a run has in the folder that is not whole yet."""

    def begin(self, resource: Resource, *, names: tuple[str, ...]) -> None:
        """Make the folder where it is not there. Raises PreconditionError where it has a file of one of the names."""

    def draft(self, resource: Resource, *, name: str) -> Path:
        """Return the path where a file is to be made that will have that name."""

    def create(self, draft: Path, *, size_bytes: int) -> None:
        """Make a file that is all holes, and that nobody but its owner may read: it holds a guest's data."""

    def copy(self, source: Path, *, draft: Path, cancel: Cancel) -> None:
        """Copy a raw image, sharing its blocks where the file system can, holes as holes."""

    def convert(self, source: Path, *, draft: Path, cancel: Cancel) -> None:
        """Make a qcow2 image of a raw one. Raises ToolError."""

    def finish(self, resource: Resource, *, name: str) -> Path:
        """Put a file on the disk and give it its name. Raises PreconditionError where there is one of that name."""
