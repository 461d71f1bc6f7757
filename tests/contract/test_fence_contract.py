"""The contract of fences, over the fake."""

from __future__ import annotations

from pathlib import Path

import pytest

import vmsnap
from vmsnap.model.isolation import BEFORE_IT_RUNS, FencePlan, ProofKind
from vmsnap.ports.network import Fence
from vmsnap.testing.fake_network import FakeFence
from vmsnap.testing.fence_contract import FenceContract, FenceHarness


class FakeHarness:
    def __init__(self) -> None:
        self._fake = FakeFence()

    @property
    def fence(self) -> Fence:
        return self._fake

    @property
    def shows(self) -> frozenset[ProofKind]:
        return BEFORE_IT_RUNS

    def end_of(self, plan: FencePlan) -> str:
        return plan.ports[0].tap

    def middle_of(self, plan: FencePlan) -> str:
        return plan.ports[0].bridge

    def attach_clone(self, plan: FencePlan) -> None:
        self._fake.world.fences[plan.run].members |= {port.tap for port in plan.ports}

    def detach_clone(self, plan: FencePlan) -> None:
        if plan.run in self._fake.world.fences:
            self._fake.world.fences[plan.run].members -= {port.tap for port in plan.ports}

    def add_foreign_member(self, plan: FencePlan) -> None:
        self._fake.world.fences[plan.run].members.add("eth1")
        self._fake.world.look(plan.run)

    def lose_rule(self, plan: FencePlan) -> None:
        self._fake.world.fences[plan.run].intact = False
        self._fake.world.look(plan.run)


class TestFakeFence(FenceContract):
    @pytest.fixture
    def harness(self) -> FenceHarness:
        return FakeHarness()


def test_only_the_fence_and_its_fake_make_proofs() -> None:
    root = Path(vmsnap.__file__).parent
    makers = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if "IsolationProof(" in path.read_text(encoding="utf-8")
        and "class IsolationProof" not in path.read_text(encoding="utf-8")
    }
    outside_tests = {maker for maker in makers if not maker.startswith("testing/")}
    assert outside_tests == {"network/fence.py", "hypervisors/hyperv/fence.py"}
