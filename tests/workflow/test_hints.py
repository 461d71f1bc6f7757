"""Hints of what changed: used where they can be, never believed blindly, and never a reason for a backup to fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.workflow.invocations import backup, invoke, order, recovers, simply, succeed
from vmsnap.engines.pg_control import ClusterState
from vmsnap.errors import NotCleanError
from vmsnap.model.guest import Severity
from vmsnap.model.ids import SnapshotId
from vmsnap.model.manifest import ReadRecord
from vmsnap.model.policy import CapturePolicy, Policy
from vmsnap.model.report import BackupReport
from vmsnap.testing.faults import DEATHS, Fault, Mode
from vmsnap.testing.world import FakeWorld
from vmsnap.workflow.hinting import hint_findings

POLICY = Policy(guest="db")
OFF = Policy(guest="db", capture=CapturePolicy(hints="off"))


@pytest.fixture
def lab(tmp_path: Path) -> FakeWorld:
    return FakeWorld(tmp_path)


def back_up(lab: FakeWorld, policy: Policy = POLICY) -> tuple[SnapshotId, ReadRecord]:
    """Back up, and return the snapshot and how its disk was read."""
    report = succeed(lab, backup(policy)).result
    assert isinstance(report, BackupReport)
    return report.snapshot, report.reads["vda"]


def notes(lab: FakeWorld) -> set[SnapshotId]:
    return {SnapshotId(run) for run in lab.host.machines["db"].notes}


def finding(lab: FakeWorld, policy: Policy = POLICY) -> tuple[Severity, str]:
    world = lab.process()
    (found,) = hint_findings(world, policy=policy, guest=world.hypervisor.inspect("db"))
    lab.end()
    return found.severity, found.message


def test_the_second_backup_reads_what_changed_since_the_first(lab: FakeWorld) -> None:
    assert finding(lab) == (Severity.OK, "the next backup reads everything: there is no earlier snapshot")
    first, read = back_up(lab)
    assert (read.since, read.full_because) == (None, "there is no earlier snapshot of this disk to build upon")
    assert finding(lab) == (Severity.OK, f"the next backup reads only what changed since snapshot {first}")
    second, read = back_up(lab)
    assert (read.since, read.full_because) == (first, None)
    assert notes(lab) == {second}, "notes of snapshots that are built upon no more end"


def test_a_guest_that_was_off_is_read_in_full_once(lab: FakeWorld) -> None:
    back_up(lab)
    lab.host.power_cycle("db")
    second, read = back_up(lab)
    assert read.since is None
    assert "there are no notes since" in str(read.full_because)
    assert back_up(lab)[1].since == second


def test_hints_that_are_off_ask_nothing_and_leave_nothing(lab: FakeWorld) -> None:
    back_up(lab)
    _, read = back_up(lab, OFF)
    assert read.full_because == "the policy says so: capture.hints is off"
    assert lab.host.machines["db"].notes == {}
    assert finding(lab, OFF)[1] == "the next backup reads everything: the policy says so: capture.hints is off"


def test_a_hint_that_was_wrong_is_told_and_no_hint_is_believed_from_then_on(lab: FakeWorld) -> None:
    lab.export.own = ()
    lab.host.machines["db"].notes_miss_writes = True
    back_up(lab)
    report = succeed(lab, backup()).result
    assert isinstance(report, BackupReport)
    assert "block 0 changed" in str(report.reads["vda"].mismatch)
    assert any("a hint of what changed was wrong" in warning for warning in report.warnings)
    for _ in range(2):
        assert finding(lab)[0] is Severity.WARNING
        _, read = back_up(lab)
        assert "hints are not believed" in str(read.full_because)
        assert lab.store.snapshots("db")[-1].manifest.hints_distrusted is not None


def test_trust_comes_back_by_one_backup_without_hints(lab: FakeWorld) -> None:
    test_a_hint_that_was_wrong_is_told_and_no_hint_is_believed_from_then_on(lab)
    back_up(lab, OFF)
    lab.host.machines["db"].notes_miss_writes = False
    snapshot, _ = back_up(lab)
    assert back_up(lab)[1].since == snapshot


def test_a_run_that_fails_leaves_the_notes_of_the_snapshot_before(lab: FakeWorld) -> None:
    first, _ = back_up(lab)
    cluster = lab.host.machines["db"].guest.clusters[0]
    before, cluster.stops_as = cluster.stops_as, ClusterState.IN_PRODUCTION
    assert isinstance(simply(lab, backup()).error, NotCleanError)
    assert notes(lab) == {first}
    cluster.stops_as = before
    assert back_up(lab)[1].since == first


@pytest.mark.parametrize("mode", list(Mode))
def test_no_fault_of_hints_harms_a_backup(tmp_path: Path, mode: Mode) -> None:
    """A backup with hints, with every fault at every call about them; the next backup stores the disk as it is."""
    good = _second(tmp_path / "good")
    calls = [call for call in invoke(good, backup()).calls if "hints" in call.name or "notes" in call.name]
    assert {"hints.begin", "hints.read", "hints.keep"} <= {call.name for call in calls}
    problems = []
    for call in calls:
        if call.inside and mode not in DEATHS:
            continue
        lab = _second(tmp_path / f"{call.number}")
        outcome = invoke(lab, backup(), Fault(call=call.number, mode=mode))
        if call.name in ("hints.begin", "hints.read", "hints.keep") and mode not in (*DEATHS, Mode.CANCEL):
            problems += [f"{call.name}: {error!r}" for error in (outcome.error,) if error is not None]
        problems += [f"{call.name}: {text}" for text in recovers(lab)]
        simply(lab, backup())
        problems += [f"{call.name}, the next: {text}" for text in order(lab)]
        newest = lab.store.snapshots("db")[-1].id
        if notes(lab) != {newest}:
            problems.append(f"{call.name}: notes since {notes(lab)}, and the newest snapshot is {newest}")
    assert problems == []


def _second(folder: Path) -> FakeWorld:
    lab = FakeWorld(folder)
    succeed(lab, backup())
    return lab
