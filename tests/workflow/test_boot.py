"""Disks alone are taken; the clone boots, its database recovers, and everything else is as ever."""

from __future__ import annotations

from datetime import timedelta
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
from vmsnap.errors import DeadlineError, IsolationError, PreconditionError
from vmsnap.model.capture import CaptureChoice, Detach
from vmsnap.model.command import CommandResult
from vmsnap.model.policy import CapturePolicy, ClonePolicy, ClusterPolicy, DatabasePolicy, Policy
from vmsnap.model.report import BackupReport
from vmsnap.testing.fake_postgresql import FakeCluster
from vmsnap.testing.faults import Mode
from vmsnap.testing.world import FakeWorld

BOOT = Policy(guest="db", capture=CapturePolicy(mode=CaptureChoice.BOOT))
BOOT_AT_ONCE = Policy(guest="db", capture=CapturePolicy(mode=CaptureChoice.BOOT, detach=Detach.REFLINK))
SYSTEMD = ("systemctl", "is-system-running")


def test_the_manifest_says_that_memory_was_not_captured(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path, disks=2)
    outcome = succeed(lab, backup(BOOT))
    (snapshot,) = lab.store.snapshots("db")
    capture = snapshot.manifest.capture
    assert (capture.mode, capture.memory_captured, capture.ram_bytes) == ("boot", False, 0)
    assert isinstance(outcome.result, BackupReport)
    boot_id = next(point.observed for point in outcome.result.isolation.proof if point.name == "boot id")
    assert "its own; the original's is" in boot_id
    assert {item.method for item in snapshot.manifest.clean.instances} == {"in-guest", "disk"}
    other = succeed(lab, backup())
    assert isinstance(other.result, BackupReport)
    assert other.result.capture.memory_captured


def test_no_place_for_memory_is_made(tmp_path: Path) -> None:
    assert not [
        name
        for name in names_of_calls(FakeWorld(tmp_path), backup(BOOT))
        if "prepare_memory" in name or "release memory" in name
    ]


def test_what_answers_with_the_originals_boot_id_is_not_the_clone(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    guest = lab.host.machines["db"].guest
    guest.boot_id = guest.crashed().boot_id
    outcome = invoke(lab, backup(BOOT))
    assert isinstance(outcome.error, IsolationError)
    assert order(lab) == []


def test_databases_that_never_come_up_are_a_deadline_that_says_why(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    policy = BOOT.model_copy(update={"clone": ClonePolicy(recovery_deadline=timedelta(milliseconds=1))})
    outcome = invoke(lab, backup(policy))
    assert isinstance(outcome.error, DeadlineError)
    assert "starting" in outcome.error.brief
    assert "clone.recovery_deadline" in (outcome.error.remedy or "")
    assert order(lab) == []


def test_the_boot_has_to_be_over_before_databases_are_looked_for(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    lab.host.machines["db"].guest.extra[SYSTEMD] = CommandResult(exit_status=1, stdout=b"starting\n")
    policy = BOOT.model_copy(update={"clone": ClonePolicy(recovery_deadline=timedelta(seconds=30))})
    outcome = invoke(lab, backup(policy))
    assert isinstance(outcome.error, DeadlineError)
    assert "systemd says 'starting'" in outcome.error.brief
    lab.host.machines["db"].guest.extra[SYSTEMD] = CommandResult(exit_status=1, stdout=b"degraded\n")
    succeed(lab, backup(policy))


def test_a_database_of_the_snapshot_before_has_to_come_up(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    second = FakeCluster(data_directory="/srv/pg/two", port=5433, pid=2000)
    lab.host.machines["db"].guest.clusters.append(second)
    succeed(lab, backup(BOOT))
    second.status = ""
    policy = BOOT.model_copy(update={"clone": ClonePolicy(recovery_deadline=timedelta(seconds=30))})
    outcome = invoke(lab, backup(policy))
    assert isinstance(outcome.error, DeadlineError)
    assert "the server on /srv/pg/two" in outcome.error.brief
    assert "[[database.clusters]]" in (outcome.error.remedy or "")
    first = lab.host.machines["db"].guest.clusters[0]
    left = ClusterPolicy(data_directory=first.data_directory, programs=first.programs)
    succeed(lab, backup(BOOT.model_copy(update={"database": DatabasePolicy(clusters=(left,))})))


@pytest.mark.parametrize("setting", ["fsync", "full_page_writes"])
def test_a_recovery_that_proves_nothing_is_refused(tmp_path: Path, setting: str) -> None:
    lab = FakeWorld(tmp_path)
    lab.host.machines["db"].guest.clusters[0].settings[setting] = "off"
    outcome = invoke(lab, backup(BOOT))
    assert isinstance(outcome.error, PreconditionError)
    assert f"{setting} = off" in outcome.error.brief
    assert order(lab) == []
    # With its memory, nothing has to recover.
    succeed(lab, backup())


@pytest.mark.parametrize("mode", list(Mode))
def test_any_fault_until_its_databases_are_found(tmp_path: Path, mode: Mode) -> None:
    """From there on, the run is as any other."""
    trial = Trial(prepare=FakeWorld, work=backup(BOOT_AT_ONCE))
    good = names_of_calls(FakeWorld(tmp_path / "good"), backup(BOOT_AT_ONCE))
    first, last = good.index("hypervisor.settle"), good.index("engine_for")
    numbers = range(first, last + 25)
    assert problems_of_faults(trial, folder=tmp_path, names=good, numbers=numbers, mode=mode) == []
