"""A capture that makes the clone while it goes on: everything else is as ever, whatever goes wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.workflow.invocations import Trial, backup, invoke, recovers, succeed
from vmsnap.model.capture import CaptureChoice, CaptureMode
from vmsnap.model.policy import CapturePolicy, Policy
from vmsnap.testing.faults import DEATHS, Fault, Mode
from vmsnap.testing.world import FakeWorld

INSTANT = Policy(guest="db", capture=CapturePolicy(mode=CaptureChoice.INSTANT))


def names(lab: FakeWorld) -> list[str]:
    outcome = invoke(lab, backup(INSTANT))
    assert outcome.error is None
    return [call.name for call in outcome.calls]


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
    good = names(FakeWorld(tmp_path / "good"))
    first, last = good.index("hypervisor.settle"), good.index("hypervisor.resume_clone")
    problems = []
    for number in range(first, last + 2):
        lab = trial.prepare(tmp_path / f"{number}")
        outcome = invoke(lab, trial.work, Fault(call=number, mode=mode))
        if not outcome.hit:
            assert mode not in DEATHS  # a place inside a driver's operation
            continue
        wrong = [*trial.judge(lab, outcome, mode=mode), *recovers(lab)]
        problems += [f"{good[number]} {mode}: {text}" for text in wrong]
    assert problems == []
