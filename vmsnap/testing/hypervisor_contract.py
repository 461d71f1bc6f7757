# ruff: noqa: S101 - a test suite, shipped for authors of drivers
"""What every hypervisor's driver must do. Subclass ``HypervisorContract`` and override ``harness`` as a fixture.

Over a real hypervisor each test that captures costs a minute or so: there are few, and each looks at much.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Protocol

import pytest

from vmsnap.errors import (
    BugError,
    EnvironmentNotFoundError,
    GuestNotFoundError,
    NotCleanError,
    PreconditionError,
    VmsnapError,
)
from vmsnap.model.capture import Capture, CaptureMode, CapturePlan, CaptureSettings, Clone, DiskImage, DiskSnapshot
from vmsnap.model.environment import EnvironmentPlan
from vmsnap.model.guest import GuestState, Severity
from vmsnap.model.ids import RunId, new_run_id
from vmsnap.model.isolation import FencePlan, IsolationProof, ProofKind, ProofPoint
from vmsnap.model.journal import Resource, ResourceKind
from vmsnap.ports.hypervisor import Hypervisor
from vmsnap.ports.network import Fence
from vmsnap.testing.cancels import NeverCancelled

DEADLINE = timedelta(minutes=2)
ANSWER = timedelta(seconds=20)
"""How long a guest may take to answer ``require_answer``."""
_OVERLAYS = frozenset({ResourceKind.SOURCE_OVERLAYS, ResourceKind.CLONE_OVERLAYS, ResourceKind.MEMORY})


@dataclass(frozen=True, kw_only=True)
class Manner:
    """In what hypervisors differ and may differ. The defaults are those of QEMU's overlays.

    ``prepared``: what a capture is prepared with that can be found by its tag. ``leaves_home``: a captured guest is not on
    its own disks until its overlays are released. ``replugs``: network cards can be pulled out of a running clone.
    ``waits``: how a VM that is going to boot waits for the proof of its fence. ``sees_all``: nobody can be at work on a guest
    unseen.
    """

    prepared: frozenset[ResourceKind] = _OVERLAYS
    leaves_home: bool = True
    replugs: bool = True
    waits: GuestState = GuestState.PAUSED
    sees_all: bool = True


class HypervisorHarness(Protocol):
    """What the suite needs beside the driver."""

    @property
    def hypervisor(self) -> Hypervisor:
        """Return the driver under test."""

    @property
    def fence(self) -> Fence:
        """Return a fence that this driver's clones can be put into."""

    @property
    def guest(self) -> str:
        """Return the name of a running guest whose agent answers. The suite leaves it as it was."""

    @property
    def settings(self) -> CaptureSettings:
        """Return settings with which it can be captured."""

    @property
    def manner(self) -> Manner:
        """Return how this hypervisor goes about it."""

    def another_process(self) -> Hypervisor:
        """Return a driver that knows nothing of what the other did, as the next process has."""

    def require_answer(self, domain: str) -> None:
        """Raise GuestUnreachableError where the guest of a running VM does not answer by the hypervisor's own line."""

    def stored_images(self) -> tuple[DiskImage, ...]:
        """Return raw or qcow2 images that an environment of the guest can have its overlays over."""


class _Made:
    """A run of the suite: what it makes is released by another process's driver, whatever happens."""

    def __init__(self, harness: HypervisorHarness) -> None:
        self.harness = harness
        self.run: RunId = new_run_id()
        self.hypervisor = harness.hypervisor
        self.guest = harness.hypervisor.inspect(harness.guest)
        self.settings = harness.hypervisor.settle(self.guest, settings=harness.settings)
        choice = harness.hypervisor.choose_mode(self.guest, settings=self.settings)
        self.plan = CapturePlan(run=self.run, guest=self.guest, settings=self.settings, choice=choice)
        self.fence = FencePlan.for_guest(self.run, guest=self.guest)
        self.resources: list[Resource] = []

    @property
    def on_copies(self) -> bool:
        return self.settings.on_copies

    def prepare(self) -> None:
        hypervisor, plan = self.hypervisor, self.plan
        for resource, make in (
            (hypervisor.overlays_resource(plan), hypervisor.prepare_overlays),
            *(((hypervisor.copies_resource(plan), hypervisor.prepare_copies),) if self.on_copies else ()),
            (hypervisor.clone_overlays_resource(plan), hypervisor.prepare_clone_overlays),
            *(
                ((hypervisor.memory_resource(plan), hypervisor.prepare_memory),)
                if plan.choice.mode.takes_memory
                else ()
            ),
        ):
            self.resources.append(resource)
            make(plan)

    def capture(self) -> Capture:
        self.prepare()
        self.resources.append(self.harness.fence.resource(self.fence))
        self.harness.fence.build(self.fence)
        self.resources.append(self.hypervisor.clone_resource(self.plan))
        return self.hypervisor.capture(self.plan, fence=self.fence, cancel=NeverCancelled())

    def restore(self) -> Clone:
        self.capture()
        return self.hypervisor.restore_clone(self.plan, fence=self.fence)

    def owned(self) -> set[ResourceKind]:
        return {resource.kind for resource in self.harness.another_process().owned() if resource.run == self.run}

    def release(self, resource: Resource) -> None:
        owner = self.harness.another_process()
        (owner if resource.kind in owner.kinds else self.harness.fence).release(resource, deadline=DEADLINE)

    def release_all(self) -> None:
        for resource in reversed(self.resources):
            self.release(resource)


@contextmanager
def _run(harness: HypervisorHarness) -> Iterator[_Made]:
    made = _Made(harness)
    try:
        yield made
    finally:
        made.release_all()
    assert made.owned() == set()
    after = harness.hypervisor.inspect(harness.guest)
    assert (after.state, after.disks) == (GuestState.RUNNING, made.guest.disks)
    assert harness.hypervisor.source_is_home(made.guest)


class HypervisorContract:
    """The duties of ``vmsnap.ports.hypervisor.Hypervisor``."""

    @pytest.fixture
    def harness(self) -> Iterator[HypervisorHarness]:
        """Return the harness of the driver under test."""
        raise NotImplementedError

    def test_the_host_is_looked_at(self, harness: HypervisorHarness) -> None:
        """It answers, and nothing stands against using it."""
        findings = harness.hypervisor.host_findings()
        assert findings
        assert all(finding.severity is not Severity.REFUSAL for finding in findings)

    def test_a_guest_is_described(self, harness: HypervisorHarness) -> None:
        """All that a run is planned from is there, and the machine can be made again."""
        hypervisor = harness.hypervisor
        assert harness.guest in hypervisor.guests()
        guest = hypervisor.inspect(harness.guest)
        assert (guest.name, guest.state) == (harness.guest, GuestState.RUNNING)
        assert guest.disks
        assert all(disk.size_bytes > 0 for disk in guest.disks)
        assert [nic.index for nic in guest.nics] == list(range(len(guest.nics)))
        assert hypervisor.machine(guest).macs == tuple(nic.mac for nic in guest.nics)
        assert hypervisor.source_is_home(guest)
        refusals = [
            finding
            for finding in hypervisor.findings(guest, settings=harness.settings)
            if finding.severity is Severity.REFUSAL
        ]
        assert refusals == []

    @pytest.mark.parametrize("name", ["no-such-guest", "", "a/../b", "<name>\"&'", "\N{SNOWMAN}" * 300])
    def test_an_unknown_guest_is_refused(self, harness: HypervisorHarness, name: str) -> None:
        """Whatever the name looks like."""
        with pytest.raises(GuestNotFoundError):
            harness.hypervisor.inspect(name)

    def test_who_works_on_a_guest_is_told(self, harness: HypervisorHarness) -> None:
        """Nobody does here, and that is said only where it can be known."""
        for name in (harness.guest, "no-such-guest", ""):
            found = harness.hypervisor.work_on(name)
            assert bool(found) is not harness.manner.sees_all
            assert all(found)

    def test_release_is_content_with_what_was_never_made(self, harness: HypervisorHarness) -> None:
        """A run may die between the intent and the making, of any kind of thing."""
        with _run(harness) as made:
            hypervisor, environment = made.hypervisor, _environment(made, name="never-made")
            resources = (
                hypervisor.memory_resource(made.plan),
                hypervisor.overlays_resource(made.plan),
                hypervisor.clone_overlays_resource(made.plan),
                hypervisor.copies_resource(made.plan),
                hypervisor.clone_resource(made.plan),
                hypervisor.environment_disks_resource(environment),
                hypervisor.environment_resource(environment),
            )
            assert {resource.kind for resource in resources} == hypervisor.kinds
            for resource in resources:
                assert (resource.run, resource.guest) == (made.run, harness.guest)
                made.release(resource)
                made.release(resource)

    def test_release_leaves_alone_what_is_not_the_runs(self, harness: HypervisorHarness) -> None:
        """An environment may have been given a name that somebody's VM has: making it failed, and the VM is not ours."""
        with _run(harness) as made:
            plan = _environment(made, name=harness.guest)
            resource = made.hypervisor.environment_resource(plan)
            images = harness.stored_images()
            made.resources.append(made.hypervisor.environment_disks_resource(plan))
            made.hypervisor.prepare_environment_disks(plan, images=images, nvram=None)
            with pytest.raises(PreconditionError):
                made.hypervisor.define_environment(plan, machine=made.hypervisor.machine(made.guest), fence=None)
            made.release(resource)
            assert harness.hypervisor.inspect(harness.guest).state is GuestState.RUNNING

    def test_prepared_things_are_owned_and_released_before_any_use(self, harness: HypervisorHarness) -> None:
        """They are found by their tags alone, and released from their names alone."""
        with _run(harness) as made:
            made.prepare()
            assert made.owned() == harness.manner.prepared
            assert made.hypervisor.source_is_home(made.guest)
            for resource in _tagged(made):
                made.release(resource)
            assert made.owned() == set()

    def test_a_capture_leaves_the_source_running_and_it_comes_home(self, harness: HypervisorHarness) -> None:
        """The pause is measured, and another process brings the guest home from the journal's entry, twice over."""
        with _run(harness) as made:
            capture = made.capture()
            assert capture.mode is made.plan.choice.mode
            assert capture.reason
            assert made.hypervisor.inspect(harness.guest).state is GuestState.RUNNING
            assert made.hypervisor.source_is_home(made.guest) is not harness.manner.leaves_home
            assert capture.captured.tzinfo is not None
            assert capture.captured <= capture.resumed
            assert 0 < capture.pause_ms <= capture.seconds * 1000 + 1000
            made_meanwhile = {ResourceKind.CLONE} if capture.mode is CaptureMode.INSTANT else set()
            assert made.owned() == harness.manner.prepared | made_meanwhile
            made.release_all()
            assert made.hypervisor.source_is_home(made.guest)

    def test_a_capture_without_a_journal_comes_home_too(self, harness: HypervisorHarness) -> None:
        """The tags say enough."""
        with _run(harness) as made:
            made.capture()
            for resource in _tagged(made):
                made.release(resource)
            assert made.hypervisor.source_is_home(made.guest)

    def test_a_clone_is_made_paused_and_runs_on_proof_of_its_own_fence(self, harness: HypervisorHarness) -> None:
        """It is no guest, it lives beside the running source, shuts down by itself, and its disks can be read."""
        with _run(harness) as made:
            hypervisor = made.hypervisor
            clone = made.restore()
            assert hypervisor.clone_state(clone) is GuestState.PAUSED
            assert made.owned() == {*harness.manner.prepared, ResourceKind.CLONE}
            assert clone.name not in hypervisor.guests()
            with pytest.raises(PreconditionError):
                hypervisor.inspect(clone.name)
            foreign = IsolationProof(
                run=new_run_id(),
                made=datetime.now(UTC),
                points=(ProofPoint(kind=ProofKind.TOPOLOGY, name="another", observed="fence"),),
            )
            with pytest.raises(BugError):
                hypervisor.resume_clone(clone, proof=foreign)
            assert hypervisor.clone_state(clone) is GuestState.PAUSED
            for nic in made.guest.nics:
                hypervisor.set_link(clone.name, mac=nic.mac, up=False)
                hypervisor.set_link(clone.name, mac=nic.mac, up=True)
                with pytest.raises(BugError):
                    hypervisor.set_link(harness.guest, mac=nic.mac, up=False)
            hypervisor.resume_clone(clone, proof=harness.fence.prove(made.fence))
            assert hypervisor.clone_state(clone) is GuestState.RUNNING
            harness.require_answer(clone.name)
            for port in made.fence.ports:
                if not harness.manner.replugs:
                    with pytest.raises(PreconditionError):
                        hypervisor.replug_nic(clone, port=port, deadline=DEADLINE)
                    assert hypervisor.clone_state(clone) is GuestState.RUNNING
                    continue
                hypervisor.replug_nic(clone, port=port, deadline=DEADLINE)
                assert hypervisor.clone_state(clone) is GuestState.PAUSED
                hypervisor.resume_clone(clone, proof=harness.fence.prove(made.fence))
            with pytest.raises(BugError if harness.manner.replugs else PreconditionError):
                hypervisor.replug_nic(
                    clone, port=replace(made.fence.ports[0], mac="52:54:00:00:00:99"), deadline=DEADLINE
                )
            assert hypervisor.overlay_free_bytes(made.plan) > 0
            assert hypervisor.shut_down_clone(clone, agent_answers=True, deadline=DEADLINE, cancel=NeverCancelled())
            images = hypervisor.clone_images(made.plan)
            assert [image.target for image in images] == [disk.target for disk in made.guest.disks]
            assert not {image.path for image in images} & {disk.source for disk in made.guest.disks}
            assert hypervisor.inspect(harness.guest).state is GuestState.RUNNING

    def test_a_clone_that_was_ended_is_not_clean(self, harness: HypervisorHarness) -> None:
        """Only a shutdown by its own guest counts."""
        with _run(harness) as made:
            clone = made.restore()
            made.hypervisor.resume_clone(clone, proof=harness.fence.prove(made.fence))
            made.release(made.hypervisor.clone_resource(made.plan))
            with pytest.raises(NotCleanError):
                made.hypervisor.shut_down_clone(clone, agent_answers=True, deadline=DEADLINE, cancel=NeverCancelled())
            with pytest.raises(GuestNotFoundError):
                made.hypervisor.clone_state(clone)

    def test_an_environment_runs_on_proof_and_is_removed(self, harness: HypervisorHarness) -> None:
        """Defined, then paused, then running; another process ends it."""
        with _run(harness) as made:
            hypervisor = made.hypervisor
            plan = _environment(made, name=f"contract-{made.run}")
            fence = FencePlan.for_macs(made.run, guest=harness.guest, macs=plan.macs)
            machine = hypervisor.machine(made.guest)
            made.resources.append(hypervisor.environment_disks_resource(plan))
            hypervisor.prepare_environment_disks(plan, images=harness.stored_images(), nvram=made.guest.nvram)
            made.resources.append(harness.fence.resource(fence))
            harness.fence.build(fence)
            made.resources.append(hypervisor.environment_resource(plan))
            hypervisor.define_environment(plan, machine=machine, fence=fence)
            assert hypervisor.environment_state(plan.name) is GuestState.SHUT_OFF
            hypervisor.attach_environment(plan, machine=machine, fence=fence)
            assert hypervisor.environment_state(plan.name) is harness.manner.waits
            with pytest.raises(BugError):
                hypervisor.start_environment(plan, proof=None)
            assert hypervisor.environment_state(plan.name) is harness.manner.waits
            hypervisor.start_environment(plan, proof=harness.fence.prove(fence))
            assert hypervisor.environment_state(plan.name) is GuestState.RUNNING
            assert hypervisor.environment_written_bytes(made.run) >= 0
            assert [nic.mac for nic in hypervisor.environment_nics(plan.name)] == list(plan.macs)
            assert made.owned() == {ResourceKind.ENVIRONMENT, ResourceKind.ENVIRONMENT_DISKS}
            assert plan.name not in hypervisor.guests()
            made.release_all()
            with pytest.raises(EnvironmentNotFoundError):
                hypervisor.environment_state(plan.name)

    def test_an_environment_needs_a_network_that_exists(self, harness: HypervisorHarness) -> None:
        """Refused before anything is defined."""
        with _run(harness) as made:
            plan = _environment(made, name=f"contract-{made.run}", network="no-such-network")
            made.resources.append(made.hypervisor.environment_disks_resource(plan))
            made.hypervisor.prepare_environment_disks(plan, images=harness.stored_images(), nvram=None)
            with pytest.raises(VmsnapError):
                made.hypervisor.define_environment(plan, machine=made.hypervisor.machine(made.guest), fence=None)
            assert ResourceKind.ENVIRONMENT not in made.owned()


class CopyingContract:
    """The further duties of a driver whose clones are on copies of the disks: reflinks, or snapshots of their storage."""

    @pytest.fixture
    def harness(self) -> Iterator[HypervisorHarness]:
        """Return the harness of the driver under test."""
        raise NotImplementedError

    def test_copies_are_owned_and_released_before_any_use(self, harness: HypervisorHarness) -> None:
        """They are found by their tags alone, and released from their names alone."""
        with _run(harness) as made:
            assert made.on_copies
            made.prepare()
            by_storage = made.settings.disk_snapshot is DiskSnapshot.STORAGE
            overlays = set() if by_storage else {ResourceKind.SOURCE_OVERLAYS}
            others = {ResourceKind.CLONE_OVERLAYS, ResourceKind.MEMORY, ResourceKind.DISK_COPIES}
            assert made.owned() == overlays | others
            for resource in _tagged(made):
                made.release(resource)
            assert made.owned() == set()

    def test_the_source_is_home_while_its_clone_runs_on_copies(self, harness: HypervisorHarness) -> None:
        """Released before the clone, the source's overlays leave the clone alone; what the run left is found by tags."""
        with _run(harness) as made:
            hypervisor = made.hypervisor
            made.capture()
            made.release(hypervisor.overlays_resource(made.plan))
            assert hypervisor.source_is_home(made.guest)
            clone = hypervisor.restore_clone(made.plan, fence=made.fence)
            hypervisor.resume_clone(clone, proof=harness.fence.prove(made.fence))
            harness.require_answer(clone.name)
            assert hypervisor.overlay_free_bytes(made.plan) > 0
            assert hypervisor.shut_down_clone(clone, agent_answers=True, deadline=DEADLINE, cancel=NeverCancelled())
            images = hypervisor.clone_images(made.plan)
            assert [image.target for image in images] == [disk.target for disk in made.guest.disks]
            assert made.owned() == {ResourceKind.CLONE_OVERLAYS, ResourceKind.DISK_COPIES, ResourceKind.MEMORY}
            for resource in _tagged(made):
                made.release(resource)


class BootingContract:
    """The further duties of a driver that can take disks alone. ``harness.settings`` are of mode ``boot``."""

    @pytest.fixture
    def harness(self) -> Iterator[HypervisorHarness]:
        """Return the harness of the driver under test."""
        raise NotImplementedError

    def test_a_clone_boots_from_the_disks_of_the_capture(self, harness: HypervisorHarness) -> None:
        """No memory is taken or needed; until its fence is proven the clone has executed nothing."""
        with _run(harness) as made:
            hypervisor = made.hypervisor
            assert not made.plan.choice.mode.takes_memory
            capture = made.capture()
            assert hypervisor.inspect(harness.guest).state is GuestState.RUNNING
            assert hypervisor.source_is_home(made.guest) is not harness.manner.leaves_home
            assert (capture.mode, capture.ram_bytes) == (made.plan.choice.mode, 0)
            assert capture.captured <= capture.resumed
            clone = hypervisor.restore_clone(made.plan, fence=made.fence)
            assert hypervisor.clone_state(clone) is harness.manner.waits
            assert made.owned() == (harness.manner.prepared - {ResourceKind.MEMORY}) | {ResourceKind.CLONE}
            hypervisor.resume_clone(clone, proof=harness.fence.prove(made.fence))
            assert hypervisor.clone_state(clone) is GuestState.RUNNING


def _environment(made: _Made, *, name: str, network: str | None = None) -> EnvironmentPlan:
    macs = tuple(f"52:54:00:c0:ff:{nic.index:02x}" for nic in made.guest.nics)
    return EnvironmentPlan(
        run=made.run,
        guest=made.guest.name,
        name=name,
        uuid=f"0b0b0b0b-0000-4000-8000-00{made.run}",
        macs=macs,
        network=network,
    )


def _tagged(made: _Made) -> list[Resource]:
    """Return what another process finds of the run, the source's overlays last."""
    found = [resource for resource in made.harness.another_process().owned() if resource.run == made.run]
    return sorted(found, key=lambda resource: resource.kind is ResourceKind.SOURCE_OVERLAYS)
