# ruff: noqa: S101 - a test suite, shipped for authors of drivers
"""What every ``ChangeHints`` must do. Subclass ``HintsContract`` and override ``harness`` as a fixture."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Protocol

import pytest

from vmsnap.model.capture import CapturePlan, CaptureSettings
from vmsnap.model.guest import Guest
from vmsnap.model.hints import DiskHint
from vmsnap.model.ids import SnapshotId, new_run_id
from vmsnap.ports.hints import ChangeHints

_DEADLINE = timedelta(seconds=30)
_MOST_OF_ITS_OWN = 4


class HintsHarness(Protocol):
    """What the suite needs: hints, and a guest with two disks of four blocks at least, which writes little by itself."""

    @property
    def hints(self) -> ChangeHints:
        """Return hints as a fresh process has them."""

    def guest(self) -> Guest:
        """Return the guest as it is now."""

    def write(self, target: str, *, block: int) -> None:
        """Let the guest write to a block of a disk."""

    def start_anew(self) -> None:
        """Power the guest off, and start it again."""


def _plan(guest: Guest) -> CapturePlan:
    return CapturePlan(run=new_run_id(), guest=guest, settings=CaptureSettings())


def _snapshot(plan: CapturePlan) -> SnapshotId:
    return SnapshotId(plan.run)


def _read(harness: HintsHarness, since: CapturePlan) -> tuple[DiskHint, ...]:
    return harness.hints.read(_plan(harness.guest()), since=_snapshot(since))


def _blocks(hint: DiskHint) -> set[int]:
    assert hint.written is not None, hint.reason
    assert hint.written.count <= _MOST_OF_ITS_OWN
    return {block for first, count in hint.written.runs() for block in range(first, first + count)}


class HintsContract:
    """The duties of ``vmsnap.ports.hints.ChangeHints``."""

    @pytest.fixture
    def harness(self) -> Iterator[HintsHarness]:
        """Return the harness of the hints under test."""
        raise NotImplementedError

    def test_notes_tell_what_was_written_since_they_began(self, harness: HintsHarness) -> None:
        """They can be read again, by another process, and never tell less than before."""
        guest = harness.guest()
        first, second = _plan(guest), _plan(guest)
        harness.write("vda", block=1)
        harness.hints.begin(first)
        harness.write("vda", block=2)
        harness.hints.begin(second)
        harness.write("vda", block=3)
        disk, other = _read(harness, first)
        assert (disk.target, other.target, disk.since) == ("vda", "vdb", _snapshot(first))
        assert {2, 3} <= _blocks(disk)
        assert 1 not in _blocks(disk)
        assert {2, 3}.isdisjoint(_blocks(other))
        assert {3} <= _blocks(_read(harness, second)[0])
        assert 2 not in _blocks(_read(harness, second)[0])
        harness.write("vdb", block=2)
        assert {2, 3} <= _blocks(_read(harness, first)[0])
        assert 2 in _blocks(_read(harness, first)[1])
        assert set(harness.hints.known_since(guest)) == {_snapshot(first), _snapshot(second)}
        harness.hints.keep(guest, run=None)

    def test_notes_that_nobody_began_are_told_with_the_reason(self, harness: HintsHarness) -> None:
        """And nothing is known of the guest then."""
        for hint in _read(harness, _plan(harness.guest())):
            assert hint.written is None
            assert hint.reason
        assert harness.hints.known_since(harness.guest()) == ()

    def test_of_several_notes_one_is_kept(self, harness: HintsHarness) -> None:
        """The others end, whoever began them. It may be repeated."""
        guest = harness.guest()
        first, second = _plan(guest), _plan(guest)
        harness.hints.begin(first)
        harness.hints.begin(second)
        for _ in range(2):
            harness.hints.keep(guest, run=second.run)
            assert harness.hints.known_since(guest) == (_snapshot(second),)
            assert _read(harness, first)[0].written is None
        for _ in range(2):
            harness.hints.keep(guest, run=None)
            assert harness.hints.known_since(guest) == ()

    def test_released_notes_are_gone(self, harness: HintsHarness) -> None:
        """Whether they were begun or not, and nobody else's."""
        guest = harness.guest()
        first, second = _plan(guest), _plan(guest)
        resource = harness.hints.resource(second)
        harness.hints.release(resource, deadline=_DEADLINE)
        harness.hints.begin(first)
        harness.hints.begin(second)
        for _ in range(2):
            harness.hints.release(resource, deadline=_DEADLINE)
            assert harness.hints.known_since(guest) == (_snapshot(first),)
        harness.hints.release(harness.hints.resource(first), deadline=_DEADLINE)
        assert harness.hints.known_since(guest) == ()

    def test_a_guest_that_was_off_may_have_been_changed_unseen(self, harness: HintsHarness) -> None:
        """So nothing is known of it any more."""
        plan = _plan(harness.guest())
        harness.hints.begin(plan)
        harness.start_anew()
        assert harness.hints.known_since(harness.guest()) == ()
        assert _read(harness, plan)[0].written is None
        harness.hints.release(harness.hints.resource(plan), deadline=_DEADLINE)
