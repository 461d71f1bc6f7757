"""The proof that a clone's disks are clean. The only place that makes a CleanShutdown."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from vmsnap.errors import NotCleanError
from vmsnap.model.drain import CleanShutdown, FileSystemState, Instance, InstanceEvidence
from vmsnap.model.ids import RunId
from vmsnap.ports.clock import Clock
from vmsnap.ports.disks import DiskInspector, DiskView, FileRequest
from vmsnap.ports.engine import Engine, GuestPath

_TIMEOUT = timedelta(minutes=5)


@dataclass(frozen=True, kw_only=True)
class StoppedInstance:
    """A database instance that was stopped in the clone: what its tools said there, and where its files lie."""

    instance: Instance
    in_guest: InstanceEvidence
    paths: tuple[GuestPath, ...]


def prove_clean(
    run: RunId,
    *,
    engine: Engine,
    stopped: tuple[StoppedInstance, ...],
    views: tuple[DiskView, ...],
    inspector: DiskInspector,
    shut_down_by: str,
    clock: Clock,
) -> CleanShutdown:
    """Read the disks of a clone that is off and judge them.

    Raises NotCleanError with everything that was seen, where a file system or an instance is not clean, or an
    instance's files are not on the disks.
    """
    file_systems = inspector.file_systems(views, timeout=_TIMEOUT)
    evidence: list[InstanceEvidence] = []
    for item in stopped:
        requests = tuple(FileRequest(file_system_uuid=path.file_system_uuid, path=path.path) for path in item.paths)
        contents = inspector.read_files(views, requests=requests, timeout=_TIMEOUT)
        evidence.append(item.in_guest)
        evidence.append(engine.judge(item.instance, files=tuple(found.content for found in contents)))
    _require_clean(file_systems, tuple(evidence))
    return CleanShutdown(
        run=run,
        made=clock.now(),
        guest_shut_down_by=shut_down_by,
        instances=tuple(evidence),
        file_systems=file_systems,
    )


def _require_clean(file_systems: tuple[FileSystemState, ...], evidence: tuple[InstanceEvidence, ...]) -> None:
    defects = [
        f"file system {state.kind} {state.uuid} on {state.disk}: {state.observed}"
        for state in file_systems
        if not state.clean
    ]
    defects += [
        f"{item.engine} {item.instance} ({item.method}): "
        + ", ".join(f"{name} = {value}" for name, value in item.observed)
        for item in evidence
        if not item.clean
    ]
    if not file_systems:
        defects.append("no file system was found on the disks")
    if not evidence:
        defects.append("no database instance was stopped")
    if defects:
        raise NotCleanError(
            "the clone's disks are not clean; nothing was stored",
            details="\n".join(defects),
            remedy="provision nothing from this run; look at the guest's own shutdown, it would be the same",
        )
