"""Environments straight from the replica: their disks while they come, and bringing them home."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

from vmsnap.errors import (
    BusyError,
    ConfigError,
    DriverError,
    EnvironmentNotFoundError,
    PreconditionError,
    SnapshotNotFoundError,
    StoreUnreachableError,
    VerificationError,
    VmsnapError,
)
from vmsnap.model.capture import DiskImage
from vmsnap.model.environment import Environment, EnvironmentPlan
from vmsnap.model.export import ExportPhase, ExportPlan, ExportStatus
from vmsnap.model.manifest import Snapshot
from vmsnap.model.policy import EnvironmentPolicy
from vmsnap.model.report import Origin
from vmsnap.ports.clock import Cancel
from vmsnap.ports.progress import Progress
from vmsnap.workflow.run import Run, as_vmsnap_error, closing
from vmsnap.workflow.world import World

_LOG = logging.getLogger(__name__)
_SERVED_DEADLINE = timedelta(seconds=60)
_PIVOT_DEADLINE = timedelta(minutes=5)
_POLL = timedelta(milliseconds=500)
_PATIENCE = timedelta(minutes=2)
_MIB = 1 << 20


def find_snapshot(world: World, reference: str, *, origin: Origin | None) -> tuple[Snapshot, Origin]:
    """Return what a reference names, and where its data is to come from. A snapshot that is here comes from here.

    A guest's name alone means its newest snapshot. Raises SnapshotNotFoundError, ConfigError where there is no replica.
    """
    if origin is not Origin.REPLICA:
        try:
            return world.store.find(reference), Origin.STORE
        except SnapshotNotFoundError:
            if origin is Origin.STORE or world.replica is None:
                raise
    if world.replica is None:
        raise ConfigError(
            "there is no replica to provision from", remedy="name it in [replica] of vmsnap.toml, or leave --from out"
        )
    try:
        return world.replica.find(reference), Origin.REPLICA
    except SnapshotNotFoundError:
        if "@" in reference:
            raise
        try:
            return world.replica.find(f"{reference}@latest"), Origin.REPLICA
        except SnapshotNotFoundError:
            pass
        raise


class LazyDisks:
    """The disks of one environment that is made straight from the replica."""

    def __init__(self, world: World, *, run: Run, plan: EnvironmentPlan, snapshot: Snapshot) -> None:
        self._world = world
        self._run = run
        self._plan = plan
        self._snapshot = snapshot
        self._export: ExportPlan | None = None

    def prepare(self, *, policy: EnvironmentPolicy) -> None:
        """Begin the export, and make the overlays over what it will serve."""
        world, plan, snapshot = self._world, self._plan, self._snapshot
        export = ExportPlan(
            run=plan.run,
            guest=plan.guest,
            snapshot=snapshot.id,
            hydrate=policy.hydrate,
            cache_bytes=None if policy.hydrate or policy.cache_mib is None else policy.cache_mib * _MIB,
            reader=world.hypervisor.image_reader(),
        )
        self._export = export
        self._run.acquire(world.exports.resource(export), lambda: world.exports.begin(export))
        images = tuple(
            DiskImage(
                target=disk.target,
                path=world.exports.socket(plan.run),
                image_format="nbd",
                size_bytes=disk.size_bytes,
            )
            for disk in snapshot.manifest.disks
        )
        with TemporaryDirectory(prefix="vmsnap-") as folder:
            nvram = self._nvram(Path(folder))
            self._run.acquire(
                world.hypervisor.environment_disks_resource(plan),
                lambda: world.hypervisor.prepare_environment_disks(plan, images=images, nvram=nvram),
            )

    def _nvram(self, folder: Path) -> str | None:
        wanted = self._snapshot.manifest.machine.nvram
        if wanted is None:
            return None
        assert self._world.replica is not None  # noqa: S101 - the snapshot was found there
        for file in self._world.replica.fetch_files(self._snapshot):
            if file.name == wanted:
                path = folder / "nvram.fd"
                path.write_bytes(file.data)
                return str(path)
        raise DriverError(f"snapshot {self._snapshot.id} in the replica lacks {wanted!r}, the firmware's variables")

    def wait(self) -> None:
        """Return once the disks are served. Raises what keeps them from it."""
        assert self._export is not None  # noqa: S101 - prepare comes first
        self._world.exports.wait(self._export, deadline=_SERVED_DEADLINE)


def tend(world: World, *, failed: Callable[[Environment, VmsnapError], None]) -> tuple[str, ...]:
    """Start again what died of exports, and bring environments home whose data has come. Returns those, by name.

    One environment's failure stops no other: it is told to ``failed``. May be repeated as often as wanted.
    """
    home = []
    for environment in world.book.all():
        try:
            status = world.exports.status(environment.run)
            if status is None or status.phase is ExportPhase.LOCAL:
                continue
            if _tend(world, environment, status=status):
                home.append(environment.name)
        except (BusyError, EnvironmentNotFoundError) as error:
            _LOG.debug("environment %s: %s", environment.name, error.brief)
        except Exception as error:  # noqa: BLE001 - as the docstring says
            failed(environment, as_vmsnap_error(error, doing=f"looking after environment {environment.name}"))
    return tuple(home)


def _tend(world: World, environment: Environment, *, status: ExportStatus) -> bool:
    if status.phase is ExportPhase.HYDRATED:
        bring_home(world, environment)
        return True
    if not status.alive:
        _LOG.warning("the export of environment %s had died and is started again", environment.name)
    world.exports.revive(environment.run)
    world.hypervisor.keep_environment_reconnecting(environment.name)
    return False


def complaint(environment: Environment, status: ExportStatus, *, now: datetime) -> VmsnapError | None:
    """Return what somebody has to be told of an export: what cannot be read, or that the replica has been away for long."""
    if status.phase is ExportPhase.LOCAL:
        return None
    if status.damage:
        return VerificationError(
            f"environment {environment.name!r} cannot read {len(status.damage)} blocks from the replica",
            details="\n".join(status.damage),
            remedy=f"'vmsnap verify {status.snapshot} --replica --repair' mends the replica where another copy is whole",
        )
    if status.waiting is not None and status.waiting_since is not None and now - status.waiting_since >= _PATIENCE:
        return StoreUnreachableError(
            f"environment {environment.name!r} waits for the replica since {status.waiting_since:%Y-%m-%d %H:%M} UTC",
            details=status.waiting,
            remedy="look at the way to the replica; the environment goes on by itself",
        )
    return None


def bring_home(world: World, environment: Environment) -> None:
    """Put an environment whose data has come on local images, and end its export. May be repeated.

    Raises BusyError where another process is at it, PreconditionError where data is missing, DriverError, DeadlineError.
    """
    images = world.exports.images(environment.run)
    journal = world.journals.reopen(environment.run)
    with closing(journal):
        # Whoever destroys it has the journal first, or waits.
        if all(item.run != environment.run for item in world.book.all()):
            raise EnvironmentNotFoundError(f"environment {environment.name!r} is gone")
        world.hypervisor.localise_environment(
            environment.name, run=environment.run, images=images, deadline=_PIVOT_DEADLINE
        )
        journal.note("its disks are local")
        world.exports.settled(environment.run)


def hydrate(world: World, *, name: str, progress: Progress, cancel: Cancel) -> ExportStatus:
    """Wait until all data of an environment has come, then bring it home. Cancelling leaves it as it is.

    Raises EnvironmentNotFoundError, PreconditionError for one that is not from the replica or does not hydrate.
    """
    environment = world.book.get(name)
    status = world.exports.status(environment.run)
    if status is None:
        raise PreconditionError(f"environment {name!r} is from this host's store: all of it is here")
    if not status.hydrate:
        raise PreconditionError(
            f"environment {name!r} does not fetch what nobody reads",
            remedy="its policy said hydrate = false in [environment]; destroy it, and provision it anew",
        )
    world.exports.hurry(environment.run)
    while status.phase is not ExportPhase.LOCAL:
        if status.phase is ExportPhase.HYDRATED:
            bring_home(world, environment)
        elif not status.alive:
            world.exports.revive(environment.run)
        if status.data_bytes is not None:
            progress.bytes_done(min(status.read_bytes, status.data_bytes), status.data_bytes)
        cancel.check()
        found = world.exports.status(environment.run)
        if found is None:
            raise EnvironmentNotFoundError(f"environment {name!r} is gone")
        status = found
        if status.phase is not ExportPhase.LOCAL:
            world.clock.sleep(_POLL)
    return status
