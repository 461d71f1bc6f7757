"""Fixtures for tests with real hypervisors and guests, and the check that no test leaves anything behind.

The session runs inside the lab: `python -m integration.lab run -- python -m pytest integration`. What a test asks for and the
lab cannot give fails the test; nothing is skipped.
"""

from __future__ import annotations

import secrets
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import libvirt
import pytest

from integration.installation import Installation
from integration.lab.commands import LabError
from integration.lab.domain import GuestSpec
from integration.lab.guest import LabGuest
from integration.lab.lab import HOW_TO, Lab
from integration.lab.leaks import Belongings, left_behind, look
from integration.s3_server import S3Server

MakeGuest = Callable[[GuestSpec], LabGuest]


def _lab_if_any() -> Lab | None:
    try:
        return Lab.current()
    except LabError:
        return None


@pytest.fixture(scope="session")
def lab() -> Lab:
    """The lab this session runs in."""
    found = _lab_if_any()
    if found is None:
        pytest.fail(f"this test needs the lab; {HOW_TO}", pytrace=False)
    return found


@pytest.fixture(scope="session", autouse=True)
def _session_leaves_nothing() -> Iterator[None]:
    found = _lab_if_any()
    if found is None:
        yield
        return
    before = look(found)
    yield
    _compare(found, before, "the whole session, its shared guest included,")


@pytest.fixture(autouse=True)
def _test_leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    found = _lab_if_any()
    if found is None:
        yield
        return
    if "guest" in request.fixturenames:
        request.getfixturevalue("guest")  # first, so that bringing it back to life is not taken for the test's doing
    before = look(found)
    yield
    _compare(found, before, "the test")


def _compare(lab: Lab, before: Belongings, who: str) -> None:
    new, gone = left_behind(lab, before)
    if new or gone:
        lines = [*(f"  left behind  {thing}" for thing in new), *(f"  taken away   {thing}" for thing in gone)]
        pytest.fail("\n".join([f"{who} did not leave the lab as it was:", *lines]), pytrace=False)


class _SharedGuest:
    """One booted guest for the whole session, made anew when a test has broken it."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._guest: LabGuest | None = None

    def get(self) -> LabGuest:
        if self._guest is None or not _sound(self._guest):
            self.close()
            self._guest = LabGuest(self._lab, GuestSpec(name=f"pg-{secrets.token_hex(3)}"))
            self._guest.boot_new()
        return self._guest

    def close(self) -> None:
        if self._guest is not None:
            self._guest.remove()
            self._guest = None


def _sound(guest: LabGuest) -> bool:
    try:
        guest.agent("guest-ping")
        guest.psql("SELECT 1")
        live = guest.domain.XMLDesc()
    except (libvirt.libvirtError, LabError):
        return False
    return all(str(disk.source) in live for disk in guest.disks)


@pytest.fixture(scope="session")
def _shared_guest(lab: Lab) -> Iterator[_SharedGuest]:
    shared = _SharedGuest(lab)
    yield shared
    shared.close()


@pytest.fixture
def guest(_shared_guest: _SharedGuest) -> LabGuest:
    """A booted guest with PostgreSQL on one qcow2 disk, shared by all tests that do not ask for one of their own."""
    return _shared_guest.get()


@pytest.fixture
def make_guest(lab: Lab) -> Iterator[MakeGuest]:
    """Boots guests of the test's own making; they are removed after it."""
    with ExitStack() as stack:
        yield lambda spec: stack.enter_context(LabGuest(lab, spec))


@pytest.fixture
def define_guest(lab: Lab) -> Iterator[MakeGuest]:
    """Like `make_guest`, but the guest is not started."""
    with ExitStack() as stack:

        def define(spec: GuestSpec) -> LabGuest:
            made = LabGuest(lab, spec)
            stack.callback(made.remove)
            return made

        yield define


@pytest.fixture
def store_dir(lab: Lab) -> Iterator[Path]:
    """An empty folder on the lab's XFS with reflinks; emptied and removed after the test."""
    folder = lab.reflink / f"store-{secrets.token_hex(4)}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def vmsnap(lab: Lab, store_dir: Path) -> Iterator[Installation]:
    """An installation of vmsnap with an empty store on reflinks; all of it is removed after the test."""
    installation = Installation(lab, name=store_dir.name, store=store_dir)
    yield installation
    for folder in (installation.folder, installation.runtime):
        # A file system that a run left mounted stays, and the leak check names it.
        subprocess.run(["rm", "-rf", "--one-file-system", str(folder)], check=True)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server for all tests of the session. What a test puts there goes into a bucket of its own."""
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server
