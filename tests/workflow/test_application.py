"""The application over fakes and real policy files: what holds for all guests at once."""

from __future__ import annotations

import functools
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.workflow.invocations import backup, succeed
from vmsnap.bootstrap import Application
from vmsnap.config.policies import PolicyBook
from vmsnap.config.settings import Settings, StoreSettings
from vmsnap.errors import BusyError, ConfigError, ExitCode
from vmsnap.model.collection import CollectReport
from vmsnap.model.due import Limits
from vmsnap.model.guest import Severity
from vmsnap.model.history import Action
from vmsnap.model.policy import Policy
from vmsnap.model.retention_policy import RetentionPolicy
from vmsnap.oversight import Oversight
from vmsnap.ports.upkeep import CollectWishes
from vmsnap.stores.packs.manifests import Body, encode_snapshot
from vmsnap.stores.packs.names import snapshot_name
from vmsnap.stores.packs.repository import initialise, open_repository
from vmsnap.stores.packs.upkeep import PackedUpkeep
from vmsnap.testing.cancels import NeverCancelled
from vmsnap.testing.memory_objects import MemoryBucket, MemoryObjects
from vmsnap.testing.world import FakeWorld, QuietProgress
from vmsnap.workflow.world import World


@pytest.fixture
def lab(tmp_path: Path) -> FakeWorld:
    lab = FakeWorld(tmp_path)
    for name in ("busy", "fine"):
        lab.add_guest(name)
        for _ in range(3):
            succeed(lab, backup(Policy(guest=name, retention=RetentionPolicy(keep_last=9))))
    return lab


@pytest.fixture
def application(lab: FakeWorld, tmp_path: Path) -> Application:
    folder = tmp_path / "policies"
    folder.mkdir()
    for name in ("busy", "fine"):
        (folder / f"{name}.toml").write_text("[retention]\nkeep_last = 1\n")
    (folder / "broken.toml").write_text("[retention]\nkeep_lost = 1\n")
    policies = PolicyBook(folder)
    settings = Settings(store=StoreSettings(path=tmp_path / "store"))
    oversight = Oversight(settings, policies=policies, world=lab.process())
    return Application(lab.process, policies=policies, limits=Limits(), oversight=oversight)


def test_pruning_all_passes_over_who_is_busy_and_whose_file_is_wrong(lab: FakeWorld, application: Application) -> None:
    with lab.store.lock("busy", timeout=timedelta(0)):
        report = application.prune(None, dry_run=False)
    assert len(lab.store.snapshots("busy")) == 3
    assert len(lab.store.snapshots("fine")) == 1
    assert {failure.guest: type(failure.error) for failure in report.failures} == {
        "broken": ConfigError,
        "busy": BusyError,
    }
    assert report.exit_code is ExitCode.CONFIGURATION
    with pytest.raises(ConfigError):
        application.prune("broken", dry_run=True)


def test_a_simulation_of_all_passes_over_whose_file_is_wrong(application: Application) -> None:
    report = application.forecast(None, span=timedelta(days=2), every=timedelta(days=1))
    assert [one.guest for one in report.forecasts] == ["busy", "fine"]
    assert [failure.guest for failure in report.failures] == ["broken"]
    assert report.exit_code is ExitCode.CONFIGURATION
    with pytest.raises(ConfigError):
        application.forecast("broken", span=timedelta(days=2), every=None)


def test_garbage_is_collected_whosever_file_is_wrong_and_locks_that_could_not_be_renewed_are_told(
    lab: FakeWorld, tmp_path: Path, application: Application
) -> None:
    folder = tmp_path / "policies"
    (folder / "fine.toml").write_text("[replica]\nenabled = true\n")
    bucket = MemoryBucket(locks=True, now=lab.clock.now)
    initialise(MemoryObjects(bucket), key=None, now=lab.clock.now())
    (snapshot, *_) = lab.store.snapshots("fine")
    seal = open_repository(MemoryObjects(bucket), key=None)
    body = Body(manifest=snapshot.manifest, disks=())
    data = encode_snapshot(body, repository=seal.id, upload="0" * 32, at=lab.clock.now(), seal=seal.seal)
    MemoryObjects(bucket).put(snapshot_name("fine", snapshot=snapshot.id), data=data)
    MemoryObjects(bucket).put(f"packs/ab/{'ab' * 32}", data=b"left by somebody")

    def collect(*, locks: bool, **wishes: Any) -> CollectReport:
        def opened() -> World:
            opens = functools.partial(open_repository, MemoryObjects(bucket), key=None)
            return replace(lab.process(), upkeep=PackedUpkeep(opens, clock=lab.clock, locks=locks))

        policies = PolicyBook(folder)
        settings = Settings(store=StoreSettings(path=tmp_path / "store"))
        oversight = Oversight(settings, policies=policies, world=lab.process())
        mine = Application(opened, policies=policies, limits=Limits(), oversight=oversight)
        return mine.collect(CollectWishes(**wishes), progress=QuietProgress(), cancel=NeverCancelled())

    assert collect(locks=True, dry_run=True).unlocked == ()
    locked = collect(locks=True)
    assert (locked.renewed, locked.found.objects) == (1, 1)
    (wrong,) = locked.unlocked
    assert "broken.toml" in wrong
    lab.clock.sleep(timedelta(days=2))
    plain = collect(locks=False)
    assert (plain.unlocked, plain.removed.objects) == ((), 1)


def test_a_pin_and_its_end_are_audited(lab: FakeWorld, application: Application) -> None:
    newest = lab.store.find("fine@latest")
    application.pin("fine@latest", pin=None)
    entry = lab.state.history.trail()[0]
    assert (entry.action, entry.guest, entry.subject) == (Action.UNPIN, "fine", newest.id)
    with lab.store.lock("fine", timeout=timedelta(0)), pytest.raises(BusyError) as caught:
        application.pin("fine@latest", pin=None)
    assert lab.state.history.trail()[0].failure == caught.value.brief


def test_doctor_says_whether_the_schedules_find_their_time(application: Application) -> None:
    (found,) = (finding for finding in application.doctor(None) if finding.check == "schedule")
    assert found.severity is Severity.OK
    assert "backups need" in found.message
