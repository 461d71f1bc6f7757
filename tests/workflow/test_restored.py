"""What was restored is held against this host's retention: as soon as it is there, for as long as was said, and no longer."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from tests.workflow.invocations import Work, backup, pruning, succeed
from tests.workflow.test_replica import WEEK, Site, elsewhere, replicating
from vmsnap.model.history import Action
from vmsnap.model.manifest import Marks, Pin
from vmsnap.model.policy import Policy
from vmsnap.model.report import RestoreOptions, RestoreReport
from vmsnap.model.retention_policy import RetentionPolicy
from vmsnap.ports.clock import Cancel
from vmsnap.testing.world import QuietProgress
from vmsnap.workflow.restore import restore
from vmsnap.workflow.world import World

KEEPS_ALL = Policy(guest="db", retention=RetentionPolicy(keep_last=9))
KEEPS_ONE = Policy(guest="db", retention=RetentionPolicy(keep_last=1))
MONTH = RestoreOptions(keep=timedelta(days=30), owner="bob")
NOT_AT_ALL = RestoreOptions(keep=None, owner="bob")


def restoring(reference: str, *, options: RestoreOptions = WEEK) -> Work:
    def work(world: World, cancel: Cancel) -> RestoreReport:
        return restore(world, reference=reference, options=options, progress=QuietProgress(), cancel=cancel)

    return work


def test_retention_leaves_what_was_restored_until_its_time_is_over(tmp_path: Path) -> None:
    site = Site(tmp_path)
    here, there = site.host("here"), site.host("there")
    for _ in range(2):
        succeed(here, backup(KEEPS_ALL))
        succeed(here, replicating)
    old, new = here.store.snapshots("db")
    for one in (old, new):
        done = elsewhere(there, restoring(one.id)).result
        assert isinstance(done, RestoreReport)
        pin = there.store.find(one.id).marks.pin
        assert pin is not None
        assert done.pin == pin
        assert (pin.owner, pin.reason, pin.until) == ("ann", "restored", pin.since + timedelta(days=7))
    elsewhere(there, pruning(KEEPS_ONE))
    assert [one.id for one in there.store.snapshots("db")] == [old.id, new.id]
    there.clock.sleep(timedelta(days=7, minutes=1))
    elsewhere(there, pruning(KEEPS_ONE))
    assert [one.id for one in there.store.snapshots("db")] == [new.id]


def test_what_is_here_already_is_held_and_no_pin_that_holds_is_lost(tmp_path: Path) -> None:
    here = Site(tmp_path).host("here")
    succeed(here, backup())
    succeed(here, replicating)
    (snapshot,) = here.store.snapshots("db")

    def held(options: RestoreOptions) -> Pin | None:
        done = succeed(here, restoring(snapshot.id, options=options)).result
        assert isinstance(done, RestoreReport)
        assert done.there
        assert done.pin == here.store.find(snapshot.id).marks.pin
        return done.pin

    assert held(NOT_AT_ALL) is None
    first = held(WEEK)
    assert first is not None
    assert first.owner == "ann"
    trail = here.state.history.trail(guest="db", limit=1)[0]
    assert (trail.action, trail.subject, trail.failure) == (Action.PIN, snapshot.id, None)
    assert held(MONTH) == first
    here.clock.sleep(timedelta(days=8))
    second = held(MONTH)
    assert second is not None
    assert second.owner == "bob"
    endless = Pin(owner="eve", reason="audit", since=second.since)
    here.store.mark(snapshot, marks=Marks(pin=endless))
    assert held(WEEK) == endless


def test_without_a_hold_it_is_left_to_retention(tmp_path: Path) -> None:
    site = Site(tmp_path)
    here, there = site.host("here"), site.host("there")
    succeed(here, backup())
    succeed(here, replicating)
    done = elsewhere(there, restoring("db@latest", options=NOT_AT_ALL)).result
    assert isinstance(done, RestoreReport)
    assert done.pin is None
    assert there.store.snapshots("db")[0].marks == Marks()
