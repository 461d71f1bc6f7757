"""``ReplicaExports``: one process and one folder for each environment whose data still lies in the replica."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from vmsnap.errors import (
    BusyError,
    ConfigError,
    DeadlineError,
    DriverError,
    ExitCode,
    PreconditionError,
    SafetyError,
    VmsnapError,
)
from vmsnap.exports.cache import is_whole
from vmsnap.exports.folder import ExportFolder, FailureRecord, translated
from vmsnap.exports.launching import Launcher
from vmsnap.exports.server import LONGEST_SOCKET_PATH
from vmsnap.model.capture import DiskImage
from vmsnap.model.export import ExportPhase, ExportPlan, ExportStatus
from vmsnap.model.ids import RunId, SnapshotId, is_run_id
from vmsnap.model.journal import Resource, ResourceKind

_LOG = logging.getLogger(__name__)
_POLL_SECONDS = 0.02
_STARTING_SECONDS = 2.0
_SOCKET_FOLDER = "replica"
_ERRORS: dict[int, type[VmsnapError]] = {
    ExitCode.CONFIGURATION: ConfigError,
    ExitCode.PRECONDITION: PreconditionError,
    ExitCode.BUSY: BusyError,
    ExitCode.SAFETY: SafetyError,
    ExitCode.DEADLINE: DeadlineError,
}
LetGo = Callable[[SnapshotId, RunId, str], None]
"""Releases a run's hold on a snapshot in the replica at a place."""


class ExportProcesses:
    """The exports of this host: their folders in ``folder``, their sockets in ``runtime``. ``place``: of new ones' replica."""

    def __init__(
        self, folder: Path, *, runtime: Path, launcher: Callable[[], Launcher], let_go: LetGo, place: str
    ) -> None:
        self._folder = folder
        self._place = place
        self._runtime = runtime
        self._find_launcher = launcher
        self._launcher: Launcher | None = None
        self._let_go = let_go

    @property
    def kinds(self) -> frozenset[ResourceKind]:
        """Return the kinds of resource that this owner releases."""
        return frozenset({ResourceKind.REPLICA_EXPORT})

    def resource(self, plan: ExportPlan) -> Resource:
        """Name an export."""
        return self._resource(plan.run, guest=plan.guest)

    def _resource(self, run: RunId, *, guest: str) -> Resource:
        return Resource(kind=ResourceKind.REPLICA_EXPORT, run=run, guest=guest, name=str(self._of(run).path))

    def _of(self, run: RunId) -> ExportFolder:
        return ExportFolder(self._folder, run=run)

    def socket(self, run: RunId) -> str:
        """Return the path of an export's socket."""
        path = str(self._socket_folder(run) / "nbd")
        if len(os.fsencode(path)) > LONGEST_SOCKET_PATH:
            raise PreconditionError(
                f"the path of the socket {path} is too long", remedy="choose a shorter [runtime] path"
            )
        return path

    def _socket_folder(self, run: RunId) -> Path:
        return self._runtime / run / _SOCKET_FOLDER

    def begin(self, plan: ExportPlan) -> None:
        """Begin an export, or start it again where it died."""
        folder = self._of(plan.run)
        folder.make(plan, socket=self.socket(plan.run), place=self._place)
        self._start(folder)

    def revive(self, run: RunId) -> None:
        """Start an export again that died. Does nothing where there is none, it lives, or nobody needs it any more."""
        folder = self._of(run)
        if folder.exists and not folder.is_local:
            self._start(folder)

    def hurry(self, run: RunId) -> None:
        """Let an export hydrate at once."""
        folder = self._of(run)
        if folder.exists and not folder.is_local:
            folder.mark_hurried()

    def _start(self, folder: ExportFolder) -> None:
        if folder.is_alive:
            return
        # QEMU's user passes through to the socket.
        socket = Path(self.socket(folder.run))
        with translated(f"make the folder {socket.parent}"):
            socket.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
            socket.unlink(missing_ok=True)
        if folder.disks() is None:
            folder.forget_status()
        self._launch().start(folder)

    def _launch(self) -> Launcher:
        if self._launcher is None:
            self._launcher = self._find_launcher()
        return self._launcher

    def wait(self, plan: ExportPlan, *, deadline: timedelta) -> tuple[DiskImage, ...]:
        """Return the disks once they are served."""
        folder, socket = self._of(plan.run), self.socket(plan.run)
        began = time.monotonic()
        while True:
            status = folder.status()
            alive = folder.is_alive
            if status is not None and status.failure is not None:
                raise _error_of(status.failure)
            disks = folder.disks()
            if alive and disks is not None and status is not None and Path(socket).exists():
                return tuple(
                    DiskImage(target=disk.target, path=socket, image_format="nbd", size_bytes=disk.size_bytes)
                    for disk in disks.disks
                )
            waited = time.monotonic() - began
            if waited > deadline.total_seconds():
                raise DeadlineError(
                    f"the replica's disks were not served within {deadline.total_seconds():.0f} s",
                    details=_tail(folder.log_path),
                    remedy="can the replica be reached from here? 'vmsnap doctor' looks",
                )
            if not alive and waited > _STARTING_SECONDS and not _may_be_starting(folder):
                raise DriverError("the export ended before it served", details=_tail(folder.log_path))
            time.sleep(_POLL_SECONDS)

    def images(self, run: RunId) -> tuple[DiskImage, ...]:
        """Return the local images, once they are whole on disk."""
        folder = self._of(run)
        disks = folder.disks()
        if disks is None:
            raise PreconditionError(f"run {run} has no disks from the replica")
        found = []
        for disk in disks.disks:
            path = folder.image(disk.target)
            if not is_whole(path, size_bytes=disk.size_bytes, identity=bytes.fromhex(disk.identity)):
                raise PreconditionError(
                    f"disk {disk.target} has not come from the replica yet",
                    remedy="'vmsnap env show' says how far it is",
                )
            found.append(DiskImage(target=disk.target, path=str(path), image_format="raw", size_bytes=disk.size_bytes))
        return tuple(found)

    def settled(self, run: RunId) -> None:
        """End the process and the hold; the images stay."""
        folder = self._of(run)
        if not folder.exists:
            return
        self._end(folder, deadline=timedelta(seconds=30))
        # Last: whoever finds no mark does all of it again.
        folder.mark_local()

    def _end(self, folder: ExportFolder, *, deadline: timedelta) -> None:
        if folder.is_alive or self._may_come_back(folder):
            self._launch().stop(folder, deadline=deadline)
        self._release_hold(folder)
        runtime = self._socket_folder(folder.run)
        with translated(f"remove {runtime}"):
            if runtime.exists():
                shutil.rmtree(runtime)
            if runtime.parent.is_dir() and not any(runtime.parent.iterdir()):
                runtime.parent.rmdir()

    def _may_come_back(self, folder: ExportFolder) -> bool:
        """Tell whether systemd may be about to start it again."""
        return self._socket_folder(folder.run).exists()

    def _release_hold(self, folder: ExportFolder) -> None:
        status = folder.status()
        if not folder.exists or (status is not None and not status.held and folder.disks() is not None):
            return  # it never began, or may only read there
        try:
            plan = folder.plan()
            self._let_go(plan.snapshot, folder.run, plan.place)
        except VmsnapError as error:
            # It ends by itself, and no environment stays because its replica is away.
            _LOG.warning(
                "the hold of run %s in the replica was not released and ends by itself: %s", folder.run, error.brief
            )

    def status(self, run: RunId) -> ExportStatus | None:
        """Return how an export is."""
        folder = self._of(run)
        if not folder.exists:
            return None
        plan, said, alive = folder.plan(), folder.status(), folder.is_alive
        phase = ExportPhase.STARTING if said is None else said.phase
        return ExportStatus(
            run=run,
            guest=plan.guest,
            snapshot=plan.snapshot,
            hydrate=plan.hydrate,
            phase=ExportPhase.LOCAL if folder.is_local else phase,
            alive=alive,
            size_bytes=0 if said is None else said.size_bytes,
            data_bytes=None if said is None else said.data_bytes,
            read_bytes=0 if said is None else said.read_bytes,
            waiting=said.waiting if said is not None and alive else None,
            waiting_since=said.waiting_since if said is not None and alive else None,
            damage=() if said is None else said.damage,
        )

    def all(self) -> tuple[ExportStatus, ...]:
        """Return all exports."""
        return tuple(status for run in self._runs() if (status := self.status(run)) is not None)

    def _runs(self) -> tuple[RunId, ...]:
        if not self._folder.is_dir():
            return ()
        return tuple(RunId(name) for name in sorted(entry.name for entry in self._folder.iterdir()) if is_run_id(name))

    def release(self, resource: Resource, *, deadline: timedelta) -> None:
        """End the process, and remove its folder and all that was fetched."""
        folder = self._of(resource.run)
        self._end(folder, deadline=deadline)
        with translated(f"remove {folder.path}"):
            if folder.path.exists():
                shutil.rmtree(folder.path)

    def owned(self) -> tuple[Resource, ...]:
        """Return the exports that left a folder or a socket."""
        runs = set(self._runs())
        if self._runtime.is_dir():
            names = (entry.name for entry in self._runtime.iterdir() if (entry / _SOCKET_FOLDER).exists())
            runs.update(RunId(name) for name in names if is_run_id(name))
        return tuple(self._resource(run, guest="") for run in sorted(runs))


def _may_be_starting(folder: ExportFolder) -> bool:
    """Tell whether a process that has said nothing yet may be on its way: nobody wrote a log either."""
    return not (folder.log_path.exists() and folder.log_path.stat().st_size)


def _error_of(failure: FailureRecord) -> VmsnapError:
    kind = _ERRORS.get(failure.exit_code, DriverError)
    return kind(failure.brief, details=failure.details, remedy=failure.remedy)


def _tail(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")[-2000:].strip()
    except OSError:
        return ""
