"""Provisioning and destroying a test VM, with every fault at every call."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.workflow.invocations import (
    Outcome,
    Trial,
    backup,
    destroy,
    invoke,
    order,
    provision,
    recovers,
    simply,
    succeed,
)
from vmsnap.testing.faults import DEATHS, Fault, Mode
from vmsnap.testing.world import FakeWorld

# After these the environment is there and stays; what fails is only the report.
REPORTING = ("hypervisor.environment_state", "hypervisor.environment_written_bytes")


def _with_snapshot(folder: Path) -> FakeWorld:
    lab = FakeWorld(folder)
    succeed(lab, backup())
    return lab


def _with_environment(folder: Path) -> FakeWorld:
    lab = _with_snapshot(folder)
    succeed(lab, provision())
    return lab


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("network", [None, "default"])
def test_any_fault_while_provisioning(tmp_path: Path, mode: Mode, network: str | None) -> None:
    trial = Trial(prepare=_with_snapshot, work=provision(network=network))

    def afterwards(lab: FakeWorld, outcome: Outcome) -> list[str]:
        wrong = recovers(lab)
        listed = [environment.name for environment in lab.state.environments.all()]
        if outcome.error is None and listed != ["test"]:
            wrong.append("done, and yet there is no environment")
        reported = bool(outcome.hit) and outcome.hit[0].name.startswith(REPORTING)
        if outcome.error is not None and mode not in DEATHS and listed and not reported:
            wrong.append("failed, and yet there is an environment")
        if listed:
            wrong += _problems(lab, outcome=simply(lab, destroy()), what="destroy")
        wrong += _problems(lab, outcome=simply(lab, provision(name="next")), what="the following provision")
        wrong += _problems(lab, outcome=simply(lab, destroy("next")), what="its destroy")
        return wrong + _nothing_left(lab)

    trial.every(tmp_path, mode, after=afterwards)
    assert trial.count > 20


@pytest.mark.parametrize("mode", list(Mode))
def test_any_fault_while_destroying(tmp_path: Path, mode: Mode) -> None:
    trial = Trial(prepare=_with_environment, work=destroy(), all_clean_up=True)

    def afterwards(lab: FakeWorld, outcome: Outcome) -> list[str]:
        wrong = recovers(lab)
        listed = bool(lab.state.environments.all())
        if outcome.error is None and listed:
            wrong.append("done, and yet there is an environment")
        if listed:
            wrong += _problems(lab, outcome=simply(lab, destroy()), what="destroying again")
        return wrong + _nothing_left(lab)

    trial.every(tmp_path, mode, after=afterwards)
    assert trial.count > 15


def test_destroying_may_be_repeated_at_once_after_any_failure(tmp_path: Path) -> None:
    good = invoke(_with_environment(tmp_path / "good"), destroy())
    for call in good.calls:
        if call.inside:
            continue
        lab = _with_environment(tmp_path / f"{call.number}")
        first = invoke(lab, destroy(), Fault(call=call.number, mode=Mode.FAIL_BEFORE))
        if lab.state.environments.all():
            assert simply(lab, destroy()).error is None, call.name
        assert lab.state.environments.all() == (), first
        assert recovers(lab) == [], call.name


@pytest.mark.parametrize("mode", [Mode.FAIL_BEFORE, Mode.DIE_BEFORE])
def test_an_error_after_it_was_kept_undoes_all_of_it(tmp_path: Path, mode: Mode) -> None:
    """Two faults: keeping fails although it is recorded, and then the undoing fails, or dies, at each of its calls."""
    good = invoke(_with_snapshot(tmp_path / "good"), provision())
    keep = next(call.number for call in good.calls if call.name.endswith(".keep"))
    first = Fault(call=keep, mode=Mode.FAIL_AFTER)
    undoing = invoke(_with_snapshot(tmp_path / "undoing"), provision(), first)
    last = max(call.number for call in undoing.calls)
    for number in range(keep + 1, last + 1):
        lab = _with_snapshot(tmp_path / f"{number}")
        outcome = invoke(lab, provision(), first, Fault(call=number, mode=mode))
        name = outcome.calls[number].name
        assert f"injected at call {keep}" in str(outcome.error) or mode in DEATHS, name
        assert recovers(lab) == [], name
        if lab.state.environments.all():
            # It died with the environment complete and kept.
            assert name.endswith(".unkeep"), name
            assert simply(lab, destroy()).error is None
        assert order(lab) == [], name
        assert lab.state.environments.all() == (), name


def _problems(lab: FakeWorld, *, outcome: Outcome, what: str) -> list[str]:
    return [f"{what} failed: {outcome.error!r}"] if outcome.error is not None else list(lab.host.violations)


def _nothing_left(lab: FakeWorld) -> list[str]:
    wrong = [f"left at the end: {item.kind} {item.name}" for owner in lab.owners for item in owner.owned()]
    (snapshot,) = lab.store.snapshots("db")
    return wrong + [f"held at the end by {run}" for run in lab.store.holders(snapshot)]
