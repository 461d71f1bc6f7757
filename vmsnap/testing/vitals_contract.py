# ruff: noqa: S101 - a test suite, shipped for authors of drivers
"""What whoever looks for signs of life must do. Subclass ``VitalsContract`` and override ``harness`` as a fixture."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import pytest

from vmsnap.model.ids import RunId
from vmsnap.ports.vitals import Vitals

RUN, OTHER = RunId("00000000a1"), RunId("00000000b2")
GUEST = "db/1"


class VitalsHarness(Protocol):
    """What the suite needs beside the port."""

    @property
    def vitals(self) -> Vitals:
        """Return what is tested."""

    def working(self, run: RunId, *, guest: str) -> AbstractContextManager[None]:
        """Let a process with another state directory work on a run of a guest meanwhile, as a backup does."""

    def working_in_lost(self, run: RunId, *, guest: str) -> AbstractContextManager[None]:
        """The same in a state directory that was removed after the run had begun."""

    def knowing(self, run: RunId) -> AbstractContextManager[None]:
        """Let a process work on another run of another guest, whose state directory has this run, dead, too."""


class VitalsContract:
    """The duties of ``vmsnap.ports.vitals.Vitals``."""

    @pytest.fixture
    def harness(self) -> VitalsHarness:
        """Return the harness of what is tested."""
        raise NotImplementedError

    def test_where_nobody_works_there_is_no_sign(self, harness: VitalsHarness) -> None:
        """Whether or not the guest is known."""
        assert harness.vitals.signs(RUN, guest=GUEST) == ()
        assert harness.vitals.signs(RUN, guest="") == ()

    def test_a_run_of_another_state_directory_is_seen_while_it_lives(self, harness: VitalsHarness) -> None:
        """By its id alone; and no longer than it lives."""
        with harness.working(RUN, guest=GUEST):
            assert any(RUN in sign for sign in harness.vitals.signs(RUN, guest=""))
            assert harness.vitals.signs(RUN, guest=GUEST)
        assert harness.vitals.signs(RUN, guest=GUEST) == ()

    def test_a_run_outlives_its_state_directory(self, harness: VitalsHarness) -> None:
        """Removing files ends no process."""
        with harness.working_in_lost(RUN, guest=GUEST):
            assert any(RUN in sign for sign in harness.vitals.signs(RUN, guest=""))
            assert harness.vitals.signs(OTHER, guest=GUEST)

    def test_another_run_of_the_guest_is_seen(self, harness: VitalsHarness) -> None:
        """It would be disturbed. Another guest's run is no sign."""
        with harness.working(OTHER, guest=GUEST):
            assert any(GUEST in sign for sign in harness.vitals.signs(RUN, guest=GUEST))
            assert harness.vitals.signs(RUN, guest="mail") == ()
            assert harness.vitals.signs(RUN, guest="") == ()

    def test_a_dead_run_that_another_vmsnap_knows_is_its(self, harness: VitalsHarness) -> None:
        """It will undo it itself."""
        with harness.knowing(RUN):
            assert any(RUN in sign for sign in harness.vitals.signs(RUN, guest=GUEST))
            assert harness.vitals.signs(OTHER, guest=GUEST) == ()
