"""Backups and test VMs over the Hyper-V driver: it dies, or loses the host's answer, at every script and within them.

After each: production is as it was, no moment was found in which the clone could have reached it, and reconcile leaves nothing
on the host: no VM, planned or real, no switch, no folder, no disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.workflow.invocations import (
    Work,
    backup,
    destroy,
    invoke,
    provision,
    reconciling,
    recovers,
    simply,
    succeed,
)
from vmsnap.errors import HostUnreachableError, UnknownOutcomeError, VmsnapError
from vmsnap.testing.faults import DEATHS, Call, Fault, Mode
from vmsnap.testing.hyperv.orphans import Orphanage
from vmsnap.testing.hyperv.world import HyperVWorld

Prepare = Callable[[Path], HyperVWorld]
_PARTS = 4


def _with_snapshot(folder: Path) -> HyperVWorld:
    lab = HyperVWorld(folder)
    succeed(lab, backup())
    return lab


def _with_environment(folder: Path) -> HyperVWorld:
    lab = _with_snapshot(folder)
    succeed(lab, provision())
    return lab


def _two_disks(folder: Path) -> HyperVWorld:
    return HyperVWorld(folder, disks=2)


WORKS: dict[str, tuple[Prepare, Callable[[], Work]]] = {
    "backup": (_two_disks, backup),
    "provision": (_with_snapshot, provision),
    "destroy": (_with_environment, destroy),
}


def _left(lab: HyperVWorld) -> list[str]:
    """Return what is on the host and should not be: environments that are listed may be."""
    if lab.state.environments.all():
        return []
    return [f"on the host: {text}" for text in lab.machine.leftovers()]


def _good(folder: Path, what: str) -> tuple[Call, ...]:
    prepare, work = WORKS[what]
    outcome = invoke(prepare(folder / "good"), work())
    assert outcome.error is None
    return outcome.calls


@pytest.mark.parametrize("part", range(_PARTS))
@pytest.mark.parametrize("what", list(WORKS))
def test_death_at_any_place_within_the_host_and_around_each_script(tmp_path: Path, what: str, part: int) -> None:
    prepare, work = WORKS[what]
    places = [call for call in _good(tmp_path, what) if call.inside]
    problems = []
    for call in places[part::_PARTS]:
        lab = prepare(tmp_path / f"{call.number}")
        outcome = invoke(lab, work(), Fault(call=call.number, mode=Mode.DIE_BEFORE))
        found = [f"harm: {text}" for text in lab.host.harm()]
        found += [*recovers(lab), *_left(lab)]
        if outcome.hit:
            problems += [f"{call.name}: {text}" for text in found]
    assert problems == []
    assert len(places) > 20


@pytest.mark.parametrize("mode", [Mode.FAIL_AFTER, Mode.DIE_AFTER, Mode.CANCEL])
def test_a_fault_at_any_call_of_the_driver_and_its_fence(tmp_path: Path, mode: Mode) -> None:
    """What fails before a call is one of its scripts, or is injected over the fakes."""
    problems = []
    for call in _good(tmp_path, "backup"):
        if call.inside or not call.name.startswith(("hypervisor.", "fence.")):
            continue
        lab = HyperVWorld(tmp_path / f"{call.number}")
        outcome = invoke(lab, backup(), Fault(call=call.number, mode=mode))
        found = [f"harm: {text}" for text in lab.host.harm()]
        if (
            mode not in DEATHS
            and outcome.error is not None
            and not isinstance(outcome.error, VmsnapError | RuntimeError)
        ):
            found.append(f"ended with {outcome.error!r}")
        found += [*recovers(lab), *_left(lab)]
        problems += [f"{call.name} {mode}: {text}" for text in found]
    assert problems == []


class _LosingAnswers:
    """Loses what the host says to the script of this number, counted from 0; ``done``: the script ran all the same."""

    def __init__(self, number: int, *, done: bool) -> None:
        self.number = number
        self.place = "after" if done else "before"
        self.passed = 0
        self.lost = ""

    def __call__(self, place: str) -> None:
        name, _, where = place.partition(": ")
        if where != self.place:
            return
        if self.passed == self.number:
            self.lost = name
            self.passed += 1
            raise UnknownOutcomeError(f"the answer to {name} was lost", remedy="this is a test")
        self.passed += 1


class _Unreachable(_LosingAnswers):
    """Does not reach the host with the script of this number."""

    def __init__(self, number: int) -> None:
        super().__init__(number, done=False)

    def __call__(self, place: str) -> None:
        try:
            super().__call__(place)
        except UnknownOutcomeError as error:
            raise HostUnreachableError("the host cannot be reached", remedy="this is a test") from error


def _lost(
    folder: Path, what: str, losing: Callable[[int], _LosingAnswers]
) -> Iterator[tuple[str, HyperVWorld, object]]:
    """Run the work again and again, each time with another script's answer lost."""
    prepare, work = WORKS[what]
    number = 0
    while True:
        lab = prepare(folder / f"{number}")
        trouble = losing(number)
        lab.script = trouble
        outcome = simply(lab, work())
        if not trouble.lost:
            return
        yield trouble.lost, lab, outcome.error
        number += 1


TROUBLES: dict[str, Callable[[int], _LosingAnswers]] = {
    "done, but no answer": lambda number: _LosingAnswers(number, done=True),
    "not done, and no answer": lambda number: _LosingAnswers(number, done=False),
    "not reached": _Unreachable,
}


@pytest.mark.parametrize("trouble", list(TROUBLES))
@pytest.mark.parametrize("what", list(WORKS))
def test_the_answer_to_any_script_is_lost(tmp_path: Path, what: str, trouble: str) -> None:
    problems, scripts = [], set()
    for name, lab, error in _lost(tmp_path, what, TROUBLES[trouble]):
        scripts.add(name)
        found = [f"harm: {text}" for text in lab.host.harm()]
        if error is None and what == "backup" and len(lab.store.snapshots("db")) != 1:
            found.append("done, and yet there is no snapshot")
        found += [*recovers(lab), *_left(lab)]
        problems += [f"{name}: {text}" for text in found]
    assert problems == []
    assert len(scripts) > 3


class _Restarting(_LosingAnswers):
    """Boots the host anew instead of running the script of this number."""

    def __init__(self, number: int) -> None:
        super().__init__(number, done=False)
        self.restart: Callable[[], None] = lambda: None

    def __call__(self, place: str) -> None:
        try:
            super().__call__(place)
        except UnknownOutcomeError:
            self.restart()
            raise


@pytest.mark.parametrize("what", ["backup", "provision"])
def test_the_host_boots_anew_at_any_script(tmp_path: Path, what: str) -> None:
    """Guests come back by themselves, and a clone does not."""
    prepare, work = WORKS[what]
    problems: list[str] = []
    for number in range(1000):
        lab = prepare(tmp_path / f"{number}")
        trouble = _Restarting(number)
        trouble.restart = lab.machine.restart
        lab.script = trouble
        outcome = simply(lab, work())
        if not trouble.lost:
            assert number > 10
            break
        found = [f"harm: {text}" for text in lab.host.harm()]
        if outcome.error is None and what == "backup" and len(lab.store.snapshots("db")) != 1:
            found.append("done, and yet there is no snapshot")
        found += [*recovers(lab), *_left(lab)]
        problems += [f"{trouble.lost}: {text}" for text in found]
    assert problems == []


@pytest.mark.parametrize("what", list(WORKS))
def test_a_script_goes_on_when_its_client_is_long_dead(tmp_path: Path, what: str) -> None:
    """The client dies in the middle of a script. Others reconcile meanwhile; later the host does the rest of the script.

    Whatever it still makes then is never a clone that could run or reach anybody, and the next to reconcile finds it.
    """
    prepare, work = WORKS[what]
    problems, places = [], []
    for number in range(1000):
        lab = prepare(tmp_path / f"{number}")
        lab.orphanage = Orphanage(lab.machine, number=number)
        outcome = invoke(lab, work())
        orphanage, lab.orphanage = lab.orphanage, None
        if not orphanage.place:
            assert outcome.error is None
            break
        places.append(orphanage.place)
        simply(lab, reconciling)
        orphanage.let_go()
        found = [f"harm: {text}" for text in lab.host.harm()]
        found += [*recovers(lab), *_left(lab)]
        problems += [f"{orphanage.place}: {text}" for text in found]
    assert problems == []
    assert len(places) > 3
