"""A capture that makes the clone while it goes on: everything else is as ever, whatever goes wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.workflow.invocations import Trial, backup, names_of_calls, problems_of_faults, succeed
from vmsnap.model.capture import CaptureChoice, CaptureMode
from vmsnap.model.policy import CapturePolicy, Policy
from vmsnap.testing.faults import Mode
from vmsnap.testing.world import FakeWorld

INSTANT = Policy(guest="db", capture=CapturePolicy(mode=CaptureChoice.INSTANT))


@pytest.mark.parametrize(
    ("choice", "mode", "reason"),
    [
        (CaptureChoice.INSTANT, CaptureMode.INSTANT, "the policy says so"),
        (CaptureChoice.AUTO, CaptureMode.LIVE, "auto: every fake guest converges"),
    ],
)
def test_the_manifest_says_which_mode_and_why(
    tmp_path: Path, choice: CaptureChoice, mode: CaptureMode, reason: str
) -> None:
    lab = FakeWorld(tmp_path, disks=2)
    succeed(lab, backup(Policy(guest="db", capture=CapturePolicy(mode=choice))))
    (snapshot,) = lab.store.snapshots("db")
    assert (snapshot.manifest.capture.mode, snapshot.manifest.capture.reason) == (mode, reason)


@pytest.mark.parametrize("mode", list(Mode))
def test_any_fault_until_the_clone_runs(tmp_path: Path, mode: Mode) -> None:
    """From there on, the run is as any other."""
    trial = Trial(prepare=FakeWorld, work=backup(INSTANT))
    good = names_of_calls(FakeWorld(tmp_path / "good"), backup(INSTANT))
    first, last = good.index("hypervisor.settle"), good.index("hypervisor.resume_clone")
    numbers = range(first, last + 2)
    assert problems_of_faults(trial, folder=tmp_path, names=good, numbers=numbers, mode=mode) == []
