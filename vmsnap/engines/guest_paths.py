"""Where a guest's paths lie on its disks."""

from __future__ import annotations

import json
import posixpath
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vmsnap.engines.asking import ask, last_words
from vmsnap.errors import GuestCommandError, PreconditionError
from vmsnap.model.command import Command, Procedure
from vmsnap.ports.engine import GuestPath


class _Mount(BaseModel):
    model_config = ConfigDict(frozen=True)

    source: str
    target: str
    fstype: str
    uuid: str | None
    fsroot: str


class _Mounts(BaseModel):
    model_config = ConfigDict(frozen=True)

    filesystems: tuple[_Mount, ...] = Field(min_length=1)


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A folder of the guest, links resolved, and the file system it lies on."""

    path: str
    mount: _Mount
    uuid: str

    def file(self, name: str) -> GuestPath:
        """Return where a file of this folder lies, seen from the file system's root."""
        inside = posixpath.relpath(self.path, self.mount.target)
        path = posixpath.normpath(posixpath.join("/", self.mount.fsroot, inside, name))
        return GuestPath(file_system_uuid=self.uuid, path=path)


def locate_files(paths: tuple[str, ...]) -> Procedure[tuple[GuestPath, ...]]:
    """Find the file system of each path, and the path from its root. The files need not exist, their folders must.

    Links are followed; bind mounts and btrfs subvolumes are seen through (``findmnt``'s FSROOT). May be repeated.
    Raises PreconditionError for a file system that is on no disk of the guest, GuestCommandError for tools that fail.
    """
    folders: dict[str, Folder] = {}
    found = []
    for path in paths:
        folder, name = posixpath.split(path)
        if folder not in folders:
            folders[folder] = yield from locate_folder(folder)
        found.append(folders[folder].file(name))
    return tuple(found)


def locate_folder(folder: str) -> Procedure[Folder]:
    """Find the file system of a folder, links followed. Raises what ``locate_files`` raises."""
    resolved = yield from ask(
        Command(argv=("readlink", "-e", "-z", "--", folder), user="root"), what=f"cannot find {folder} in the guest"
    )
    path = resolved.stdout.decode("utf-8", "surrogateescape").rstrip("\0")
    result = yield from ask(
        Command(argv=("findmnt", "-J", "-o", "SOURCE,TARGET,FSTYPE,UUID,FSROOT", "-T", path), user="root"),
        what=f"cannot tell on which file system {path} lies",
    )
    try:
        mount = _Mounts.model_validate(json.loads(result.stdout)).filesystems[-1]
    except (ValueError, ValidationError) as error:
        raise GuestCommandError("the output of findmnt makes no sense", details=result.text[:500]) from error
    uuid = mount.uuid or (yield from _probe(mount))
    return Folder(path=path, mount=mount, uuid=uuid)


def _probe(mount: _Mount) -> Procedure[str]:
    # findmnt knows UUIDs from udev alone; the device itself always knows. btrfs appends the subvolume: /dev/vda2[/@].
    device = mount.source.partition("[")[0]
    result = yield Command(argv=("blkid", "-p", "-o", "value", "-s", "UUID", "--", device), user="root")
    uuid = result.text.strip()
    if result.exit_status != 0 or not uuid:
        raise PreconditionError(
            f"{mount.target} in the guest ({mount.fstype}, {mount.source}) has no UUID by which it could be found on a disk",
            details=last_words(result),
            remedy="databases on network or memory file systems cannot be captured: move the data to a disk",
        )
    return uuid
