"""What can be told of how long a guest stood still, from looks at it while it was exported."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest

from vmsnap.errors import HostUnreachableError
from vmsnap.hypervisors.hyperv.pauses import PauseWatch, Sample, pause_of


def _samples(*states: str, behind_ms: float = 0.0, step: float = 0.2) -> list[Sample]:
    """Return looks that take 10 ms each; at the last one the uptime is behind."""
    found = []
    for index, state in enumerate(states):
        at = 100.0 + index * step
        late = behind_ms if index == len(states) - 1 else 0.0
        found.append(Sample(began=at, ended=at + 0.01, state=state, uptime_ms=5000.0 + index * step * 1000 - late))
    return found


def test_where_nothing_was_seen_the_export_bounds_the_pause() -> None:
    pause = pause_of(_samples("Running", "Running", "Running"), export_ms=4200.0)
    assert (pause.ms, pause.at_most) == (4200.0, True)
    assert "Hyper-V tells nothing" in pause.parts[0].name


def test_no_looks_at_all_say_no_more() -> None:
    assert pause_of([], export_ms=10.0).at_most


def test_a_state_that_is_not_running_counts_from_the_look_before_to_the_look_after() -> None:
    pause = pause_of(_samples("Running", "Saving", "Saved", "Running", "Running"), export_ms=4200.0)
    assert not pause.at_most
    assert pause.ms == pytest.approx(630.0, abs=1)


def test_an_uptime_that_falls_behind_counts() -> None:
    pause = pause_of(_samples("Running", "Running", behind_ms=30_000.0, step=40.0), export_ms=42_000.0)
    assert not pause.at_most
    assert pause.ms == pytest.approx(30_000.0, abs=20)


def test_no_pause_is_longer_than_the_export() -> None:
    """An uptime that begins anew tells nothing of how long."""
    samples = [
        Sample(began=0.0, ended=0.0, state="Running", uptime_ms=9e9),
        Sample(began=2.0, ended=2.0, state="Running", uptime_ms=0.0),
    ]
    assert pause_of(samples, export_ms=1500.0).ms == 1500.0


def test_a_look_that_fails_is_left_out() -> None:
    def answers() -> Iterator[tuple[str, float]]:
        for number in count():
            if number % 2:
                raise HostUnreachableError("no answer")
            yield "Running", 1000.0

    looks = answers()
    with PauseWatch(lambda: next(looks, ("Running", 1000.0)), interval_seconds=0.001) as watch:
        pass
    assert watch.pause.at_most
    assert watch.started <= watch.ended
