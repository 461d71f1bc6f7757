from __future__ import annotations

from pathlib import Path

import pytest

from vmsnap.config.settings import ReplicaSettings
from vmsnap.errors import ConfigError
from vmsnap.offsite import objects_of
from vmsnap.state.clock import SystemClock
from vmsnap.stores.objects.directory import DirectoryObjects
from vmsnap.stores.objects.pacing import PacedObjects
from vmsnap.stores.objects.retrying import RetryingObjects


def settings(**keys: object) -> ReplicaSettings:
    return ReplicaSettings.model_validate(keys)


def test_a_directory_is_a_place(tmp_path: Path) -> None:
    store = objects_of(settings(kind="directory", path=tmp_path), clock=SystemClock())
    assert isinstance(store, DirectoryObjects)
    store.put("a", data=b"x")
    assert (tmp_path / "a").read_bytes() == b"x"


def test_limits_go_round_it(tmp_path: Path) -> None:
    paced = objects_of(settings(kind="directory", path=tmp_path, bandwidth_mib_s=1), clock=SystemClock())
    assert isinstance(paced, PacedObjects)
    assert isinstance(objects_of(settings(kind="s3", bucket="abc"), clock=SystemClock()), RetryingObjects)


def test_a_credential_that_others_may_read_is_refused_at_once(tmp_path: Path) -> None:
    credential = tmp_path / "credential"
    credential.write_text('access_key = "a"\nsecret_key = "b"\n')
    credential.chmod(0o644)
    with pytest.raises(ConfigError, match="others may read it"):
        objects_of(settings(kind="s3", bucket="abc", credential=str(credential)), clock=SystemClock())
