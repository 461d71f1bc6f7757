"""What a run learned, as the records of its manifest."""

from __future__ import annotations

from collections.abc import Iterable

from vmsnap.model.capture import Capture
from vmsnap.model.drain import CleanShutdown, DrainReport
from vmsnap.model.isolation import Addressed, ProofPoint
from vmsnap.model.manifest import (
    AttemptRecord,
    CaptureRecord,
    CleanRecord,
    DrainRecord,
    FileSystemRecord,
    InstanceRecord,
    IsolationRecord,
    PausePartRecord,
    ProofRecord,
)


def capture_record(capture: Capture) -> CaptureRecord:
    """Return how a guest was captured."""
    return CaptureRecord(
        mode=capture.mode,
        reason=capture.reason,
        captured=capture.captured,
        pause_ms=round(capture.pause_ms, 3),
        ram_bytes=capture.ram_bytes,
        parts=tuple(PausePartRecord(name=part.name, ms=round(part.ms, 3)) for part in capture.parts),
        memory_captured=capture.mode.takes_memory,
        on_overlay_seconds=None if capture.on_overlay_seconds is None else round(capture.on_overlay_seconds, 3),
        pause_at_most=capture.pause_at_most,
    )


def isolation_record(addressed: Addressed, *, points: Iterable[ProofPoint]) -> IsolationRecord:
    """Return how a clone was kept apart and reached."""
    return IsolationRecord(
        rung=addressed.rung,
        address=addressed.address,
        seconds=round(addressed.seconds, 3),
        proof=tuple(ProofRecord(kind=point.kind, name=point.name, observed=point.observed) for point in points),
        attempts=tuple(
            AttemptRecord(rung=item.rung, seconds=round(item.seconds, 3), failure=item.failure)
            for item in addressed.attempts
        ),
    )


def drain_record(report: DrainReport) -> DrainRecord:
    """Return what became of one instance's work in flight."""
    return DrainRecord(
        engine=report.engine,
        instance=report.instance,
        in_flight_at_start=report.in_flight_at_start,
        finished=report.finished,
        rolled_back=report.rolled_back,
        seconds=round(report.seconds, 3),
    )


def clean_record(clean: CleanShutdown) -> CleanRecord:
    """Return the evidence of a clean shutdown."""
    return CleanRecord(
        made=clean.made,
        guest_shut_down_by=clean.guest_shut_down_by,
        instances=tuple(
            InstanceRecord(
                engine=item.engine,
                instance=item.instance,
                data_directory=item.data_directory,
                method=item.method,
                observed=dict(item.observed),
            )
            for item in clean.instances
        ),
        file_systems=tuple(
            FileSystemRecord(disk=state.disk, kind=state.kind, uuid=state.uuid, observed=state.observed)
            for state in clean.file_systems
        ),
    )
