"""Pruning, with every fault at every call: what is kept stays, and the next prune finishes the job."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.workflow.invocations import Outcome, Trial, backup, provision, pruning, recovers, simply, succeed
from vmsnap.model.policy import Policy, RetentionPolicy
from vmsnap.testing.faults import Mode
from vmsnap.testing.world import FakeWorld

KEEP_ONE = Policy(guest="db", retention=RetentionPolicy(keep_last=1))


def _with_four_snapshots(folder: Path) -> FakeWorld:
    """Return a world whose second snapshot is in use."""
    lab = FakeWorld(folder)
    for number in range(4):
        succeed(lab, backup())
        if number == 1:
            succeed(lab, provision())
    return lab


@pytest.mark.parametrize("mode", list(Mode))
def test_any_fault_while_pruning(tmp_path: Path, mode: Mode) -> None:
    trial = Trial(prepare=_with_four_snapshots, work=pruning(KEEP_ONE))

    def afterwards(lab: FakeWorld, outcome: Outcome) -> list[str]:
        wrong = recovers(lab)
        simply(lab, pruning(KEEP_ONE))
        (environment,) = lab.state.environments.all()
        ids = [snapshot.id for snapshot in lab.store.snapshots("db")]
        if len(ids) != 2 or ids[0] != environment.snapshot:
            wrong.append(f"after the next prune there are {ids}, in use is {environment.snapshot}")
        return wrong

    trial.every(tmp_path, mode, after=afterwards)
    assert trial.count > 8


def test_pruning_after_a_good_backup_is_a_warning_at_worst(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    lab.store.capacity_bytes = None
    first = succeed(lab, backup(KEEP_ONE))
    succeed(lab, backup(KEEP_ONE))
    assert len(lab.store.snapshots("db")) == 1
    assert first.result not in lab.store.snapshots("db")
