"""Reconcile, and faults in the middle of it: it may die and be run again as often as it likes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.workflow.invocations import (
    TOLD_ONLY,
    Outcome,
    Trial,
    backup,
    destroy,
    invoke,
    provision,
    reconciling,
    recovers,
    simply,
    succeed,
)
from vmsnap.model.ids import RunId
from vmsnap.model.isolation import FencePlan
from vmsnap.model.journal import ResourceKind, RunKind
from vmsnap.model.policy import Policy
from vmsnap.model.report import ReconcileReport
from vmsnap.testing.faults import Fault, Mode
from vmsnap.testing.world import FakeWorld
from vmsnap.workflow.reconcile import reconcile

# Where a process dies, so that as many different things as possible are left.
DEATHS = {
    "in the capture": (backup(), "the source stands still"),
    "with the clone running": (backup(), "hypervisor.resume_clone"),
    "before publishing": (backup(), "store.publish"),
    "in the commit": (backup(), "vda is back, live"),
    "with the environment started": (provision(), "hypervisor.start_environment"),
    "in destroying": (destroy(), "hypervisor.release environment"),
}


def _after_death(folder: Path, *, where: str) -> Callable[[Path], FakeWorld]:
    work, name = DEATHS[where]

    def ready(folder: Path) -> FakeWorld:
        lab = FakeWorld(folder)
        succeed(lab, backup())
        succeed(lab, provision(name="other"))
        if where == "in destroying":
            succeed(lab, provision())
        return lab

    calls = invoke(ready(folder / "to die"), work).calls
    number = next(call.number for call in calls if call.name == name)

    def prepare(folder: Path) -> FakeWorld:
        lab = ready(folder)
        assert invoke(lab, work, Fault(call=number, mode=Mode.DIE_BEFORE)).hit
        return lab

    return prepare


@pytest.mark.parametrize("mode", [Mode.FAIL_BEFORE, Mode.FAIL_AFTER, Mode.BUG_BEFORE, Mode.DIE_BEFORE, Mode.DIE_AFTER])
@pytest.mark.parametrize("where", list(DEATHS))
def test_any_fault_while_reconciling(tmp_path: Path, where: str, mode: Mode) -> None:
    trial = Reconciling(prepare=_after_death(tmp_path, where=where), work=reconciling)

    def afterwards(lab: FakeWorld, outcome: Outcome) -> list[str]:
        wrong = recovers(lab)
        if [environment.name for environment in lab.state.environments.all()] != ["other"]:
            wrong.append("an environment that was kept is gone, or one is back")
        following = simply(lab, backup())
        return wrong if following.error is None else [*wrong, f"the following backup failed: {following.error!r}"]

    trial.every(tmp_path, mode, after=afterwards)
    assert trial.count > 10


class Reconciling(Trial):
    """A trial whose failures are told in a report."""

    def judge(self, lab: FakeWorld, outcome: Outcome, *, mode: Mode) -> list[str]:
        wrong = list(lab.host.violations)
        result = outcome.result
        if isinstance(result, ReconcileReport):
            failures = " ".join(item.failure for item in result.undone if item.failure is not None)
            name = outcome.hit[0].name
            if "injected" not in failures and not name.endswith(".close") and not name.startswith(TOLD_ONLY):
                wrong.append("the fault was swallowed")
            if result.complete == ("injected" in failures):
                wrong.append("complete, and yet something failed")
        elif outcome.error is None:
            wrong.append("neither a report nor an error")
        return wrong


def test_it_says_what_it_undid_in_the_order_of_undoing(tmp_path: Path) -> None:
    lab = _after_death(tmp_path, where="before publishing")(tmp_path / "lab")
    report = invoke(lab, reconciling).result
    assert isinstance(report, ReconcileReport)
    assert report.complete
    assert len(report.runs) == 1
    kinds = [item.kind for item in report.undone]
    assert kinds == ["staging", "export", "clone", "hints", "fence", "clone-overlays", "source-overlays"]
    again = invoke(lab, reconciling).result
    assert again == ReconcileReport(runs=(), undone=())


def test_what_a_living_run_or_nobody_knows_is_left_alone(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    world = lab.process()
    mine, unknown = RunId("00000000a1"), RunId("00000000b2")
    journal = world.journals.begin(mine, kind=RunKind.BACKUP, guest="db", at=world.clock.now())
    for run in (mine, unknown):
        resource = world.store.staging_resource(run, guest="db")
        if run == mine:
            journal.intend(resource)
        world.store.stage(run, guest="db")
    assert reconcile(world).undone == ()
    assert {item.run for item in world.store.owned()} == {mine, unknown}
    journal.close()
    (undone,) = reconcile(world).undone
    assert (undone.run, undone.kind) == (mine, ResourceKind.STAGING)
    assert {item.run for item in world.store.owned()} == {unknown}


def test_tagged_things_of_a_run_that_is_over_are_removed_without_a_journal_entry(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    world = lab.process()
    run = RunId("00000000a1")
    journal = world.journals.begin(run, kind=RunKind.BACKUP, guest="db", at=world.clock.now())
    journal.finish()
    journal.close()
    world.store.stage(run, guest="db")
    report = reconcile(world)
    assert [(item.run, item.kind) for item in report.undone] == [(run, ResourceKind.STAGING)]
    assert report.runs == (run,)
    assert world.store.owned() == ()


def test_one_guest_only_where_asked(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    lab.add_guest("mail")
    world = lab.process()
    for run, guest in ((RunId("00000000a1"), "db"), (RunId("00000000b2"), "mail")):
        journal = world.journals.begin(run, kind=RunKind.BACKUP, guest=guest, at=world.clock.now())
        journal.intend(world.store.staging_resource(run, guest=guest))
        world.store.stage(run, guest=guest)
        journal.close()
    assert [item.guest for item in reconcile(world, guest="mail").undone] == ["mail"]
    assert [item.guest for item in reconcile(world).undone] == ["db"]


def test_a_fence_without_a_guests_name_goes_with_its_own_guest_only(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    world = lab.process()
    run = RunId("00000000a1")
    journal = world.journals.begin(run, kind=RunKind.BACKUP, guest="db", at=world.clock.now())
    journal.finish()
    journal.close()
    world.fence.build(FencePlan.for_macs(run, guest="db", macs=("52:54:00:00:00:01",)))
    (left,) = world.fence.owned()
    assert left.guest == ""
    assert reconcile(world, guest="mail").undone == ()
    assert [item.kind for item in reconcile(world, guest="db").undone] == [ResourceKind.FENCE]


def test_one_run_that_cannot_be_undone_keeps_no_other_from_it(tmp_path: Path) -> None:
    names = [call.name for call in invoke(FakeWorld(tmp_path / "good"), backup()).calls]
    lab = _two_dead(tmp_path / "lab", names=names)
    # The first run's journal cannot be taken over.
    calls = [call.name for call in invoke(_two_dead(tmp_path / "calls", names=names), reconciling).calls]
    reopened = calls.index("journals.reopen")
    outcome = invoke(lab, reconciling, Fault(call=reopened, mode=Mode.FAIL_BEFORE))
    assert f"call {reopened}" in str(outcome.error)
    assert {item.guest for item in lab.leftovers() if item.kind is ResourceKind.CLONE} == {"db"}
    assert recovers(lab) == []


def _two_dead(folder: Path, *, names: list[str]) -> FakeWorld:
    lab = FakeWorld(folder)
    lab.add_guest("mail")
    for guest in ("db", "mail"):
        fault = Fault(call=names.index("fence.prove"), mode=Mode.DIE_AFTER)
        assert invoke(lab, backup(Policy(guest=guest)), fault).hit
    return lab
