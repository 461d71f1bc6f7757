"""Production goes home right after the capture, where the clone can be put on copies of its disks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.workflow.invocations import (
    Trial,
    backup,
    invoke,
    names_of_calls,
    order,
    problems_of_faults,
    succeed,
)
from vmsnap.errors import PreconditionError
from vmsnap.model.capture import Detach, DiskSnapshot
from vmsnap.model.policy import CapturePolicy, Policy
from vmsnap.model.report import BackupReport
from vmsnap.testing.faults import DEATHS, Mode
from vmsnap.testing.world import FakeWorld

AT_ONCE = Policy(guest="db", capture=CapturePolicy(detach=Detach.REFLINK))
STORAGE = Policy(guest="db", capture=CapturePolicy(disk_snapshot=DiskSnapshot.STORAGE))
AUTO = Policy(guest="db", capture=CapturePolicy(detach=Detach.AUTO))


def test_production_is_home_before_the_clone_is_made(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path, disks=2)
    calls = names_of_calls(lab, backup(AT_ONCE))
    home = calls.index("hypervisor.release source-overlays")
    assert calls.index("hypervisor.capture") < home < calls.index("hypervisor.restore_clone")
    assert calls.count("hypervisor.release source-overlays") == 1
    assert calls.index("hypervisor.release clone") < calls.index("hypervisor.release disk-copies")
    (snapshot,) = lab.store.snapshots("db")
    assert snapshot.manifest.capture.on_overlay_seconds is not None
    assert order(lab) == []


def test_auto_follows_the_file_system(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    assert "hypervisor.prepare_copies" in names_of_calls(lab, backup(AUTO))
    lab.host.has_reflinks = False
    calls = names_of_calls(lab, backup(AUTO))
    assert "hypervisor.prepare_copies" not in calls
    assert calls.index("store.publish") < calls.index("hypervisor.release source-overlays")
    assert [item.manifest.capture.on_overlay_seconds is None for item in lab.store.snapshots("db")] == [False, True]


def test_reflinks_that_are_not_there_end_the_run(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    lab.host.has_reflinks = False
    outcome = invoke(lab, backup(AT_ONCE))
    assert isinstance(outcome.error, PreconditionError)
    assert order(lab) == []


def test_the_operator_is_told(tmp_path: Path) -> None:
    outcome = succeed(FakeWorld(tmp_path), backup(AT_ONCE))
    assert isinstance(outcome.result, BackupReport)
    assert [step.name for step in outcome.result.steps][1:4] == ["capture", "detach", "restore clone"]


def test_with_storage_snapshots_production_never_leaves_its_disks(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path, disks=2)
    calls = names_of_calls(lab, backup(STORAGE))
    assert calls.index("hypervisor.capture") < calls.index("hypervisor.release source-overlays")
    assert calls.index("hypervisor.release clone") < calls.index("hypervisor.release disk-copies")
    (snapshot,) = lab.store.snapshots("db")
    assert snapshot.manifest.capture.on_overlay_seconds == 0.0
    assert order(lab) == []


@pytest.mark.parametrize("policy", [AT_ONCE, STORAGE], ids=["reflinks", "storage"])
@pytest.mark.parametrize("mode", list(Mode))
def test_any_fault_up_to_the_clone_and_at_the_end(tmp_path: Path, mode: Mode, policy: Policy) -> None:
    """In between, the run is as any other."""
    disks = 2 if mode in DEATHS else 1
    trial = Trial(prepare=lambda folder: FakeWorld(folder, disks=disks), work=backup(policy))
    good = names_of_calls(FakeWorld(tmp_path / "good", disks=disks), backup(policy))
    first, clone, stored = (good.index(f"hypervisor.{name}") for name in ("settle", "resume_clone", "release clone"))
    numbers = (*range(first, clone + 1), *range(stored, len(good)))
    assert problems_of_faults(trial, folder=tmp_path, names=good, numbers=numbers, mode=mode) == []
