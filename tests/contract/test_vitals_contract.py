"""Signs of life are found in what real journals and locks leave under a ``/proc``, and the fake tells the same."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from vmsnap.model.ids import RunId
from vmsnap.model.journal import RunKind
from vmsnap.ports.vitals import Vitals
from vmsnap.state.journal import FileJournals
from vmsnap.state.locks import FileLocks
from vmsnap.state.vitals import ProcessVitals
from vmsnap.testing.fake_vitals import FakeVitals
from vmsnap.testing.standing_clock import StandingClock
from vmsnap.testing.vitals_contract import GUEST, OTHER, RUN, VitalsContract, VitalsHarness

AT = datetime(2026, 11, 21, 2, 0, tzinfo=UTC)
NOBODY = 0
PID = "4711"


class FakeHarness:
    def __init__(self) -> None:
        self.vitals = FakeVitals()
        self.working = self.working_in_lost = self.vitals.working
        self.knowing = self.vitals.knowing


class ProcHarness:
    """Real journals and locks, and a ``/proc`` that shows the present process as another one, and no other."""

    def __init__(self, folder: Path) -> None:
        self._state = folder / "other state"
        proc = folder / "proc"
        (proc / "self").mkdir(parents=True)
        (proc / PID).symlink_to(f"/proc/{os.getpid()}")
        self.vitals: Vitals = ProcessVitals(proc=proc)

    @contextmanager
    def working(self, run: RunId, *, guest: str) -> Iterator[None]:
        locks = FileLocks(self._state, clock=StandingClock(AT))
        with locks.guest(guest, purpose="backup"):
            journal = FileJournals(self._state).begin(run, kind=RunKind.BACKUP, guest=guest, at=AT)
            yield
            journal.finish()
            journal.close()

    @contextmanager
    def working_in_lost(self, run: RunId, *, guest: str) -> Iterator[None]:
        with self.working(run, guest=guest):
            shutil.rmtree(self._state)
            yield

    @contextmanager
    def knowing(self, run: RunId) -> Iterator[None]:
        FileJournals(self._state).begin(run, kind=RunKind.BACKUP, guest="mail", at=AT).close()
        with self.working(RunId("00000000c3"), guest="mail"):
            yield


class TestFakeVitals(VitalsContract):
    @pytest.fixture
    def harness(self) -> VitalsHarness:
        return FakeHarness()


class TestProcessVitals(VitalsContract):
    @pytest.fixture
    def harness(self, tmp_path: Path) -> VitalsHarness:
        return ProcHarness(tmp_path)


def test_a_sign_names_the_process_and_the_file(tmp_path: Path) -> None:
    harness = ProcHarness(tmp_path)
    with harness.working(RUN, guest=GUEST):
        lock = tmp_path / "other state" / "locks" / "guest-db%2F1.lock"
        (sign,) = (sign for sign in harness.vitals.signs(RUN, guest=GUEST) if "lock" in sign)
        assert sign.startswith(f"process {PID} (")
        assert sign.endswith(f") has the lock of guest {GUEST!r} open: {lock}")


def test_a_journal_that_was_taken_over_is_found_by_its_name(tmp_path: Path) -> None:
    harness = ProcHarness(tmp_path)
    journals = FileJournals(tmp_path / "third state")
    journals.begin(RUN, kind=RunKind.BACKUP, guest=GUEST, at=AT).close()
    journal = journals.reopen(RUN)
    (sign,) = harness.vitals.signs(RUN, guest="")
    assert sign.endswith(f"has the journal of run {RUN} open: {tmp_path}/third state/runs/{RUN}.jsonl")
    journal.close()
    assert harness.vitals.signs(RUN, guest="") == ()


def test_the_present_process_is_no_other(tmp_path: Path) -> None:
    journal = FileJournals(tmp_path).begin(RUN, kind=RunKind.BACKUP, guest=GUEST, at=AT)
    what = f"the journal of run {RUN} open: {tmp_path}"
    assert not any(what in sign for sign in ProcessVitals().signs(RUN, guest=GUEST))
    (found,) = (sign for sign in ProcessVitals(own=NOBODY).signs(RUN, guest=GUEST) if what in sign)
    assert f"process {os.getpid()} " in found
    journal.close()


def test_what_cannot_be_looked_into_is_a_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = ProcHarness(tmp_path)
    real = Path.iterdir

    def denied(path: Path) -> Iterator[Path]:
        if path.name == "fd":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(Path, "iterdir", denied)
    (sign,) = harness.vitals.signs(OTHER, guest=GUEST)
    assert "cannot be looked into" in sign


def test_a_process_that_ends_meanwhile_is_no_sign(tmp_path: Path) -> None:
    harness = ProcHarness(tmp_path)
    gone = tmp_path / "proc" / "4712"
    gone.mkdir()
    assert harness.vitals.signs(RUN, guest=GUEST) == ()
    (tmp_path / "proc" / PID).unlink()
    with harness.working(RUN, guest=GUEST):
        assert harness.vitals.signs(RUN, guest=GUEST) == ()
