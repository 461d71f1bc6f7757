"""The host's volumes: paths of Windows on a folder of this machine, locks, and room that runs out."""

from __future__ import annotations

import fnmatch
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from vmsnap.testing.hyperv.values import Item, SmbShare

FORBIDDEN = frozenset('<>:"/\\|?*')
_WILD = frozenset("*?[")


class BadPathError(ValueError):
    """A path that Windows does not take, or that is not on a volume of the host."""


class InUseError(OSError):
    """Somebody has the file open."""


class NoRoomError(OSError):
    """The volume is full."""


@dataclass
class Volume:
    """One volume. ``free_bytes`` is what is left, whatever this machine has."""

    letter: str
    size_bytes: int
    free_bytes: int


class HostFiles:
    r"""Files of the host below ``root``: ``D:\Folder`` is ``root/D/Folder``. Names are found whatever their case.

    ``in_use`` tells whether a file of the host is open: vmms and workers hold files that are no Linux process's.
    """

    def __init__(self, root: Path, *, volumes: dict[str, int]) -> None:
        self.root = root
        self.volumes = {letter: Volume(letter, 4 * free, free) for letter, free in volumes.items()}
        self.shares: dict[str, SmbShare] = {}
        self.in_use: Callable[[str], bool] = lambda _path: False
        for letter in volumes:
            (root / letter).mkdir(parents=True, exist_ok=True)

    def share(self, name: str, *, path: str) -> SmbShare:
        """Share a folder."""
        self.shares[name] = SmbShare(name=name, path=path)
        return self.shares[name]

    def local(self, path: str) -> Path:
        """Return where a file of the host is on this machine, whether it is there or not. Raises BadPathError."""
        windows = PureWindowsPath(path)
        parts = windows.parts
        if not windows.is_absolute() or windows.drive.startswith("\\\\") or len(windows.drive) != 2:
            raise BadPathError(path)
        if windows.drive[0].upper() not in self.volumes or ".." in parts:
            raise BadPathError(path)
        place = self.root / windows.drive[0].upper()
        for part in parts[1:]:
            if FORBIDDEN & set(part) or part != part.rstrip(" .") or any(ord(letter) < 32 for letter in part):
                raise BadPathError(path)
            place = self._find(place, part)
        return place

    def _find(self, folder: Path, name: str) -> Path:
        exact = folder / name
        if not exact.exists() and folder.is_dir():
            for entry in folder.iterdir():
                if entry.name.casefold() == name.casefold():
                    return entry
        return exact

    def windows(self, local: Path) -> str:
        """Return the host's path of a file."""
        letter, *rest = local.relative_to(self.root).parts
        return str(PureWindowsPath(f"{letter}:\\", *rest))

    def exists(self, path: str) -> bool:
        """Tell whether there is such a file or folder; no for a path that cannot be."""
        try:
            return self.local(path).exists()
        except BadPathError:
            return False

    def item(self, path: str) -> Item:
        """Describe a file or folder. Raises FileNotFoundError, BadPathError."""
        place = self.local(path)
        if not place.exists():
            raise FileNotFoundError(path)
        return self._item(place)

    def _item(self, place: Path) -> Item:
        return Item(
            full_name=self.windows(place),
            name=place.name,
            length=0 if place.is_dir() else place.stat().st_size,
            is_container=place.is_dir(),
        )

    def children(self, path: str, *, recurse: bool = False) -> Iterator[Item]:
        """Yield what is in a folder, in the order of names. Raises FileNotFoundError, BadPathError."""
        place = self.local(path)
        if not place.is_dir():
            raise FileNotFoundError(path)
        for entry in sorted(place.rglob("*") if recurse else place.iterdir()):
            yield self._item(entry)

    def matches(self, pattern: str) -> list[str]:
        """Return the paths that a ``-Path`` with wildcards means; the path itself where it has none."""
        if not _WILD & set(pattern):
            return [pattern]
        windows = PureWindowsPath(pattern)
        found = [windows.drive + "\\"]
        for part in windows.parts[1:]:
            found = [
                item.full_name
                for folder in found
                if self.exists(folder) and self.local(folder).is_dir()
                for item in self.children(folder)
                if fnmatch.fnmatchcase(item.name.casefold(), part.casefold())
            ]
        return found

    def make_folder(self, path: str) -> Item:
        """Make a folder, and those above it. Raises BadPathError."""
        place = self.local(path)
        place.mkdir(parents=True, exist_ok=True)
        return self._item(place)

    def charge(self, path: str, *, size_bytes: int) -> None:
        """Take room of a volume. Raises NoRoomError."""
        volume = self.volumes[path[0].upper()]
        if size_bytes > volume.free_bytes:
            raise NoRoomError(path)
        volume.free_bytes -= size_bytes

    def write(self, path: str, *, content: bytes) -> None:
        """Write a small file. Raises NoRoomError, FileExistsError, BadPathError."""
        place = self.local(path)
        if place.exists():
            raise FileExistsError(path)
        self.charge(path, size_bytes=len(content))
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)

    def copy(self, source: str, *, target: str) -> None:
        """Copy a file. Raises NoRoomError, FileExistsError, FileNotFoundError, BadPathError."""
        origin, place = self.local(source), self.local(target)
        if not origin.is_file():
            raise FileNotFoundError(source)
        if place.exists():
            raise FileExistsError(target)
        self.charge(target, size_bytes=_occupied(origin))
        place.parent.mkdir(parents=True, exist_ok=True)
        copy_sparse(origin, target=place)

    def remove(self, path: str, *, recurse: bool = False) -> None:
        """Remove a file or folder. Raises FileNotFoundError, InUseError, BadPathError; OSError for a folder with content."""
        place = self.local(path)
        if not place.exists():
            raise FileNotFoundError(path)
        inside = [place, *place.rglob("*")] if place.is_dir() else [place]
        for entry in inside:
            if self.in_use(self.windows(entry)):
                raise InUseError(self.windows(entry))
        freed = sum(_occupied(entry) for entry in inside if entry.is_file())
        if place.is_dir() and not recurse:
            place.rmdir()
        elif place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink()
        self.volumes[path[0].upper()].free_bytes += freed


def _occupied(path: Path) -> int:
    """Return what a file takes of its volume, so that sparse files of tests count for what they hold."""
    return min(path.stat().st_size, path.stat().st_blocks * 512)


def copy_sparse(source: Path, *, target: Path) -> None:
    """Copy a file without its holes, and replace what is at the target."""
    size = source.stat().st_size
    with source.open("rb") as reading, target.open("wb") as writing:
        position = 0
        while position < size:
            try:
                start = os.lseek(reading.fileno(), position, os.SEEK_DATA)
            except OSError:
                break  # ENXIO: a hole up to the end
            position = os.lseek(reading.fileno(), start, os.SEEK_HOLE)
            os.lseek(writing.fileno(), start, os.SEEK_SET)
            while start < position:
                start += os.sendfile(writing.fileno(), reading.fileno(), start, position - start)
        writing.truncate(size)
