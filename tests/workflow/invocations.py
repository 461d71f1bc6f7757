"""Invocations of vmsnap in a fake world: one process each, with faults or without, and what must be true afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vmsnap.errors import CancelledError, CleanupError, VmsnapError
from vmsnap.model.export import ExportPhase
from vmsnap.model.ids import SnapshotId
from vmsnap.model.policy import EnvironmentPolicy, Policy
from vmsnap.model.report import BackupReport, ProvisionOptions, ProvisionReport, ReconcileReport
from vmsnap.ports.clock import Cancel
from vmsnap.testing.faults import DEATHS, Call, Fault, FaultCancel, Faults, Mode
from vmsnap.testing.memory_state import ProcessDied
from vmsnap.testing.world import FakeWorld, QuietProgress
from vmsnap.workflow.backup import Backup
from vmsnap.workflow.provision import Provision, destroy_environment
from vmsnap.workflow.prune import prune
from vmsnap.workflow.reconcile import reconcile
from vmsnap.workflow.world import World

POLICY = Policy(guest="db")
Work = Callable[[World, Cancel], object]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one process did: its result or its error, its calls, and what it held when it ended."""

    result: object
    error: BaseException | None
    calls: tuple[Call, ...]
    hit: tuple[Call, ...]
    held: tuple[str, ...]
    alive: tuple[str, ...]


def backup(policy: Policy = POLICY) -> Work:
    def work(world: World, cancel: Cancel) -> BackupReport:
        return Backup(world, policy=policy, progress=QuietProgress(), cancel=cancel).run()

    return work


def provision(*, name: str = "test", network: str | None = None, wait: bool = False) -> Work:
    def work(world: World, cancel: Cancel) -> ProvisionReport:
        options = ProvisionOptions(name=name, network=network, wait=wait)
        making = Provision(world, options=options, policy=EnvironmentPolicy(), progress=QuietProgress(), cancel=cancel)
        return making.run("db@latest")

    return work


def destroy(name: str = "test") -> Work:
    return lambda world, _cancel: destroy_environment(world, name=name)


def pruning(policy: Policy) -> Work:
    return lambda world, _cancel: prune(world, policy=policy, dry_run=False)


def reconciling(world: World, _cancel: Cancel) -> ReconcileReport:
    return reconcile(world)


def simply(lab: FakeWorld, work: Work) -> Outcome:
    """Run one process without faults, and without counting its calls, which is faster."""
    result: object = None
    error: BaseException | None = None
    try:
        result = work(lab.process(), FaultCancel())
    except (VmsnapError, RuntimeError) as caught:
        error = caught.with_traceback(None)
    held = tuple(lab.state.held)
    lab.end()
    return Outcome(result=result, error=error, calls=(), hit=(), held=held, alive=())


def invoke(lab: FakeWorld, work: Work, *faults: Fault) -> Outcome:
    """Run one process to its end, whatever end that is."""
    going_wrong = Faults(*faults, on_death=lab.state.die)
    result: object = None
    error: BaseException | None = None
    try:
        result = work(lab.process(going_wrong), going_wrong.cancel)
    except (VmsnapError, RuntimeError, ProcessDied) as caught:
        error = caught.with_traceback(None)
    held = tuple(lab.state.held)
    alive = tuple(run for run, known in lab.state.runs.items() if known.owner is not None)
    going_wrong.end()
    lab.end()
    return Outcome(
        result=result, error=error, calls=tuple(going_wrong.calls), hit=tuple(going_wrong.hit), held=held, alive=alive
    )


def names_of_calls(lab: FakeWorld, work: Work) -> list[str]:
    """Return the names of the port calls of work that must succeed, in their order."""
    outcome = invoke(lab, work)
    assert outcome.error is None
    return [call.name for call in outcome.calls]


def succeed(lab: FakeWorld, work: Work) -> Outcome:
    """Run one process that must succeed and leave everything in order."""
    outcome = simply(lab, work)
    if outcome.error is not None:
        raise outcome.error
    assert order(lab) == []
    return outcome


def order(lab: FakeWorld) -> list[str]:
    """Return everything that is not as it should be when no run is going on."""
    wrong = lab.host.harm()
    wrong += [f"left behind: {item.kind} {item.name}" for item in lab.leftovers()]
    wrong += [f"unfinished journal of run {run}" for run in lab.unfinished()]
    wrong += list(_environments(lab))
    for snapshot in lab.store.snapshots():
        wrong += list(_instant(lab, snapshot.id))
    return wrong


def _environments(lab: FakeWorld) -> Iterator[str]:
    """Check that book, journals, host and store agree on the environments."""
    records = {record.run: record for record in lab.state.journals.records()}
    snapshots = {snapshot.id: snapshot for snapshot in lab.store.snapshots()}
    listed = lab.state.environments.all()
    for environment in listed:
        if records[environment.run].kept_for != environment.name:
            yield f"{environment.name} is listed but not kept"
        machine = lab.host.machines.get(environment.name)
        if machine is None or machine.run != environment.run:
            yield f"{environment.name} is listed but there is no such VM"
        if environment.network is None and environment.run not in lab.network.fences:
            yield f"{environment.name} has lost its fence"
        export = lab.exports.status(environment.run)
        if export is not None:  # straight from the replica, where it is held until all of it is here
            if (environment.run in lab.exports.held) != (export.phase is not ExportPhase.LOCAL):
                yield f"{environment.name} does not hold its snapshot in the replica as it should"
            continue
        snapshot = snapshots.get(environment.snapshot)
        if snapshot is None or environment.run not in lab.store.holders(snapshot):
            yield f"{environment.name} does not hold its snapshot"
    for record in records.values():
        if record.kept_for is not None and record.run not in {environment.run for environment in listed}:
            yield f"run {record.run} is kept for {record.kept_for}, which is not listed"


def _instant(lab: FakeWorld, snapshot_id: SnapshotId) -> Iterator[str]:
    """Check that a snapshot holds its guest's writes up to one instant, all of them and none after."""
    snapshot = lab.store.find(snapshot_id)
    guest = lab.host.machines[snapshot.manifest.guest]
    instants = set()
    for disk in snapshot.manifest.disks:
        stored = {word for word in lab.stored_writes(snapshot, target=disk.target) if _writer(word) == guest.name}
        last = max(map(_number, stored))
        instants.add(last)
        due = {w for w in guest.promised if w.split("/")[1] == disk.target and _number(w) <= last}
        if stored != due:
            yield f"snapshot {snapshot_id} lacks {len(due - stored)} writes on {disk.target}"
    if len(instants) > 1:
        yield f"the disks of snapshot {snapshot_id} are of different instants"


def _writer(word: str) -> str:
    return word.split("/", maxsplit=1)[0]


def _number(word: str) -> int:
    return int(word.rsplit("/", maxsplit=1)[1])


# A fault in these may leave something for reconcile: they are the clean-up itself.
CLEAN_UP = (
    ".release",
    ".released",
    ".finish",
    ".close",
    ".unkeep",
    ".source_is_home",
    ".exit",
    "journals.begin",
)


# Courtesies: what was not closed ends with the process, and a note is for people.
TOLERATED = (".close", ".note")
# The history tells what happened, and decides nothing; hints save reading, and without them everything is read.
TOLD_ONLY = ("history.", "hints.resource", "hints.begin", "hints.read", "hints.keep")


@dataclass
class Trial:
    """A good invocation, repeated with every fault at every call. ``count`` is how many faults were injected.

    ``all_clean_up``: the whole invocation is clean-up, so that a failure may leave something for reconcile anywhere.
    """

    prepare: Callable[[Path], FakeWorld]
    work: Work
    all_clean_up: bool = False
    count: int = 0
    problems: list[str] = field(default_factory=list)

    def run(self, folder: Path, mode: Mode, *, after: Callable[[FakeWorld, Outcome], list[str]]) -> list[str]:
        """Inject ``mode`` at every call; return what went wrong, each line naming the call."""
        good = invoke(self.prepare(folder / "good"), self.work)
        assert good.error is None
        for call in good.calls:
            if call.inside and mode not in DEATHS:
                continue
            lab = self.prepare(folder / f"{call.number}")
            outcome = invoke(lab, self.work, Fault(call=call.number, mode=mode))
            self.count += 1
            found = [f"{call.name} was not reached"] if not outcome.hit else []
            found += self.judge(lab, outcome, mode=mode)
            found += after(lab, outcome)
            self.problems += [f"call {call.number} {call.name} {mode}: {text}" for text in found]
        return self.problems

    def every(self, folder: Path, mode: Mode, *, after: Callable[[FakeWorld, Outcome], list[str]]) -> None:
        """As ``run``; fail where anything went wrong."""
        problems = self.run(folder, mode, after=after)
        assert not problems, "\n".join(problems)

    def judge(self, lab: FakeWorld, outcome: Outcome, *, mode: Mode) -> list[str]:
        """Return what is wrong at once after the fault, before anything is reconciled."""
        wrong = [f"harm: {violation}" for violation in lab.host.violations]
        name = outcome.hit[0].name if outcome.hit else ""
        if mode in DEATHS:
            return wrong if isinstance(outcome.error, ProcessDied) else [*wrong, f"ended with {outcome.error!r}"]
        if name != "hypervisor.release source-overlays":
            wrong += lab.host.harm()
        wrong += [f"{machine.name} is {machine.state}" for machine in lab.host.sources() if machine.state != "running"]
        if mode is Mode.CANCEL:
            if outcome.error is not None and not isinstance(outcome.error, CancelledError):
                wrong.append(f"ended with {outcome.error!r}")
        elif name.startswith(TOLD_ONLY):
            if outcome.error is not None:
                wrong.append(f"{name} stopped it: {outcome.error!r}")
        elif outcome.error is None and not name.endswith(TOLERATED) and not _warned(outcome):
            wrong.append("the fault was swallowed")
        elif outcome.error is not None and "injected" not in _all_words(outcome.error):
            wrong.append(f"the first error is hidden by {outcome.error!r}")
        if outcome.error is None or not (self.all_clean_up or _is_clean_up(outcome)):
            wrong += order(lab)
        if not name.endswith((".exit", ".close", "journals.begin", "journals.reopen", ".enter")):
            wrong += [f"still held: {what}" for what in (*outcome.held, *outcome.alive)]
        return wrong


def problems_of_faults(
    trial: Trial, *, folder: Path, names: Sequence[str], numbers: Iterable[int], mode: Mode
) -> list[str]:
    """Let each of these calls fail, in a world of its own, and reconcile; return what is wrong then. ``names``: all calls'."""
    problems = []
    for number in numbers:
        lab = trial.prepare(folder / f"{number}")
        outcome = invoke(lab, trial.work, Fault(call=number, mode=mode))
        if not outcome.hit:
            assert mode not in DEATHS  # a place inside a driver's operation
            continue
        wrong = [*trial.judge(lab, outcome, mode=mode), *recovers(lab)]
        problems += [f"{names[number]} {mode}: {text}" for text in wrong]
    return problems


def _is_clean_up(outcome: Outcome) -> bool:
    """Tell whether the fault hit the clean-up: a call of it by name, or the note of the last state."""
    hit = outcome.hit[0]
    home = [call.number for call in outcome.calls if call.name == "hypervisor.release source-overlays"]
    last_note = hit.name.endswith(".state") and bool(home) and home[0] < hit.number
    return last_note or hit.name.split(" ")[0].endswith(CLEAN_UP)


def _warned(outcome: Outcome) -> bool:
    return isinstance(outcome.result, BackupReport | ProvisionReport) and "injected" in " ".join(
        outcome.result.warnings
    )


def _all_words(error: BaseException) -> str:
    words = f"{error} {error!r}"
    if isinstance(error, CleanupError):
        words += str(error.details)
    return words


def recovers(lab: FakeWorld) -> list[str]:
    """Reconcile in a new process; return what is still not in order."""
    outcome = simply(lab, reconciling)
    if outcome.error is not None:
        return [f"reconcile failed: {outcome.error!r}"]
    assert isinstance(outcome.result, ReconcileReport)
    wrong = [] if outcome.result.complete else [f"reconcile is not complete: {outcome.result}"]
    wrong += [f"run {entry.run} goes on for ever by the history" for entry in lab.state.history.dead()]
    return wrong + [f"after reconcile: {text}" for text in order(lab)]
