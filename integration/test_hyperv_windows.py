"""A backup of a Windows guest: Hyper-V's driver, PowerShell Direct, the engine for Windows, and the proof from NTFS in VHDX."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from integration.windows_guest import WindowsGuest, WindowsWorld, control_file, make_volumes
from tests.workflow.invocations import backup, simply
from vmsnap.errors import NotCleanError
from vmsnap.model.policy import DatabasePolicy, Policy

POLICY = Policy(guest="db", database=DatabasePolicy(engine="postgresql-windows"))


Volumes = tuple[Path, Path]


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Volumes:
    return make_volumes(tmp_path_factory.mktemp("volumes"))


def _guest(lab: WindowsWorld) -> WindowsGuest:
    inside = lab.machine.vm("db").truth.inside
    assert isinstance(inside, WindowsGuest)
    return inside


def test_a_windows_guest_is_drained_shut_down_and_proven(tmp_path: Path, volumes: Volumes) -> None:
    lab = WindowsWorld(tmp_path, volumes=volumes)
    outcome = simply(lab, backup(POLICY))
    assert outcome.error is None, (outcome.error, getattr(outcome.error, "details", ""))
    (snapshot,) = lab.real_store.snapshots("db")
    (image,) = lab.real_store.images(snapshot)
    stored = Path(image.path)
    assert hashlib.sha256(stored.read_bytes()).digest() == hashlib.sha256(lab.clean_volume.read_bytes()).digest()
    assert control_file(stored) is not None
    (state,) = snapshot.manifest.clean.file_systems
    assert state.kind == "ntfs"
    (drained,) = snapshot.manifest.drain
    assert (drained.in_flight_at_start, drained.finished, drained.rolled_back) == (3, 2, 1)
    assert {evidence.method for evidence in snapshot.manifest.clean.instances} == {"in-guest", "disk"}
    assert _guest(lab).asked == [], "nothing was run in production"
    assert _guest(lab).tokens == {}
    assert lab.machine.harm() == []
    assert lab.machine.leftovers() == []


@pytest.mark.parametrize("how", ["power is lost", "its disk says otherwise"])
def test_a_windows_guest_that_was_not_shut_down_is_stored_nowhere(tmp_path: Path, volumes: Volumes, how: str) -> None:
    lab = WindowsWorld(tmp_path, volumes=volumes)
    guest = _guest(lab)
    if how == "power is lost":
        guest.ends_in_order = False
    else:
        guest.clean = None
    outcome = simply(lab, backup(POLICY))
    assert isinstance(outcome.error, NotCleanError), (outcome.error, getattr(outcome.error, "details", ""))
    assert "journal in use" in str(outcome.error.details)
    assert "in production" in str(outcome.error.details)
    assert lab.real_store.snapshots() == ()
    assert lab.machine.harm() == []
    assert lab.machine.leftovers() == []
