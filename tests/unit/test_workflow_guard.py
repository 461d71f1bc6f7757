from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from vmsnap.errors import CancelledError, DriverError, IsolationError, NoSpaceError
from vmsnap.testing.faults import FaultCancel
from vmsnap.workflow.guard import ISOLATION_ALARM, IsolationGuard, OverlayGuard

MIB = 1 << 20


class Space:
    """Room on a file system, looked at by the guard; an exception stands for a look that fails."""

    def __init__(self, *seen: int | Exception) -> None:
        self._seen = list(seen)
        self.looks = 0
        self.all_seen = threading.Event()

    def free_bytes(self) -> int:
        self.looks += 1
        seen = self._seen.pop(0) if len(self._seen) > 1 else self._seen[0]
        if len(self._seen) == 1:
            self.all_seen.set()
        if isinstance(seen, Exception):
            raise seen
        return seen


def _guard(space: Space, *, kill: Callable[[], None], cancel: FaultCancel | None = None) -> OverlayGuard:
    return OverlayGuard(
        cancel or FaultCancel(),
        free_bytes=space.free_bytes,
        floor_bytes=512 * MIB,
        kill_clone=kill,
        interval_seconds=0.001,
    )


def test_enough_room_lets_everything_go_on() -> None:
    space = Space(600 * MIB, 513 * MIB, 512 * MIB)
    killed: list[str] = []
    with _guard(space, kill=lambda: killed.append("clone")) as guard:
        assert space.all_seen.wait(10)
        guard.check()
        assert not guard.is_set()
    assert (killed, guard.reason) == ([], None)


def test_too_little_room_ends_the_clone_once_and_stops_the_run() -> None:
    killed = threading.Event()
    count: list[str] = []

    def kill() -> None:
        count.append("clone")
        killed.set()

    with _guard(Space(600 * MIB, 500 * MIB), kill=kill) as guard:
        assert killed.wait(10)
        assert guard.is_set()
        with pytest.raises(NoSpaceError, match="500 MiB"):
            guard.check()
    assert count == ["clone"]
    assert guard.reason is not None
    assert guard.reason.remedy


@pytest.mark.parametrize("error", [DriverError("libvirt is restarting"), OSError("gone"), ZeroDivisionError()])
def test_a_look_that_fails_does_not_end_the_watch(error: Exception) -> None:
    killed = threading.Event()
    with _guard(Space(error, error, 1), kill=killed.set) as guard:
        assert killed.wait(10)
    assert isinstance(guard.reason, NoSpaceError)


def test_ending_the_clone_is_tried_until_it_works() -> None:
    ended = threading.Event()
    failures = [DriverError("libvirt is restarting"), DriverError("libvirt is restarting")]

    def kill() -> None:
        if failures:
            raise failures.pop()
        ended.set()

    with _guard(Space(1, 600 * MIB), kill=kill):
        assert ended.wait(10)


@pytest.mark.parametrize("error", [DriverError("libvirt is restarting"), ZeroDivisionError()])
def test_a_clone_that_cannot_be_ended_still_stops_the_run(error: Exception) -> None:
    tried = threading.Event()

    def kill() -> None:
        tried.set()
        raise error

    with _guard(Space(1), kill=kill) as guard:
        assert tried.wait(10)
    with pytest.raises(NoSpaceError):
        guard.check()


def test_a_signal_passes_through() -> None:
    cancel = FaultCancel()
    with _guard(Space(600 * MIB), kill=lambda: None, cancel=cancel) as guard:
        guard.check()
        cancel.asked = True
        assert guard.is_set()
        with pytest.raises(CancelledError):
            guard.check()


def test_the_watch_is_over_with_the_block() -> None:
    space = Space(600 * MIB)
    with _guard(space, kill=lambda: None):
        pass
    looks = space.looks
    assert "vmsnap-overlay-guard" not in [thread.name for thread in threading.enumerate()]
    assert space.looks == looks


def test_an_alarm_ends_the_clone_once_and_only_the_first_breach_counts() -> None:
    killed: list[str] = []
    guard = IsolationGuard(FaultCancel(), cut=lambda: killed.append("links"), kill_clone=lambda: killed.append("clone"))
    guard.check()
    assert not guard.is_set()
    first, second = IsolationError("a frame got out"), IsolationError("another")
    guard.sound(first)
    guard.sound(second)
    assert killed == ["links", "clone"]
    assert guard.is_set()
    with pytest.raises(IsolationError) as raised:
        guard.check()
    assert raised.value is guard.reason is first


@pytest.mark.parametrize("error", [DriverError("libvirt is restarting"), ZeroDivisionError()])
def test_an_alarm_stops_the_run_even_where_the_clone_cannot_be_ended(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    def kill() -> None:
        raise error

    cuts: list[str] = []
    for cut in (lambda: cuts.append("links"), kill):
        guard = IsolationGuard(FaultCancel(), cut=cut, kill_clone=kill)
        guard.sound(IsolationError("a frame got out"))
        assert guard.is_set()
    assert cuts == ["links"]
    assert [record.getMessage().startswith(ISOLATION_ALARM) for record in caplog.records] == [True] * 5


def test_an_inner_reason_passes_through() -> None:
    cancel = FaultCancel()
    guard = IsolationGuard(cancel, cut=lambda: None, kill_clone=lambda: None)
    cancel.asked = True
    assert guard.is_set()
    with pytest.raises(CancelledError):
        guard.check()
