"""Where files of a Windows guest lie on its disks: the volume's own serial number, and the path from the volume's root."""

from __future__ import annotations

import ntpath
import re

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from vmsnap.engines.windows import ask_json, powershell
from vmsnap.errors import GuestCommandError, PreconditionError
from vmsnap.model.command import Procedure
from vmsnap.ports.engine import GuestPath

# GetFinalPathNameByHandle sees through links, junctions and folders that volumes are mounted on (fileapi.h: flag 1 is
# VOLUME_NAME_GUID). fsutil is the one tool that prints the 64-bit serial number, which blkid calls the UUID.
_SERIAL = re.compile(r"0x([0-9A-Fa-f]{16})")


class _Folder(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    Folder: str
    Volume: str
    Inside: str
    Facts: str


_FOLDERS = TypeAdapter(tuple[_Folder, ...])


def locate_files(paths: tuple[str, ...]) -> Procedure[tuple[GuestPath, ...]]:
    """Find the volume of each path, and the path from its root. The files need not exist, their folders must.

    May be repeated. Raises PreconditionError for a volume that is not NTFS, GuestCommandError for tools that fail.
    """
    folders = sorted({ntpath.dirname(path) for path in paths})
    answer = yield from ask_json(
        powershell("windows_locate", parameters={"Folders": folders}),
        what="cannot find the database's volumes in the guest",
    )
    try:
        found = {item.Folder: item for item in _FOLDERS.validate_python(answer)}
        return tuple(_path(found[ntpath.dirname(path)], name=ntpath.basename(path)) for path in paths)
    except (ValidationError, KeyError) as error:
        raise GuestCommandError("the guest's answer about its volumes makes no sense", details=str(error)) from error


def _path(folder: _Folder, *, name: str) -> GuestPath:
    serial = _SERIAL.search(folder.Facts)
    if serial is None:
        raise PreconditionError(
            f"{folder.Folder} in the guest is on no NTFS volume ({folder.Volume})",
            details=folder.Facts[:500],
            remedy="databases on ReFS, shares or memory disks cannot be proven from the disk: move the data to NTFS",
        )
    inside = folder.Inside.replace("\\", "/").strip("/")
    return GuestPath(file_system_uuid=serial[1].upper(), path=f"/{inside}/{name}" if inside else f"/{name}")
