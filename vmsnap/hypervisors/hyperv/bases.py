"""Stored images as VHDX where Hyper-V reads them: one copy of each, under all test VMs that stand on it.

A test VM's folder says which copies it uses before they are looked for. A copy that no folder names is removed: it is
renamed first, and looked for once more, so that a test VM that comes meanwhile either finds it back or makes it anew.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import subprocess
from contextlib import suppress
from datetime import timedelta
from pathlib import Path, PureWindowsPath

from vmsnap.errors import DeadlineError, DriverError, PreconditionError, ToolError
from vmsnap.hypervisors.hyperv.tags import Part, RunFolders
from vmsnap.model.capture import DiskImage
from vmsnap.model.ids import RunId
from vmsnap.ports.clock import Clock

_LOG = logging.getLogger(__name__)
_FOLDER = "vmsnap-bases"
_USES = "bases"
_NAME = re.compile(r"(?P<key>[0-9a-f]{32})(\.(?P<run>[0-9a-f]{10}))?\.(?P<kind>vhdx|draft|claim|gone)\Z")
_CONVERT = timedelta(hours=6)
_BETWEEN = timedelta(seconds=1)


class Bases:
    """The copies on one Hyper-V host, through its folder of exports as it is mounted here."""

    def __init__(self, folders: RunFolders, *, clock: Clock) -> None:
        self._folders = folders
        self._clock = clock
        self._here = Path(folders.mounted, _FOLDER)

    def use(self, image: DiskImage, *, run: RunId) -> str:
        """Return the path on the host of an image's copy, made where there is none. The run's folder is there already.

        Raises ToolError, DeadlineError, PreconditionError, DriverError.
        """
        key = _key_of(image)
        try:
            self._note_use(run, key=key)
            self._make(image, key=key, run=run)
        except OSError as error:
            raise DriverError(
                f"disk {image.target} cannot be put into {self._here}: {error.strerror}",
                remedy="mount the share of hyperv.export_folder writable; is there room on the Hyper-V host's volume?",
            ) from error
        return str(PureWindowsPath(self._folders.root, _FOLDER, f"{key}.vhdx"))

    def _note_use(self, run: RunId, *, key: str) -> None:
        with self._uses_of(run).open("a", encoding="ascii") as file:
            file.write(f"{key}\n")
            file.flush()
            os.fsync(file.fileno())

    def _uses_of(self, run: RunId) -> Path:
        return Path(self._folders.here(self._folders.of(run, Part.ENVIRONMENT)), _USES)

    def _make(self, image: DiskImage, *, key: str, run: RunId) -> None:
        base, claim = self._here / f"{key}.vhdx", self._here / f"{key}.claim"
        until = self._clock.monotonic() + _CONVERT.total_seconds()
        while not base.exists():
            if not self._claimed(claim, run=run):
                if self._clock.monotonic() > until:
                    raise DeadlineError(
                        f"disk {image.target} is still being copied to the Hyper-V host by another process",
                        remedy=f"where no process does so, remove {claim}",
                    )
                self._clock.sleep(_BETWEEN)
                continue
            try:
                if not base.exists():
                    draft = self._here / f"{key}.{run}.draft"
                    _convert(image, to=draft)
                    draft.rename(base)
            finally:
                claim.unlink(missing_ok=True)

    def _claimed(self, claim: Path, *, run: RunId) -> bool:
        """Take the right to make a copy, unless somebody has it whose folder is there."""
        # Whoever collects removes the folder with the last copy.
        self._here.mkdir(exist_ok=True)
        try:
            with claim.open("x", encoding="ascii") as file:
                file.write(run)
        except FileExistsError:
            owner = claim.read_text(encoding="ascii").strip() if claim.exists() else ""
            if owner and not self._is_there(RunId(owner)):
                claim.unlink(missing_ok=True)
            return False
        except FileNotFoundError:
            return False
        return True

    def _is_there(self, run: RunId) -> bool:
        return self._uses_of(run).exists()

    def collect(self) -> None:
        """Remove what no test VM uses. May be repeated; what somebody has open stays until the next time."""
        if not self._here.is_dir():
            return
        for path in sorted(self._here.iterdir()):
            found = _NAME.match(path.name)
            if found is None:
                continue
            try:
                self._look_at(path, key=found["key"], kind=found["kind"], run=found["run"])
            except OSError as error:
                _LOG.info("%s stays for now: %s", path, error)
        with suppress(OSError):  # it is not empty, which is not looked for: somebody may just have come
            self._here.rmdir()

    def _look_at(self, path: Path, *, key: str, kind: str, run: str | None) -> None:
        base = path.with_name(f"{key}.vhdx")
        gone = path.with_name(f"{key}.gone")
        if kind == "draft":
            if run is None or not self._is_there(RunId(run)):
                path.unlink()
        elif kind == "claim":
            if not self._is_there(RunId(path.read_text(encoding="ascii").strip() or "0" * 10)):
                path.unlink()
        elif key not in self._used():
            if path != gone:
                path.rename(gone)
            if key not in self._used():
                gone.unlink()
            elif not base.exists():
                gone.rename(base)
        elif path == gone:
            # Whoever collected died in the middle, and somebody has come since.
            if base.exists():
                gone.unlink()
            else:
                gone.rename(base)

    def _used(self) -> frozenset[str]:
        keys: set[str] = set()
        for uses in Path(self._folders.mounted).glob(f"vmsnap-*/{Part.ENVIRONMENT}/{_USES}"):
            try:
                keys.update(uses.read_text(encoding="ascii").split())
            except FileNotFoundError:
                continue  # its test VM was removed meanwhile
        return frozenset(keys)


def _key_of(image: DiskImage) -> str:
    found = Path(image.path).stat()
    told = f"{image.path}\0{image.image_format}\0{found.st_size}\0{found.st_mtime_ns}"
    return hashlib.sha256(told.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _convert(image: DiskImage, *, to: Path) -> None:
    """Write a stored image as a dynamic VHDX. Raises ToolError, PreconditionError."""
    source = ["qemu-img", "convert", "-f", image.image_format, "-O", "vhdx", "-o", "subformat=dynamic"]
    try:
        done = subprocess.run(
            [*source, image.path, str(to)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_CONVERT.total_seconds(),
            check=False,
            text=True,
        )
    except FileNotFoundError as error:
        raise PreconditionError("qemu-img is not installed", remedy="apt install qemu-utils") from error
    except subprocess.TimeoutExpired as error:
        raise ToolError(f"qemu-img did not write {to} within {_CONVERT}", remedy="is the share slow?") from error
    if done.returncode != 0:
        raise ToolError(
            f"qemu-img could not write {to}: {done.stderr.strip()[:500]}",
            remedy="is there room on the Hyper-V host's volume, and may this host write there?",
        )
