"""The application over fakes and real policy files: what holds for all guests at once."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from tests.workflow.invocations import backup, succeed
from vmsnap.bootstrap import Application
from vmsnap.config.policies import PolicyBook
from vmsnap.config.settings import Settings, StoreSettings
from vmsnap.errors import BusyError, ConfigError, ExitCode
from vmsnap.model.due import Limits
from vmsnap.model.history import Action
from vmsnap.model.policy import Policy
from vmsnap.model.retention_policy import RetentionPolicy
from vmsnap.oversight import Oversight
from vmsnap.testing.world import FakeWorld


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


def test_a_pin_and_its_end_are_audited(lab: FakeWorld, application: Application) -> None:
    newest = lab.store.find("fine@latest")
    application.pin("fine@latest", pin=None)
    entry = lab.state.history.trail()[0]
    assert (entry.action, entry.guest, entry.subject) == (Action.UNPIN, "fine", newest.id)
    with lab.store.lock("fine", timeout=timedelta(0)), pytest.raises(BusyError) as caught:
        application.pin("fine@latest", pin=None)
    assert lab.state.history.trail()[0].failure == caught.value.brief
