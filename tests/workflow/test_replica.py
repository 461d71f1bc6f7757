"""Copies of snapshots at a replica: sent after backups and by command, brought back elsewhere, exported; with every fault."""

from __future__ import annotations

import subprocess
from datetime import timedelta
from pathlib import Path

import pytest

from tests.workflow.invocations import POLICY, Outcome, Trial, Work, backup, invoke, order, recovers, simply, succeed
from vmsnap.errors import (
    ConfigError,
    PreconditionError,
    SnapshotNotFoundError,
    StoreUnreachableError,
    VerificationError,
)
from vmsnap.model.due import ReplicateEntry
from vmsnap.model.history import Action, RunOutcome
from vmsnap.model.journal import RunKind
from vmsnap.model.policy import Policy
from vmsnap.model.report import (
    BackupReport,
    ExportOptions,
    ExportReport,
    ReplicateReport,
    RestoreOptions,
    RestoreReport,
)
from vmsnap.ports.clock import Cancel
from vmsnap.ports.objects import ObjectStore
from vmsnap.stores.packs.names import INTENTS, PACKS, SNAPSHOTS
from vmsnap.stores.packs.replica import PacksReplica
from vmsnap.testing.faults import DEATHS, Fault, Mode
from vmsnap.testing.memory_objects import FaultyObjects, MemoryBucket, MemoryObjects, ObjectFault
from vmsnap.testing.world import FakeWorld, QuietProgress
from vmsnap.workflow.backup import Backup
from vmsnap.workflow.export import export
from vmsnap.workflow.replicate import replicate, replicate_due, with_replica
from vmsnap.workflow.restore import restore
from vmsnap.workflow.world import World

REPLICATED = Policy.model_validate({"guest": "db", "replica": {"enabled": True}})
KEY = bytes(range(32))
WEEK = RestoreOptions(keep=timedelta(days=7), owner="ann")
MODES = (Mode.FAIL_BEFORE, Mode.FAIL_AFTER, Mode.DIE_BEFORE, Mode.DIE_AFTER, Mode.CANCEL)


def replicating(world: World, cancel: Cancel) -> ReplicateReport:
    return replicate(world, reference="db@latest", progress=QuietProgress(), cancel=cancel)


def restoring(world: World, cancel: Cancel) -> RestoreReport:
    return restore(world, reference="db@latest", options=WEEK, progress=QuietProgress(), cancel=cancel)


def exporting(options: ExportOptions) -> Work:
    def work(world: World, cancel: Cancel) -> ExportReport:
        return export(world, reference="db@latest", options=options, progress=QuietProgress(), cancel=cancel)

    return work


def backing_up(world: World, cancel: Cancel) -> BackupReport:
    report = Backup(world, policy=REPLICATED, progress=QuietProgress(), cancel=cancel).run()
    return with_replica(world, report=report, policy=REPLICATED, progress=QuietProgress(), cancel=cancel)


def sending_what_is_lacking(world: World, cancel: Cancel) -> list[object]:
    return list(replicate_due(world, policies=(REPLICATED,), progress=QuietProgress(), cancel=cancel))


def entries(outcome: Outcome) -> list[ReplicateEntry]:
    assert isinstance(outcome.result, list)
    return outcome.result


def connected(lab: FakeWorld, objects: ObjectStore, *, state: Path, key: bytes | None = None) -> FakeWorld:
    lab.replica = PacksReplica(lambda: objects, key=lambda: key, state=state, connections=2, clock=lab.clock)
    return lab


class Site:
    """A bucket, and hosts that use it."""

    def __init__(self, folder: Path, *, key: bytes | None = None) -> None:
        self.folder = folder
        self.bucket = MemoryBucket()
        self.key = key

    def host(self, name: str, objects: ObjectStore | None = None) -> FakeWorld:
        lab = FakeWorld(self.folder / name, disks=2)
        state = self.folder / name / "state"
        return connected(lab, objects or MemoryObjects(self.bucket), state=state, key=self.key)

    def names(self, prefix: str) -> list[str]:
        return [info.name for info in MemoryObjects(self.bucket).list(prefix)]


def elsewhere(lab: FakeWorld, work: Work) -> Outcome:
    """As ``succeed``, on a host whose own guest never wrote what is in the snapshot."""
    outcome = simply(lab, work)
    if outcome.error is not None:
        raise outcome.error
    assert [text for text in order(lab) if not _of_other_host(text)] == []
    return outcome


def stored(lab: FakeWorld) -> dict[str, bytes]:
    (snapshot,) = lab.store.snapshots("db")
    return {image.target: Path(image.path).read_bytes() for image in lab.store.images(snapshot)}


@pytest.mark.parametrize("key", [None, KEY], ids=["open", "keyed"])
def test_a_snapshot_comes_back_on_a_host_that_never_saw_it(tmp_path: Path, key: bytes | None) -> None:
    site = Site(tmp_path, key=key)
    here, there = site.host("here"), site.host("there")
    succeed(here, backup())
    succeed(here, replicating)
    done = elsewhere(there, restoring).result
    assert isinstance(done, RestoreReport)
    assert not done.there
    assert stored(there) == stored(here)
    (mine,), (other,) = there.store.snapshots(), here.store.snapshots()
    assert mine.manifest == other.manifest
    assert there.store.verify(there.store.find(done.snapshot), progress=lambda _a, _b: None, cancel=Never())[1] == ()
    again = elsewhere(there, restoring).result
    assert isinstance(again, RestoreReport)
    assert again.there


class Never:
    def is_set(self) -> bool:
        return False

    def check(self) -> None:
        """Never stop."""


def test_restoring_only_reads(tmp_path: Path) -> None:
    site = Site(tmp_path)
    here = site.host("here")
    succeed(here, backup())
    succeed(here, replicating)
    watched = FaultyObjects(MemoryObjects(site.bucket))
    elsewhere(site.host("there", watched), restoring)
    assert {call.method for call in watched.calls} <= {"get", "get_range", "info", "list"}


def test_both_are_in_the_history_and_the_audit_trail(tmp_path: Path) -> None:
    site = Site(tmp_path)
    here, there = site.host("here"), site.host("there")
    succeed(here, backup())
    sent = succeed(here, replicating).result
    assert isinstance(sent, ReplicateReport)
    assert sent.sent_bytes > 0
    elsewhere(there, restoring)
    for lab, kind, action in ((here, RunKind.REPLICATE, Action.REPLICATE), (there, RunKind.RESTORE, Action.RESTORE)):
        newest = lab.state.history.runs(guest=None, failures_only=False, limit=1)[0]
        assert (newest.kind, newest.outcome) == (kind, RunOutcome.DONE)
        assert newest.result is not None
        assert newest.result.snapshot == sent.snapshot
        trail = lab.state.history.trail(guest="db", limit=1)[0]
        assert (trail.action, trail.subject, trail.failure) == (action, sent.snapshot, None)


def test_a_backup_sends_its_snapshot_where_the_policy_says_so(tmp_path: Path) -> None:
    site = Site(tmp_path)
    here = site.host("here")
    done = succeed(here, backing_up).result
    assert isinstance(done, BackupReport)
    assert done.replica is not None
    assert done.replica.snapshot == done.snapshot
    assert len(site.names(SNAPSHOTS)) == 1
    succeed(here, backup(POLICY))
    assert len(site.names(SNAPSHOTS)) == 1


def test_a_replica_that_fails_leaves_the_backup_alone_and_is_tried_again(tmp_path: Path) -> None:
    site = Site(tmp_path)
    down = FaultyObjects(MemoryObjects(site.bucket), faults=dict.fromkeys(range(1000), ObjectFault.FAIL_BEFORE))
    here = site.host("here", down)
    done = succeed(here, backing_up).result
    assert isinstance(done, BackupReport)
    assert done.replica is None
    assert any(line.startswith("not sent to the replica: injected") for line in done.warnings)
    assert len(here.store.snapshots("db")) == 1
    (entry,) = entries(simply(here, sending_what_is_lacking))
    assert isinstance(entry.error, StoreUnreachableError)
    connected(here, MemoryObjects(site.bucket), state=tmp_path / "here" / "state")
    (entry,) = entries(succeed(here, sending_what_is_lacking))
    assert entry.report is not None
    assert entry.report.snapshot == done.snapshot
    assert succeed(here, sending_what_is_lacking).result == []


def test_what_is_damaged_here_is_not_sent(tmp_path: Path) -> None:
    site = Site(tmp_path)
    here = site.host("here")
    succeed(here, backup())
    here.store.damage(here.store.snapshots("db")[0], target="vda")
    assert isinstance(simply(here, replicating).error, VerificationError)
    assert site.names(SNAPSHOTS) == []


def test_without_a_replica_the_remedy_names_the_setting(tmp_path: Path) -> None:
    lab = FakeWorld(tmp_path)
    succeed(lab, backup())
    for work in (replicating, restoring):
        error = simply(lab, work).error
        assert isinstance(error, ConfigError)
        assert "[replica]" in str(error.remedy)


@pytest.mark.parametrize("mode", MODES)
def test_any_fault_while_sending(tmp_path: Path, mode: Mode) -> None:
    def prepare(folder: Path) -> FakeWorld:
        lab = Site(folder).host("here")
        succeed(lab, backup())
        return lab

    def afterwards(lab: FakeWorld, _: Outcome) -> list[str]:
        wrong = recovers(lab)
        again = simply(lab, replicating)
        (snapshot,) = lab.store.snapshots("db")
        held = [f"held by {run}" for run in lab.store.holders(snapshot)]
        return wrong + held + ([] if again.error is None else [f"the next one failed: {again.error!r}"])

    trial = Trial(prepare=prepare, work=replicating)
    trial.every(tmp_path, mode, after=afterwards)
    assert trial.count > 10


@pytest.mark.parametrize("mode", MODES)
def test_any_fault_while_restoring(tmp_path: Path, mode: Mode) -> None:
    site = Site(tmp_path / "site")
    here = site.host("here")
    succeed(here, backup())
    succeed(here, replicating)

    def prepare(folder: Path) -> FakeWorld:
        lab = FakeWorld(folder, disks=2)
        lab.host.machines["db"].guest = here.host.machines["db"].guest
        return connected(lab, MemoryObjects(site.bucket), state=folder / "state")

    def afterwards(lab: FakeWorld, outcome: Outcome) -> list[str]:
        wrong = _recovers_elsewhere(lab)
        wrong += [f"{one.id} is here and not held" for one in lab.store.snapshots("db") if one.marks.pin is None]
        if outcome.error is None and mode not in DEATHS and len(lab.store.snapshots("db")) != 1:
            wrong.append("done, and yet there is no snapshot")
        again = simply(lab, restoring)
        if again.error is not None:
            return [*wrong, f"the next one failed: {again.error!r}"]
        return wrong if stored(lab) == stored(here) else [*wrong, "the disks are others"]

    trial = Elsewhere(prepare=prepare, work=restoring)
    trial.every(tmp_path, mode, after=afterwards)
    assert trial.count > 10


class Elsewhere(Trial):
    """A trial on a host whose own guest never wrote what is in the snapshot."""

    def judge(self, lab: FakeWorld, outcome: Outcome, *, mode: Mode) -> list[str]:
        return [text for text in super().judge(lab, outcome, mode=mode) if not _of_other_host(text)]


def _of_other_host(text: str) -> bool:
    return "lacks" in text or "different instants" in text


def _recovers_elsewhere(lab: FakeWorld) -> list[str]:
    return [text for text in recovers(lab) if not _of_other_host(text)]


def test_disks_are_exported_as_files(tmp_path: Path) -> None:
    site = Site(tmp_path)
    here, there = site.host("here"), site.host("there")
    succeed(here, backup())
    succeed(here, replicating)
    for lab, source, only in ((here, "local", False), (here, "replica", True), (there, "replica", False)):
        for image_format in ("raw", "qcow2"):
            folder = tmp_path / f"{source}-{only}-{image_format}"
            options = ExportOptions(folder=folder, image_format=image_format, replica_only=only)
            done = elsewhere(lab, exporting(options)).result
            assert isinstance(done, ExportReport)
            assert done.source == source
            for target, data in stored(here).items():
                path = folder / f"{target}.{image_format}"
                assert str(path) in done.files
                assert path.stat().st_mode & 0o777 == 0o600
                assert _raw(path, image_format=image_format) == data
            assert sorted(path.name for path in folder.iterdir()) == sorted(Path(one).name for one in done.files)


def _raw(path: Path, *, image_format: str) -> bytes:
    if image_format == "raw":
        return path.read_bytes()
    raw = path.with_suffix(".check")
    subprocess.run(["qemu-img", "convert", "-O", "raw", path, raw], check=True, timeout=60)
    try:
        return raw.read_bytes()
    finally:
        raw.unlink()


def test_an_export_touches_no_file_that_is_there(tmp_path: Path) -> None:
    here = Site(tmp_path).host("here")
    succeed(here, backup())
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "vdb.raw").write_bytes(b"precious")
    outcome = simply(here, exporting(ExportOptions(folder=folder)))
    assert isinstance(outcome.error, PreconditionError)
    assert [path.name for path in folder.iterdir()] == ["vdb.raw"]
    assert (folder / "vdb.raw").read_bytes() == b"precious"
    missing = simply(Site(tmp_path / "other").host("other"), exporting(ExportOptions(folder=folder)))
    assert isinstance(missing.error, SnapshotNotFoundError | PreconditionError)


@pytest.mark.parametrize("mode", [Mode.DIE_AFTER, Mode.FAIL_AFTER])
def test_an_export_that_is_cut_leaves_whole_files_or_none(tmp_path: Path, mode: Mode) -> None:
    def prepare(folder: Path) -> FakeWorld:
        lab = Site(folder).host("here")
        succeed(lab, backup())
        return lab

    count = len(invoke(prepare(tmp_path / "good"), exporting(ExportOptions(folder=tmp_path / "good-out"))).calls)
    for number in range(count):
        lab = prepare(tmp_path / f"{number}")
        folder = tmp_path / f"{number}-out"
        invoke(lab, exporting(ExportOptions(folder=folder)), Fault(call=number, mode=mode))
        assert recovers(lab) == []
        for path in folder.iterdir() if folder.exists() else ():
            assert path.read_bytes() == stored(lab)[path.stem], path


def test_a_kill_in_the_middle_of_sending_repeats_no_pack(tmp_path: Path) -> None:
    site = Site(tmp_path)
    here = site.host("here")
    succeed(here, backup())
    state = tmp_path / "here" / "state"

    def after_the_first_pack(_: object) -> None:
        if site.names(PACKS):
            raise StoreUnreachableError("the line is gone", remedy="mend it")

    connected(here, FaultyObjects(MemoryObjects(site.bucket), on_call=after_the_first_pack), state=state)
    assert isinstance(simply(here, replicating).error, StoreUnreachableError)
    packs = site.names(PACKS)
    assert len(packs) == 1
    assert len(site.names(INTENTS)) == 1
    connected(here, MemoryObjects(site.bucket), state=state)
    succeed(here, replicating)
    assert site.names(PACKS) == packs
    assert site.names(INTENTS) == []
