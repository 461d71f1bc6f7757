"""The manifest of a backup: everything that its run learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from vmsnap import __version__
from vmsnap.model.doubt import doubt_before
from vmsnap.model.ids import SnapshotId
from vmsnap.model.manifest import DiskRecord, Manifest, StoreRecord
from vmsnap.model.policy import Policy
from vmsnap.ports.store import Staging
from vmsnap.workflow.records import capture_record, clean_record, drain_record, isolation_record
from vmsnap.workflow.run import Run
from vmsnap.workflow.stages import Facts
from vmsnap.workflow.world import World

NVRAM_FILE = "nvram.fd"


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What was stored, how long that took, and why hints are not believed from now on, if so."""

    staging: Staging
    disks: tuple[DiskRecord, ...]
    seconds: float
    hints_distrusted: str | None


def manifest_of(
    world: World, *, run: Run, policy: Policy, facts: Facts, stored: Stored, warn: Callable[[str], None]
) -> Manifest:
    """Return the manifest of a run whose disks are stored. ``warn`` is told where the clock may have jumped."""
    quiesced, captured, staging = facts.quiesced, facts.capture.captured, stored.staging
    nvram = None if facts.machine.nvram is None else NVRAM_FILE
    snapshots = world.store.snapshots(staging.guest)
    doubt = doubt_before(captured, snapshots=snapshots, policy=policy)
    if doubt and doubt > max(timedelta(seconds=one.manifest.clock_doubt_seconds) for one in snapshots):
        warn(
            "this snapshot comes long after the one before it: the clock may have jumped, so the time between does not "
            "count for max_age and for pins. 'vmsnap prune --trust-clock' says that the clock is right"
        )
    return Manifest(
        id=SnapshotId(run.id),
        run=run.id,
        guest=staging.guest,
        created=world.clock.now(),
        parent=staging.previous,
        machine=facts.machine.model_copy(update={"nvram": nvram}),
        capture=capture_record(facts.capture),
        isolation=isolation_record(quiesced.addressed, points=facts.points),
        drain=tuple(drain_record(report) for report in quiesced.drains),
        clean=clean_record(facts.clean),
        disks=stored.disks,
        store=StoreRecord(
            logical_bytes=sum(disk.size_bytes for disk in stored.disks),
            new_bytes=sum(disk.new_bytes for disk in stored.disks),
            seconds=round(stored.seconds, 3),
            read_bytes=sum(disk.read.read_bytes for disk in stored.disks if disk.read is not None),
        ),
        steps=run.steps,
        vmsnap_version=__version__,
        clock_doubt_seconds=round(doubt.total_seconds(), 3),
        made_after=next(
            (one.manifest.ranked for one in snapshots if one.id == staging.previous and one.manifest.ranked > captured),
            None,
        ),
        hints_distrusted=stored.hints_distrusted,
    )
