"""How a run marks what it makes on a Hyper-V host: notes of VMs and switches, and names of folders.

Notes begin with ``vmsnap KIND RUN``; a line break and whatever else there is to say may follow. Folders of a run are
``vmsnap-RUN`` below the folder of exports.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePosixPath, PureWindowsPath

from vmsnap.errors import BugError
from vmsnap.model.ids import RunId, is_run_id

_NOTES = re.compile(r"vmsnap (clone|environment|fence) ([0-9a-f]{10}) ")
_FOLDER = re.compile(r"vmsnap-([0-9a-f]{10})\Z")


class TagKind(StrEnum):
    """What a tagged thing is."""

    CLONE = "clone"
    ENVIRONMENT = "environment"
    FENCE = "fence"


class Part(StrEnum):
    """The folders within a run's folder: the export with memory, the export without, and what VMs are made in."""

    MEMORY = "memory"
    DISKS = "disks"
    CLONE = "clone"
    ENVIRONMENT = "environment"


@dataclass(frozen=True, kw_only=True)
class Tag:
    """Whose a thing is. ``guest`` is for people, and for reports: it may be any text."""

    kind: TagKind
    run: RunId
    guest: str = ""

    @property
    def beginning(self) -> str:
        """Return how the notes of such a thing begin: enough to know it by."""
        return f"vmsnap {self.kind} {self.run} "

    @property
    def notes(self) -> str:
        """Return the notes of the thing."""
        return (
            f"{self.beginning}\nMade by vmsnap from {self.guest}. Removed by 'vmsnap reconcile' where its run is over."
        )


@dataclass(frozen=True, kw_only=True)
class Mark:
    """What an operator writes at the beginning of a VM's notes, where vmsnap may move its cable."""

    beginning: str


RESPONDER = Mark(beginning="vmsnap responder")
"""The mark of the VM that gives clones addresses (``vmsnap.hypervisors.hyperv.responder``)."""


def read_tag(notes: str) -> Tag | None:
    """Return the tag in notes, or None where they are not vmsnap's."""
    found = _NOTES.match(notes)
    if found is None:
        return None
    after = notes[found.end() :].removeprefix("\nMade by vmsnap from ")
    guest = after.rpartition(". Removed by 'vmsnap reconcile'")[0]
    return Tag(kind=TagKind(found[1]), run=RunId(found[2]), guest=guest)


@dataclass(frozen=True, kw_only=True)
class RunFolders:
    """Where runs put files: ``root`` is the folder as the Hyper-V host names it, ``mounted`` the same one as seen here."""

    root: str
    mounted: str

    def name(self, run: RunId) -> str:
        """Return the name of a run's folder. Raises BugError for what is no run."""
        if not is_run_id(run):
            raise BugError(f"{run!r} is not a run's id; no folder is called after it")
        return f"vmsnap-{run}"

    def of(self, run: RunId, part: Part | None = None) -> str:
        """Return the path of a run's folder, or of a part of it, on the host."""
        folder = PureWindowsPath(self.root, self.name(run))
        return str(folder if part is None else folder / part)

    def holds(self, path: str, *, run: RunId) -> bool:
        """Tell whether a path of the host is inside the folder of a run."""
        windows = PureWindowsPath(path)
        return PureWindowsPath(self.of(run)) in windows.parents and ".." not in windows.parts

    def here(self, path: str) -> PurePosixPath:
        """Return where a file of the host is found here. Raises BugError for one outside the folder."""
        windows = PureWindowsPath(path)
        if not windows.is_relative_to(self.root) or ".." in windows.parts:
            raise BugError(f"{path!r} is not in {self.root!r}, the only folder of the Hyper-V host that is seen here")
        return PurePosixPath(self.mounted, *windows.relative_to(self.root).parts)

    def run_of(self, path: str) -> RunId | None:
        """Return the run in whose folder a path of the host is, or None."""
        try:
            parts = PureWindowsPath(path).relative_to(self.root).parts
        except ValueError:
            return None
        return run_of_folder(parts[0]) if parts else None


def run_of_folder(name: str) -> RunId | None:
    """Return the run that a folder of this name is of, or None."""
    found = _FOLDER.match(name)
    return None if found is None else RunId(found[1])
