# ruff: noqa: D102, S101 - a test suite, shipped for authors of drivers
"""What every fence must do. Subclass ``FenceContract`` in a test module and override ``harness`` as a fixture."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

import pytest

from vmsnap.errors import BugError, GuestUnreachableError, IsolationError, PreconditionError
from vmsnap.model.guest import Guest, GuestState, Nic
from vmsnap.model.ids import new_run_id
from vmsnap.model.isolation import BEFORE_IT_RUNS, FencePlan, IsolationProof, ProofKind
from vmsnap.model.journal import Resource, ResourceKind
from vmsnap.ports.network import Fence
from vmsnap.testing.threads import no_thread_left

DEADLINE = timedelta(seconds=20)


class FenceHarness(Protocol):
    """What the suite needs beside the fence itself: a hypervisor's hand, and an intruder's."""

    @property
    def fence(self) -> Fence:
        """Return the fence under test."""

    @property
    def shows(self) -> frozenset[ProofKind]:
        """Return what this fence can show before a clone runs: ``BEFORE_IT_RUNS``, or as much of it as its kind allows."""

    def end_of(self, plan: FencePlan) -> str:
        """Return a word by which an error names the clone's missing end of the fence: its first tap, or NIC."""

    def middle_of(self, plan: FencePlan) -> str:
        """Return a word by which an error names what the clone's first NIC is on: a bridge, or a switch."""

    def attach_clone(self, plan: FencePlan) -> None:
        """Do what a hypervisor does when it restores a clone paused: put its taps into the bridges."""

    def detach_clone(self, plan: FencePlan) -> None:
        """Take the clone and its taps away. May be repeated."""

    def add_foreign_member(self, plan: FencePlan) -> None:
        """Put a link that does not belong there into the first bridge. It goes away with ``detach_clone``."""

    def lose_rule(self, plan: FencePlan) -> None:
        """Remove one rule of the fence."""


def fence_plan(*, nics: int = 1) -> FencePlan:
    """Return the plan of a fence for a guest with that many NICs."""
    guest = Guest(
        name="shop db/1",
        uuid="5f0c1f7e-0000-4000-8000-000000000001",
        state=GuestState.RUNNING,
        memory_bytes=1 << 30,
        vcpus=1,
        disks=(),
        nics=tuple(Nic(index=i, mac=f"52:54:00:00:00:{i:02x}", attached_to="production") for i in range(nics)),
        has_agent_channel=True,
    )
    return FencePlan.for_guest(new_run_id(), guest=guest)


class FenceContract:
    """The duties of ``vmsnap.ports.network.Fence``, one test each."""

    @pytest.fixture
    def harness(self) -> FenceHarness:
        """Return the harness of the fence under test."""
        raise NotImplementedError

    def test_names_are_the_same_every_time(self, harness: FenceHarness) -> None:
        plan = fence_plan()
        resource = harness.fence.resource(plan)
        assert resource == harness.fence.resource(plan)
        assert (resource.kind, resource.run, resource.guest) == (ResourceKind.FENCE, plan.run, "shop db/1")
        assert resource.kind in harness.fence.kinds

    @pytest.mark.parametrize("nics", [0, 1, 3])
    def test_a_fence_is_built_proven_and_removed(self, harness: FenceHarness, nics: int) -> None:
        plan = fence_plan(nics=nics)
        harness.fence.build(plan)
        assert plan.run in _owned_runs(harness)
        harness.attach_clone(plan)
        proof = harness.fence.prove(plan)
        assert proof.run == plan.run
        assert proof.made.tzinfo is not None
        assert proof.points
        harness.detach_clone(plan)
        harness.fence.release(harness.fence.resource(plan), deadline=DEADLINE)
        assert plan.run not in _owned_runs(harness)

    def test_what_is_owned_can_be_released(self, harness: FenceHarness) -> None:
        plan = fence_plan()
        harness.fence.build(plan)
        for resource in harness.fence.owned():
            if resource.run == plan.run:
                harness.fence.release(resource, deadline=DEADLINE)
        assert plan.run not in _owned_runs(harness)

    def test_release_may_be_repeated_and_is_content_with_never_made(self, harness: FenceHarness) -> None:
        plan = fence_plan()
        resource = harness.fence.resource(plan)
        harness.fence.release(resource, deadline=DEADLINE)
        harness.fence.build(plan)
        bare = Resource(kind=ResourceKind.FENCE, run=plan.run, guest="", name=resource.name)
        harness.fence.release(bare, deadline=DEADLINE)
        harness.fence.release(resource, deadline=DEADLINE)
        assert plan.run not in _owned_runs(harness)

    def test_release_works_with_the_clone_still_there(self, harness: FenceHarness) -> None:
        plan = fence_plan()
        harness.fence.build(plan)
        harness.attach_clone(plan)
        harness.fence.release(harness.fence.resource(plan), deadline=DEADLINE)
        assert plan.run not in _owned_runs(harness)
        harness.detach_clone(plan)

    def test_a_fence_is_not_built_twice(self, harness: FenceHarness) -> None:
        plan = fence_plan()
        harness.fence.build(plan)
        with pytest.raises(PreconditionError):
            harness.fence.build(plan)
        harness.fence.release(harness.fence.resource(plan), deadline=DEADLINE)

    def test_nothing_is_proven_before_it_is_built(self, harness: FenceHarness) -> None:
        with pytest.raises(IsolationError):
            harness.fence.prove(fence_plan())

    def test_nothing_is_proven_without_the_clones_taps(self, harness: FenceHarness) -> None:
        plan = fence_plan()
        harness.fence.build(plan)
        with pytest.raises(IsolationError, match=harness.end_of(plan)):
            harness.fence.prove(plan)
        harness.fence.release(harness.fence.resource(plan), deadline=DEADLINE)

    def test_a_foreign_member_is_noticed(self, harness: FenceHarness) -> None:
        plan = fence_plan()
        harness.fence.build(plan)
        harness.attach_clone(plan)
        harness.add_foreign_member(plan)
        with pytest.raises(IsolationError, match=harness.middle_of(plan)):
            harness.fence.prove(plan)
        harness.detach_clone(plan)
        harness.fence.release(harness.fence.resource(plan), deadline=DEADLINE)

    def test_a_fence_that_was_cut_lets_nothing_pass_and_is_removed(self, harness: FenceHarness) -> None:
        plan = fence_plan()
        harness.fence.cut(plan)
        harness.fence.build(plan)
        harness.attach_clone(plan)
        harness.fence.prove(plan)
        for _ in range(2):
            harness.fence.cut(plan)
        with pytest.raises(IsolationError):
            harness.fence.prove(plan)
        harness.detach_clone(plan)
        harness.fence.release(harness.fence.resource(plan), deadline=DEADLINE)

    def test_a_lost_rule_is_noticed(self, harness: FenceHarness) -> None:
        plan = fence_plan()
        harness.fence.build(plan)
        harness.attach_clone(plan)
        harness.lose_rule(plan)
        with pytest.raises(IsolationError):
            harness.fence.prove(plan)
        harness.detach_clone(plan)
        harness.fence.release(harness.fence.resource(plan), deadline=DEADLINE)

    def test_two_fences_do_not_disturb_each_other(self, harness: FenceHarness) -> None:
        first, second = fence_plan(), fence_plan()
        for plan in (first, second):
            harness.fence.build(plan)
            harness.attach_clone(plan)
        harness.fence.prove(first)
        harness.fence.release(harness.fence.resource(first), deadline=DEADLINE)
        harness.detach_clone(first)
        harness.fence.prove(second)
        harness.detach_clone(second)
        harness.fence.release(harness.fence.resource(second), deadline=DEADLINE)
        assert not {first.run, second.run} & _owned_runs(harness)

    @pytest.mark.parametrize("nics", [1, 2])
    def test_the_proof_says_everything_that_can_be_said_before_a_clone_runs(
        self, harness: FenceHarness, nics: int
    ) -> None:
        plan = fence_plan(nics=nics)
        with _proven(harness, plan=plan) as proof:
            assert {point.kind for point in proof.points} == harness.shows
            assert ProofKind.TOPOLOGY in harness.shows <= BEFORE_IT_RUNS
            assert all(point.name and point.observed for point in proof.points)

    def test_a_watch_says_what_only_a_running_clone_can_show(self, harness: FenceHarness) -> None:
        plan = fence_plan()
        alarms: list[IsolationError] = []
        with _proven(harness, plan=plan) as proof:
            watch = harness.fence.watch(plan, proof=proof, alarm=alarms.append)
            assert {point.kind for point in watch.observed()} == {ProofKind.PRODUCTION}
            assert {point.kind for point in watch.original()} == {ProofKind.ORIGINAL}
            assert watch.passed_bytes() >= 0
            watch.close()
            watch.close()
        assert alarms == []

    def test_a_fence_of_an_environment_has_no_original(self, harness: FenceHarness) -> None:
        plan = FencePlan.for_macs(new_run_id(), guest="shop db/1", macs=("52:54:00:00:00:07",))
        with _proven(harness, plan=plan) as proof:
            watch = harness.fence.watch(plan, proof=proof, alarm=lambda _: None)
            assert watch.original() == ()
            watch.close()

    @pytest.mark.parametrize("change", ["lose_rule", "add_foreign_member"])
    def test_a_change_sounds_the_alarm_once_within_a_second(self, harness: FenceHarness, change: str) -> None:
        plan = fence_plan()
        alarms: list[IsolationError] = []
        heard = threading.Event()

        def alarm(breach: IsolationError) -> None:
            alarms.append(breach)
            heard.set()

        with _proven(harness, plan=plan) as proof:
            watch = harness.fence.watch(plan, proof=proof, alarm=alarm)
            getattr(harness, change)(plan)
            assert heard.wait(1)
            for look in (watch.observed, watch.original):
                with pytest.raises(IsolationError):
                    look()
            watch.close()
        assert len(alarms) == 1
        assert alarms[0].remedy

    @pytest.mark.parametrize("change", ["lose_rule", "add_foreign_member"])
    def test_a_watch_does_not_begin_over_a_fence_that_changed_since_its_proof(
        self, harness: FenceHarness, change: str
    ) -> None:
        plan = fence_plan()
        with no_thread_left(), _proven(harness, plan=plan) as proof:
            getattr(harness, change)(plan)
            with pytest.raises(IsolationError):
                harness.fence.watch(plan, proof=proof, alarm=lambda _: None)

    def test_a_clone_that_is_gone_is_no_alarm(self, harness: FenceHarness) -> None:
        plan = fence_plan()
        alarms: list[IsolationError] = []
        with _proven(harness, plan=plan) as proof:
            watch = harness.fence.watch(plan, proof=proof, alarm=alarms.append)
            harness.detach_clone(plan)
            time.sleep(0.3)
            assert watch.observed()
            watch.close()
        assert alarms == []

    def test_a_proof_of_another_fence_begins_no_watch(self, harness: FenceHarness) -> None:
        plan, other = fence_plan(), fence_plan()
        with _proven(harness, plan=plan) as proof, pytest.raises(BugError):
            harness.fence.watch(other, proof=proof, alarm=lambda _: None)

    def test_the_connector_reaches_nobody_in_an_empty_fence(self, harness: FenceHarness) -> None:
        plan = fence_plan()
        harness.fence.build(plan)
        with no_thread_left(), pytest.raises(GuestUnreachableError):
            harness.fence.connector(plan)("198.18.0.10", 22, timedelta(seconds=0.2))
        harness.fence.release(harness.fence.resource(plan), deadline=DEADLINE)


@contextmanager
def _proven(harness: FenceHarness, *, plan: FencePlan) -> Iterator[IsolationProof]:
    harness.fence.build(plan)
    harness.attach_clone(plan)
    try:
        yield harness.fence.prove(plan)
    finally:
        harness.detach_clone(plan)
        harness.fence.release(harness.fence.resource(plan), deadline=DEADLINE)


def _owned_runs(harness: FenceHarness) -> set[str]:
    return {resource.run for resource in harness.fence.owned()}
