"""Environments whose time has come: removed by command as by the daemon, and what still needs the program afterwards."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from tests.workflow.invocations import Outcome, Trial, Work, backup, order, provision, recovers, simply, succeed
from vmsnap.model.environment import Environment, Expiry
from vmsnap.model.export import ExportPhase, ExportStatus
from vmsnap.model.history import Action
from vmsnap.model.journal import RunKind
from vmsnap.ports.clock import Cancel
from vmsnap.testing.faults import Mode
from vmsnap.testing.world import FakeWorld
from vmsnap.workflow.expire import expire
from vmsnap.workflow.unfinished import unfinished
from vmsnap.workflow.world import World

LONG = timedelta(days=2)


def expiring(*, dry_run: bool = False) -> Work:
    """Expire as a process of its own; the first environment's failure is the process's."""

    def work(world: World, _cancel: Cancel) -> tuple[Expiry, ...]:
        entries = tuple(expire(world, dry_run=dry_run))
        for entry in entries:
            if entry.error is not None:
                raise entry.error
        return entries

    return work


def _with(folder: Path, *names: str) -> FakeWorld:
    lab = FakeWorld(folder)
    succeed(lab, backup())
    for name in names:
        succeed(lab, provision(name=name))
    return lab


def _listed(lab: FakeWorld) -> list[str]:
    return [environment.name for environment in lab.state.environments.all()]


def _let_stay(lab: FakeWorld, name: str) -> Environment:
    environment = next(one for one in lab.state.environments.all() if one.name == name)
    lab.state.environments.replace(replace(environment, expires=None))
    return environment


def test_what_has_come_to_its_end_goes_and_the_rest_stays(tmp_path: Path) -> None:
    lab = _with(tmp_path, "done", "kept")
    _let_stay(lab, "kept")
    assert succeed(lab, expiring()).result == ()
    lab.clock.sleep(LONG)
    foreseen = succeed(lab, expiring(dry_run=True)).result
    assert isinstance(foreseen, tuple)
    assert [(entry.environment.name, entry.removed) for entry in foreseen] == [("done", False)]
    assert _listed(lab) == ["done", "kept"]
    removed = succeed(lab, expiring()).result
    assert isinstance(removed, tuple)
    assert [(entry.environment.name, entry.removed) for entry in removed] == [("done", True)]
    assert _listed(lab) == ["kept"]
    assert lab.state.history.trail()[0].action is Action.EXPIRE


def test_one_that_cannot_go_stops_no_other(tmp_path: Path) -> None:
    lab = _with(tmp_path, "a-held", "b-free")
    held = lab.state.environments.get("a-held")
    journal = lab.state.journals.reopen(held.run)
    lab.clock.sleep(LONG)
    entries = tuple(expire(lab.process(), dry_run=False))
    assert [(entry.environment.name, entry.removed) for entry in entries] == [("a-held", False), ("b-free", True)]
    assert entries[0].error is not None
    assert _listed(lab) == ["a-held"]
    journal.close()
    succeed(lab, expiring())
    assert _listed(lab) == []


def test_one_that_is_extended_meanwhile_stays(tmp_path: Path) -> None:
    lab = _with(tmp_path, "a", "b")
    lab.clock.sleep(LONG)
    going = expire(lab.process(), dry_run=False)
    assert next(going).environment.name == "a"
    _let_stay(lab, "b")
    assert list(going) == []
    assert _listed(lab) == ["b"]
    lab.end()
    assert order(lab) == []


@pytest.mark.parametrize("mode", [Mode.FAIL_BEFORE, Mode.FAIL_AFTER, Mode.DIE_BEFORE, Mode.DIE_AFTER])
def test_any_fault_while_expiring(tmp_path: Path, mode: Mode) -> None:
    def prepare(folder: Path) -> FakeWorld:
        lab = _with(folder, "test")
        lab.clock.sleep(LONG)
        return lab

    def afterwards(lab: FakeWorld, outcome: Outcome) -> list[str]:
        wrong = recovers(lab)
        if outcome.error is None and _listed(lab):
            wrong.append("done, and yet there is an environment")
        again = simply(lab, expiring())
        if again.error is not None:
            wrong.append(f"expiring again: {again.error!r}")
        return [*wrong, *order(lab), *(f"{name} is still there" for name in _listed(lab))]

    trial = Trial(prepare=prepare, work=expiring(), all_clean_up=True)
    trial.every(tmp_path, mode, after=afterwards)
    assert trial.count > 15


# What still needs the program


def test_a_host_at_rest_with_a_local_environment_needs_it_no_more(tmp_path: Path) -> None:
    assert unfinished(_with(tmp_path, "test").process()) == ()


def test_a_run_that_goes_on_and_one_that_died_need_it(tmp_path: Path) -> None:
    lab = _with(tmp_path)
    world = lab.process()
    run = world.new_run_id()
    journal = world.journals.begin(run, kind=RunKind.BACKUP, guest="db", at=world.clock.now())
    (going,) = unfinished(world)
    assert f"run {run} (backup of 'db') goes on" in going
    journal.close()
    (died,) = unfinished(world)
    assert "vmsnap reconcile" in died
    assert recovers(lab) == []
    assert unfinished(lab.process()) == ()


def test_an_environment_that_reads_from_the_replica_needs_it_until_its_data_is_here(tmp_path: Path) -> None:
    lab = _with(tmp_path, "test")
    environment = lab.state.environments.get("test")
    status = ExportStatus(
        run=environment.run,
        guest="db",
        snapshot=environment.snapshot,
        hydrate=True,
        phase=ExportPhase.SERVING,
        alive=True,
    )
    lab.exports.statuses[environment.run] = status
    (found,) = unfinished(lab.process())
    assert found.startswith("environment 'test' reads from the replica")
    lab.exports.statuses[environment.run] = replace(status, phase=ExportPhase.LOCAL)
    assert unfinished(lab.process()) == ()
