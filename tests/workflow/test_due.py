"""``run --due`` over a fake host: what is due runs, and one guest's trouble is no other's."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.unit.cli_samples import AT, CLEAN, DRAIN, ISOLATION, sample
from tests.workflow.invocations import Outcome as Ending
from tests.workflow.invocations import Work, invoke, order, recovers, simply
from vmsnap.errors import (
    BusyError,
    CancelledError,
    CleanupError,
    ConfigError,
    ExitCode,
    NoSpaceError,
    NotCleanError,
    ToolError,
    VmsnapError,
)
from vmsnap.model.due import DueReport, Limits, Outcome
from vmsnap.model.ids import RunId
from vmsnap.model.journal import RunKind
from vmsnap.model.policy import Policy
from vmsnap.model.report import BackupReport
from vmsnap.model.schedule import FailedAttempt
from vmsnap.model.schedule_policy import SchedulePolicy
from vmsnap.ports.clock import Cancel
from vmsnap.testing.faults import DEATHS, Fault, FaultCancel, Mode
from vmsnap.testing.memory_store import MemoryStore
from vmsnap.testing.world import START, FakeWorld, QuietProgress
from vmsnap.workflow.backup import Backup
from vmsnap.workflow.due import DueRuns, NamedProgress, upcoming_of
from vmsnap.workflow.world import World

MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
BackUp = Callable[[World, Policy, Cancel], BackupReport]


def policy(guest: str = "db", *, enabled: bool = True, **schedule: Any) -> Policy:
    return Policy(guest=guest, enabled=enabled, schedule=SchedulePolicy(**schedule))


def really(world: World, wanted: Policy, cancel: Cancel) -> BackupReport:
    return Backup(world, policy=wanted, progress=QuietProgress(), cancel=cancel).run()


def sample_report(guest: str) -> BackupReport:
    manifest = sample(guest=guest).manifest
    return BackupReport(
        snapshot=manifest.id,
        guest=guest,
        started=AT,
        finished=AT,
        capture=manifest.capture,
        isolation=ISOLATION,
        drain=DRAIN,
        clean=CLEAN,
        store=manifest.store,
        steps=manifest.steps,
    )


def failing_with(error: VmsnapError, *, guest: str = "db") -> BackUp:
    def back_up(world: World, wanted: Policy, cancel: Cancel) -> BackupReport:
        if wanted.guest == guest:
            raise error
        return really(world, wanted, cancel)

    return back_up


def due(*policies: Policy, dry_run: bool = False, limits: Limits | None = None, back_up: BackUp = really) -> Work:
    def work(world: World, cancel: Cancel) -> DueReport:
        runs = DueRuns(
            world,
            policies=policies or (policy(),),
            limits=limits or Limits(),
            back_up=lambda wanted: back_up(world, wanted, cancel),
            progress=QuietProgress(),
            cancel=cancel,
        )
        return runs.run(dry_run=dry_run)

    return work


def report_of(ending: Ending) -> DueReport:
    assert isinstance(ending.result, DueReport), ending.error
    return ending.result


def outcomes(ending: Ending) -> list[tuple[str, Outcome]]:
    return [(entry.guest, entry.outcome) for entry in report_of(ending).entries]


def test_a_due_guest_is_backed_up_once_and_then_again_in_its_time(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    first = simply(lab, due())
    assert outcomes(first) == [("db", Outcome.DONE)]
    (entry,) = report_of(first).entries
    assert entry.report is not None
    assert entry.report.snapshot == lab.store.snapshots("db")[0].id
    assert entry.due is not None
    assert entry.due.reason == "there is no snapshot yet"
    assert entry.following is not None
    assert entry.following.at == lab.store.snapshots("db")[0].manifest.capture.captured + DAY
    assert report_of(first).exit_code is ExitCode.DONE
    again = simply(lab, due())
    assert outcomes(again) == [("db", Outcome.NOT_DUE)]
    assert report_of(again).exit_code is ExitCode.DONE
    lab.clock.sleep(DAY)
    assert outcomes(simply(lab, due())) == [("db", Outcome.DONE)]
    assert len(lab.store.snapshots("db")) == 2
    assert order(lab) == []


def test_the_longest_overdue_is_first_and_a_failing_one_stops_no_other(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    lab.add_guest("second")
    lab.add_guest("third")
    simply(lab, due(policy("third")))
    lab.clock.sleep(HOUR)
    simply(lab, due(policy("second")))
    lab.clock.sleep(DAY)
    policies = (policy("db", enabled=False), policy("ghost"), policy("second"), policy("third"))
    ending = simply(lab, due(*policies))
    assert outcomes(ending) == [
        ("ghost", Outcome.FAILED),
        ("third", Outcome.DONE),
        ("second", Outcome.DONE),
        ("db", Outcome.DISABLED),
    ]
    assert report_of(ending).exit_code is ExitCode.PRECONDITION
    (attempt,) = lab.state.attempts.failures("ghost")
    assert attempt.exit_code == ExitCode.PRECONDITION
    assert "ghost" in attempt.brief
    assert lab.store.snapshots("db") == ()


def test_a_dry_run_begins_nothing_records_nothing_and_takes_no_lock(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    with lab.state.locks.schedule():
        ending = invoke(lab, due(policy(), policy("off", enabled=False), dry_run=True))
    assert outcomes(ending) == [("db", Outcome.DUE), ("off", Outcome.DISABLED)]
    assert report_of(ending).dry_run
    assert not [call.name for call in ending.calls if ".replace" in call.name or ".lock" in call.name]
    assert lab.store.snapshots() == ()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    with lab.state.locks.schedule(), pytest.raises(BusyError) as caught:
        due()(lab.process(), FaultCancel())
    assert caught.value.exit_code is ExitCode.BUSY
    assert lab.store.snapshots() == ()


def test_a_guest_that_somebody_works_on_is_passed_over_without_a_failure(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    lab.add_guest("other")
    with lab.state.locks.guest("db", purpose="provision"):
        report = due(policy("db"), policy("other"))(lab.process(), FaultCancel())
    assert isinstance(report, DueReport)
    assert [(entry.guest, entry.outcome) for entry in report.entries] == [
        ("db", Outcome.SKIPPED),
        ("other", Outcome.DONE),
    ]
    assert report.entries[0].note == "guest 'db' is held by process 1 for provision"
    assert report.exit_code is ExitCode.DONE
    assert lab.state.attempts.failures("db") == ()


def test_busy_in_the_middle_of_a_run_is_a_failure(tmp_path: Path) -> None:
    def back_up(world: World, wanted: Policy, cancel: Cancel) -> BackupReport:
        world.journals.begin(RunId("00000000f1"), kind=RunKind.BACKUP, guest=wanted.guest, at=world.clock.now()).close()
        raise BusyError("the store is locked")

    lab = FakeWorld(tmp_path)
    ending = simply(lab, due(back_up=back_up))
    assert outcomes(ending) == [("db", Outcome.FAILED)]
    assert report_of(ending).exit_code is ExitCode.BUSY
    assert len(lab.state.attempts.failures("db")) == 1


def test_failures_put_the_next_attempt_off_and_a_success_forgets_them(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    broken = due(back_up=failing_with(ToolError("qemu-img failed")))
    for waits in (15, 30, 60):
        ending = simply(lab, broken)
        assert outcomes(ending) == [("db", Outcome.FAILED)]
        assert report_of(ending).exit_code is ExitCode.DRIVER
        following = report_of(ending).entries[0].following
        assert following is not None
        assert following.at is not None
        assert timedelta(0) <= lab.clock.now() - (following.at - waits * MINUTE) < MINUTE
        lab.clock.sleep((waits - 1) * MINUTE)
        assert outcomes(simply(lab, broken)) == [("db", Outcome.NOT_DUE)]
        lab.clock.sleep(2 * MINUTE)
    assert outcomes(simply(lab, due())) == [("db", Outcome.DONE)]
    assert lab.state.attempts.failures("db") == ()


def test_attempts_do_not_pile_up(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    for _ in range(25):
        assert outcomes(simply(lab, due(back_up=failing_with(ToolError("no"))))) == [("db", Outcome.FAILED)]
        lab.clock.sleep(7 * HOUR)
    assert len(lab.state.attempts.failures("db")) == 20


def test_what_was_not_safe_is_not_tried_again_in_this_period(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    ending = simply(lab, due(back_up=failing_with(NotCleanError("not clean"))))
    assert report_of(ending).exit_code is ExitCode.SAFETY
    lab.clock.sleep(23 * HOUR)
    assert outcomes(simply(lab, due())) == [("db", Outcome.NOT_DUE)]
    lab.clock.sleep(2 * HOUR)
    assert outcomes(simply(lab, due())) == [("db", Outcome.DONE)]


def test_a_stored_snapshot_with_something_left_is_told_and_not_repeated(tmp_path: Path) -> None:
    def back_up(world: World, wanted: Policy, cancel: Cancel) -> BackupReport:
        really(world, wanted, cancel)
        raise CleanupError("left something", causes=[ToolError("bridge is busy")])

    lab = FakeWorld(tmp_path)
    ending = simply(lab, due(back_up=back_up))
    assert report_of(ending).exit_code is ExitCode.CLEANUP
    lab.clock.sleep(HOUR)
    assert outcomes(simply(lab, due())) == [("db", Outcome.NOT_DUE)]


def test_the_worst_failure_gives_the_exit_code(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    lab.add_guest("other")

    def back_up(world: World, wanted: Policy, cancel: Cancel) -> BackupReport:
        raise NotCleanError("not clean") if wanted.guest == "db" else ZeroDivisionError

    ending = simply(lab, due(policy("db"), policy("other"), back_up=back_up))
    assert outcomes(ending) == [("db", Outcome.FAILED), ("other", Outcome.FAILED)]
    assert report_of(ending).exit_code is ExitCode.SAFETY
    alone = simply(lab, due(policy("third"), back_up=failing_with(NoSpaceError("full"), guest="third")))
    assert report_of(alone).exit_code is ExitCode.PRECONDITION


def test_a_signal_ends_the_round_and_is_nobodys_failure(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    lab.add_guest("other")

    def back_up(world: World, wanted: Policy, cancel: Cancel) -> BackupReport:
        assert isinstance(cancel, FaultCancel)
        cancel.asked = True
        raise CancelledError("stopped by SIGTERM")

    ending = simply(lab, due(policy("db"), policy("other"), back_up=back_up))
    assert outcomes(ending) == [("db", Outcome.STOPPED), ("other", Outcome.STOPPED)]
    assert report_of(ending).exit_code is ExitCode.DEADLINE
    assert lab.state.attempts.failures("db") == lab.state.attempts.failures("other") == ()


def test_a_window_that_closed_while_others_ran_is_respected(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    lab.add_guest("other")
    window = f"{START:%H:%M}-{START + HOUR:%H:%M}"

    def back_up(world: World, wanted: Policy, cancel: Cancel) -> BackupReport:
        report = really(world, wanted, cancel)
        lab.clock.sleep(2 * HOUR)
        return report

    ending = simply(lab, due(policy("db", windows=(window,)), policy("other", windows=(window,)), back_up=back_up))
    assert outcomes(ending) == [("db", Outcome.DONE), ("other", Outcome.NOT_DUE)]
    assert report_of(ending).entries[1].note == "no longer"
    assert lab.store.snapshots("other") == ()


def test_limits_count_the_runs_of_other_processes(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    going_on = lab.state.journals.begin(RunId("00000000f1"), kind=RunKind.BACKUP, guest="third", at=START)
    here, there = policy("db", storage="san"), policy("third", enabled=False, storage="san")

    def look(limits: Limits) -> tuple[Outcome, str | None]:
        report = due(here, there, dry_run=False, limits=limits)(lab.process(), FaultCancel())
        assert isinstance(report, DueReport)
        return report.entries[0].outcome, report.entries[0].note

    assert look(Limits()) == (
        Outcome.SKIPPED,
        "a run of 'third' goes on, and at most 1 may at a time on this host",
    )
    assert look(Limits(per_host=2)) == (
        Outcome.SKIPPED,
        "a run of 'third' goes on, and at most 1 may at a time on storage 'san'",
    )
    assert look(Limits(per_host=2, per_storage=2)) == (Outcome.DONE, None)
    going_on.close()


class Crowd:
    """Runs that last a while, and the most that went on at a time: in all, and on each storage."""

    def __init__(self, storage: dict[str, str | None], *, expected: int) -> None:
        self.storage = storage
        self.expected = expected
        self.going_on: list[str] = []
        self.most = 0
        self.most_on: Counter[str | None] = Counter()
        self.lock = threading.Lock()

    def back_up(self, world: World, wanted: Policy, cancel: Cancel) -> BackupReport:
        with self.lock:
            self.going_on.append(wanted.guest)
            self.most = max(self.most, len(self.going_on))
            for storage, count in Counter(self.storage[guest] for guest in self.going_on).items():
                self.most_on[storage] = max(self.most_on[storage], count)
        end = time.monotonic() + 5
        while self.most < self.expected and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(0.01)  # for one too many to come in, if it would
        with self.lock:
            self.going_on.remove(wanted.guest)
        if wanted.guest == "g3":
            raise ToolError("g3 is broken")
        return sample_report(wanted.guest)


def test_a_storage_that_a_run_of_the_same_round_uses_is_waited_for(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    guests = [f"g{number}" for number in range(4)]

    def back_up(world: World, wanted: Policy, cancel: Cancel) -> BackupReport:
        # As a real run does: others, and this round too, see it in the journals.
        run = RunId(f"{int(wanted.guest[1:]) + 0xA0:010x}")
        journal = world.journals.begin(run, kind=RunKind.BACKUP, guest=wanted.guest, at=world.clock.now())
        time.sleep(0.02)
        journal.finish()
        journal.close()
        return sample_report(wanted.guest)

    policies = [policy(guest, storage="san") for guest in guests]
    ending = simply(lab, due(*policies, limits=Limits(per_host=3, per_storage=1), back_up=back_up))
    assert outcomes(ending) == [(guest, Outcome.DONE) for guest in guests]


@pytest.mark.parametrize(
    ("now", "outcome", "note"),
    [
        (None, Outcome.DISABLED, "its policy was removed meanwhile"),
        (policy("other", enabled=False), Outcome.DISABLED, None),
        (policy("other", at=("01:00",)), Outcome.DONE, None),
    ],
)
def test_a_policy_that_changed_while_others_ran_counts_as_it_is(
    tmp_path: Path, now: Policy | None, outcome: Outcome, note: str | None
) -> None:
    lab = FakeWorld(tmp_path)
    lab.add_guest("other")
    taken: list[Policy] = []

    def back_up(wanted: Policy) -> BackupReport:
        taken.append(wanted)
        return really(world, wanted, FaultCancel())

    world = lab.process()
    runs = DueRuns(
        world,
        policies=(policy("db"), policy("other")),
        limits=Limits(),
        back_up=back_up,
        progress=QuietProgress(),
        cancel=FaultCancel(),
        reread=lambda guest: policy("db") if guest == "db" else now,
    )
    first, second = runs.run(dry_run=False).entries
    assert (first.guest, first.outcome) == ("db", Outcome.DONE)
    assert (second.guest, second.outcome, second.note) == ("other", outcome, note)
    assert [wanted for wanted in taken if wanted.guest == "other"] == ([now] if outcome is Outcome.DONE else [])


def test_a_policy_that_became_wrong_meanwhile_is_its_guests_failure(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)

    def reread(_: str) -> Policy | None:
        raise ConfigError("db.toml:1: not valid TOML", remedy="correct it")

    runs = DueRuns(
        lab.process(),
        policies=(policy("db"),),
        limits=Limits(),
        back_up=lambda wanted: sample_report(wanted.guest),
        progress=QuietProgress(),
        cancel=FaultCancel(),
        reread=reread,
    )
    report = runs.run(dry_run=False)
    assert report.entries[0].outcome is Outcome.FAILED
    assert report.exit_code is ExitCode.CONFIGURATION


def test_a_policy_removed_while_its_run_goes_on_changes_nothing_for_that_run(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    policies = {"db": policy("db")}

    def back_up(wanted: Policy) -> BackupReport:
        policies.clear()
        return really(world, wanted, FaultCancel())

    world = lab.process()
    runs = DueRuns(
        world,
        policies=(policy("db"),),
        limits=Limits(),
        back_up=back_up,
        progress=QuietProgress(),
        cancel=FaultCancel(),
        reread=policies.get,
    )
    (entry,) = runs.run(dry_run=False).entries
    assert entry.outcome is Outcome.DONE
    assert len(lab.store.snapshots("db")) == 1


def test_a_bug_after_a_run_does_not_hide_what_the_run_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = FakeWorld(tmp_path)

    def back_up(world: World, wanted: Policy, cancel: Cancel) -> BackupReport:
        report = really(world, wanted, cancel)
        monkeypatch.setattr(MemoryStore, "captured", lambda *_: 1 / 0)
        return report

    (entry,) = report_of(simply(lab, due(back_up=back_up))).entries
    assert entry.outcome is Outcome.DONE
    assert entry.following is None


def test_several_at_a_time_stay_within_both_limits(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    storage: dict[str, str | None] = {f"g{number}": ("san", "ssd", None)[number % 3] for number in range(12)}
    crowd = Crowd(storage, expected=4)
    policies = [policy(guest, storage=name) for guest, name in storage.items()]
    ending = simply(lab, due(*policies, limits=Limits(per_host=4, per_storage=1), back_up=crowd.back_up))
    report = report_of(ending)
    assert crowd.most == 4
    assert (crowd.most_on["san"], crowd.most_on["ssd"]) == (1, 1)
    assert crowd.most_on[None] >= 2
    assert sorted(entry.guest for entry in report.entries) == sorted(storage)
    assert {entry.outcome for entry in report.entries if entry.guest != "g3"} == {Outcome.DONE}
    assert report.exit_code is ExitCode.DRIVER
    assert [guest for guest in storage if lab.state.attempts.failures(guest)] == ["g3"]


def test_several_at_a_time_leave_room_for_other_processes(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    going_on = lab.state.journals.begin(RunId("00000000f1"), kind=RunKind.BACKUP, guest="by hand", at=START)
    crowd = Crowd(dict.fromkeys(("a", "b", "c")), expected=1)
    work = due(policy("a"), policy("b"), policy("c"), limits=Limits(per_host=2), back_up=crowd.back_up)
    report = work(lab.process(), FaultCancel())
    assert isinstance(report, DueReport)
    assert crowd.most == 1
    assert [entry.outcome for entry in report.entries] == [Outcome.DONE] * 3
    going_on.close()


def test_a_signal_ends_all_of_several(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)

    def back_up(world: World, wanted: Policy, cancel: Cancel) -> BackupReport:
        assert isinstance(cancel, FaultCancel)
        cancel.asked = True
        raise CancelledError("stopped by SIGTERM")

    work = due(*(policy(guest) for guest in "abcdef"), limits=Limits(per_host=2), back_up=back_up)
    assert {outcome for _, outcome in outcomes(simply(lab, work))} == {Outcome.STOPPED}


def test_lines_of_several_say_whose_they_are() -> None:
    quiet = QuietProgress()
    named = NamedProgress("db", progress=quiet)
    named.step("capture")
    named.note("41 ms")
    named.waiting("work", deadline_seconds=1)
    named.bytes_done(1, 2)
    assert (quiet.steps, quiet.notes) == ([], ["db: capture", "db: 41 ms"])


def test_the_next_runs_of_a_guest(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    runs = upcoming_of(lab.process(), policy(at=("03:00",)), count=3)
    assert [run.at for run in runs][1:] == [START + HOUR, START + HOUR + DAY]
    (never,) = upcoming_of(lab.process(), policy(windows=("2020-01-01",)), count=3)
    assert never.at is None


# Faults at every call


@pytest.mark.parametrize("mode", [Mode.FAIL_BEFORE, Mode.FAIL_AFTER, Mode.BUG_BEFORE, Mode.DIE_BEFORE, Mode.DIE_AFTER])
def test_whatever_goes_wrong_the_guest_has_a_backup_in_the_end_and_is_not_tried_again_at_once(
    tmp_path: Path, mode: Mode
) -> None:
    good = invoke(FakeWorld(tmp_path / "good"), due())
    assert outcomes(good) == [("db", Outcome.DONE)]
    calls = [call for call in good.calls if not call.inside or mode in DEATHS]
    # All calls around the run, and every seventh within, which tests of the backup itself go through one by one.
    own = [call for call in calls if call.name.split(".")[0] in {"attempts", "locks"}]
    assert len(own) > 8
    problems = []
    for call in sorted({call.number: call for call in (*own, *calls[::7])}.values(), key=lambda item: item.number):
        lab = FakeWorld(tmp_path / f"{call.number}")
        invoke(lab, due(), Fault(call=call.number, mode=mode))
        began = bool(lab.state.runs)
        stored = bool(lab.store.snapshots("db"))
        at_once = simply(lab, due())
        if began and not stored and outcomes(at_once) != [("db", Outcome.NOT_DUE)]:
            problems.append(f"{call.name}: tried again at once: {outcomes(at_once)}")
        if stored and outcomes(at_once) != [("db", Outcome.NOT_DUE)]:
            problems.append(f"{call.name}: made a second snapshot")
        lab.clock.sleep(16 * MINUTE)
        simply(lab, due())
        problems += [f"{call.name}: {text}" for text in recovers(lab)]
        if len(lab.store.snapshots("db")) != 1:
            problems.append(f"{call.name}: {len(lab.store.snapshots('db'))} snapshots")
    assert problems == []


def test_a_death_in_a_run_is_remembered(tmp_path: Path) -> None:
    good = invoke(FakeWorld(tmp_path / "good"), due())
    capture = next(call.number for call in good.calls if call.name == "hypervisor.capture")
    lab = FakeWorld(tmp_path / "lab")
    invoke(lab, due(), Fault(call=capture, mode=Mode.DIE_AFTER))
    (attempt,) = lab.state.attempts.failures("db")
    assert attempt == FailedAttempt(began=attempt.began)
    entry = report_of(simply(lab, due())).entries[0]
    assert entry.following is not None
    assert "it did not end in order), so it waits 15m" in entry.following.reason
