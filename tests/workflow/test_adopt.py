"""Runs that no journal knows, as after a state directory was lost: told, left alone, and undone where that is asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.workflow.invocations import Outcome, Work, backup, invoke, order, provision, reconciling, simply, succeed
from tests.workflow.test_reconcile import Reconciling
from vmsnap.errors import BusyError, PreconditionError
from vmsnap.model.history import Action
from vmsnap.model.ids import RunId
from vmsnap.model.journal import ResourceKind, RunKind
from vmsnap.model.report import Adoption, ReconcileReport
from vmsnap.testing.faults import DEATHS, Fault, Mode
from vmsnap.testing.memory_state import MemoryState
from vmsnap.testing.world import FakeWorld
from vmsnap.workflow.adopt import adopt

PLACES = ("the source stands still", "hypervisor.resume_clone", "store.publish", "vda is back, live")


def adopting(*runs: RunId, destroy_test_vms: bool = False, dry_run: bool = False) -> Work:
    adoption = Adoption(runs=runs, destroy_test_vms=destroy_test_vms, dry_run=dry_run)
    return lambda world, _cancel: adopt(world, adoption)


def lose_state(lab: FakeWorld) -> None:
    """The state directory is gone, and everything else is as it was."""
    lab.state = MemoryState()


def stranded(folder: Path, *, where: str) -> Callable[[Path], FakeWorld]:
    """Return what makes a world with a snapshot, whose second backup died, and whose state directory was lost then."""

    def ready(folder: Path) -> FakeWorld:
        lab = FakeWorld(folder)
        succeed(lab, backup())
        return lab

    calls = invoke(ready(folder / "to die"), backup()).calls
    number = next(call.number for call in calls if call.name == where)

    def prepare(folder: Path) -> FakeWorld:
        lab = ready(folder)
        assert invoke(lab, backup(), Fault(call=number, mode=Mode.DIE_BEFORE)).hit
        lose_state(lab)
        return lab

    return prepare


def the_run(lab: FakeWorld) -> RunId:
    (run,) = {item.run for item in lab.leftovers()}
    return run


@pytest.mark.parametrize("where", PLACES)
def test_a_lost_run_is_told_and_left_alone_and_undone_when_it_is_adopted(tmp_path: Path, where: str) -> None:
    lab = stranded(tmp_path, where=where)(tmp_path / "lab")
    before, run = lab.leftovers(), the_run(lab)
    report = simply(lab, reconciling).result
    assert isinstance(report, ReconcileReport)
    assert (report.runs, report.undone) == ((), ())
    (unknown,) = report.unknown
    assert (unknown.run, unknown.guest, unknown.test_vm) == (run, "db", False)
    assert {(thing.kind, thing.name) for thing in unknown.things} == {(item.kind, item.name) for item in before}
    assert lab.leftovers() == before
    adopted = simply(lab, adopting(run)).result
    assert isinstance(adopted, ReconcileReport)
    assert adopted.complete
    assert adopted.adopted == (unknown,)
    assert [(item.kind, item.name) for item in adopted.undone] == [(t.kind, t.name) for t in unknown.things]
    assert order(lab) == []
    entries = lab.state.history.trail(guest="db", limit=None)
    assert {(entry.action, entry.subject) for entry in entries} == {(Action.RECONCILE, run)}
    following = simply(lab, backup())
    assert following.error is None


def test_the_clone_goes_first_then_its_fence_then_the_guest_comes_home(tmp_path: Path) -> None:
    lab = stranded(tmp_path, where="store.publish")(tmp_path / "lab")
    report = simply(lab, adopting(the_run(lab))).result
    assert isinstance(report, ReconcileReport)
    assert [item.kind for item in report.undone] == [
        "export", "fence", "source-overlays", "clone-overlays", "staging",
    ]  # fmt: skip
    lab = stranded(tmp_path, where="hypervisor.resume_clone")(tmp_path / "other")
    report = simply(lab, adopting(the_run(lab))).result
    assert isinstance(report, ReconcileReport)
    assert [item.kind for item in report.undone][:3] == ["clone", "fence", "source-overlays"]


@pytest.mark.parametrize(
    ("where", "mode"),
    [
        *(
            ("hypervisor.resume_clone", mode)
            for mode in (Mode.FAIL_BEFORE, Mode.FAIL_AFTER, Mode.BUG_BEFORE, Mode.DIE_BEFORE, Mode.DIE_AFTER)
        ),
        ("store.publish", Mode.DIE_BEFORE),
    ],
)
def test_any_fault_while_adopting(tmp_path: Path, where: str, mode: Mode) -> None:
    prepare = stranded(tmp_path, where=where)
    run = the_run(prepare(tmp_path / "told"))
    trial = Reconciling(prepare=prepare, work=adopting(run))

    def afterwards(lab: FakeWorld, outcome: Outcome) -> list[str]:
        wrong = _unfenced(lab, run) if mode in DEATHS else []
        report = simply(lab, reconciling).result
        assert isinstance(report, ReconcileReport)
        if run in lab.state.runs:
            # It has a journal, so the next reconcile finishes what was begun.
            return [*wrong, *order(lab), *(f"still unknown: {left.run}" for left in report.unknown)]
        wrong += [] if report.undone == () else ["undone without a journal"]
        again = simply(lab, adopting(run)).error
        return [*wrong, *order(lab)] if again is None else [*wrong, f"the second adoption failed: {again!r}"]

    trial.every(tmp_path, mode, after=afterwards)
    assert trial.count > 20


def _unfenced(lab: FakeWorld, run: RunId) -> list[str]:
    """Return what is wrong with a clone that outlives the death: it must have its fence, and its disks unchanged."""
    clone = lab.host.machines.get(f"vmsnap-clone-{run}")
    if clone is None:
        return []
    wrong = [] if run in lab.network.fences else ["the clone has lost its fence"]
    at_home = "vmsnap-" not in lab.host.machines["db"].live["vda"]
    return [*wrong, "the source was committed under its clone"] if at_home else wrong


def refused(lab: FakeWorld, work: Work) -> PreconditionError | BusyError:
    """Do what must be refused, and must change nothing."""
    before, runs = lab.leftovers(), set(lab.state.runs)
    error = simply(lab, work).error
    assert isinstance(error, PreconditionError | BusyError)
    assert error.remedy
    assert (lab.leftovers(), set(lab.state.runs)) == (before, runs)
    assert lab.host.violations == []
    return error


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_run_that_may_be_alive_is_never_adopted(tmp_path: Path, *, dry_run: bool) -> None:
    lab = stranded(tmp_path, where="hypervisor.resume_clone")(tmp_path / "lab")
    run = the_run(lab)
    work = adopting(run, dry_run=dry_run)
    with lab.vitals.working(run, guest="db"):
        assert f"another process works on run {run}" in str(refused(lab, work))
    with lab.vitals.working(RunId("00000000b2"), guest="db"):
        assert "holds guest 'db'" in str(refused(lab, work))
    with lab.vitals.knowing(run):
        assert "journals of another vmsnap" in str(refused(lab, work))
    lab.host.jobs["db"] = "a job is done on 'db'"
    assert "a job is done on 'db'" in str(refused(lab, work))
    lab.host.jobs.clear()
    assert simply(lab, work).error is None


def test_a_guest_that_is_held_here_is_not_disturbed(tmp_path: Path) -> None:
    lab = stranded(tmp_path, where="hypervisor.resume_clone")(tmp_path / "lab")
    with lab.process().locks.guest("db", purpose="backup"):
        world = lab.process()
        with pytest.raises(BusyError, match="db"):
            adopt(world, Adoption(runs=(the_run(lab),)))
        assert lab.state.runs == {}


def test_only_all_that_are_named_or_none(tmp_path: Path) -> None:
    lab = stranded(tmp_path, where="hypervisor.resume_clone")(tmp_path / "lab")
    run, nobody = the_run(lab), RunId("ffffffffff")
    assert "nothing here bears the id of run ffffffffff" in str(refused(lab, adopting(run, nobody)))
    assert simply(lab, adopting(run, run)).error is None
    assert order(lab) == []
    assert "in the journals here" in str(refused(lab, adopting(run)))


def test_a_dry_run_shows_what_would_be_undone(tmp_path: Path) -> None:
    lab = stranded(tmp_path, where="hypervisor.resume_clone")(tmp_path / "lab")
    before, run = lab.leftovers(), the_run(lab)
    report = simply(lab, adopting(run, dry_run=True)).result
    assert isinstance(report, ReconcileReport)
    assert report.dry_run
    assert report.undone == ()
    assert [told.run for told in report.adopted] == [run]
    assert (lab.leftovers(), lab.state.runs) == (before, {})


def test_a_test_vm_of_a_lost_book_is_destroyed_only_where_that_is_said(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    succeed(lab, backup())
    succeed(lab, provision(name="precious"))
    lose_state(lab)
    report = simply(lab, reconciling).result
    assert isinstance(report, ReconcileReport)
    (unknown,) = report.unknown
    assert unknown.test_vm
    assert "precious" in [thing.name for thing in unknown.things]
    error = refused(lab, adopting(unknown.run))
    assert "is a test VM" in str(error)
    assert "--destroy-test-vms" in (error.remedy or "")
    assert "precious" in lab.host.machines
    assert simply(lab, adopting(unknown.run, destroy_test_vms=True)).error is None
    assert "precious" not in lab.host.machines
    assert order(lab) == []


def test_a_test_vm_leaves_the_book_where_only_its_journal_was_lost(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    succeed(lab, backup())
    succeed(lab, provision(name="precious"))
    (environment,) = lab.state.environments.all()
    del lab.state.runs[environment.run]
    assert simply(lab, adopting(environment.run, destroy_test_vms=True)).error is None
    assert lab.state.environments.all() == ()
    assert order(lab) == []


def test_what_is_in_the_store_alone_may_be_another_hosts(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    run = RunId("00000000b2")
    lab.store.stage(run, guest="db")
    error = refused(lab, adopting(run))
    assert "another host" in str(error)


def test_adopting_leaves_other_unknown_runs_and_living_ones_alone(tmp_path: Path) -> None:
    lab = stranded(tmp_path, where="hypervisor.resume_clone")(tmp_path / "lab")
    run, other, living = the_run(lab), RunId("00000000b2"), RunId("00000000b3")
    lab.store.stage(other, guest="db")
    world = lab.process()
    journal = world.journals.begin(living, kind=RunKind.BACKUP, guest="mail", at=world.clock.now())
    world.store.stage(living, guest="mail")
    report = adopt(world, Adoption(runs=(run,)))
    assert [told.run for told in report.unknown] == [other]
    assert {(item.run, item.kind) for item in lab.leftovers()} == {
        (other, ResourceKind.STAGING), (living, ResourceKind.STAGING),
    }  # fmt: skip
    journal.close()
