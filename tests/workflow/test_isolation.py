"""What a backup and an environment do when the isolation of their VM cannot be proven, or breaks while it runs."""

from __future__ import annotations

import logging
from ipaddress import IPv4Interface
from pathlib import Path

import pytest

from tests.workflow.invocations import POLICY, Outcome, backup, invoke, order, simply, succeed
from vmsnap.errors import ExitCode, IsolationError
from vmsnap.model.command import Command
from vmsnap.model.isolation import BEFORE_IT_RUNS, WHILE_IT_RUNS, ProofKind
from vmsnap.model.policy import ControlPolicy, EnvironmentPolicy, Policy, SshPolicy
from vmsnap.model.report import BackupReport, ProvisionOptions
from vmsnap.ports.clock import Cancel
from vmsnap.testing.world import FakeWorld, QuietProgress
from vmsnap.workflow.guard import ISOLATION_ALARM
from vmsnap.workflow.provision import Provision
from vmsnap.workflow.world import World

CLONE_ADDRESS = "198.18.7.10"
BY_SSH = Policy(guest="db", control=ControlPolicy(via="ssh", ssh=SshPolicy(key_file="/etc/vmsnap/key")))


def points_of(outcome: Outcome) -> list[tuple[ProofKind | None, str, str]]:
    assert isinstance(outcome.result, BackupReport)
    return [(point.kind, point.name, point.observed) for point in outcome.result.isolation.proof]


def broken(lab: FakeWorld, policy: Policy = POLICY) -> IsolationError:
    """Run a backup whose isolation fails: exit 5, nothing stored, everything undone; return the error."""
    outcome = simply(lab, backup(policy))
    assert isinstance(outcome.error, IsolationError), outcome.error
    assert outcome.error.exit_code is ExitCode.SAFETY
    assert outcome.error.remedy
    assert lab.store.snapshots() == ()
    assert order(lab) == []
    return outcome.error


def test_the_manifest_has_all_points_once(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    points = points_of(succeed(lab, backup()))
    assert {kind for kind, _, _ in points} == BEFORE_IT_RUNS | WHILE_IT_RUNS
    assert len({(kind, name) for kind, name, _ in points}) == len(points)
    observed = {name: text for _, name, text in points}
    assert observed["token"].endswith("read back by agent")
    assert observed["token in the original"] == "is not there"
    assert "as the original's before the capture" in observed["boot id"]
    stored = lab.store.find("db@latest").manifest.isolation.proof
    assert [(point.kind, point.name, point.observed) for point in stored] == points


def test_a_token_stays_in_the_clone_and_in_memory(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    paths: list[str] = []
    lab.host.before_command = lambda _, command: paths.extend(command.argv[1:] if command.argv[0] == "tee" else ())
    succeed(lab, backup())
    assert [path.startswith("/run/") for path in paths] == [True]
    assert lab.host.machines["db"].guest.written == {}


def test_a_breach_at_any_command_ends_the_clone_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, logger="vmsnap")
    commands: list[str] = []
    good = FakeWorld(tmp_path / "good")
    good.host.before_command = lambda name, _: commands.append(name)
    succeed(good, backup())
    assert len(commands) > 10
    for number in range(len(commands)):
        lab = FakeWorld(tmp_path / str(number))
        left = [number]

        def breach(name: str, _command: Command, lab: FakeWorld = lab, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == -1:
                run = lab.host.machines[name].run
                assert run is not None
                lab.network.breach(run, what="a frame from the clone's side of the fence was on the host's link eth0")
                assert name not in lab.host.machines, "the clone ended in the moment of the alarm"

        lab.host.before_command = breach
        caplog.clear()
        assert "eth0" in broken(lab).brief
        alarms = [record for record in caplog.records if record.message.startswith(ISOLATION_ALARM)]
        assert [record.levelno for record in alarms] == [logging.CRITICAL]


def test_a_fence_that_changes_while_the_clone_runs_ends_it(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)

    def flush(name: str, _command: Command) -> None:
        run = lab.host.machines[name].run
        if run is not None and lab.network.fences[run].intact:
            lab.network.fences[run].intact = False
            lab.network.look(run)

    lab.host.before_command = flush
    error = simply(lab, backup()).error
    assert isinstance(error, IsolationError)
    assert "changed while the clone ran" in error.brief
    assert lab.store.snapshots() == ()
    assert lab.leftovers() == ()


def test_an_original_that_falls_silent_stops_the_run(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    lab.network.original_answers = False
    assert "does not answer ARP" in broken(lab).brief


def test_an_original_whose_agent_falls_silent_stops_the_run(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)

    def silence(name: str, command: Command) -> None:
        if name != "db" and command.argv[0] == "tee":
            lab.host.machines["db"].guest.answers = False

    lab.host.before_command = silence
    assert "does not answer by its agent" in broken(lab).brief


def test_an_original_that_lost_its_address_stops_the_run(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)

    def move(name: str, _command: Command) -> None:
        if name != "db":
            lab.host.machines["db"].addresses = (IPv4Interface("10.0.0.77/24"),)

    lab.host.before_command = move
    assert "has lost its address 10.0.0.1" in broken(lab).brief


def test_what_is_no_copy_of_the_original_is_not_drained(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)

    def another_boot(name: str, _command: Command) -> None:
        if name != "db":
            lab.host.machines[name].guest.boot_id = "ffffffff-0000-4000-8000-000000000000"

    lab.host.before_command = another_boot
    assert "boot id" in broken(lab).brief


def test_a_clone_that_takes_no_token_is_not_drained(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)

    def forget(name: str, command: Command) -> None:
        if command.argv[0] == "cat":
            lab.host.machines[name].guest.written.clear()

    lab.host.before_command = forget
    assert "does not have the token" in broken(lab).brief


def test_by_ssh_the_clones_own_agent_carries_the_token(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    with lab.ssh_servers(clone_address=CLONE_ADDRESS):
        observed = {name: text for _, name, text in points_of(succeed(lab, backup(BY_SSH)))}
    assert observed["token"].endswith("read back by ssh")
    assert "262144 were counted at the clone's tap" in observed["connection by ssh"]


def test_by_ssh_without_an_agent_the_clones_tap_tells_who_answers(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    lab.host.machines["db"].has_agent_channel = False
    with lab.ssh_servers(clone_address=CLONE_ADDRESS):
        observed = {name: text for _, name, text in points_of(succeed(lab, backup(BY_SSH)))}
    assert "token" not in observed
    assert "262144 were counted at the clone's tap" in observed["connection by ssh"]
    assert "could not be read" in observed["boot id"]


def test_who_answers_by_ssh_past_the_tap_is_not_drained(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    lab.host.machines["db"].has_agent_channel = False
    lab.network.by_the_tap = False
    with lab.ssh_servers(clone_address=CLONE_ADDRESS):
        assert "is not the clone" in broken(lab, BY_SSH).brief


def test_a_fence_that_cannot_be_watched_lets_no_clone_run(tmp_path: Path) -> None:
    good = invoke(FakeWorld(tmp_path / "good"), backup())
    names = [call.name for call in good.calls]
    order_of = [names.index(name) for name in ("fence.prove", "fence.watch", "hypervisor.resume_clone")]
    assert order_of == sorted(order_of)
    assert names.index("fence.watch().close") < names.index("export.open")


class BreakingProgress(QuietProgress):
    """Lets an environment's fence break when a step begins."""

    def __init__(self, lab: FakeWorld, *, at: str) -> None:
        super().__init__()
        self._lab = lab
        self._at = at

    def step(self, name: str) -> None:
        """Break every watched fence at the step."""
        super().step(name)
        if name == self._at:
            for run, state in self._lab.network.fences.items():
                if state.watch is not None:
                    self._lab.network.breach(run, what="a frame was on the host's link eth0")


@pytest.mark.parametrize("at", ["start", "wait"])
def test_an_environment_whose_fence_breaks_while_it_is_made_is_removed(tmp_path: Path, at: str) -> None:
    lab = FakeWorld(tmp_path)
    succeed(lab, backup())

    def work(world: World, cancel: Cancel) -> object:
        options = ProvisionOptions(name="test", wait=True)
        progress = BreakingProgress(lab, at=at)
        return Provision(world, options=options, policy=EnvironmentPolicy(), progress=progress, cancel=cancel).run(
            "db@latest"
        )

    outcome = simply(lab, work)
    assert isinstance(outcome.error, IsolationError), outcome.error
    assert outcome.error.also == []
    assert order(lab) == []
    assert lab.state.environments.all() == ()
    assert [machine.name for machine in lab.host.machines.values()] == ["db"]
