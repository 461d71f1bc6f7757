"""A backup, with every fault at every call it makes to the outside."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.workflow.invocations import (
    POLICY,
    TOLD_ONLY,
    Outcome,
    Trial,
    backup,
    invoke,
    order,
    recovers,
    simply,
    succeed,
)
from vmsnap.engines.pg_control import ClusterState
from vmsnap.errors import CancelledError, CleanupError, ExitCode, GuestCommandError, NotCleanError, VmsnapError
from vmsnap.model.isolation import Rung
from vmsnap.model.policy import DatabasePolicy, IsolationPolicy, Policy
from vmsnap.testing.fake_network import FakeAddressing, RungOutcome
from vmsnap.testing.faults import DEATHS, Fault, Mode
from vmsnap.testing.world import FakeWorld


@pytest.mark.parametrize("mode", list(Mode))
def test_any_fault_at_any_call(tmp_path: Path, mode: Mode) -> None:
    disks = 2 if mode in DEATHS else 1
    trial = Trial(prepare=lambda folder: FakeWorld(folder, disks=disks), work=backup())
    trial.every(tmp_path, mode, after=_afterwards)
    assert trial.count > 100


def _dirty(folder: Path) -> FakeWorld:
    """Return a world whose guest's database stops as if it had been killed."""
    lab = FakeWorld(folder)
    lab.host.machines["db"].guest.clusters[0].stops_as = ClusterState.IN_PRODUCTION
    return lab


def _afterwards(lab: FakeWorld, outcome: Outcome) -> list[str]:
    wrong = recovers(lab)
    published = [call.number for call in outcome.calls if call.name == "store.publish"]
    stored = lab.store.snapshots("db")
    if stored and not published:
        wrong.append("there is a snapshot that was never published")
    if stored and isinstance(outcome.error, CancelledError):
        wrong.append("cancelled, and yet there is a snapshot")
    if not stored and outcome.error is None:
        wrong.append("done, and yet there is no snapshot")
    following = simply(lab, backup())
    if following.error is not None:
        wrong.append(f"the following backup failed: {following.error!r}")
    elif len(lab.store.snapshots("db")) != len(stored) + 1:
        wrong.append("the following backup stored nothing")
    return wrong


ALWAYS_HOT_PLUG = Policy(guest="db", isolation=IsolationPolicy(address="always", ladder=(Rung.HOT_PLUG,)))


def _pluggable(folder: Path) -> FakeWorld:
    lab = FakeWorld(folder)
    lab.addressing = FakeAddressing({Rung.HOT_PLUG: RungOutcome("198.18.7.10")})
    return lab


@pytest.mark.parametrize("mode", list(Mode))
def test_any_fault_while_a_card_is_plugged_anew(tmp_path: Path, mode: Mode) -> None:
    good = invoke(_pluggable(tmp_path / "good"), backup(ALWAYS_HOT_PLUG))
    names = [call.name for call in good.calls]
    first, last = names.index("rungs.recall"), names.index("rungs.remember")
    inside = names[first : last + 1]
    replugged = inside.index("hypervisor.replug_nic")
    proven = inside.index("fence.prove", replugged)
    assert inside.index("hypervisor.resume_clone", replugged) > proven, "the clone has its card back, and stands still"
    for number in range(first, last + 1):
        if good.calls[number].inside and mode not in DEATHS:
            continue
        lab = _pluggable(tmp_path / f"{number}")
        outcome = invoke(lab, backup(ALWAYS_HOT_PLUG), Fault(call=number, mode=mode))
        assert outcome.hit
        assert _afterwards(lab, outcome) == [], names[number]


def test_the_following_backup_needs_no_reconcile_by_hand(tmp_path: Path) -> None:
    """A backup undoes what dead runs of its guest left, before it looks at the guest."""
    names = [call.name for call in invoke(FakeWorld(tmp_path / "good"), backup()).calls]
    for name in ("hypervisor.capture", "hypervisor.resume_clone", "store.publish", "hypervisor.source_is_home"):
        lab = FakeWorld(tmp_path / name)
        invoke(lab, backup(), Fault(call=names.index(name), mode=Mode.DIE_AFTER))
        assert lab.unfinished() != ()
        succeed(lab, backup())


# Runs that fail: with the clone off, at the proof; and with the clone running, at a command of the policy's.
FAILING = {
    NotCleanError: (POLICY, ".judge"),
    GuestCommandError: (POLICY.model_copy(update={"database": DatabasePolicy(before_drain=(("false",),))}), ".send"),
}


@pytest.mark.parametrize("mode", [Mode.FAIL_BEFORE, Mode.BUG_BEFORE])
@pytest.mark.parametrize("why", list(FAILING))
def test_an_error_of_the_clean_up_never_hides_why_the_run_failed(
    tmp_path: Path, why: type[VmsnapError], mode: Mode
) -> None:
    policy, last_call = FAILING[why]
    failed = invoke(_dirty(tmp_path / "good"), backup(policy))
    assert isinstance(failed.error, why)
    assert failed.error.also == []
    went_wrong = max(call.number for call in failed.calls if call.name.endswith(last_call))
    problems, count = [], 0
    for call in failed.calls[went_wrong + 1 :]:
        if call.inside or call.name.endswith((".close", ".exit")) or call.name.startswith(TOLD_ONLY):
            continue
        lab = _dirty(tmp_path / f"{call.number}")
        error = invoke(lab, backup(policy), Fault(call=call.number, mode=mode)).error
        count += 1
        if not isinstance(error, why) or not error.also:
            problems.append(f"{call.name}: {error!r}, also {getattr(error, 'also', None)}")
        elif lab.unfinished() == ():
            problems.append(f"{call.name}: the journal says that nothing was left")
        problems += [f"{call.name}: {text}" for text in recovers(lab)]
    assert problems == []
    assert count > 10


def test_stored_but_not_cleaned_up_is_exit_8_and_reconcile_finishes_it(tmp_path: Path) -> None:
    good = invoke(FakeWorld(tmp_path / "good"), backup())
    releases = [call for call in good.calls if ".release " in call.name and call.name != "hypervisor.release memory"]
    assert len(releases) == 6
    for call in releases:
        lab = FakeWorld(tmp_path / f"{call.number}")
        outcome = invoke(lab, backup(), Fault(call=call.number, mode=Mode.FAIL_BEFORE))
        assert isinstance(outcome.error, CleanupError), call.name
        assert outcome.error.exit_code is ExitCode.CLEANUP
        (snapshot,) = lab.store.snapshots("db")
        assert snapshot.id in outcome.error.brief
        assert lab.unfinished() == (snapshot.manifest.run,)
        assert recovers(lab) == [], call.name
        assert lab.store.snapshots("db") == (snapshot,)


def test_a_release_before_its_turn_that_could_not_be_recorded_is_made_again(tmp_path: Path) -> None:
    good = invoke(FakeWorld(tmp_path / "good"), backup())
    early = next(call for call in good.calls if call.name.endswith(".released memory"))
    lab = FakeWorld(tmp_path / "lab")
    outcome = invoke(lab, backup(), Fault(call=early.number, mode=Mode.FAIL_BEFORE))
    assert outcome.error is not None
    assert order(lab) == []


@pytest.mark.parametrize("released", ["clone", "export", "fence", "clone-overlays", "staging"])
def test_production_comes_home_whatever_else_cannot_be_removed(tmp_path: Path, released: str) -> None:
    good = invoke(FakeWorld(tmp_path / "good"), backup())
    call = next(call for call in good.calls if call.name.endswith(f".release {released}"))
    lab = FakeWorld(tmp_path / "lab")
    invoke(lab, backup(), Fault(call=call.number, mode=Mode.BUG_BEFORE))
    assert lab.host.harm() == []


def test_a_fence_stays_as_long_as_its_clone_could_not_be_ended(tmp_path: Path) -> None:
    policy, _ = FAILING[GuestCommandError]
    good = invoke(FakeWorld(tmp_path / "good"), backup(policy))
    call = next(call for call in good.calls if call.name == "hypervisor.release clone")
    lab = FakeWorld(tmp_path / "lab")
    outcome = invoke(lab, backup(policy), Fault(call=call.number, mode=Mode.FAIL_BEFORE))
    assert isinstance(outcome.error, VmsnapError)
    assert {item.kind for item in lab.leftovers()} == {"clone", "clone-overlays", "fence"}
    lab.host.live_on()
    assert lab.host.harm() == []
    assert recovers(lab) == []
