"""The folder of one export, ``STORE/.exports/RUN``: what it serves, what it fetched, and how it is.

``plan.json`` is written before the process begins, ``disks.json`` by the process once it has seen the replica, ``status.json``
again and again. ``hurry`` is there where somebody waits for all of it, ``local`` once the environment is on the local images.
``lock`` is held by the process as long as it lives.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from vmsnap.errors import BugError, DriverError, NoSpaceError
from vmsnap.model.export import ExportPhase, ExportPlan
from vmsnap.model.ids import RunId, SnapshotId, folder_name, is_run_id

_FULL = (errno.ENOSPC, errno.EDQUOT)
RecordT = TypeVar("RecordT", bound=BaseModel)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PlanRecord(_Record):
    """What is to be served, where and to whom.

    ``reader``: the user and the group of the hypervisor's processes. ``place``: how to find the replica, as its opener wrote it.
    """

    version: int = 1
    guest: str
    snapshot: SnapshotId
    hydrate: bool
    cache_bytes: int | None
    reader: tuple[int, int] | None
    socket: str
    place: str


class DiskRecord(_Record):
    """One disk: ``identity`` is that of ``ports.exports.BlockSource``, in hexadecimal."""

    target: str
    size_bytes: int
    identity: str


class DisksRecord(_Record):
    """All disks of the snapshot, in its order."""

    version: int = 1
    disks: tuple[DiskRecord, ...]


class FailureRecord(_Record):
    """Why an export could not begin."""

    exit_code: int
    brief: str
    details: str | None
    remedy: str | None


class StatusRecord(_Record):
    """How an export is. See ``ports.exports.ExportStatus``. ``held``: the snapshot is held in the replica."""

    version: int = 1
    phase: ExportPhase
    size_bytes: int = 0
    data_bytes: int | None = None
    read_bytes: int = 0
    waiting: str | None = None
    waiting_since: AwareDatetime | None = None
    damage: tuple[str, ...] = ()
    held: bool = False
    failure: FailureRecord | None = None


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turn an OSError in the body into an error with a remedy."""
    try:
        yield
    except OSError as error:
        brief = f"cannot {doing}: {error.strerror or error}"
        if error.errno in _FULL:
            raise NoSpaceError(brief, remedy="free space on the file system of the store") from error
        raise DriverError(brief, remedy="look at the file system of the store") from error


class ExportFolder:
    """The folder of one run's export, which may not exist."""

    def __init__(self, exports: Path, *, run: RunId) -> None:
        if not is_run_id(run):
            raise BugError(f"{run!r} is no run id")
        self.run = run
        self.path = exports / run
        self.lock_path = self.path / "lock"
        self.log_path = self.path / "log"
        self._local = self.path / "local"
        self._hurry = self.path / "hurry"

    @property
    def exists(self) -> bool:
        """Tell whether the run has an export."""
        return (self.path / "plan.json").exists()

    def make(self, plan: ExportPlan, *, socket: str, place: str) -> None:
        """Make the folder, or leave it as it is. QEMU's user passes through it to the images."""
        with translated(f"make the folder {self.path}"):
            self.path.mkdir(mode=0o711, parents=True, exist_ok=True)
            record = PlanRecord(
                guest=plan.guest,
                snapshot=plan.snapshot,
                hydrate=plan.hydrate,
                cache_bytes=plan.cache_bytes,
                reader=plan.reader,
                socket=socket,
                place=place,
            )
            if not self.exists:
                self._write("plan.json", record, sync=True)

    def plan(self) -> PlanRecord:
        """Return what is to be served. Raises DriverError."""
        return self._require("plan.json", PlanRecord)

    def disks(self) -> DisksRecord | None:
        """Return the disks; None before the replica was seen for the first time."""
        return self._read("disks.json", DisksRecord)

    def write_disks(self, record: DisksRecord) -> None:
        """Record the disks."""
        with translated(f"write in {self.path}"):
            self._write("disks.json", record, sync=True)

    def status(self) -> StatusRecord | None:
        """Return what the process said last, alive or not."""
        return self._read("status.json", StatusRecord)

    def write_status(self, record: StatusRecord) -> None:
        """Say how it is. Raises OSError: a full disk is no reason to stop serving."""
        self._write("status.json", record, sync=False)

    def forget_status(self) -> None:
        """Forget what a process before said."""
        with translated(f"write in {self.path}"):
            (self.path / "status.json").unlink(missing_ok=True)

    def image(self, target: str) -> Path:
        """Return the path of a disk's local image."""
        return self.path / f"{folder_name(target)}.raw"

    @property
    def is_hurried(self) -> bool:
        """Tell whether somebody waits for all of it."""
        return self._hurry.exists()

    def mark_hurried(self) -> None:
        """Record that. May be repeated."""
        with translated(f"write in {self.path}"):
            self._hurry.touch()

    @property
    def is_local(self) -> bool:
        """Tell whether the environment does not need the process any more."""
        return self._local.exists()

    def mark_local(self) -> None:
        """Record that. May be repeated."""
        with translated(f"write in {self.path}"):
            self._local.touch()
            self._sync_folder()

    @property
    def is_alive(self) -> bool:
        """Tell whether a process serves it."""
        try:
            with self.lock_path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def pid(self) -> int | None:
        """Return the process that serves it."""
        try:
            return int(self.lock_path.read_bytes()) if self.is_alive else None
        except (OSError, ValueError):
            return None

    def _require(self, name: str, kind: type[RecordT]) -> RecordT:
        found = self._read(name, kind)
        if found is None:
            raise DriverError(f"{self.path / name} is missing or damaged", remedy="destroy the environment of this run")
        return found

    def _read(self, name: str, kind: type[RecordT]) -> RecordT | None:
        try:
            return kind.model_validate_json((self.path / name).read_bytes())
        except (FileNotFoundError, ValidationError):
            return None
        except OSError as error:
            raise DriverError(f"cannot read {self.path / name}: {error.strerror}") from error

    def _write(self, name: str, record: BaseModel, *, sync: bool) -> None:
        draft = self.path / f".{name}.{secrets.token_hex(4)}"
        try:
            with draft.open("wb") as file:
                file.write(record.model_dump_json(indent=2).encode() + b"\n")
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
            draft.replace(self.path / name)
        finally:
            draft.unlink(missing_ok=True)
        if sync:
            self._sync_folder()

    def _sync_folder(self) -> None:
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
