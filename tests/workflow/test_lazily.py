"""Environments straight from the replica: made, looked after, brought home and destroyed, with every fault at every call."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from tests.workflow.invocations import Outcome, Trial, Work, backup, destroy, order, recovers, simply, succeed
from vmsnap.errors import ConfigError, PreconditionError, SnapshotNotFoundError, StoreUnreachableError, VmsnapError
from vmsnap.model.environment import Environment
from vmsnap.model.export import ExportPhase, ExportStatus
from vmsnap.model.ids import RunId
from vmsnap.model.policy import EnvironmentPolicy
from vmsnap.model.report import Origin, ProvisionOptions, ProvisionReport
from vmsnap.ports.clock import Cancel
from vmsnap.stores.packs.replica import PacksReplica
from vmsnap.testing.faults import Mode
from vmsnap.testing.memory_objects import MemoryBucket, MemoryObjects
from vmsnap.testing.world import FakeWorld, QuietProgress
from vmsnap.workflow.lazily import bring_home, complaint, hydrate, tend
from vmsnap.workflow.provision import Provision
from vmsnap.workflow.replicate import replicate
from vmsnap.workflow.world import World


def provision(*, origin: Origin | None = Origin.REPLICA, name: str = "test", reference: str = "db@latest") -> Work:
    def work(world: World, cancel: Cancel) -> ProvisionReport:
        options = ProvisionOptions(name=name, origin=origin)
        making = Provision(world, options=options, policy=EnvironmentPolicy(), progress=QuietProgress(), cancel=cancel)
        return making.run(reference)

    return work


def _with_replica(folder: Path) -> FakeWorld:
    lab = FakeWorld(folder, disks=2)
    objects = MemoryObjects(MemoryBucket())
    lab.replica = PacksReplica(
        lambda: objects, key=lambda: None, state=folder / "state", connections=2, clock=lab.clock
    )
    succeed(lab, backup())
    succeed(lab, lambda world, cancel: replicate(world, reference="db@latest", progress=QuietProgress(), cancel=cancel))
    return lab


def _with_environment(folder: Path) -> FakeWorld:
    lab = _with_replica(folder)
    succeed(lab, provision())
    return lab


def _hydrated(folder: Path) -> FakeWorld:
    lab = _with_environment(folder)
    lab.exports.bring(run_of(lab))
    return lab


def run_of(lab: FakeWorld) -> RunId:
    (environment,) = lab.state.environments.all()
    return environment.run


def status_of(lab: FakeWorld) -> ExportStatus:
    status = lab.exports.status(run_of(lab))
    assert status is not None
    return status


def backing_of(lab: FakeWorld) -> set[str | None]:
    prefix = f"/environments/{run_of(lab)}/"
    return {file.backing for path, file in lab.host.files.items() if path.startswith(prefix)}


def tending(world: World, _cancel: Cancel) -> tuple[str, ...]:
    def failed(_environment: Environment, error: VmsnapError) -> None:
        raise error

    return tend(world, failed=failed)


def nothing_left(lab: FakeWorld) -> list[str]:
    wrong = [f"left at the end: {item.kind} {item.name}" for owner in lab.owners for item in owner.owned()]
    return wrong + [f"held in the replica by {run}" for run in lab.exports.held]


def test_from_the_replica_to_a_local_image(tmp_path: Path) -> None:
    lab = _with_replica(tmp_path)
    report = succeed(lab, provision()).result
    assert isinstance(report, ProvisionReport)
    assert report.origin is Origin.REPLICA
    assert lab.exports.held == {run_of(lab)}
    (snapshot,) = lab.store.snapshots("db")
    assert lab.store.holders(snapshot) == ()
    assert backing_of(lab) == {lab.exports.socket(run_of(lab))}
    assert succeed(lab, tending).result == ()
    lab.exports.die(run_of(lab))
    succeed(lab, tending)
    assert status_of(lab).alive
    lab.exports.bring(run_of(lab))
    assert succeed(lab, tending).result == ("test",)
    assert status_of(lab).phase is ExportPhase.LOCAL
    assert not status_of(lab).alive
    assert not lab.exports.held
    assert all(str(backing).endswith(".raw") for backing in backing_of(lab))
    assert succeed(lab, tending).result == ()
    succeed(lab, destroy())
    assert nothing_left(lab) == []


def test_where_the_data_comes_from(tmp_path: Path) -> None:
    lab = _with_replica(tmp_path)
    report = succeed(lab, provision(origin=None, name="here")).result
    assert isinstance(report, ProvisionReport)
    assert report.origin is Origin.STORE
    succeed(lab, destroy("here"))
    (snapshot,) = lab.store.snapshots("db")
    lab.store.remove(snapshot)
    for reference in ("db@latest", "db", snapshot.id[:6]):
        report = simply(lab, provision(origin=None, name="there", reference=reference)).result
        assert isinstance(report, ProvisionReport), reference
        assert report.origin is Origin.REPLICA
        assert simply(lab, destroy("there")).error is None
    assert isinstance(simply(lab, provision(origin=Origin.STORE)).error, SnapshotNotFoundError)
    assert isinstance(simply(lab, provision(reference="no-such-guest")).error, SnapshotNotFoundError)
    lab.replica = None
    assert isinstance(simply(lab, provision()).error, ConfigError)
    assert isinstance(simply(lab, provision(origin=None)).error, SnapshotNotFoundError)


def test_a_replica_that_is_away_leaves_nothing(tmp_path: Path) -> None:
    lab = _with_replica(tmp_path)
    lab.exports.away = True
    outcome = simply(lab, provision())
    assert isinstance(outcome.error, StoreUnreachableError)
    assert lab.state.environments.all() == ()
    assert order(lab) == []
    assert nothing_left(lab) == []


def test_waiting_for_all_of_it(tmp_path: Path) -> None:
    lab = _with_environment(tmp_path)
    run = run_of(lab)

    def waiting(world: World, cancel: Cancel) -> ExportStatus:
        assert run not in lab.exports.hurried
        lab.exports.bring(run)
        return hydrate(world, name="test", progress=QuietProgress(), cancel=cancel)

    status = succeed(lab, waiting).result
    assert isinstance(status, ExportStatus)
    assert status.phase is ExportPhase.LOCAL
    assert run in lab.exports.hurried
    succeed(lab, provision(origin=Origin.STORE, name="other"))
    outcome = simply(lab, lambda world, cancel: hydrate(world, name="other", progress=QuietProgress(), cancel=cancel))
    assert isinstance(outcome.error, PreconditionError)


def test_it_is_not_brought_home_too_early(tmp_path: Path) -> None:
    lab = _with_environment(tmp_path)
    outcome = simply(lab, lambda world, _: bring_home(world, world.book.get("test")))
    assert isinstance(outcome.error, PreconditionError)
    assert status_of(lab).alive


def test_somebody_is_told_of_damage_and_of_a_long_wait(tmp_path: Path) -> None:
    lab = _with_environment(tmp_path)
    (environment,) = lab.state.environments.all()
    now = lab.clock.now()
    status = status_of(lab)
    assert complaint(environment, status, now=now) is None

    def told(**changes: object) -> str | None:
        changed = ExportStatus(**{**status.__dict__, **changes})
        error = complaint(environment, changed, now=now)
        return None if error is None else error.brief

    assert "cannot read 1 blocks" in str(told(damage=("disk vda, at 0",)))
    assert told(waiting="no route", waiting_since=now - timedelta(seconds=5)) is None
    assert "waits for the replica" in str(told(waiting="no route", waiting_since=now - timedelta(minutes=5)))
    assert told(waiting="no route", waiting_since=now - timedelta(days=1), phase=ExportPhase.LOCAL) is None


@pytest.mark.parametrize("mode", [Mode.FAIL_AFTER, Mode.DIE_BEFORE, Mode.DIE_AFTER])
def test_any_fault_while_provisioning(tmp_path: Path, mode: Mode) -> None:
    trial = Trial(prepare=_with_replica, work=provision())

    def afterwards(lab: FakeWorld, outcome: Outcome) -> list[str]:
        wrong = recovers(lab)
        listed = bool(lab.state.environments.all())
        if outcome.error is None and not listed:
            wrong.append("done, and yet there is no environment")
        if listed and simply(lab, destroy()).error is not None:
            wrong.append("it cannot be destroyed")
        return wrong + list(lab.host.violations) + nothing_left(lab)

    trial.every(tmp_path, mode, after=afterwards)
    assert trial.count > 20


@pytest.mark.parametrize("mode", list(Mode))
def test_any_fault_while_it_is_brought_home(tmp_path: Path, mode: Mode) -> None:
    trial = Trial(prepare=_hydrated, work=tending)

    def afterwards(lab: FakeWorld, outcome: Outcome) -> list[str]:
        wrong = recovers(lab)
        if not lab.state.environments.all():
            return [*wrong, "the environment is gone"]
        again = simply(lab, tending)
        if again.error is not None:
            wrong.append(f"it cannot be brought home any more: {again.error!r}")
        if status_of(lab).phase is not ExportPhase.LOCAL or status_of(lab).alive:
            wrong.append(f"it is not home: {status_of(lab)}")
        if not all(str(backing).endswith(".raw") for backing in backing_of(lab)):
            wrong.append(f"its disks are over {backing_of(lab)}")
        if simply(lab, destroy()).error is not None:
            wrong.append("it cannot be destroyed")
        return wrong + list(lab.host.violations) + nothing_left(lab)

    trial.every(tmp_path, mode, after=afterwards)
    assert trial.count > 5


@pytest.mark.parametrize("mode", [Mode.FAIL_AFTER, Mode.DIE_BEFORE, Mode.DIE_AFTER])
def test_any_fault_while_destroying_one_that_hydrates(tmp_path: Path, mode: Mode) -> None:
    trial = Trial(prepare=_with_environment, work=destroy(), all_clean_up=True)

    def afterwards(lab: FakeWorld, _outcome: Outcome) -> list[str]:
        wrong = recovers(lab)
        if lab.state.environments.all() and simply(lab, destroy()).error is not None:
            wrong.append("it cannot be destroyed")
        return wrong + nothing_left(lab)

    trial.every(tmp_path, mode, after=afterwards)
    assert trial.count > 15
